"""Training speed: samples a second, what the matrix shapes alone would take, and the reference job.

    python scripts/bench_train.py

Three measurements on untrained networks and random data, each the best of three runs after one for warming up:

- a training step of the `tiny` preset, and the share of it that its matrix products take when they run alone (every
  linear layer and both products of every attention, forward and backward);
- the reference job: batch 1, 8 frames of 4x32x32 latents, patch 2, width 384, 12 attention layers, 6 heads, float32. The
  plain pass over the 8 frames is what other implementations time; the doubled pass is what this one trains with;
- streaming at those sizes: 4 context frames, then 8 new ones at 4 solver steps.

Training steps are timed once more with the network compiled, as trainings of 2,000 steps and more run (--no-compile leaves
it out), and the compiled network's loss and gradients are held against the plain one's.
"""

import argparse
import json
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from worldline.data import RobustNormalizer
from worldline.trainers.loop import LoopConfig
from worldline.trainers.speed import build_optimizers, compile_network
from worldline.trainers.world_model import PRESETS
from worldline.types import ActionSpec, CameraSpec, Clip, LatentSpec, WorldSpec
from worldline.worldmodels import AutoregressiveConfig, AutoregressiveWorldModel, TransformerConfig
from worldline.worldmodels.ports import FrameBatch
from worldline.worldmodels.transformer import banded_causal_mask

SHARE_GOAL = 0.6
PUBLISHED = {"forward_ms": 750.0, "step_ms": 2262.0, "streaming": 0.85}  # the leanest published implementation
ADAMW = LoopConfig(lr=1e-4)  # what others time; the preset is timed with its own optimisers
GOAL = 0.7  # of the published times


def build(latent: tuple[int, int, int], cameras: int, network: TransformerConfig) -> AutoregressiveWorldModel:
    """An untrained world model with random weights everywhere: zero-initialised outputs would have zero gradients."""
    torch.manual_seed(0)
    names, c = [f"camera{i}" for i in range(cameras)], latent[0]
    spec = WorldSpec(
        cameras=tuple(CameraSpec(name=name, height=8 * latent[1], width=8 * latent[2]) for name in names),
        fps=10.0,
        control_steps=4,
        action=ActionSpec(
            names=("dx", "dy", "dz", "grip"), low=(-1.0,) * 4, high=(1.0,) * 4, kind="delta", space="cartesian",
            rate_hz=40.0, source="commanded", embodiment="benchmark",
        ),
        pose_names=("x", "y", "z", "grip"),
        latent=LatentSpec(
            fingerprint="benchmark",
            shapes=dict.fromkeys(names, latent),
            mean=dict.fromkeys(names, (0.0,) * c),
            std=dict.fromkeys(names, (1.0,) * c),
        ),
    )  # fmt: skip
    unit = RobustNormalizer(low=(-1.0,) * 4, high=(1.0,) * 4)
    config = AutoregressiveConfig(network=network, solver_steps=4)
    model = AutoregressiveWorldModel(config, spec, action_normalizer=unit, pose_normalizer=unit)
    for parameter in model.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.02)
    return model.to("cuda" if torch.cuda.is_available() else "cpu")


def random_clip(model: AutoregressiveWorldModel, batch: int, frames: int) -> Clip:
    shapes = model.latent_spec.shapes
    return Clip(
        frames={camera: torch.randn(batch, frames, *shape) for camera, shape in shapes.items()},
        actions=torch.rand(batch, frames - 1, 4, 4),
        poses=torch.rand(batch, frames, 4),
    )


def best_of(run: Callable[[], Any], repeats: int) -> float:
    """Seconds of the fastest of `repeats` runs, after one that does not count."""
    seconds = []
    for _ in range(repeats + 1):
        synchronise()
        start = time.perf_counter()
        run()
        synchronise()
        seconds.append(time.perf_counter() - start)
    return min(seconds[1:])


def synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def stepper(model: AutoregressiveWorldModel, loss: Callable[[], Tensor], config: LoopConfig) -> Callable[[], None]:
    """Forward, backward, clipping and the optimisers of `config`."""
    optimizers = build_optimizers(model, config)

    def step() -> None:
        model.zero_grad()
        loss().backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()

    return step


def gflop(run: Callable[[], Any]) -> float:
    """Billions of floating-point operations of the matrix products in `run`."""
    counter = FlopCounterMode(display=False)
    with counter, sdpa_kernel(SDPBackend.MATH):  # the fused CPU kernel is not counted
        run()
    return counter.get_total_flops() / 1e9


def matrix_products(model: AutoregressiveWorldModel, run: Callable[[], Any]) -> Counter:
    """Shapes (batch, rows, inner, columns) of the products in one forward pass `run`, with how often each occurs."""
    shapes: Counter = Counter()
    whole = F.scaled_dot_product_attention

    def linear(module: nn.Linear, inputs: tuple[Tensor, ...], _: Tensor) -> None:
        shapes[1, inputs[0].numel() // module.in_features, module.in_features, module.out_features] += 1

    def attention(q: Tensor, k: Tensor, v: Tensor, *options: Any) -> Tensor:
        batch, (queries, d), keys = q.shape[:-2].numel(), q.shape[-2:], k.shape[-2]
        shapes[batch, queries, d, keys] += 1
        shapes[batch, queries, keys, d] += 1
        return whole(q, k, v, *options)

    hooks = [m.register_forward_hook(linear) for m in model.modules() if isinstance(m, nn.Linear)]
    with mock.patch.object(F, "scaled_dot_product_attention", attention):
        run()
    for hook in hooks:
        hook.remove()
    return shapes


def alone(shape: tuple[int, int, int, int], device: torch.device, repeats: int) -> float:
    """Seconds of one product and of the two products of its backward pass, on random data."""
    batch, rows, inner, columns = shape
    x = torch.randn(batch, rows, inner, device=device)
    w = torch.randn(batch, inner, columns, device=device)
    y = torch.randn(batch, rows, columns, device=device)
    if batch == 1:
        x, w, y = x[0], w[0], y[0]
    return best_of(lambda: (x @ w, y @ w.transpose(-1, -2), x.transpose(-1, -2) @ y), repeats)


def compiled(
    model: AutoregressiveWorldModel, loss: Callable[[], Tensor], config: LoopConfig, repeats: int
) -> dict[str, float]:
    """Compile the network in place; step time afterwards, and how far loss and gradients moved (relative)."""

    def measure() -> tuple[Tensor, Tensor]:
        model.zero_grad()
        value = loss()
        value.backward()
        return value.detach(), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    plain_loss, plain = measure()
    start = time.perf_counter()
    compile_network(model)
    new_loss, new = measure()
    seconds = time.perf_counter() - start
    return {
        "compile_s": seconds,
        "compiled_loss_difference": float((new_loss - plain_loss).abs() / plain_loss.abs()),
        "compiled_gradient_difference": float((new - plain).norm() / plain.norm()),
        "compiled_step_ms": 1e3 * best_of(stepper(model, loss, config), repeats),
    }


def measure_preset(repeats: int, compile: bool) -> dict[str, float]:
    config = PRESETS["tiny"][1]
    batch, frames, cameras = config["loop"].batch_size, 10, 2
    model = build((8, 8, 8), cameras, config["model"].network)
    clip, generator = random_clip(model, batch, frames), torch.Generator().manual_seed(0)

    def loss() -> Tensor:
        return model.loss(clip, generator)[0]

    print(f"tiny preset: batch {batch}, {frames} frames, {cameras} cameras ...", flush=True)
    shapes = matrix_products(model, loss)
    seconds = best_of(stepper(model, loss, config["loop"]), repeats)
    print(f"  {len(shapes)} shapes of matrix products alone ...", flush=True)
    products = sum(count * alone(shape, model.device, repeats) for shape, count in shapes.items())
    work = sum(6e-9 * b * r * i * c * count for (b, r, i, c), count in shapes.items())
    more: dict[str, float] = {}
    if compile:
        print("  compiled ...", flush=True)
        more = compiled(model, lambda: model.loss(clip, generator.manual_seed(0))[0], config["loop"], repeats)
        more["compiled_share_of_products_rate"] = 1e3 * products / more["compiled_step_ms"]
    return more | {
        "step_ms": 1e3 * seconds,
        "samples_per_second": batch / seconds,
        "gflop": work,
        "gflops": work / seconds,
        "products_alone_ms": 1e3 * products,
        "share_of_products_rate": products / seconds,
    }


def measure_reference(repeats: int, compile: bool) -> dict[str, float]:
    # depth counts pairs: 12 attentions; the job knows of no guesses
    network = TransformerConfig(width=384, depth=6, heads=6, window=8, patch=2, guess_width=0)
    model = build((4, 32, 32), 1, network)
    device, clip = model.device, random_clip(model, 1, 8)
    z, pose = clip.frames["camera0"].to(device), clip.poses.to(device)
    frames = FrameBatch(
        latents={"camera0": z},
        previous={"camera0": z.roll(1, 1)},
        pose=pose,
        previous_pose=pose.roll(1, 1),
        motion=torch.rand(1, 8, 2 * pose.shape[2] + 16, device=device),
        level=torch.rand(1, 8, device=device),
        action=torch.rand(1, 8, 16, device=device),
        has_action=torch.ones(1, 8, dtype=torch.bool, device=device),
        time=torch.arange(8, device=device),
    )
    mask = banded_causal_mask(8, 8, device)

    def forward() -> Tensor:
        made = model.network(model.body, frames, mask)
        return (made.latents["camera0"] - z).square().mean() + (made.pose - pose).square().mean()

    def stream() -> None:
        first = Clip(frames={"camera0": z[:, :4]}, actions=clip.actions[:, :3], poses=clip.poses[:, :4])
        state = model.observe(first)
        model.imagine(state, torch.rand(1, 8, 4, 4), seeds=torch.zeros(1, dtype=torch.long))

    out = {"weights": float(sum(p.numel() for p in model.parameters()))}
    print("reference job: forward ...", flush=True)
    with torch.no_grad():
        out["forward_gflop"] = gflop(forward)
        out["forward_ms"] = 1e3 * best_of(forward, repeats)
    print("reference job: training step ...", flush=True)
    out["step_gflop"] = gflop(lambda: forward().backward())
    out["step_ms"] = 1e3 * best_of(stepper(model, forward, ADAMW), repeats)
    print("reference job: training step of the doubled pass ...", flush=True)
    out["doubled_step_ms"] = 1e3 * best_of(stepper(model, lambda: model.loss(clip)[0], ADAMW), repeats)
    print("reference job: streaming ...", flush=True)
    out["streaming_frames_per_second"] = 8 / best_of(stream, repeats)
    if compile:
        print("reference job: compiled ...", flush=True)
        out |= compiled(model, forward, ADAMW, repeats)
        with torch.no_grad():
            out["compiled_forward_ms"] = 1e3 * best_of(forward, repeats)
    return out


def report(preset: dict[str, float], job: dict[str, float], matmul: float) -> str:
    lines = [
        "tiny preset, training step",
        f"  {preset['step_ms']:8.0f} ms a step, {preset['samples_per_second']:.2f} clips/s, {preset['gflops']:.0f} GFLOP/s",
        f"  {preset['products_alone_ms']:8.0f} ms its matrix products alone: "
        f"{100 * preset['share_of_products_rate']:.0f}% of the rate they reach (goal {100 * SHARE_GOAL:.0f}%)",
        f"reference job ({job['weights'] / 1e6:.1f}M weights)",
    ]
    if "compiled_step_ms" in preset:
        lines.insert(
            3,
            f"  {preset['compiled_step_ms']:8.0f} ms compiled ({preset['compile_s']:.0f} s to compile): "
            f"{100 * preset['compiled_share_of_products_rate']:.0f}% of that rate; loss and gradients move by "
            f"{preset['compiled_loss_difference']:.0e} and {preset['compiled_gradient_difference']:.0e}",
        )
    for name, title in (
        ("forward", "forward"),
        ("step", "training step"),
        ("compiled_forward", "forward, compiled"),
        ("compiled_step", "training step, compiled"),
    ):
        if f"{name}_ms" not in job:
            continue
        name_plain = name.removeprefix("compiled_")
        ms, work = job[f"{name}_ms"], job[f"{name_plain}_gflop"]
        goal = GOAL * PUBLISHED[f"{name_plain}_ms"]
        lines.append(f"  {ms:8.0f} ms {title}, {work:.0f} GFLOP, {1e3 * work / ms:.0f} GFLOP/s (goal {goal:.0f} ms)")
    lines += [
        f"  {job['doubled_step_ms']:8.0f} ms training step of the doubled pass (7 clean and 7 noisy frames)",
        f"  {job['streaming_frames_per_second']:8.2f} frames/s streaming: 4 + 8 frames, 4 solver steps "
        f"(published best {PUBLISHED['streaming']})",
        f"float32 matmul of 2048^3 in the same run: {matmul:.0f} GFLOP/s",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3, help="runs of which the best counts")
    parser.add_argument("--threads", type=int, help="CPU threads (on a busy machine fewer are faster)")
    parser.add_argument(
        "--no-compile", action="store_true", help="leave out the compiled network (a C++ compiler is needed)"
    )
    parser.add_argument("--json", type=Path, help="write the measurements here too")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    on_gpu = torch.cuda.is_available()
    name = torch.cuda.get_device_name() if on_gpu else f"CPU, {torch.get_num_threads()} threads"
    print(f"{name} · torch {torch.__version__}", flush=True)
    square = torch.randn(2048, 2048, device="cuda" if on_gpu else "cpu")
    matmul = 2 * 2048**3 / best_of(lambda: square @ square, args.repeats) / 1e9
    compile = not args.no_compile
    preset, job = measure_preset(args.repeats, compile), measure_reference(args.repeats, compile)
    print(report(preset, job, matmul))
    if args.json:
        found = {"device": name, "torch": torch.__version__, "matmul_gflops": matmul, "tiny": preset, "reference": job}
        args.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
