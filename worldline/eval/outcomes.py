"""Success rates and episode outcomes of several policies, checked once and then trusted by every statistic.

Two forms are accepted wherever a function takes `real` or `imagined`: one success rate a policy (1-D), or the outcomes
of every episode (2-D "policies episodes", or one sequence a policy where the counts differ). Outcomes are 0 or 1, or
success probabilities from a scorer. Only outcomes (or rates with counts) carry rollout noise.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from jaxtyping import Float
from torch import Tensor

from worldline.errors import WorldlineError

Outcomes: TypeAlias = Sequence[Any] | np.ndarray | Tensor
"""Rates "policies", or outcomes "policies episodes"; lists of unequal length are allowed for the latter."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyOutcomes:
    """Checked outcomes. `episodes` is None where only rates are known; `counts` is None where nobody said how many."""

    rates: Float[np.ndarray, " policies"]
    episodes: tuple[Float[np.ndarray, " _"], ...] | None
    counts: tuple[int, ...] | None

    def __len__(self) -> int:
        return len(self.rates)

    @property
    def rectangular(self) -> Float[np.ndarray, "policies episodes"] | None:
        """The outcomes as one array where every policy has the same number of episodes, else None."""
        if self.episodes is None or len({len(row) for row in self.episodes}) != 1:
            return None
        return np.stack(self.episodes)

    @property
    def binary(self) -> bool:
        """True where every episode outcome is exactly 0 or 1."""
        return self.episodes is not None and all(bool(np.isin(row, (0.0, 1.0)).all()) for row in self.episodes)


def read_outcomes(values: Outcomes, *, name: str, counts: int | Sequence[int] | None = None) -> PolicyOutcomes:
    """Check `values` (rates or outcomes) and return them as float64.

    Args:
        values: rates "policies" or outcomes "policies episodes", each in [0, 1].
        name: what to call them in error messages.
        counts: episodes behind each rate; one number for all policies or one each. Only with rates.

    Raises:
        WorldlineError: values outside [0, 1], NaN, empty rows, more than two axes, or counts that do not fit.
    """
    rows = [np.asarray(_numpy(value), dtype=np.float64) for value in values]
    if not rows:
        raise WorldlineError(f"{name}: success rates or outcomes of some policies required, got none.")
    shapes = {row.ndim for row in rows}
    if shapes not in ({0}, {1}):
        raise WorldlineError(
            f"{name}: one rate a policy (1-D) or 'policies episodes' (2-D) required, got rows with {sorted(shapes)} axes."
        )
    for policy, row in enumerate(rows):
        if row.size == 0:
            raise WorldlineError(f"{name}: policy {policy} has no episodes; evaluate it or leave it out.")
        if np.isnan(row).any():
            raise WorldlineError(f"{name}: policy {policy} holds NaN; leave unscored episodes out before ranking.")
        if row.min() < 0 or row.max() > 1:
            raise WorldlineError(
                f"{name}: values in [0, 1] required, policy {policy} has [{row.min():g}, {row.max():g}]. "
                "Divide percentages by 100; pass success, not return."
            )
    if shapes == {1}:
        if counts is not None:
            raise WorldlineError(
                f"{name}: counts come with rates only; episode outcomes already say how many they are."
            )
        return PolicyOutcomes(
            rates=np.array([row.mean() for row in rows]), episodes=tuple(rows), counts=tuple(len(row) for row in rows)
        )
    return PolicyOutcomes(rates=np.array(rows), episodes=None, counts=_counts(counts, len(rows), name))


def require_pair(real: PolicyOutcomes, imagined: PolicyOutcomes, *, at_least: int) -> None:
    """Raise `WorldlineError` unless both name the same number of policies, `at_least` of them."""
    if len(real) != len(imagined):
        raise WorldlineError(
            f"real and imagined must name the same policies in the same order, got {len(real)} and {len(imagined)}."
        )
    if len(real) < at_least:
        raise WorldlineError(
            f"at least {at_least} policies required, got {len(real)}; a ranking of fewer says nothing."
        )


def policy_names(names: Sequence[str] | None, count: int, *, what: str = "names") -> tuple[str, ...]:
    """`names` checked to be `count` distinct strings, or "policy 0", "policy 1", ... where None."""
    if names is None:
        return tuple(f"policy {i}" for i in range(count))
    if len(names) != count:
        raise WorldlineError(f"{what}: one per policy required ({count}), got {len(names)}.")
    if what == "names" and len(set(names)) != count:
        raise WorldlineError(f"{what}: must differ from each other, got {list(names)}.")
    return tuple(names)


def _numpy(value: Any) -> Any:
    return value.detach().cpu().numpy() if isinstance(value, Tensor) else value


def _counts(counts: int | Sequence[int] | None, policies: int, name: str) -> tuple[int, ...] | None:
    if counts is None:
        return None
    result = (counts,) * policies if isinstance(counts, int) else tuple(int(count) for count in counts)
    if len(result) != policies or min(result) < 1:
        raise WorldlineError(f"{name}: one episode count >= 1 per policy required ({policies}), got {list(result)}.")
    return result
