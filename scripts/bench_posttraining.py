"""How long an update of post-training takes and where that goes, and what a dream's log-probability costs beside sampling it.

    python scripts/bench_posttraining.py
    python scripts/bench_posttraining.py --world-model runs/wm --reward runs/reward

Without folders, untrained models of the `tiny` presets are timed (two cameras of 64x64): the autoregressive denoiser and a unified model of design
uwm. The parts of an update: sampling the dreams, decoding and judging them, the gradient steps. Prints Markdown.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import bench_action_latency
import numpy as np
import torch
import tyro
from bench_imagination import tiny_models
from result_tables import row, table

from worldline.data import RobustNormalizer
from worldline.rl_in_imagination.denoiser_grpo import (
    DenoiserUpdater,
    GRPOConfig,
    TracedDreams,
    advantages,
    log_density,
    repeat,
)
from worldline.rl_in_imagination.inverse import InverseConfig, InverseModel
from worldline.tokenizers import Tokenizer
from worldline.types import Clip
from worldline.worldmodels import load_world_model

HEAD = (
    "| world model, weights | rows, frames, steps | sampling, s | decoding | reading the actions | gradient steps | an update | log-probability / "
    "sampling | with gradient |"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchPosttraining:
    """Time the parts of an update."""

    world_model: Path | None = None
    reward: Path | None = None
    grpo: GRPOConfig = field(default_factory=GRPOConfig)
    repeats: int = 3
    threads: int = 2


def models(config: BenchPosttraining) -> list[tuple[str, Any, Tokenizer, InverseModel]]:
    if config.world_model is not None and config.reward is not None:
        model, tokenizer = load_world_model(config.world_model)
        return [(config.world_model.name, model, tokenizer, InverseModel.from_pretrained(config.reward))]
    autoregressive, tokenizer, *_ = tiny_models("transformer")
    policy = bench_action_latency.build("uwm", bench_action_latency.Bench(), "cpu")
    found: list[tuple[str, Any, Tokenizer, InverseModel]] = []
    for name, model, seeing in (
        ("autoregressive", autoregressive, tokenizer),
        ("uwm", policy.model.requires_grad_(True), policy.tokenizer),
    ):
        unit = RobustNormalizer(low=(-1.0,) * model.spec.action.dim, high=(1.0,) * model.spec.action.dim)
        found.append((name, model, seeing, InverseModel(InverseConfig(), model.spec, unit).eval()))
    return found


def seconds(run: Callable[[], Any], repeats: int) -> tuple[float, Any]:
    """The median, after one that does not count, and what it made."""
    took, made = [], None
    for i in range(repeats + 1):
        start = time.perf_counter()
        made = run()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        if i:
            took.append(time.perf_counter() - start)
    return float(np.median(took)), made


def measure(config: BenchPosttraining, name: str, model: Any, tokenizer: Tokenizer, reader: InverseModel) -> str:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for module in (model, tokenizer, reader):
        module.to(device)
    grpo, spec = config.grpo, model.spec
    rows, n = torch.arange(grpo.contexts).repeat_interleave(grpo.group), grpo.contexts * grpo.group
    clip = Clip(
        frames={c: torch.randn(grpo.contexts, 1, *shape) for c, shape in model.latent_spec.shapes.items()},
        poses=torch.rand(grpo.contexts, 1, len(spec.pose_names)),
        actions=torch.zeros(grpo.contexts, 0, spec.control_steps, spec.action.dim),
        instruction=("",) * grpo.contexts,
    )
    seen, actions = repeat(clip, rows), torch.rand(n, grpo.frames, spec.control_steps, spec.action.dim) * 2 - 1
    options = {"seeds": torch.arange(n), "steps": grpo.solver_steps, "eta": grpo.eta}
    sampling, trace = seconds(lambda: model.sample_traced(seen, actions, **options), config.repeats)
    latents = {c: torch.cat([seen.frames[c].to(z), z], 1) for c, z in model.dreamt(trace).latents.items()}
    decoding, frames = seconds(lambda: tokenizer.decode(latents), config.repeats)
    reading, _ = seconds(lambda: reader.read_along(frames), config.repeats)
    with torch.no_grad():
        density, means = seconds(lambda: model.trace_means(trace), config.repeats)
    gradient, _ = seconds(lambda: model.log_prob(trace).sum().backward(), config.repeats)
    earned = torch.randn(n, grpo.frames, generator=torch.Generator().manual_seed(0)).to(device)
    dreams = TracedDreams(trace=trace, reward=earned, advantage=advantages(earned, grpo), old=log_density(means, trace))
    updater = DenoiserUpdater(model, replace(grpo, lr=1e-9))  # nothing moves, so that every repeat is alike
    updating, _ = seconds(lambda: updater.update(dreams, torch.Generator().manual_seed(0)), config.repeats)
    whole = sampling + decoding + reading + updating
    share = [f"{x:.2f} ({x / whole:.0%})" for x in (sampling, decoding, reading, updating)]
    weights = sum(p.numel() for p in model.parameters()) / 1e6
    ratios = [f"{density / sampling:.2f}", f"{gradient / sampling:.2f}"]
    return row(f"{name}, {weights:.1f}M", f"{n}, {grpo.frames}, {grpo.solver_steps}", *share, f"{whole:.1f} s", *ratios)


def main(config: BenchPosttraining) -> None:
    torch.set_num_threads(config.threads)
    where = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    rows = [measure(config, *each) for each in models(config)]
    print(f"{where}; the median of {config.repeats} after one that does not count.\n")
    print(table(HEAD, rows))


if __name__ == "__main__":
    main(tyro.cli(BenchPosttraining, description=__doc__))
