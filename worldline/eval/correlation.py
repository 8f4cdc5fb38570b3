"""Correlations of a handful of policies: point values, intervals over policies, permutation p, lineages.

Where a correlation is undefined (all rates equal) the functions return None and append the reason to `notes`.
"""

import itertools
import math
from typing import Any, cast

import numpy as np
from jaxtyping import Float
from scipy import stats

from worldline.eval.intervals import Interval

EXACT_POLICIES = 8  # all 8! = 40320 permutations; more policies are sampled
MONTE_CARLO = 20_000
LINEAGE_CHOICES = 10_000


def correlations(
    real: Float[np.ndarray, " n"], imagined: Float[np.ndarray, " n"], level: float, notes: list[str]
) -> dict[str, Any]:
    """The three correlations and the Fisher interval of the first."""
    names = ("pearson", "spearman", "kendall", "pearson_interval_policy")
    for label, rates in (("real", real), ("imagined", imagined)):
        if np.ptp(rates) == 0:
            notes.append(f"correlations undefined: all {label} rates equal {rates[0]:g}")
            return dict.fromkeys(names)
    r = cast(Any, stats.pearsonr(real, imagined))
    interval = None
    if len(real) < 4:
        notes.append("Fisher z interval needs four policies")
    elif abs(r.statistic) > 1 - 1e-12:
        notes.append("Fisher z interval undefined: r is exactly ±1")
    else:
        low, high = r.confidence_interval(level)
        interval = Interval(low=float(low), high=float(high), level=level, method=f"Fisher z, {len(real)} policies")
    values = (r, cast(Any, stats.spearmanr(real, imagined)), cast(Any, stats.kendalltau(real, imagined)))
    return dict(zip(names, (*(float(value.statistic) for value in values), interval)))


def pearson(real: Float[np.ndarray, " n"], imagined: Float[np.ndarray, " n"]) -> float | None:
    """r, or None where it is undefined."""
    if len(real) < 2 or np.ptp(real) == 0 or np.ptp(imagined) == 0:
        return None
    return float(np.corrcoef(real, imagined)[0, 1])


def pearson_draws(real: Float[np.ndarray, "*draws n"], imagined: Float[np.ndarray, "*draws n"]) -> np.ndarray:
    """r of every draw, NaN where a draw's rates are all equal; the caller counts and names those."""
    x, y = real - real.mean(-1, keepdims=True), imagined - imagined.mean(-1, keepdims=True)
    scale = np.sqrt((x**2).sum(-1) * (y**2).sum(-1))
    return np.divide((x * y).sum(-1), scale, out=np.full(scale.shape, np.nan), where=scale > 1e-12)


def permutation_p(real: Float[np.ndarray, " n"], imagined: Float[np.ndarray, " n"], seed: int) -> tuple[float, int]:
    """One-sided p of r under random pairings, and how many pairings were looked at."""
    exact = len(real) <= EXACT_POLICIES
    count = math.factorial(len(real)) if exact else MONTE_CARLO
    result = stats.permutation_test(
        (imagined,),
        lambda x, axis: pearson_draws(np.broadcast_to(real, x.shape), x),  # scipy passes axis=-1
        permutation_type="pairings",
        vectorized=True,
        n_resamples=cast(Any, np.inf) if exact else count,  # scipy's way to say all of them
        alternative="greater",
        rng=np.random.default_rng(seed),
    )
    return float(result.pvalue), count


def pearson_jackknife(
    r: float | None, without: tuple[float | None, ...], level: float, notes: list[str]
) -> Interval | None:
    """Jackknife over policies on the Fisher z scale, Student t with n - 1 degrees of freedom."""
    n = len(without)
    values = [value for value in without if value is not None]
    if r is None:
        return None
    if n < 4 or len(values) < n or max(map(abs, (*values, r))) > 1 - 1e-12:
        notes.append("jackknife interval needs four policies and every leave-one-out r strictly within ±1")
        return None
    z = np.arctanh(values)
    half = stats.t.ppf((1 + level) / 2, n - 1) * np.sqrt((n - 1) / n * ((z - z.mean()) ** 2).sum())
    low, high = np.tanh([np.arctanh(r) - half, np.arctanh(r) + half])
    return Interval(
        low=float(low), high=float(high), level=level, method=f"jackknife over {n} policies, Fisher z scale"
    )


def pearson_independent(
    real: Float[np.ndarray, " n"],
    imagined: Float[np.ndarray, " n"],
    lineages: tuple[str, ...],
    seed: int,
    notes: list[str],
) -> tuple[float | None, tuple[float, float] | None]:
    """Mean and range of r over all choices of one policy per lineage (10,000 random ones where there are more)."""
    groups = [[i for i, other in enumerate(lineages) if other == name] for name in dict.fromkeys(lineages)]
    if len(groups) < 3:
        notes.append(f"r over independent lineages needs three of them, got {len(groups)}")
        return None, None
    if math.prod(len(group) for group in groups) <= LINEAGE_CHOICES:
        choices = np.array(list(itertools.product(*groups)))
    else:
        rng = np.random.default_rng(seed)
        choices = np.stack([rng.choice(group, LINEAGE_CHOICES) for group in groups], axis=1)
    values = pearson_draws(real[choices], imagined[choices])
    known = values[np.isfinite(values)]
    if len(known) < len(values):
        notes.append(f"r over lineages undefined for {len(values) - len(known)} of {len(values)} choices (tied rates)")
    if not len(known):
        return None, None
    return float(known.mean()), (float(known.min()), float(known.max()))
