"""How long does a unified video-action model take to decide on a chunk?

    python scripts/bench_action_latency.py --out bench_action_latency.json

Untrained models of both designs with the `tiny` preset's sizes (or --preset base), two 64x64 views, chunks of 16 actions, by the policy query: median
and 95th percentile of a whole decision (pixels in, actions out), split into tokenizer, trunk and heads, by solver steps and batch.
Beside it: what the video query takes at the same steps, and the cloned policies' decisions. Goals (2 cores, tiny, batch 1, 4 steps): UVA
40 ms, UWM 80 ms, and UVA's acting a fifth of its video generation.
"""

import json
import resource
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from bench_train import gflop, synchronise
from result_tables import row, table
from torch import nn

from worldline.data.normalization import RobustNormalizer
from worldline.policies import ClonedPolicy, PolicyConfig, VideoActionPolicy
from worldline.rl_in_imagination.dream import Timer
from worldline.tokenizers import AutoencoderConfig, AutoencoderTokenizer, build_autoencoder
from worldline.trainers.video_action import PRESETS
from worldline.types import ActionSpec, CameraSpec, Clip, Observation, Policy, WorldSpec
from worldline.worldmodels import VideoActionModel
from worldline.worldmodels.video_action import POLICY, VIDEO

NAMES = ("dx", "dy", "dz", "gripper")


@dataclass(frozen=True, slots=True, kw_only=True)
class Bench:
    """Time decisions, print the tables."""

    out: Path | None = None
    """JSON file of all numbers."""
    preset: str = "tiny"
    steps: tuple[int, ...] = (1, 2, 4, 10, 16)
    batches: tuple[int, ...] = (1, 64)
    repeats: int = 40
    size: int = 64


def spec_of(size: int) -> WorldSpec:
    return WorldSpec(
        cameras=tuple(CameraSpec(name=name, height=size, width=size) for name in ("outer", "wrist")),
        fps=20.0,
        control_steps=4,
        action=ActionSpec(
            names=NAMES,
            low=(-1.0,) * 4,
            high=(1.0,) * 4,
            kind="delta",
            space="cartesian",
            rate_hz=80.0,
            source="commanded",
            embodiment="bench",
        ),
        pose_names=("x", "y", "z", "opening"),
    )


def observation_of(spec: WorldSpec, n: int) -> Observation:
    images = {c.name: torch.randint(256, (n, 3, c.height, c.width), dtype=torch.uint8) for c in spec.cameras}
    return Observation(images=images, pose=torch.rand(n, 4), instruction=("",) * n)


def build(design: str, config: Bench, device: str) -> VideoActionPolicy:
    torch.manual_seed(0)
    spec = spec_of(config.size)
    tokenizer = AutoencoderTokenizer(spec.cameras, build_autoencoder(AutoencoderConfig())).eval()
    settings = replace(PRESETS[config.preset][1]["model"], design=design, execute=0)
    model = VideoActionModel(
        settings,
        replace(spec, latent=tokenizer.latent_spec),
        action_normalizer=RobustNormalizer(low=(-1.0,) * 4, high=(1.0,) * 4),
        pose_normalizer=RobustNormalizer(low=(0.0,) * 4, high=(1.0,) * 4),
    )
    return VideoActionPolicy(model.to(device).eval().requires_grad_(False), tokenizer.to(device))


def watch(module: nn.Module, part: str, timer: Timer) -> None:
    """Adds the module's time to a part."""
    whole = module.forward

    def timed(*arguments: Any, **options: Any) -> Any:
        synchronise()
        with timer(part):
            made = whole(*arguments, **options)
            synchronise()
        return made

    module.forward = timed  # pyright: ignore[reportAttributeAccessIssue]


def milliseconds(run: Callable[[], Any], repeats: int) -> tuple[float, float]:
    """Median and 95th percentile, after three runs that do not count."""
    took = []
    for i in range(repeats + 3):
        synchronise()
        start = time.perf_counter()
        run()
        synchronise()
        if i >= 3:
            took.append(1000 * (time.perf_counter() - start))
    return float(np.median(took)), float(np.quantile(took, 0.95))


def decide(policy: Policy, spec: WorldSpec, n: int) -> Callable[[], Any]:
    observation, state, seeds = observation_of(spec, n), policy.reset(n), torch.arange(n)
    return lambda: policy.act(observation, state, seeds=seeds)


def measure(design: str, config: Bench, device: str) -> list[dict[str, Any]]:
    policy, rows = build(design, config, device), []
    timer = Timer()
    watch(policy.model.network.trunk, "trunk", timer)
    network: Any = policy.model.network
    for head in (network.action_head,) if design == "uva" else (network.to_action,):
        watch(head, "head", timer)
    encode = policy.tokenizer.encode

    def timed_encode(frames: Any) -> Any:
        with timer("tokenizer"):
            made = encode(frames)
            synchronise()
        return made

    policy.tokenizer.encode = timed_encode  # pyright: ignore[reportAttributeAccessIssue]
    for n in config.batches:
        for steps in config.steps:
            now = policy.with_options(steps=steps)
            run = decide(now, policy.spec, n)
            repeats = config.repeats if n == 1 else max(5, config.repeats // 5)
            median, high = milliseconds(run, repeats)
            timer.seconds.clear()
            for _ in range(repeats):
                run()
            parts = {k: 1000 * v / repeats for k, v in timer.seconds.items()}
            made: dict[str, Any] = {
                "design": design,
                "batch": n,
                "steps": steps,
                "median": median,
                "p95": high,
                **parts,
            }
            if n == 1:
                seen = Clip(
                    frames={c: torch.randn(1, 1, *s) for c, s in policy.model.latent_spec.shapes.items()},
                    poses=torch.rand(1, 1, 4),
                    actions=torch.zeros(1, 0, 4, 4),
                )
                video = milliseconds(
                    lambda seen=seen, steps=steps: policy.model.sample(
                        seen, VIDEO, seeds=torch.zeros(1).long(), steps=steps
                    ),
                    max(5, repeats // 4),
                )
                without = milliseconds(
                    lambda now=now, seen=seen: now.model.sample(seen, POLICY, seeds=torch.zeros(1).long()), repeats
                )
                ask = {"seeds": torch.zeros(1).long(), "steps": steps}
                flops = [
                    gflop(lambda q=q, seen=seen, ask=ask: policy.model.sample(seen, q, **ask)) for q in (POLICY, VIDEO)
                ]
                made |= {"video": video[0], "acting": without[0], "gflop": flops[0], "video_gflop": flops[1]}
            rows.append(made)
    rows[0]["parameters"] = sum(p.numel() for p in policy.model.parameters())
    return rows


def others(config: Bench) -> list[str]:
    """The cloned policies' decisions, chunks of 16 as well."""
    spec, rows = spec_of(config.size), []
    for kind in ("bc", "diffusion"):
        unit = RobustNormalizer(low=(-1.0,) * 4, high=(1.0,) * 4)
        settings = PolicyConfig(kind=kind, chunk=16)  # pyright: ignore[reportArgumentType]
        policy = ClonedPolicy(settings, spec, action_normalizer=unit, pose_normalizer=unit).eval()
        for n in config.batches:
            median, high = milliseconds(decide(policy, spec, n), config.repeats if n == 1 else 8)
            rows.append(row(kind, n, f"{median:.1f}", f"{high:.1f}"))
    return rows


def main(config: Bench) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    name = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    found = [made for design in ("uwm", "uva") for made in measure(design, config, device)]
    lines = [
        row(
            r["design"],
            r["batch"],
            r["steps"],
            f"{r['median']:.1f}",
            f"{r['p95']:.1f}",
            *(f"{r.get(part, 0.0):.1f}" for part in ("tokenizer", "trunk", "head")),
            f"{r['video']:.1f}" if "video" in r else "–",
            f"{r['acting'] / r['video']:.2f}" if "video" in r else "–",
            f"{r['gflop']:.3f}, {r['video_gflop']:.3f}" if "video" in r else "–",
        )
        for r in found
    ]
    memory = (
        torch.cuda.max_memory_allocated() / 2**20
        if device == "cuda"
        else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    )
    sizes = ", ".join(f"{r['design']} {r['parameters'] / 1e6:.1f}M weights" for r in found if "parameters" in r)
    head = "| design | batch | steps | ms a chunk, median | p95 | tokenizer | trunk | head | ms of a video of the same horizon, latents | acting / video, ms | GFLOP of acting, of video |"
    print(f"{name}; preset {config.preset}: {sizes}; peak memory {memory:.0f} MB (whole process)\n")
    print(table(head, lines))
    print(f"\n{table('| cloned policy | batch | ms a chunk, median | p95 |', others(config))}")
    if config.out is not None:
        config.out.write_text(json.dumps({"device": name, "memory_mb": memory, "rows": found}, indent=1))


if __name__ == "__main__":
    main(tyro.cli(Bench, description=__doc__))
