"""Intervals of proportions and of paired differences, and the one dataclass that carries them.

An `Interval` always says how it was made, so that a report can print the method next to the numbers. Bootstrap
intervals come from `scipy.stats.bootstrap`, those of proportions from statsmodels.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float
from scipy import stats
from statsmodels.stats.proportion import confint_proportions_2indep, proportion_confint
from torch import Tensor

from worldline.errors import WorldlineError

Array = np.ndarray | Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Interval:
    """A two-sided interval at `level` (0.95: 95%), and the method that made it."""

    low: float
    high: float
    level: float
    method: str

    def __contains__(self, value: float) -> bool:
        return self.low <= value <= self.high

    @property
    def width(self) -> float:
        return self.high - self.low


@dataclass(frozen=True, slots=True, kw_only=True)
class PairedDifference:
    """Mean over episodes of a - b. `interval` is None where fewer than two episodes count; `note` says so."""

    mean: float | None
    interval: Interval | None
    episodes: int
    note: str = ""


def wilson(successes: float | int, episodes: float | int, *, level: float = 0.95) -> Interval:
    """Wilson interval of a proportion. Both may be fractional (mean probabilities, effective sample sizes)."""
    low, high = np.asarray(proportion_confint(successes, episodes, alpha=1 - level, method="wilson"))
    return Interval(low=max(0.0, float(low)), high=min(1.0, float(high)), level=level, method="Wilson")


def clopper_pearson(successes: int, episodes: int, *, level: float = 0.95) -> Interval:
    """Exact (conservative) interval of a proportion."""
    low, high = np.asarray(proportion_confint(successes, episodes, alpha=1 - level, method="beta"))
    return Interval(low=float(low), high=float(high), level=level, method="Clopper-Pearson")


def newcombe_paired(a: Float[np.ndarray, " n"], b: Float[np.ndarray, " n"], *, level: float = 0.95) -> Interval:
    """Newcombe's interval (1998, method 10) of the difference of two paired proportions; `a`, `b` hold 0 and 1.

    Wilson limits of either proportion, joined with the correlation of the pairs. Unlike a bootstrap it keeps a width
    when every pair agrees.
    """
    n, pa, pb = len(a), float(a.mean()), float(b.mean())
    wa, wb = wilson(a.sum(), n, level=level), wilson(b.sum(), n, level=level)
    both, neither = float((a * b).sum()), float(((1 - a) * (1 - b)).sum())
    only_a, only_b = float(a.sum()) - both, float(b.sum()) - both
    margins = (both + only_a) * (only_b + neither) * (both + only_b) * (only_a + neither)
    product = both * neither - only_a * only_b
    # Newcombe's continuity correction for a positive association.
    product = max(product - n / 2, 0.0) if product > 0 else product
    phi = product / np.sqrt(margins) if margins > 0 else 0.0
    below_a, above_a, below_b, above_b = pa - wa.low, wa.high - pa, pb - wb.low, wb.high - pb
    down = np.sqrt(max(0.0, below_a**2 - 2 * phi * below_a * above_b + above_b**2))
    up = np.sqrt(max(0.0, above_a**2 - 2 * phi * above_a * below_b + below_b**2))
    difference = pa - pb
    return Interval(
        low=max(-1.0, difference - float(down)),
        high=min(1.0, difference + float(up)),
        level=level,
        method="Newcombe paired",
    )


def newcombe_independent(a: Float[np.ndarray, " n"], b: Float[np.ndarray, " m"], *, level: float = 0.95) -> Interval:
    """Newcombe's interval of the difference of two independent proportions; `a`, `b` hold 0 and 1."""
    low, high = confint_proportions_2indep(
        int(a.sum()), len(a), int(b.sum()), len(b), method="newcomb", compare="diff", alpha=1 - level
    )
    return Interval(low=float(low), high=float(high), level=level, method="Newcombe independent")


def bootstrap_distribution(
    data: tuple[np.ndarray, ...], statistic: Callable[..., Any], *, resamples: int, seed: int, paired: bool = False
) -> np.ndarray:
    """The `resamples` bootstrap values of a vectorised `statistic(*data, axis)`; samples are resampled independently."""
    result = stats.bootstrap(
        data,
        statistic,
        n_resamples=resamples,
        method="percentile",
        vectorized=True,
        paired=paired,
        batch=max(1, 4_000_000 // max(1, sum(len(sample) for sample in data))),
        rng=np.random.default_rng(seed),
    )
    return np.asarray(result.bootstrap_distribution)


def mean_difference_interval(
    a: Float[np.ndarray, " n"], b: Float[np.ndarray, " m"], *, paired: bool, level: float, resamples: int, seed: int
) -> Interval:
    """Percentile bootstrap interval of mean(a) - mean(b), resampling episodes (pairs where `paired`)."""
    if paired:
        draws = bootstrap_distribution((a - b,), np.mean, resamples=resamples, seed=seed)
    else:
        draws = bootstrap_distribution(
            (a, b), lambda x, y, axis: x.mean(axis) - y.mean(axis), resamples=resamples, seed=seed
        )
    low, high = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2])
    method = f"percentile bootstrap over {'pairs' if paired else 'episodes'}, {resamples} resamples"
    return Interval(low=float(low), high=float(high), level=level, method=method)


def paired_interval(
    a: Float[Array, " n"],
    b: Float[Array, " n"],
    *,
    mask: Bool[Array, " n"] | None = None,
    level: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> PairedDifference:
    """Mean difference a - b of one value per episode, with a bootstrap interval over episodes.

    Args:
        a, b: the two methods' values on the same episodes, in the same order.
        mask: episodes that count; the others are left out (a metric that is undefined there). Default: all.

    Raises:
        WorldlineError: a value that counts is NaN or infinite.
    """
    keep = np.ones(len(a), dtype=bool) if mask is None else np.asarray(mask)
    x, y = np.asarray(a, dtype=np.float64)[keep], np.asarray(b, dtype=np.float64)[keep]
    if not (np.isfinite(x).all() and np.isfinite(y).all()):
        raise WorldlineError("paired_interval: finite values required, got NaN or infinite ones; mask those episodes.")
    if len(x) < 2:
        mean = float((x - y).mean()) if len(x) else None
        return PairedDifference(mean=mean, interval=None, episodes=len(x), note="fewer than two episodes count")
    interval = mean_difference_interval(x, y, paired=True, level=level, resamples=resamples, seed=seed)
    return PairedDifference(mean=float((x - y).mean()), interval=interval, episodes=len(x))
