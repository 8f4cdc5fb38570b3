"""Post-train a world model so that it does what the actions say: dream in groups, reward, update, watch (RLIR 2509.23958).

- An iteration's contexts are first frames of recorded clips, or what is dreamt from them (`prefix`), the actions those recorded after them, all
  drawn by (seed, iteration) alone; a killed post-training goes on bit for bit.
- The reward model is what training maximises. What is watched is what it never sees: a judge of another architecture that learned from other
  episodes, PSNR and SSIM on moved pixels and the Frechet distance of latents, on held-out clips by the deployed sampler.
- Where the reward rises while the judge or the pictures get worse, or while the judge confirms next to nothing of it, the reward is being
  hacked: post-training stops and says so.
- The model that is published is the one the judge liked best among those whose pictures did not get worse and whose reward it confirmed.
"""

import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from worldline.errors import WorldlineError
from worldline.eval.frechet import latent_frechet_distance, pooled_latents
from worldline.eval.protocol import PROTOCOL
from worldline.eval.video_metrics import compare_videos
from worldline.rl_in_imagination.denoiser_grpo import DenoiserUpdater, GRPOConfig, Reward, dream, dreamt_from
from worldline.tokenizers import Tokenizer
from worldline.trainers.state import IterationState
from worldline.types import Clip

log = logging.getLogger(__name__)
FRECHET_FLOOR = 0.1
"""A first latent Frechet distance below this one counts as this one: it is 0.05 to 0.16 of 32 to 48 clips of trained world models, and moves by
0.01 from check to check without a reason."""
Batches = Callable[[int, int, int], Clip]
"""(seed, step, size) to a clip of raw latents of that many rows: a function of its arguments alone."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PosttrainSettings:
    """How long, and how it is watched."""

    iterations: int = 60
    """Of dreaming and learning."""
    check_every: int = 10
    """Iterations between checks on held-out clips."""
    check_clips: int = 48
    """Held-out clips of a check."""
    patience: int = 3
    """Checks without an improvement after which it stops."""
    worst_psnr: float = 0.3
    """dB on moved pixels that a model may lose and still be published."""
    worst_ssim: float = 0.05
    """SSIM on moved pixels (0 to 1) that a model may lose and still be published."""
    worst_frechet: float = 2.0
    """Times the latent Frechet distance of the first check (0.1 where that is less) that a model may reach and still be published."""
    parted: float = 0.02
    """Agreement (0 to 1) that the judge may lose, while the reward rises, before the reward counts as hacked."""
    clear: float = 0.1
    """Agreement by which the reward must have risen, above what chance does, before the judge must have confirmed it."""
    confirmed: float = 0.25
    """Share of such a rise that the judge must have gained too; with less the reward counts as hacked."""
    seed: int = 0
    """Of contexts, dreams and updates."""
    grpo: GRPOConfig = field(default_factory=GRPOConfig)

    def __post_init__(self) -> None:
        for name in ("iterations", "check_every", "patience"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.check_clips < 4:
            raise ValueError(f"check_clips of at least 4 required, got {self.check_clips}")
        for name in ("worst_psnr", "worst_ssim", "parted", "clear"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} of at least 0 required, got {getattr(self, name)}")
        if not self.worst_frechet >= 1 or not 0 <= self.confirmed <= 1:
            raise ValueError(
                f"worst_frechet of at least 1 and confirmed from 0 to 1 required, got {self.worst_frechet} and {self.confirmed}"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Posttraining:
    """What a post-training did. `history` holds a row for each iteration, `checks` one for each check; both JSON-like."""

    history: list[dict[str, float]]
    checks: list[dict[str, float]]
    best: int  # the iteration whose model is published
    stopped: str
    hacked: bool


def posttrain(
    model: Any,
    tokenizer: Tokenizer,
    reward: Reward,
    judge: Reward,
    training: Batches,
    held_out: Clip,
    settings: PosttrainSettings,
    out: Path,
    *,
    ahead: int = 0,
    provenance: Mapping[str, Any],
    progress: bool = True,
) -> Posttraining:
    """Move `model` (a `TracedWorldModel` with weights), publish the best in `out`. Goes on from `out/training`.

    Args:
        training: clips of `grpo.prefix` + `grpo.frames` + 1 frames.
        held_out: clips that nothing was trained on, of 16 frames or more.
        out: a folder claimed for this run.
        ahead: frames behind a transition that its reward looks at.
    """
    updater = DenoiserUpdater(model, settings.grpo)
    state = IterationState(
        out / "training" / "state.safetensors",
        modules={"model": updater.model, "reference": updater.reference},
        optimizers={"model": updater.optimizer},
    )
    iteration, history, checks = state.restore()
    grpo = settings.grpo
    writer = SummaryWriter(str(out / "tensorboard"), purge_step=iteration)
    bar = tqdm(total=settings.iterations, initial=iteration, desc="posttrain", unit="iteration", disable=not progress)
    try:
        while True:
            # --- check: what do those say whom it does not train for? -------------------------------------------------
            last = iteration >= settings.iterations
            if (iteration % settings.check_every == 0 or last) and not (
                checks and checks[-1]["iteration"] == iteration
            ):
                checks.append({"iteration": float(iteration), **check(model, tokenizer, reward, judge, held_out)})
                facts = {**provenance, "iteration": iteration, "check": checks[-1]}
                if best_of(checks, settings) == iteration:
                    updater.published().save_pretrained(out, provenance=facts)
                    tokenizer.save_pretrained(out / "tokenizer")
                for name, value in checks[-1].items():
                    writer.add_scalar(f"check/{name}", value, iteration)
                bar.set_postfix({k: f"{checks[-1][k]:.3f}" for k in ("reward", "judge", "moved_psnr")})
                state.store(iteration, history, checks)
            stopped = stop_reason(checks, settings)
            if last or stopped:
                break

            # --- dream ------------------------------------------------------------------------------------------------
            clip = training(settings.seed, iteration, grpo.contexts)
            generator = torch.Generator().manual_seed(settings.seed * 1_000_003 + iteration)
            rows = grpo.contexts * grpo.group
            seeds = torch.arange(rows) + (settings.seed * 1_000_003 + iteration) * rows
            blocks = clip.actions[:, -(grpo.prefix + grpo.frames) :]
            before = prefix_of(grpo, model.traced_chunk(), generator)
            seen = dreamt_from(model, opening(clip), blocks[:, :before], seeds=seeds[:: grpo.group])
            actions = blocks[:, before : before + grpo.frames]
            made = dream(model, tokenizer, reward, seen, actions, grpo, seeds=seeds, ahead=ahead)

            # --- update -----------------------------------------------------------------------------------------------
            learned = updater.update(made, generator)
            iteration += 1
            history.append({"iteration": float(iteration), "reward": float(made.reward.mean()), **learned})
            state.store(iteration, history, checks)

            # --- log --------------------------------------------------------------------------------------------------
            bar.update()
            for name, value in history[-1].items():
                writer.add_scalar(f"posttrain/{name}", value, iteration)
    finally:
        bar.close()
        writer.close()
    return Posttraining(
        history=history,
        checks=checks,
        best=best_of(checks, settings),
        stopped=stopped or "all iterations were run",
        hacked=bool(_parted(checks[0], checks[-1], settings)),
    )


def prefix_of(grpo: GRPOConfig, chunk: int, generator: torch.Generator) -> int:
    """How many frames an update dreams before those it learns from: whole chunks, at most `grpo.prefix`."""
    if not grpo.prefix:
        return 0
    return chunk * int(torch.randint(grpo.prefix // chunk + 1, (), generator=generator))


@torch.no_grad()
def check(model: Any, tokenizer: Tokenizer, reward: Reward, judge: Reward, clip: Clip) -> dict[str, float]:
    """Of held-out clips dreamt from their first frame by the deployed sampler: reward, judge, and how the pictures are."""
    real = tokenizer.decode(clip.frames)  # as good as the tokenizer lets them be
    _, made = model.imagine(model.observe(opening(clip)), clip.actions, seeds=torch.arange(len(clip.poses)) + 7919)
    latents = {c: torch.cat([clip.frames[c][:, :1].to(z), z], 1) for c, z in made.latents.items()}
    frames = tokenizer.decode(latents)
    said, true = judge(frames, clip.actions), judge(real, clip.actions)
    psnr, ssim = [], []
    for camera, video in frames.items():
        metrics = compare_videos(real[camera][:, 1:].cpu(), video[:, 1:].cpu(), real[camera][:, 0].cpu())
        for name, values in (("moved_psnr", psnr), ("moved_ssim", ssim)):
            each, there = metrics.over_frames(name)  # pyright: ignore[reportArgumentType]
            if there.any():
                values.append(float(each[there].mean()))
    if not psnr:
        raise WorldlineError(
            f"held-out clips in which something moves are required, in none of {len(said)} does a pixel change: more --rl.check-clips"
        )
    t = PROTOCOL.clip_frames
    pooled = [
        pooled_latents({c: z[:, -t:].cpu() for c, z in x.items()}, model.latent_spec) for x in (clip.frames, latents)
    ]  # of the last frames, where dreams have drifted most
    by_clip = said.mean(1)
    return {
        "reward": float(reward(frames, clip.actions).mean()),
        "judge": float(by_clip.mean()),
        "judge_error": float(by_clip.std() / math.sqrt(len(by_clip))),
        "ceiling": float(true.mean()),
        "moved_psnr": sum(psnr) / len(psnr),
        "moved_ssim": sum(ssim) / len(ssim),
        "frechet": latent_frechet_distance(*pooled).distance,
    }


def opening(clip: Clip) -> Clip:
    """Its first frame (the one behind its lead)."""
    i = clip.lead
    return replace(
        clip,
        frames={c: z[:, i : i + 1] for c, z in clip.frames.items()},
        poses=clip.poses[:, i : i + 1],
        actions=clip.actions[:, :0],
        lead=0,
        led=None,
    )


def best_of(checks: list[dict[str, float]], settings: PosttrainSettings) -> int:
    """The iteration that the judge liked best, of those that kept their pictures and whose reward it confirmed; the first of equals."""
    first = checks[0]
    kept = [c for c in checks[1:] if not _worse_pictures(first, c, settings) and not _parted(first, c, settings)]
    return int(max([first, *kept], key=lambda c: (c["judge"], -c["iteration"]))["iteration"])


def _worse_pictures(first: dict[str, float], now: dict[str, float], settings: PosttrainSettings) -> list[str]:
    """What got worse about the pictures, by more than they may."""
    lost = []
    if not now["moved_psnr"] >= first["moved_psnr"] - settings.worst_psnr:
        lost.append(f"PSNR on moved pixels fell from {first['moved_psnr']:.2f} to {now['moved_psnr']:.2f} dB")
    if not now["moved_ssim"] >= first["moved_ssim"] - settings.worst_ssim:
        lost.append(f"SSIM on moved pixels fell from {first['moved_ssim']:.3f} to {now['moved_ssim']:.3f}")
    if not now["frechet"] <= settings.worst_frechet * max(first["frechet"], FRECHET_FLOOR):
        lost.append(f"the latent Frechet distance rose from {first['frechet']:.3f} to {now['frechet']:.3f}")
    return lost


def _parted(first: dict[str, float], now: dict[str, float], settings: PosttrainSettings) -> list[str]:
    """How the judge and the pictures parted from the reward, which rose since the beginning. Empty: they did not, or it did not rise."""
    earned, gained = now["reward"] - first["reward"], now["judge"] - first["judge"]
    if earned <= 0:
        return []
    parted = []
    if gained < -settings.parted:
        parted.append(f"the judge fell from {first['judge']:.3f} to {now['judge']:.3f}")
    elif earned > settings.clear and gained < settings.confirmed * earned:
        parted.append(f"the judge confirmed {gained:+.3f} of it, at least {settings.confirmed * earned:+.3f} required")
    return parted + _worse_pictures(first, now, settings)


def stop_reason(checks: list[dict[str, float]], settings: PosttrainSettings) -> str:
    """Why it should stop; empty: it should not."""
    first, now = checks[0], checks[-1]
    if parted := _parted(first, now, settings):
        return f"the reward rose from {first['reward']:.3f} to {now['reward']:.3f} while {' and '.join(parted)}: it is being hacked"
    best = best_of(checks, settings)
    since = sum(c["iteration"] > best for c in checks)
    return f"{since} checks brought nothing better than iteration {best}" if since >= settings.patience else ""
