"""How well imagined success rates rank and predict real ones, with what can and cannot be concluded from few policies.

Two kinds of uncertainty are kept apart. *Policy level*: would other policies have given the same correlation? (Fisher z,
jackknife, permutation, leave-one-out.) *Rollout level*: would other initial states have, for these very policies?
(`pearson_interval_rollouts`, the scores of a perfect model at the same counts.) What cannot be computed is None, with
the reason in `notes`. Tasks are never pooled: call this once per task.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np
from jaxtyping import Float
from scipy import stats

from worldline.checkpoint import to_json
from worldline.errors import WorldlineError
from worldline.eval.correlation import (
    EXACT_POLICIES,
    correlations,
    pearson,
    pearson_independent,
    pearson_jackknife,
    permutation_p,
)
from worldline.eval.intervals import Interval
from worldline.eval.outcomes import Outcomes, policy_names, read_outcomes, require_pair
from worldline.eval.rank_violation import CONVENTION, PerfectModel, mean_maximum_rank_violation
from worldline.eval.rollout_noise import rollout_level


@dataclass(frozen=True, slots=True, kw_only=True)
class RankStatistics:
    """Agreement of imagined with real success rates over one set of policies. None: undefined, see `notes`.

    `pearson`, `spearman`, `kendall` (tau-b) compare the rates; `mmrv` and `mmrv_sim_gap` are explained by
    `mmrv_convention`. `bias` is the mean of imagined - real. `top1_regret` is how much real success is lost by taking
    the policy that imagination likes best (the average over policies that tie there). The line is
    imagined = intercept + slope * real. `permutation_p` is one-sided (imagined ranks better than chance); no data on n
    policies can push it below `permutation_floor` = 1/n!. `leave_one_out[i]` is r without policy i.
    `pearson_independent` is r over one policy per lineage, the mean over all such choices.
    """

    policies: tuple[str, ...]
    real: tuple[float, ...]
    imagined: tuple[float, ...]
    level: float
    pearson: float | None
    spearman: float | None
    kendall: float | None
    mmrv: float
    mmrv_sim_gap: float
    mmrv_convention: str
    bias: float
    mean_absolute_error: float
    top1_regret: float
    slope: float | None
    intercept: float | None
    pearson_interval_policy: Interval | None
    pearson_jackknife: Interval | None
    leave_one_out: tuple[float | None, ...]
    leave_one_out_range: tuple[float, float] | None
    permutation_p: float | None
    permutation_count: int
    permutation_exact: bool
    permutation_floor: float
    pearson_independent: float | None = None
    pearson_independent_range: tuple[float, float] | None = None
    lineages: tuple[str, ...] | None = None
    pearson_interval_rollouts: Interval | None = None
    mmrv_interval_rollouts: Interval | None = None
    bias_interval_rollouts: Interval | None = None
    mmrv_perfect_floor: PerfectModel | None = None
    pearson_perfect_ceiling: PerfectModel | None = None
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types, one key per field, None kept."""
        return to_json(self)


def rank_statistics(
    real: Outcomes,
    imagined: Outcomes,
    *,
    names: Sequence[str] | None = None,
    lineages: Sequence[str] | None = None,
    paired: bool | None = None,
    real_counts: int | Sequence[int] | None = None,
    imagined_counts: int | Sequence[int] | None = None,
    level: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> RankStatistics:
    """Compare imagined with real success over at least three policies.

    Args:
        real, imagined: success rates, one a policy; or outcomes "policies episodes" (0/1 or probabilities), which add
            the rollout intervals. Rates with `real_counts` and `imagined_counts` add them too (binomial).
        names: of the policies, for the report.
        lineages: the training run each policy comes from; checkpoints of one run are not independent evidence.
        paired: column e is the same initial state for every policy, real and imagined, and is resampled as one; imagined episodes
            may go on from starts that have no real ones. Default: True where both shapes agree.
        level: of every interval.
        resamples: bootstrap resamples and simulated draws.

    Raises:
        WorldlineError: lengths differ, fewer than three policies, values outside [0, 1] or NaN.
    """
    r = read_outcomes(real, name="real", counts=real_counts)
    m = read_outcomes(imagined, name="imagined", counts=imagined_counts)
    require_pair(r, m, at_least=3)
    if not 0 < level < 1:
        raise WorldlineError(f"level: a number between 0 and 1 required (0.95 for 95%), got {level}.")
    notes: list[str] = []
    result = _policy_level(r.rates, m.rates, policy_names(names, len(r)), level, seed, notes)
    if lineages is not None:
        groups = policy_names(lineages, len(r), what="lineages")
        mean, extent = pearson_independent(r.rates, m.rates, groups, seed, notes)
        result = replace(result, lineages=groups, pearson_independent=mean, pearson_independent_range=extent)
    rollouts = rollout_level(r, m, paired=paired, level=level, resamples=resamples, seed=seed, notes=notes)
    return replace(result, **rollouts, notes=tuple(notes))


def _policy_level(
    real: Float[np.ndarray, " policies"],
    imagined: Float[np.ndarray, " policies"],
    names: tuple[str, ...],
    level: float,
    seed: int,
    notes: list[str],
) -> RankStatistics:
    n = len(real)
    chosen = imagined == imagined.max()
    values, line = correlations(real, imagined, level, notes), None
    if np.ptp(real) > 0:
        line = cast(Any, stats.linregress(real, imagined))
    without = tuple(pearson(np.delete(real, i), np.delete(imagined, i)) for i in range(n))
    known = [value for value in without if value is not None]
    defined = values["pearson"] is not None
    p, count = permutation_p(real, imagined, seed) if defined else (None, 0)
    if defined and n > EXACT_POLICIES:
        notes.append(f"permutation p from {count} random permutations: it cannot fall below {1 / (count + 1):.1e}")
    if defined and len(known) < n:
        notes.append(f"leave-one-out: r is undefined without {n - len(known)} of the policies (the rest are tied)")
    return RankStatistics(
        policies=names,
        real=tuple(real.tolist()),
        imagined=tuple(imagined.tolist()),
        level=level,
        **values,
        mmrv=float(mean_maximum_rank_violation(real, imagined)),
        mmrv_sim_gap=float(mean_maximum_rank_violation(real, imagined, gap="imagined")),
        mmrv_convention=CONVENTION,
        bias=float((imagined - real).mean()),
        mean_absolute_error=float(np.abs(imagined - real).mean()),
        top1_regret=float(real.max() - real[chosen].mean()),
        slope=None if line is None else float(line.slope),
        intercept=None if line is None else float(line.intercept),
        pearson_jackknife=pearson_jackknife(values["pearson"], without, level, notes),
        leave_one_out=without,
        leave_one_out_range=(min(known), max(known)) if known else None,
        permutation_p=p,
        permutation_count=count,
        permutation_exact=n <= EXACT_POLICIES,
        permutation_floor=1 / math.factorial(n),
    )
