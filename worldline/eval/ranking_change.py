"""Does one world model rank better than another? The same policies from the same starts, judged by both; differences are paired over starts.

The intervals say what other starts would have given for these very policies, not what other policies would have.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float

from worldline.checkpoint import to_json
from worldline.errors import WorldlineError
from worldline.eval.correlation import pearson_draws
from worldline.eval.rank_violation import mean_maximum_rank_violation
from worldline.eval.rollout_noise import shared_rates

Rates = Float[np.ndarray, "*draws policies"]
MEASURES: Mapping[str, Callable[[Rates, Rates], np.ndarray]] = {
    "pearson": pearson_draws,
    "mmrv": mean_maximum_rank_violation,
    "bias": lambda real, imagined: (imagined - real).mean(-1),
    "mean_absolute_error": lambda real, imagined: np.abs(imagined - real).mean(-1),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Changed:
    """A measure under both models. None: undefined (rates that are all equal), or, of the interval, in most resamples."""

    before: float | None
    after: float | None
    low: float | None  # of after - before
    high: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class RankingChange:
    """`measures` by the names of `MEASURES`."""

    policies: tuple[str, ...]
    episodes: int
    level: float
    measures: Mapping[str, Changed]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return to_json(self)


def ranking_change(
    real: Float[np.ndarray, "_p r"],
    before: Float[np.ndarray, "_p n"],
    after: Float[np.ndarray, "_p _n"],
    *,
    names: tuple[str, ...],
    level: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> RankingChange:
    """Compare two models' imagined outcomes (0/1) with the true ones.

    Args:
        real: of the first r starts. before, after: of all n starts, in the same order.

    Raises `WorldlineError` for fewer than three policies, or other shapes than these.
    """
    r, n = real.shape[1], before.shape[1]
    if len(real) < 3 or before.shape != after.shape or len(before) != len(real) or r > n:
        raise WorldlineError(
            "the same three policies or more, judged by both models from the same starts, which hold the true ones, are required; got true "
            f"outcomes {real.shape}, imagined {before.shape} and {after.shape} (policies, episodes)"
        )
    true, earlier, later = shared_rates(
        *(x.astype(float) for x in (real, before, after)), resamples=resamples, seed=seed
    )
    found = {}
    for name, measure in MEASURES.items():
        first, last = (float(measure(real.mean(1), made.mean(1))) for made in (before, after))
        change = measure(true, later) - measure(true, earlier)
        known = change[np.isfinite(change)]
        ends = [None, None]
        if len(known) >= 0.5 * resamples:
            ends = [float(q) for q in np.quantile(known, [(1 - level) / 2, (1 + level) / 2])]
        found[name] = Changed(before=_defined(first), after=_defined(last), low=ends[0], high=ends[1])
    return RankingChange(policies=names, episodes=r, level=level, measures=found)


def _defined(value: float) -> float | None:
    return value if np.isfinite(value) else None
