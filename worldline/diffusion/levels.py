"""Which noise levels training shows, and which sampling asks for. The second must be covered by the first.

Levels in training carry atoms at exactly 0 and 1, since sampling conditions on exactly clean frames and starts from
exactly pure noise: a continuous distribution would meet neither.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class LevelDistribution:
    """Mixture of an atom at 0, an atom at 1 and a uniform on [low, high].

    The uniform part takes what the atoms leave. `contains` says whether a level can be met in training.
    """

    clean: float = 0.0  # probability of exactly 0
    pure: float = 0.0  # probability of exactly 1
    low: float = 0.0  # least of the other levels, which are drawn evenly
    high: float = 1.0  # largest of them

    def __post_init__(self) -> None:
        if not (self.clean >= 0 and self.pure >= 0 and self.clean + self.pure <= 1):
            raise ValueError(
                f"atoms must be probabilities that sum to at most 1, got clean={self.clean}, pure={self.pure}"
            )
        if not 0 <= self.low <= self.high <= 1:
            raise ValueError(f"0 <= low <= high <= 1 required, got low={self.low}, high={self.high}")

    def sample(self, shape: tuple[int, ...], generator: torch.Generator | None = None) -> Float[Tensor, "..."]:
        kind = torch.rand(shape, generator=generator)
        uniform = self.low + (self.high - self.low) * torch.rand(shape, generator=generator)
        level = torch.where(kind < self.clean, torch.zeros(()), uniform)
        return torch.where(kind >= 1 - self.pure, torch.ones(()), level)

    def contains(self, level: float) -> bool:
        uniform = self.clean + self.pure < 1 and self.low <= level <= self.high
        return uniform or (level == 0 and self.clean > 0) or (level == 1 and self.pure > 0)


def solver_levels(steps: int) -> Float[Tensor, " levels"]:
    """The levels a solver visits: `steps` + 1 values from exactly 1 to exactly 0, evenly spaced."""
    if steps < 1:
        raise ValueError(f"a solver needs at least 1 step, got {steps}")
    return torch.linspace(1, 0, steps + 1)
