"""Which policies can be told apart: an interval and a p value for every pair, Holm's correction, letters, and how many
more rollouts would settle the neighbours.

Paired outcomes (column e = one initial state) give McNemar's exact test and Newcombe's paired interval; independent ones
give Fisher's exact test and Newcombe's independent interval. Probabilities instead of 0/1 are compared by a permutation
test and a percentile bootstrap. P values are corrected together by Holm's method; intervals are not corrected.

Policies that share a letter are not separable at the corrected level (compact letter display by insertion and
absorption, Piepho 2004).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from math import ceil
from typing import Any, cast

import numpy as np
from jaxtyping import Float
from scipy import stats
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.power import NormalIndPower
from statsmodels.stats.proportion import proportion_effectsize

from worldline.checkpoint import to_json
from worldline.errors import WorldlineError
from worldline.eval.intervals import (
    Interval,
    clopper_pearson,
    mean_difference_interval,
    newcombe_independent,
    newcombe_paired,
    wilson,
)
from worldline.eval.outcomes import Outcomes, policy_names, read_outcomes


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyRate:
    """Success of one policy. `clopper_pearson` is None where outcomes are probabilities."""

    policy: str
    rate: float
    episodes: int
    wilson: Interval
    clopper_pearson: Interval | None
    letters: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Contrast:
    """`difference` = success of `a` minus that of `b`."""

    a: str
    b: str
    difference: float
    interval: Interval
    test: str
    p: float
    p_holm: float
    separable: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutsNeeded:
    """Rollouts of each of two neighbours that would separate them, were the differences seen so far the true ones.

    `total` and `more` are None where the observed difference is 0: no number would do. Two-sided, one comparison (not
    corrected), at `power`.
    """

    a: str
    b: str
    difference: float
    total: int | None
    more: int | None
    power: float
    method: str


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyContrasts:
    """Policies by falling success, every pair of them, and the neighbours in that order."""

    policies: tuple[PolicyRate, ...]
    contrasts: tuple[Contrast, ...]
    neighbours: tuple[RolloutsNeeded, ...]
    level: float
    paired: bool

    def to_dict(self) -> dict[str, Any]:
        return to_json(self)


def policy_contrasts(
    outcomes: Outcomes,
    *,
    names: Sequence[str] | None = None,
    paired: bool | None = None,
    level: float = 0.95,
    power: float = 0.8,
    resamples: int = 2000,
    seed: int = 0,
) -> PolicyContrasts:
    """Compare every pair of policies by their episode outcomes.

    Args:
        outcomes: "policies episodes", 0/1 or probabilities; counts may differ between policies.
        names: of the policies.
        paired: column e is the same initial state for every policy. Default: True where all counts are equal.
        level: of the intervals; 1 - level is the significance level after Holm's correction.

    Raises:
        WorldlineError: rates instead of outcomes, fewer than two policies, or paired with unequal counts.
    """
    data = read_outcomes(outcomes, name="outcomes")
    if data.episodes is None:
        raise WorldlineError("outcomes: 'policies episodes' required to compare policies, got one rate a policy.")
    if len(data) < 2:
        raise WorldlineError(f"outcomes: at least two policies required to compare, got {len(data)}.")
    if paired and data.rectangular is None:
        raise WorldlineError("paired=True: the same number of episodes required for every policy.")
    paired = data.rectangular is not None if paired is None else paired
    order = np.argsort(-data.rates, kind="stable")
    labels = [policy_names(names, len(data))[i] for i in order]
    rows = [data.episodes[i] for i in order]

    pairs = list(combinations(range(len(rows)), 2))
    tests = [_test(rows[i], rows[j], paired, data.binary, resamples, seed) for i, j in pairs]
    rejected, corrected, *_ = multipletests([p for _, p in tests], alpha=1 - level, method="holm")
    letters = letter_display(len(rows), [pair for pair, reject in zip(pairs, rejected) if reject])
    return PolicyContrasts(
        policies=tuple(_rate(*item, data.binary, level) for item in zip(labels, rows, letters)),
        contrasts=tuple(
            Contrast(
                a=labels[i],
                b=labels[j],
                difference=float(rows[i].mean() - rows[j].mean()),
                interval=_interval(rows[i], rows[j], paired, data.binary, level, resamples, seed),
                test=test,
                p=p,
                p_holm=float(p_holm),
                separable=bool(reject),
            )
            for (i, j), (test, p), p_holm, reject in zip(pairs, tests, np.asarray(corrected), rejected)
        ),
        neighbours=tuple(
            _needed(labels[i], labels[i + 1], rows[i], rows[i + 1], paired, data.binary, level, power)
            for i in range(len(rows) - 1)
        ),
        level=level,
        paired=paired,
    )


def letter_display(policies: int, separable: Sequence[tuple[int, int]]) -> list[str]:
    """Letters such that two policies share one exactly when their pair is not in `separable`."""
    groups = [set(range(policies))]
    for i, j in separable:
        split: list[set[int]] = []
        for group in groups:
            split += [group - {i}, group - {j}] if {i, j} <= group else [group]
        groups = []
        for k, group in enumerate(split):  # absorb: drop what another group holds
            bigger = any(group < other or (group == other and m < k) for m, other in enumerate(split) if m != k)
            if not bigger:
                groups.append(group)
    groups.sort(key=sorted)
    return ["".join(_letter(k) for k, group in enumerate(groups) if i in group) for i in range(policies)]


def _letter(index: int) -> str:
    return chr(ord("a") + index) if index < 26 else f"({index + 1})"


def _rate(name: str, row: Float[np.ndarray, " n"], letters: str, binary: bool, level: float) -> PolicyRate:
    return PolicyRate(
        policy=name,
        rate=float(row.mean()),
        episodes=len(row),
        wilson=wilson(float(row.sum()), len(row), level=level),
        clopper_pearson=clopper_pearson(int(row.sum()), len(row), level=level) if binary else None,
        letters=letters,
    )


def _test(
    a: Float[np.ndarray, " n"], b: Float[np.ndarray, " m"], paired: bool, binary: bool, resamples: int, seed: int
) -> tuple[str, float]:
    if binary and paired:
        only_a, only_b = int((a > b).sum()), int((b > a).sum())
        if only_a + only_b == 0:
            return "McNemar exact", 1.0  # no initial state tells them apart
        return "McNemar exact", float(cast(Any, mcnemar([[0, only_a], [only_b, 0]], exact=True)).pvalue)
    if binary:
        table = [[int(a.sum()), int(len(a) - a.sum())], [int(b.sum()), int(len(b) - b.sum())]]
        return "Fisher exact", float(cast(Any, stats.fisher_exact(table)).pvalue)
    result = stats.permutation_test(
        (a, b),
        lambda x, y, axis: x.mean(axis) - y.mean(axis),
        permutation_type="samples" if paired else "independent",
        vectorized=True,
        n_resamples=max(resamples, 9999),
        rng=np.random.default_rng(seed),
    )
    return "permutation, paired" if paired else "permutation, independent", float(result.pvalue)


def _interval(
    a: Float[np.ndarray, " n"],
    b: Float[np.ndarray, " m"],
    paired: bool,
    binary: bool,
    level: float,
    resamples: int,
    seed: int,
) -> Interval:
    if binary:
        return newcombe_paired(a, b, level=level) if paired else newcombe_independent(a, b, level=level)
    return mean_difference_interval(a, b, paired=paired, level=level, resamples=resamples, seed=seed)


def _needed(
    name_a: str,
    name_b: str,
    a: Float[np.ndarray, " n"],
    b: Float[np.ndarray, " m"],
    paired: bool,
    binary: bool,
    level: float,
    power: float,
) -> RolloutsNeeded:
    """Closed forms: Connor 1987 for McNemar, z for mean differences; statsmodels' arcsine z for two proportions."""
    difference = float(a.mean() - b.mean())
    z_alpha, z_power = float(stats.norm.ppf((1 + level) / 2)), float(stats.norm.ppf(power))
    total: float | None = None
    if paired and binary:
        method, discordant = "Connor 1987 (McNemar)", float((a != b).mean())
        if difference:
            spread = z_alpha * discordant**0.5 + z_power * max(0.0, discordant - difference**2) ** 0.5
            total = float(spread / difference) ** 2
    elif binary:
        method = "two proportions, arcsine effect size, z test"
        if difference:
            effect = proportion_effectsize(a.mean(), b.mean())
            total = float(cast(Any, NormalIndPower().solve_power(effect, alpha=1 - level, power=power)))
    else:
        method = "z test of paired differences" if paired else "z test of two means"
        variance = float((a - b).var(ddof=1)) if paired else float(a.var(ddof=1) + b.var(ddof=1))
        if difference:
            total = variance * float((z_alpha + z_power) / difference) ** 2
    have = min(len(a), len(b))
    return RolloutsNeeded(
        a=name_a,
        b=name_b,
        difference=difference,
        total=None if total is None else ceil(total),
        more=None if total is None else max(0, ceil(total) - have),
        power=power,
        method=method,
    )
