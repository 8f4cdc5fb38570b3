"""What the key-value cache saves, and whether a long dream stays as cheap as a short one.

    python scripts/bench_stream.py

Untrained networks of the `tiny` preset's width and depth, two cameras of 8x8x8 latents, batch 1 unless said otherwise:

- imagined frames a second by window and solver steps, cached against the honest alternative: all frames of the window go
  through the network again at every solver step, in one pass under the banded mask, and nothing is kept;
- a dream of `--long` frames: time and memory of its frames early and late, without and with a memory bank;
- the share of the machine's matrix-product rate that streaming reaches, at batch 1 and at `--batch`.

Each time is the best of `--repeats` after one for warming up.
"""

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path

import torch
from bench_imagination import state_bytes
from bench_train import best_of, build, gflop, random_clip
from torch import Tensor

from worldline.trainers.world_model import PRESETS
from worldline.worldmodels import AutoregressiveWorldModel
from worldline.worldmodels.memory import MemoryConfig
from worldline.worldmodels.ports import FrameBatch
from worldline.worldmodels.transformer import banded_causal_mask

GOAL = 5.0  # times faster than encoding anew, at a window of 32
LATENT, CAMERAS = (8, 8, 8), 2


def model_of(window: int, steps: int, memory: MemoryConfig | None = None) -> AutoregressiveWorldModel:
    network = replace(PRESETS["tiny"][1]["model"].network, window=window, memory=memory or MemoryConfig())
    model = build(LATENT, CAMERAS, network).eval()
    return model.with_sampling(solver_steps=steps)


def start(model: AutoregressiveWorldModel, batch: int, frames: int):
    """A state that has seen `frames` frames."""
    clip = random_clip(model, batch, frames)
    return model.observe(replace(clip, frames={c: z.to(model.device) for c, z in clip.frames.items()}))


def actions(batch: int, frames: int) -> Tensor:
    return torch.rand(batch, frames, 4, 4) - 0.5


@torch.no_grad()
def cached_seconds(model: AutoregressiveWorldModel, batch: int, repeats: int) -> float:
    """One imagined frame of a state whose window is full."""
    state, seeds = start(model, batch, model.config.network.window), torch.arange(batch)
    block = actions(batch, 1)
    return best_of(lambda: model.imagine(state, block, seeds=seeds), repeats)


@torch.no_grad()
def anew_seconds(model: AutoregressiveWorldModel, batch: int, repeats: int) -> float:
    """One imagined frame if the whole window is encoded again at every solver step."""
    window, device = model.config.network.window, model.device
    clip = random_clip(model, batch, window)
    z, pose = {c: x.to(device) for c, x in clip.frames.items()}, clip.poses.to(device)
    blocks = torch.rand(batch, window, model.port.body.action_dim, device=device)
    frames = FrameBatch(
        latents=z,
        previous={c: x.roll(1, 1) for c, x in z.items()},
        pose=pose,
        previous_pose=pose.roll(1, 1),
        motion=torch.zeros(batch, window, 2 * pose.shape[2] + blocks.shape[2], device=device),
        level=torch.zeros(batch, window, device=device),
        action=blocks,
        has_action=torch.ones(batch, window, dtype=torch.bool, device=device),
        time=torch.arange(window, device=device),
    )
    mask, last = banded_causal_mask(window, window, device), slice(window - 1, None)
    once = best_of(lambda: model.network(model.body, frames, mask, last), repeats)
    return model.config.solver_steps * once


@torch.no_grad()
def long_dream(model: AutoregressiveWorldModel, frames: int, piece: int = 50) -> list[dict[str, float]]:
    """Milliseconds a frame and bytes of the state, piece by piece of one dream."""
    state, seeds, rows = start(model, 1, 1), torch.zeros(1, dtype=torch.long), []
    for first in range(0, frames, piece):
        block, began = actions(1, piece), time.perf_counter()
        state, _ = model.imagine(state, block, seeds=seeds)
        ms = 1e3 * (time.perf_counter() - began) / piece
        rows.append({"frames": first + piece, "ms_per_frame": ms, "state_bytes": state_bytes(state)})
    return rows


@torch.no_grad()
def share_of_rate(model: AutoregressiveWorldModel, batch: int, matmul: float, repeats: int) -> dict[str, float]:
    state, seeds, block = start(model, batch, 8), torch.arange(batch), actions(batch, 1)

    def frame() -> None:
        model.imagine(state, block, seeds=seeds)

    work, seconds = gflop(frame), best_of(frame, repeats)
    return {"gflops": work / seconds, "share": work / seconds / matmul}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--windows", type=int, nargs="+", default=[8, 16, 32, 64, 128])
    parser.add_argument("--steps", type=int, nargs="+", default=[1, 2, 4, 8], help="solver steps")
    parser.add_argument("--long", type=int, default=1000, help="frames of the long dream")
    parser.add_argument("--batch", type=int, default=16, help="rows of the second rate measurement")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, help="CPU threads")
    parser.add_argument("--json", type=Path, help="write the measurements here too")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    on_gpu = torch.cuda.is_available()
    device = torch.cuda.get_device_name() if on_gpu else f"CPU, {torch.get_num_threads()} threads"
    print(f"{device} · torch {torch.__version__}", flush=True)
    print("| window | solver steps | cached, frames/s | encoded anew, frames/s | ratio |\n|---|---|---|---|---|")
    rows = []
    for window in args.windows:
        for steps in args.steps:
            model = model_of(window, steps)
            cached, anew = cached_seconds(model, 1, args.repeats), anew_seconds(model, 1, args.repeats)
            rows.append({"window": window, "steps": steps, "cached_s": cached, "anew_s": anew, "ratio": anew / cached})
            goal = f" (goal {GOAL:g})" if window == 32 else ""
            print(f"| {window} | {steps} | {1 / cached:.1f} | {1 / anew:.1f} | {anew / cached:.1f}{goal} |", flush=True)
    bank = MemoryConfig(recent=1, nearest=3)
    dreams = {"no bank": long_dream(model_of(8, 1), args.long), "bank": long_dream(model_of(8, 1, bank), args.long)}
    for name, pieces in dreams.items():
        early, late = pieces[1:4], pieces[-3:]
        first, last = (min(p["ms_per_frame"] for p in part) for part in (early, late))
        sizes = sorted({p["state_bytes"] for p in pieces})
        print(
            f"{name}: {first:.1f} ms a frame around frame 150, {last:.1f} ms around frame {args.long}; state of {sizes} bytes"
        )
    square = torch.randn(2048, 2048, device="cuda" if on_gpu else "cpu")
    matmul = 2 * 2048**3 / best_of(lambda: square @ square, args.repeats) / 1e9
    shares = {n: share_of_rate(model_of(8, 1), n, matmul, args.repeats) for n in (1, args.batch)}
    for n, found in shares.items():
        print(
            f"batch {n}: {found['gflops']:.1f} GFLOP/s, {found['share']:.0%} of a large matrix product's {matmul:.0f}"
        )
    if args.json:
        found = {"device": device, "table": rows, "long": dreams, "matmul_gflops": matmul, "shares": shares}
        args.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
