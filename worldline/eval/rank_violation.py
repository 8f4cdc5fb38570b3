"""Mean maximum rank violation (SIMPLER, Li et al. 2024, arXiv:2405.05941), and what a perfect model would score.

SIMPLER: violation(i, j) = |real_i - real_j| * 1[(imagined_i < imagined_j) != (real_i < real_j)], strict orders; MMRV is
the mean over i of the maximum over j. A pair tied in imagination alone is charged once, to the policy that is really
the worse. Some papers weigh a violation by the *imagined* gap instead, which is kinder where imagined rates are
compressed; both are offered, by name, because printed numbers use either.

Even a perfect model has MMRV above 0: it draws a finite number of outcomes. The floor here is the posterior predictive
one: true rates drawn from Beta(1/2 + successes, 1/2 + failures) given the real rollouts, imagined outcomes from
them, the real rates held as measured. It is about a model that is right in distribution; one that reproduces every
episode's own outcome scores 0.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Float

Gap = Literal["real", "imagined"]
CONVENTION = (
    "mmrv: SIMPLER's, strict orders, violation weighed by the real gap; "
    "mmrv_sim_gap: the same weighed by the imagined gap"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class PerfectModel:
    """What a model with the true success rates scores at the same episode counts: mean and central band over draws."""

    mean: float
    low: float
    high: float
    level: float
    draws: int


def mean_maximum_rank_violation(
    real: Float[np.ndarray, "*draws policies"], imagined: Float[np.ndarray, "*draws policies"], *, gap: Gap = "real"
) -> Float[np.ndarray, "*draws"]:
    """MMRV of every draw (0 is best); `gap` says which rates weigh a violation."""
    violated = (imagined[..., :, None] < imagined[..., None, :]) != (real[..., :, None] < real[..., None, :])
    weight = real if gap == "real" else imagined
    return np.asarray((np.abs(weight[..., :, None] - weight[..., None, :]) * violated).max(-1).mean(-1))


def perfect_model_draws(
    real: Float[np.ndarray, " policies"],
    real_counts: Sequence[int],
    imagined_counts: Sequence[int],
    *,
    draws: int,
    seed: int,
) -> Float[np.ndarray, "draws policies"]:
    """Imagined rates that a model with the true success rates would show (posterior predictive, see the module)."""
    rng = np.random.default_rng(seed)
    n, m = np.asarray(real_counts), np.asarray(imagined_counts)
    true = rng.beta(real * n + 0.5, (1 - real) * n + 0.5, size=(draws, len(real)))
    return rng.binomial(m, true) / m


def summarise(values: Float[np.ndarray, " draws"], *, level: float) -> PerfectModel:
    """Mean and central band of simulated values."""
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return PerfectModel(mean=float(values.mean()), low=float(low), high=float(high), level=level, draws=len(values))
