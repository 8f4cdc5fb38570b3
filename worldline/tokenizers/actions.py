"""Two-hot action codes: each value as weights on two neighbouring bins (World4RL 2509.19080, section III-B).

    bins  -1 ... -0.2  -0.1   0.0   0.1 ...  1        value 0.07
    code       0  0     0     0.3   0.7   0  ...      weights (0.1 - 0.07) / 0.1 and (0.07 - 0) / 0.1

The code of a value within the bins' ends is exact: the bins' mean under the weights is the value. Values beyond the ends go to
the end's bin. As a network's input it is a piecewise linear basis; as a target it makes a categorical head learn a mean.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class TwoHot:
    """Codes of `bins` evenly spaced values from `low` to `high`, the same for every dimension of normalised actions."""

    bins: int = 21
    low: float = -1.0
    high: float = 1.0

    def __post_init__(self) -> None:
        if self.bins < 2 or not self.low < self.high:
            raise ValueError(f"at least 2 bins and low < high required, got {self.bins} from {self.low} to {self.high}")

    @property
    def values(self) -> Float[Tensor, " bins"]:
        return torch.linspace(self.low, self.high, self.bins)

    def encode(self, actions: Float[Tensor, "*rows"]) -> Float[Tensor, "*rows bins"]:
        """Weights that sum to 1, at most two of them not 0. Raises `ValueError` for NaN."""
        if actions.isnan().any():
            raise ValueError(f"actions without NaN required, got {int(actions.isnan().sum())} of {actions.numel()}")
        place = (actions.double().clamp(self.low, self.high) - self.low) / (self.high - self.low) * (self.bins - 1)
        below = place.floor().clamp(max=self.bins - 2)
        above = (place - below).to(actions.dtype)
        code = actions.new_zeros(*actions.shape, self.bins)
        code.scatter_(-1, below.long()[..., None], 1 - above[..., None])
        return code.scatter_(-1, below.long()[..., None] + 1, above[..., None])

    def decode(self, code: Float[Tensor, "*rows bins"]) -> Float[Tensor, "*rows"]:
        """The mean of the bins under weights or probabilities."""
        return (code * self.values.to(code)).sum(-1)

    def nearest(self, actions: Float[Tensor, "*rows"]) -> Int[Tensor, "*rows"]:
        """The number of the nearest bin."""
        return self.encode(actions).argmax(-1)
