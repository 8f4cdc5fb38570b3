"""Rank policies by imagined rollouts, and hold the ranking against simulator truth where there is one.

The pieces, in order: the replay diagnostic (held-out episodes' own actions through model and scorer: the cheapest test of
both), imagined rollouts of every policy from given first frames, true rollouts from the very same starts, statistics.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, UInt8
from torch import Tensor

from worldline.checkpoint import to_json
from worldline.eval.calibration import ScorerCalibration, scorer_calibration, threshold_interval
from worldline.eval.contrasts import PolicyContrasts, policy_contrasts
from worldline.eval.intervals import Interval, wilson
from worldline.eval.prediction_powered import leave_one_policy_out, prediction_powered_rate
from worldline.eval.ranking_statistics import RankStatistics, rank_statistics
from worldline.eval.replays import Replays
from worldline.rl_in_imagination.dream import Dream, Rollouts, rollout
from worldline.rl_in_imagination.success import SuccessScorer, episode_probability, episode_success
from worldline.types import Observation, Policy

MIN_CALIBRATION = 12  # replayed episodes of which at least a quarter are of each kind, to choose a threshold by


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplayDiagnostic:
    """Scorer on imagined replays of real episodes, against their recorded success."""

    calibration: ScorerCalibration
    on_real_frames: ScorerCalibration  # the same episodes' real frames: what of the error is the scorer's own
    threshold: float
    threshold_interval: Interval | None  # None where the threshold is the scorer's own
    threshold_from: str
    by_cause: Mapping[str, tuple[int, int, int]]  # cause -> (episodes, true successes, imagined successes)

    def to_dict(self) -> dict[str, Any]:
        return to_json(self)


def imagine_replays(
    dream: Dream, scorer: SuccessScorer, replays: Replays, *, seed: int = 0, batch: int = 16, progress: bool = True
) -> Float[Tensor, "n t"]:
    """Success probabilities of the episodes' own actions, imagined from their first frames."""
    n, t = replays.poses.shape[:2]
    made = rollout(
        dream,
        None,
        scorer,
        replays.first,
        frames=t,
        seeds=torch.arange(n) + seed * 1_000_003,
        actions=replays.actions,
        batch=batch,
        progress="replay held-out episodes" if progress else None,
    )
    return replays.held(made.probability)


def replay_diagnostic(scorer: SuccessScorer, replays: Replays, probability: Float[Tensor, "n t"]) -> ReplayDiagnostic:
    """What the scorer said of imagined replays (`imagine_replays`) against the recorded success.

    The threshold is chosen on these replays when they are enough to choose by, else it is the scorer's own.
    """
    assert replays.frame_success is not None, "replays with success labels are required"
    n, persist = len(probability), scorer.config.persist
    truth = episode_success(replays.held(replays.frame_success, beyond=persist - 1), persist=persist)
    imagined = episode_probability(replays.held(probability, beyond=persist - 1), persist=persist)
    seen = score_frames(scorer, replays.frames, replays.instruction)
    real = episode_probability(replays.held(seen, beyond=persist - 1), persist=persist)
    kinds = min(int(truth.sum()), int((~truth).sum()))
    calibration, between, source = (
        scorer_calibration(imagined, truth, threshold=scorer.config.threshold),
        None,
        "scorer",
    )
    if n >= MIN_CALIBRATION and kinds >= n // 4:
        calibration, between = scorer_calibration(imagined, truth), threshold_interval(imagined, truth)
        source = f"{n} replayed episodes, these very ones"
    threshold = calibration.threshold
    said = imagined > threshold
    causes = {
        cause: (len(rows), int(truth[rows].sum()), int(said[rows].sum()))
        for cause in sorted(set(replays.causes))
        for rows in [torch.tensor([i for i, c in enumerate(replays.causes) if c == cause])]
    }
    return ReplayDiagnostic(
        calibration=calibration,
        on_real_frames=scorer_calibration(real, truth, threshold=scorer.config.threshold),
        threshold=threshold,
        threshold_interval=between,
        threshold_from=source,
        by_cause=causes,
    )


def score_frames(
    scorer: SuccessScorer, frames: Mapping[str, UInt8[Tensor, "n t c _h _w"]], instruction: Sequence[str]
) -> Float[Tensor, "n t2"]:
    """A scorer stepped over n whole videos."""
    n, t = next(iter(frames.values())).shape[:2]
    state, out = scorer.reset(n), []
    for i in range(t):
        images = {c: x[:, i] for c, x in frames.items()}
        state, score = scorer.step(
            state, Observation(images=images, pose=torch.zeros(n, 0), instruction=tuple(instruction)), None
        )
        out.append(score.success)
    return torch.stack(out, 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranked:
    """What a ranking found. `truth` is None without a simulator. All rows in the order of `names`."""

    names: tuple[str, ...]
    lineages: tuple[str, ...]
    probability: Float[Tensor, "policies n t"]  # scorer's word on each imagined frame
    level: Float[Tensor, "policies n"]  # the highest that each episode kept up
    imagined: Bool[Tensor, "policies n"]  # level above the threshold
    starts: int  # that are distinct; n where each is dreamt from once
    truth: Bool[Tensor, "policies r"] | None
    contrasts: PolicyContrasts
    statistics: RankStatistics | None
    corrected: dict[str, Any] | None


def summarize_ranking(
    names: Sequence[str],
    lineages: Sequence[str],
    probability: Float[Tensor, "policies n t"],
    frame_success: Bool[Tensor, "policies r t"] | None,
    *,
    threshold: float,
    persist: int,
    correct_with: int,
    starts: int | None = None,
    seed: int = 0,
) -> Ranked:
    """Episode outcomes by one rule in both worlds, then every statistic.

    Args:
        probability: imagined success probabilities; the first r starts are those of `frame_success`.
        frame_success: true success of every frame, or None.
        correct_with: real rollouts a policy that the bias correction may use.
        starts: how many starts the imagined episodes go round (default: each is dreamt from once). Dreams from one start hardly
            differ, so it is starts that count as evidence.
    """
    level = torch.stack([episode_probability(p, persist=persist) for p in probability])
    imagined = level > threshold
    starts = min(starts or imagined.shape[1], imagined.shape[1])
    by_start = torch.stack([imagined[:, s::starts].double().mean(1) for s in range(starts)], 1)
    contrasts = policy_contrasts(by_start.numpy(), names=list(names), paired=True)
    if frame_success is None:
        return Ranked(
            names=tuple(names),
            lineages=tuple(lineages),
            probability=probability,
            level=level,
            imagined=imagined,
            starts=starts,
            truth=None,
            contrasts=contrasts,
            statistics=None,
            corrected=None,
        )
    truth = torch.stack([episode_success(s, persist=persist) for s in frame_success])
    statistics = None
    if len(names) >= 3:
        statistics = rank_statistics(
            truth.float().numpy(),
            imagined.float().numpy(),
            names=list(names),
            lineages=list(lineages),
            paired=True,
            seed=seed,
        )
    return Ranked(
        names=tuple(names),
        lineages=tuple(lineages),
        probability=probability,
        level=level,
        imagined=imagined,
        starts=starts,
        truth=truth,
        contrasts=contrasts,
        statistics=statistics,
        corrected=bias_correction(names, truth, imagined, correct_with, seed),
    )


def bias_correction(
    names: Sequence[str], truth: Bool[Tensor, "policies r"], imagined: Bool[Tensor, "policies n"], count: int, seed: int
) -> dict[str, Any]:
    """Prediction-powered rates from `count` real rollouts a policy beside those real rollouts alone, and the calibration
    of each policy by the others.

    `truth_mean` (all real rollouts) is what both are judged by.
    """
    y, f = truth.double().numpy(), imagined.double().numpy()
    m = min(count, y.shape[1] - 1, f.shape[1] - 1)
    out: dict[str, Any] = {"real_rollouts": m, "policies": []}
    if m >= 4:
        for i, name in enumerate(names):
            powered = prediction_powered_rate(y[i, :m], f[i, :m], f[i, m:])
            out["policies"].append({"policy": name, "truth_mean": float(y[i].mean()), **powered.to_dict()})
        rest = y[:, m:].mean(1)  # rollouts the correction did not see
        corrected = np.array([row["estimate"] for row in out["policies"]])
        out["mean_absolute_error"] = {
            "raw": float(np.abs(f.mean(1) - rest).mean()),
            "real_only": float(np.abs(y[:, :m].mean(1) - rest).mean()),
            "corrected": float(np.abs(corrected - rest).mean()),
        }
        if len(names) >= 3:
            for key, rates in (("raw", f.mean(1)), ("real_only", y[:, :m].mean(1)), ("corrected", corrected)):
                found = rank_statistics(rest, rates.clip(0, 1), names=list(names), seed=seed)
                out.setdefault("pearson", {})[key] = found.pearson
                out.setdefault("mmrv", {})[key] = found.mmrv
    if len(names) >= 4:
        out["leave_one_policy_out"] = to_json(leave_one_policy_out(y.mean(1), f.mean(1), names=list(names)))
    return out


def policy_table(ranked: Ranked, threshold: Interval | None = None) -> list[dict[str, Any]]:
    """One row a policy, best imagined first: rates with Wilson intervals, letters, truth where there is one.

    Args:
        threshold: what the threshold could have been: adds the lowest and highest imagined rate that this would give.
    """
    letters = {p.policy: p.letters for p in ranked.contrasts.policies}
    rows = []
    for i in ranked.imagined.float().mean(1).argsort(descending=True, stable=True).tolist():
        hits, n = int(ranked.imagined[i].sum()), ranked.imagined.shape[1]
        row: dict[str, Any] = {
            "policy": ranked.names[i],
            "lineage": ranked.lineages[i],
            "imagined": hits / n,
            "imagined_interval": to_json(wilson(hits * ranked.starts / n, ranked.starts)),
            "imagined_episodes": n,
            "imagined_starts": ranked.starts,
            "letters": letters[ranked.names[i]],
        }
        if threshold is not None:
            ends = [float((ranked.level[i] > end).float().mean()) for end in (threshold.high, threshold.low)]
            row["imagined_by_threshold"] = {"low": ends[0], "high": ends[1]}
        if ranked.truth is not None:
            real, r = int(ranked.truth[i].sum()), ranked.truth.shape[1]
            row |= {"real": real / r, "real_interval": to_json(wilson(real, r)), "real_episodes": r}
        rows.append(row)
    return rows


def tokenizer_table(ranked: Ranked, frame_success: Bool[Tensor, "policies r t"], *, persist: int) -> dict[str, Any]:
    """True success of policies that saw reconstructed frames, beside true frames and the dream, over the same r starts."""
    assert ranked.truth is not None
    rows, r = [], frame_success.shape[1]
    for i, name in enumerate(ranked.names):
        hits = int(episode_success(frame_success[i], persist=persist).sum())
        rows.append(
            {
                "policy": name,
                "real": float(ranked.truth[i, :r].float().mean()),
                "through": hits / r,
                "through_interval": to_json(wilson(hits, r)),
                "imagined": float(ranked.imagined[i, :r].float().mean()),
            }
        )
    return {"episodes": r, "policies": rows}


def own_actions_table(ranked: Ranked, frame_success: Bool[Tensor, "policies r t"], *, persist: int) -> dict[str, Any]:
    """True success of the very actions that policies took in imagination, beside what imagination said of them."""
    assert ranked.truth is not None
    rows, r = [], frame_success.shape[1]
    for i, name in enumerate(ranked.names):
        own, said = episode_success(frame_success[i], persist=persist), ranked.imagined[i, :r]
        hits, same = int(own.sum()), int((own == said).sum())
        rows.append(
            {
                "policy": name,
                "real": float(ranked.truth[i, :r].float().mean()),
                "own_actions": hits / r,
                "own_actions_interval": to_json(wilson(hits, r)),
                "imagined": float(said.float().mean()),
                "agreement": same / r,
                "agreement_interval": to_json(wilson(same, r)),
            }
        )
    return {"episodes": r, "policies": rows}


def imagine_policy(
    dream: Dream,
    policy: Policy,
    scorer: SuccessScorer,
    starts: Observation,
    *,
    frames: int,
    seed: int,
    batch: int,
    label: str | None,
) -> Rollouts:
    """One imagined rollout from every start, scored."""
    seeds = torch.arange(len(starts)) * 7919 + seed
    return rollout(dream, policy, scorer, starts, frames=frames, seeds=seeds, batch=batch, progress=label)
