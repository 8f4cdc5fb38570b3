"""Excess error: how much worse a dream is at frame 100 than at frame 10, and how two models compare in it.

The early frames hold what a model gets wrong from the start (its tokenizer, its sharpness); what is added later is drift.
Both ends are averages over a small band of frames, because one frame's error depends on what the arm happens to do then,
and over frames in which the real video still moves: an arm that has stopped makes late frames easy.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from worldline.checkpoint import read_json
from worldline.errors import WorldlineError
from worldline.eval.intervals import Interval, bootstrap_distribution
from worldline.eval.protocol import PROTOCOL


@dataclass(frozen=True, slots=True, kw_only=True)
class Excess:
    """Each episode's mean error in both bands, in the unit of the error; NaN where `defined` is False."""

    early: Float[Tensor, " n"]
    late: Float[Tensor, " n"]
    defined: Bool[Tensor, " n"]
    bands: tuple[tuple[int, int], tuple[int, int]]  # first and last imagined frame of each

    @property
    def excess(self) -> Float[Tensor, " n"]:
        return self.late - self.early


@dataclass(frozen=True, slots=True, kw_only=True)
class ExcessRatio:
    """Mean excess of one model over that of another. `ratio` and `interval` are None where `note` says why."""

    ratio: float | None
    interval: Interval | None
    ours: float
    base: float
    base_interval: Interval
    episodes: int
    note: str = ""


def bands_within(
    frames: int, *, around: tuple[int, int] = PROTOCOL.excess_frames, band: int = PROTOCOL.excess_band
) -> tuple[tuple[int, int], tuple[int, int]]:
    """First and last frame of both bands, of imagined frames 1 to `frames`.

    The late band ends where the frames end. Raises `WorldlineError` if not even its middle is reached.
    """
    early, late = around
    if frames < late:
        raise WorldlineError(
            f"excess error: imagined frame {late} required, the rollouts reach frame {frames}. "
            f"Evaluate longer episodes, or with --frames {late + band + 1}."
        )
    return (max(1, early - band), early + band), (late - band, min(frames, late + band))


def excess_error(
    error: Float[Tensor, "n t"],
    counts: Bool[Tensor, "n t"],
    *,
    around: tuple[int, int] = PROTOCOL.excess_frames,
    band: int = PROTOCOL.excess_band,
    least: int = PROTOCOL.excess_least,
) -> Excess:
    """Mean error around the late frame and around the early one, per episode.

    Args:
        error: of imagined frames 1 to t; may be NaN where `counts` is False.
        counts: the frames that are averaged: those in motion.
        around: the early and the late imagined frame, from 1.
        band: frames to either side that are averaged with it.
        least: an episode with fewer frames that count in either band is not defined.

    Raises:
        WorldlineError: fewer than `around[1]` frames.
    """
    bands = bands_within(error.shape[1], around=around, band=band)
    means, enough = [], []
    for first, last in bands:
        values, mask = error[:, first - 1 : last], counts[:, first - 1 : last]
        n = mask.sum(1)
        means.append(torch.where(mask, values, torch.zeros_like(values)).sum(1) / n.clamp(min=1))
        enough.append(n >= least)
    defined = enough[0] & enough[1]
    early, late = (m.masked_fill(~defined, torch.nan) for m in means)
    return Excess(early=early, late=late, defined=defined, bands=bands)


def excess_ratio(
    ours: Float[np.ndarray, " n"],
    base: Float[np.ndarray, " _n"],
    *,
    level: float = PROTOCOL.level,
    resamples: int = 4000,
    seed: int = 0,
) -> ExcessRatio:
    """Ratio of the mean excess errors of two models on the same episodes, with a percentile bootstrap over pairs.

    A ratio says something only if the base drifts: unless the whole interval of its mean lies above zero, `ratio` is None
    and `note` says so. Resamples in which the base does not drift then are fewer than those beyond the upper end, and
    count as the largest.

    Args:
        ours, base: one value per episode, in the same order; NaN marks an episode that is not defined, and leaves the
            pair out.

    Raises:
        WorldlineError: other lengths, infinite values, or fewer than two pairs.
    """
    if ours.shape != base.shape:
        raise WorldlineError(f"excess_ratio: the same episodes required, got {len(ours)} and {len(base)} values.")
    keep = ~(np.isnan(ours) | np.isnan(base))
    x, y = np.asarray(ours, np.float64)[keep], np.asarray(base, np.float64)[keep]
    if len(x) < 2 or not (np.isfinite(x).all() and np.isfinite(y).all()):
        raise WorldlineError(
            f"excess_ratio: at least two episodes with finite values in both required, got {len(x)} of {len(ours)}."
        )
    draws = bootstrap_distribution(
        (x, y), lambda a, b, axis: np.stack([a.mean(axis), b.mean(axis)]), resamples=resamples, seed=seed, paired=True
    )
    method = f"percentile bootstrap over pairs, {resamples} resamples"
    ends = (1 - level) / 2, (1 + level) / 2
    low, high = np.quantile(draws[1], ends, method="inverted_cdf")
    of_base = Interval(low=float(low), high=float(high), level=level, method=method)
    found: dict[str, Any] = {"ours": float(x.mean()), "base": float(y.mean()), "base_interval": of_base}
    if not low > 0:
        note = (
            f"no ratio: the base's mean excess {y.mean():.4g} [{low:.4g}, {high:.4g}] is not told from zero or below "
            f"on {len(y)} episodes"
        )
        return ExcessRatio(ratio=None, interval=None, episodes=len(x), note=note, **found)
    ratios = np.full(draws.shape[1], np.inf)
    np.divide(draws[0], draws[1], out=ratios, where=draws[1] > 0)
    low, high = np.quantile(np.sort(ratios), ends, method="inverted_cdf")
    interval = Interval(low=float(low), high=float(high), level=level, method=method)
    return ExcessRatio(ratio=float(x.mean() / y.mean()), interval=interval, episodes=len(x), **found)


def excess_ratio_of_reports(
    ours: Path, base: Path, *, predictor: str = "true", camera: str = "all", level: float = PROTOCOL.level
) -> ExcessRatio:
    """`excess_ratio` of two `report.json` files (or their folders) of `worldline eval`, paired by episode number.

    Args:
        predictor, camera: keys of `results.drift.excess.predictors`.

    Raises:
        WorldlineError: a report without excess errors, other protocol versions, bands or data, or no two episodes shared.
    """
    found = [_excess_of(path, predictor, camera) for path in (ours, base)]
    (settings, mine), (other_settings, theirs) = found
    if settings != other_settings:
        raise WorldlineError(
            f"excess_ratio: reports of one protocol, the same bands and the same data required, got {settings} in {ours} "
            f"and {other_settings} in {base}. Evaluate both with the same version, --frames and --data."
        )
    shared = sorted(mine.keys() & theirs.keys())
    return excess_ratio(
        np.array([mine[i] for i in shared], np.float64), np.array([theirs[i] for i in shared], np.float64), level=level
    )


def _excess_of(path: Path, predictor: str, camera: str) -> tuple[dict[str, Any], dict[int, float]]:
    """The settings and the excess error by episode of one report."""
    file = path / "report.json" if path.is_dir() else path
    report: Mapping[str, Any] = read_json(file)
    results: Mapping[str, Any] = report.get("results", {})
    if "drift" not in results:
        raise WorldlineError(f"{file}: a report of `worldline eval` with drift required, it has none. Evaluate again.")
    excess = results["drift"]["excess"]
    if excess["reason"]:
        raise WorldlineError(f"{file}: no excess error in it: {excess['reason']}")
    cells = excess["predictors"].get(predictor, {})
    if camera not in cells:
        known = {name: sorted(per_camera) for name, per_camera in excess["predictors"].items()}
        raise WorldlineError(f"{file}: predictor {predictor!r} of camera {camera!r} required, got {known}.")
    values = cells[camera]["per_episode"]
    settings = {
        "version": results.get("protocol", {}).get("version"),
        "bands": excess["bands"],
        "data_fingerprint": report.get("provenance", {}).get("data_fingerprint"),
    }
    return settings, {i: np.nan if v is None else v for i, v in zip(excess["episodes"], values, strict=True)}
