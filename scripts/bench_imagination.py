"""Imagined frames a second, by batch and solver steps, with and without the cache, and where the time goes.

    python scripts/bench_imagination.py
    python scripts/bench_imagination.py --world-model runs/wm --scorer runs/success --policy runs/bc50 --batches 64

Without folders, untrained models of the `tiny` presets are timed: two cameras of 64x64, latents of 8x8x8; both kinds of world model, the
transformer and World4RL's U-Net (which has no cache: four frames are its state). Every imagined
frame is timed by itself; the best of `--frames` after one for warming up counts. Cache off is the honest alternative: the
last `window` frames are observed anew before each frame. The policy is asked at every frame, so that all frames cost alike.
"""

import argparse
import json
import time
from collections.abc import Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from worldline.data import RobustNormalizer
from worldline.executor import ChunkExecutor
from worldline.policies import ClonedPolicy, PolicyConfig
from worldline.rl_in_imagination.dream import Dream, Timer
from worldline.rl_in_imagination.success import SuccessConfig, SuccessScorer
from worldline.tokenizers import AutoencoderConfig, AutoencoderTokenizer, Tokenizer, build_autoencoder
from worldline.trainers.world_model import PRESETS
from worldline.trainers.world_model_edm import PRESETS as EDM_PRESETS
from worldline.types import ActionSpec, CameraSpec, Clip, Imagination, Observation, TensorState, WorldSpec
from worldline.worldmodels import AutoregressiveWorldModel, EDMWorldModel, TrainedWorldModel, load_world_model

KINDS = ("transformer", "unet")
PARTS = ("denoiser", "decoder", "policy", "scorer")
GOAL = 0.05  # share of the wall time that may be spent outside the parts


class SynchronisedTimer(Timer):
    """Waits for the accelerator at the end of each part, so that work is charged to the part that asked for it."""

    @contextmanager
    def __call__(self, part: str):
        with super().__call__(part):
            yield
            if torch.cuda.is_available():
                torch.cuda.synchronize()


class WithoutCache:
    """The same world model, observing its last `window` frames anew before each frame it imagines."""

    def __init__(self, model: AutoregressiveWorldModel) -> None:
        self.model, self.spec, self.window = model, model.spec, model.config.network.window

    def observe(self, clip: Clip) -> TensorState:
        tensors = {f"frames/{camera}": z for camera, z in clip.frames.items()}
        return TensorState(tensors={**tensors, "poses": clip.poses, "actions": clip.actions}, rows=len(clip.poses))

    def imagine(self, state: TensorState, actions: Tensor, *, seeds: Tensor) -> tuple[TensorState, Imagination]:
        held = {name: z[:, -self.window :] for name, z in state.tensors.items()}
        frames = {name.removeprefix("frames/"): z for name, z in held.items() if name.startswith("frames/")}
        past = held["actions"][:, held["actions"].shape[1] - held["poses"].shape[1] + 1 :]
        fresh = self.model.observe(Clip(frames=frames, actions=past, poses=held["poses"]))
        _, made = self.model.imagine(fresh, actions, seeds=seeds)
        new = {f"frames/{camera}": z for camera, z in made.latents.items()} | {"poses": made.poses, "actions": actions}
        tensors = {name: torch.cat([z, new[name].to(z)], dim=1) for name, z in held.items()}
        return TensorState(tensors=tensors, rows=len(state)), made


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One measurement. `parts` are shares of the wall time, `bytes_per_env` the world model's state after the first and last frame."""

    kind: str
    batch: int
    steps: int
    cache: bool
    frames_per_second: float
    ms_per_frame: float
    parts: Mapping[str, float]
    bytes_per_env: tuple[int, int] | None


def tiny_models(kind: str) -> tuple[TrainedWorldModel, Tokenizer, ClonedPolicy, SuccessScorer]:
    """Untrained models of the `tiny` presets' sizes; `kind`: transformer or unet."""
    torch.manual_seed(0)
    cameras = (CameraSpec(name="front", height=64, width=64), CameraSpec(name="wrist", height=64, width=64))
    tokenizer = AutoencoderTokenizer(cameras, build_autoencoder(AutoencoderConfig())).eval()
    names = ("dx", "dy", "dz", "grip")
    action = ActionSpec(
        names=names, low=(-1.0,) * 4, high=(1.0,) * 4, kind="delta", space="cartesian", rate_hz=40.0,
        source="commanded", embodiment="benchmark",
    )  # fmt: skip
    spec = WorldSpec(cameras=cameras, fps=10.0, control_steps=4, action=action, pose_names=names)
    unit = RobustNormalizer(low=(-1.0,) * 4, high=(1.0,) * 4)
    normalizers: dict[str, Any] = {"action_normalizer": unit, "pose_normalizer": unit}
    latent = replace(spec, latent=tokenizer.latent_spec)
    world: TrainedWorldModel
    if kind == "transformer":
        world = AutoregressiveWorldModel(PRESETS["tiny"][1]["model"], latent, **normalizers)
    else:
        world = EDMWorldModel(EDM_PRESETS["tiny"][1]["model"], latent, **normalizers)
    policy = ClonedPolicy(PolicyConfig(), spec, **normalizers)
    return world.eval(), tokenizer, policy.eval(), SuccessScorer(SuccessConfig(), spec).eval()


def state_bytes(state: Any) -> int:
    """Bytes of one row of a world model's state."""

    def size(value: Any) -> int:
        if isinstance(value, Tensor):
            return value.numel() * value.element_size()
        if isinstance(value, Mapping):
            return sum(size(part) for part in value.values())
        return sum(size(getattr(value, f.name)) for f in fields(value)) if is_dataclass(value) else 0

    return size(state) // len(state)


def measure(
    world: TrainedWorldModel,
    tokenizer: Tokenizer,
    policy: ClonedPolicy,
    scorer: SuccessScorer,
    *,
    kind: str,
    batch: int,
    steps: int,
    cache: bool,
    frames: int,
) -> Row:
    """Roll `frames` + 1 frames; the fastest but the first counts."""
    timer = SynchronisedTimer()
    sampler = world.with_sampling(solver_steps=steps)
    used: Any = sampler
    if not cache:
        assert isinstance(sampler, AutoregressiveWorldModel), "the other kind has no cache"
        used = WithoutCache(sampler)
    dream = Dream(used, tokenizer, timer=timer)
    executor, seeds = ChunkExecutor(policy, execute=policy.spec.control_steps), torch.arange(batch)
    observation = Observation(
        images={
            c.name: torch.randint(0, 256, (batch, 3, c.height, c.width), dtype=torch.uint8) for c in world.spec.cameras
        },
        pose=torch.zeros(batch, len(world.spec.pose_names)),
        instruction=("",) * batch,
    )
    state, acting, scoring = dream.start(observation, seeds=seeds), executor.reset(batch), scorer.reset(batch)
    if not cache:  # a full window, as in the middle of a rollout
        world_state = state.world
        for _ in range(used.window - 1):
            tensors = {k: torch.cat([z, z[:, -1:]], 1) for k, z in world_state.tensors.items() if k != "actions"}
            zeros = torch.zeros(batch, tensors["poses"].shape[1] - 1, world.spec.control_steps, world.spec.action.dim)
            world_state = TensorState(tensors=tensors | {"actions": zeros}, rows=batch)
        state = replace(state, world=world_state)
    best, sizes = (float("inf"), {}), []
    for i in range(frames + 1):
        timer.seconds.clear()
        start = time.perf_counter()
        with timer("policy"):
            block, acting = executor.block(state.observation, acting, seeds=seeds)
        state = dream.step(state, block)
        with timer("scorer"):
            scoring, _ = scorer.step(scoring, state.observation, block)
        wall = time.perf_counter() - start
        sizes.append(state_bytes(state.world) if cache else 0)
        if i and wall < best[0]:
            best = wall, dict(timer.seconds)
    wall, seconds = best
    parts = {part: seconds.get(part, 0.0) / wall for part in PARTS}
    return Row(
        kind=kind,
        batch=batch,
        steps=steps,
        cache=cache,
        frames_per_second=batch / wall,
        ms_per_frame=1e3 * wall / batch,
        parts={**parts, "overhead": 1 - sum(parts.values())},
        bytes_per_env=(sizes[0], sizes[-1]) if cache else None,
    )


def table(rows: list[Row]) -> str:
    head = ["kind", "batch", "steps", "cache", "frames/s", "ms/frame", *PARTS, "overhead", "KB/env"]
    lines = [f"{head[0]:>12}" + "".join(f"{name:>10}" for name in head[1:])]
    for row in rows:
        shares = "".join(f"{100 * row.parts[part]:>9.1f}%" for part in (*PARTS, "overhead"))
        memory = f"{row.bytes_per_env[1] / 1024:>10.0f}" if row.bytes_per_env else f"{'-':>10}"
        lines.append(
            f"{row.kind:>12}{row.batch:>10}{row.steps:>10}{'on' if row.cache else 'off':>10}{row.frames_per_second:>10.1f}"
            f"{row.ms_per_frame:>10.2f}{shares}{memory}"
        )
    return "\n".join(lines)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--world-model", type=Path, help="folder of a trained world model")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS), help="untrained world models to time")
    parser.add_argument("--policy", type=Path, help="folder of a trained policy")
    parser.add_argument("--scorer", type=Path, help="folder of a trained scorer")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16, 64, 256, 1024])
    parser.add_argument("--steps", type=int, nargs="+", default=[1, 2, 4], help="solver steps")
    parser.add_argument("--frames", type=int, default=3, help="frames timed, after one for warming up; the best counts")
    parser.add_argument("--no-cache-up-to", type=int, default=16, help="largest batch that is also timed without cache")
    parser.add_argument("--threads", type=int, help="CPU threads (on a busy machine fewer are faster)")
    parser.add_argument("--json", type=Path, help="write the measurements here too")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    if args.threads:
        torch.set_num_threads(args.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"{name} · torch {torch.__version__}", flush=True)
    rows = []
    for kind in ("given",) if args.world_model else args.kinds:
        world, tokenizer, policy, scorer = tiny_models("transformer" if args.world_model else kind)
        if args.world_model:
            world, tokenizer = load_world_model(args.world_model)
        if args.policy:
            policy = ClonedPolicy.from_pretrained(args.policy)
        if args.scorer:
            scorer = SuccessScorer.from_pretrained(args.scorer)
        for module in (world, tokenizer, policy, scorer):
            module.to(device)
        print(f"  {kind}: {sum(p.numel() for p in world.parameters()) / 1e6:.1f}M weights", flush=True)
        caches = (True, False) if isinstance(world, AutoregressiveWorldModel) else (True,)
        for cache in caches:
            for batch in args.batches:
                for steps in args.steps if cache or batch <= args.no_cache_up_to else ():
                    options: dict[str, Any] = {"batch": batch, "steps": steps, "cache": cache, "frames": args.frames}
                    rows.append(measure(world, tokenizer, policy, scorer, kind=kind, **options))
                    print(f"  {kind}, {options}: {rows[-1].frames_per_second:.1f} frames/s", flush=True)
    print(table(rows))
    worst = max(row.parts["overhead"] for row in rows if row.cache)
    grown = [row for row in rows if row.bytes_per_env and row.bytes_per_env[0] != row.bytes_per_env[1]]
    print(f"overhead at most {100 * worst:.1f}% with the cache (goal {100 * GOAL:.0f}%)")
    print(f"state per environment {'grew' if grown else 'did not grow'} over {args.frames + 1} frames")
    if args.json:
        plain = [{f.name: getattr(row, f.name) for f in fields(row)} for row in rows]
        args.json.write_text(json.dumps({"device": name, "torch": torch.__version__, "rows": plain}, indent=2) + "\n")


if __name__ == "__main__":
    main()
