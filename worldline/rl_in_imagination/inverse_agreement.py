"""How well actions read off frames agree with commanded ones, on a scale that held-out real clips have set.

Per action dimension, by head:

    continuous   exp(-(read - commanded)^2 / (2 tolerance^2))
    binned       the probability that the reading puts within `tolerance` (whole bins) of the commanded value

The tolerance is the one that tells commanded actions best from other ones on held-out real clips (the largest gap between the two means):
tight for a reader that reads well, wide for one that does not. Dimensions are weighted by how well they can be read (R2 on the same
clips); those that never change, or are read hardly better than by guessing, do not count and are named.

`chance` is what one constant guess would get, the best there is: the agreement to be had without looking. It depends on the task (where
most commands are alike it is high), so results also state the **skill**, (agreement - chance) / (1 - chance): 1 is perfect, 0 a guess.
With Gaussian actions:

    R2            0.99   0.95   0.90   0.75   0.50
    agreement     0.89   0.87   0.78   0.77   0.65
    chance        0.20   0.37   0.37   0.51   0.51
    skill         0.87   0.80   0.66   0.52   0.27
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

LEAST_R2 = 0.1  # a dimension read worse than this does not count
FRACTIONS = (
    0.05,
    0.1,
    0.15,
    0.2,
    0.3,
    0.4,
    0.5,
    0.6,
    0.8,
    1.0,
)  # tolerances tried, in standard deviations of the action
SLACK = 1 + 1e-5  # bins a whole tolerance away count as within it
GUESSES = 101  # constant guesses tried between the smallest and the largest action


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """What an inverse model reads: q = 1 (the mean of a block) or k values of each action dimension, in physical units.

    `value` is the mean, `std` the uncertainty it states. `levels` "a bins" and `probability` are those of a binned head, else None.
    """

    value: Float[Tensor, "*n q a"]
    std: Float[Tensor, "*n q a"]
    levels: Float[Tensor, "a bins"] | None = None
    probability: Float[Tensor, "*n q a bins"] | None = None

    def at(self, index: Any) -> "Reading":
        """The readings at an index of the leading axes."""
        chosen = None if self.probability is None else self.probability[index]
        return Reading(value=self.value[index], std=self.std[index], levels=self.levels, probability=chosen)


def joined(readings: Sequence[Reading]) -> Reading:
    """Readings of one model, one after another."""
    probabilities = [r.probability for r in readings if r.probability is not None]
    return Reading(
        value=torch.cat([r.value for r in readings]),
        std=torch.cat([r.std for r in readings]),
        levels=readings[0].levels,
        probability=torch.cat(probabilities) if probabilities else None,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """What held-out real clips say of an inverse model, one number an action dimension.

    `tolerance` is in physical units. `weight` adds up to 1, or is 0 everywhere if nothing can be read. `left_out` names dimensions that
    do not count, with the reason. `transitions` is how many it was made on.
    """

    names: tuple[str, ...]
    r2: tuple[float, ...]
    tolerance: tuple[float, ...]
    weight: tuple[float, ...]
    chance_by_dimension: tuple[float, ...]
    left_out: tuple[str, ...]
    transitions: int

    @property
    def chance(self) -> float:
        """Agreement of the best constant guess."""
        return sum(w * c for w, c in zip(self.weight, self.chance_by_dimension))

    def weighted(self, each: Float[Tensor, "*n a"]) -> Float[Tensor, "*n"]:
        """The weighted mean over dimensions; 0 if none counts."""
        return (each * torch.tensor(self.weight).to(each)).sum(-1)

    def by_dimension(self, reading: Reading, commanded: Float[Tensor, "*n q a"]) -> Float[Tensor, "*n a"]:
        """Agreement of each dimension in [0, 1], the mean over the q values."""
        return agreement_of(reading, commanded, torch.tensor(self.tolerance).to(commanded)).mean(-2)

    def agreement(self, reading: Reading, commanded: Float[Tensor, "*n q a"]) -> Float[Tensor, "*n"]:
        """Agreement in [0, 1]: the dimensions' weighted mean; 0 everywhere if no dimension counts."""
        return self.weighted(self.by_dimension(reading, commanded))


def skill(agreement: Any, chance: Any) -> Any:
    """`agreement` (a number or array) on the scale on which guessing, which gets `chance`, is 0 and perfect is 1."""
    return (agreement - chance) / np.maximum(1 - chance, 1e-3)  # where guessing is perfect nothing is to be read


def agreement_of(
    reading: Reading, commanded: Float[Tensor, "*n q a"], tolerance: Float[Tensor, " a"]
) -> Float[Tensor, "*n q a"]:
    """Agreement of every value; `tolerance` in physical units."""
    if reading.probability is None or reading.levels is None:
        return torch.exp(-((reading.value - commanded) / tolerance).square() / 2)
    near = (reading.levels - commanded[..., None]).abs() <= tolerance[:, None] * SLACK
    return (reading.probability * near).sum(-1)


def calibrate(
    reading: Reading, commanded: Float[Tensor, "n q a"], names: Sequence[str], *, constant: Sequence[str] = ()
) -> Calibration:
    """Tolerance, weight and chance of each dimension from readings of held-out real clips, all transitions in a row.

    Args:
        constant: dimensions that never changed in training.
    """
    r2 = r_squared(reading.value, commanded)
    tolerance = _tolerance(reading, commanded)
    _, chance = best_guess(reading, commanded, tolerance)
    left_out: list[str] = []
    weight = torch.zeros(len(names))
    for i, name in enumerate(names):
        if name in constant:
            left_out.append(f"{name}: never changes in the training data")
        elif not bool(torch.isfinite(r2[i])):
            left_out.append(f"{name}: never changes in the held-out episodes")
        elif r2[i] < LEAST_R2:
            left_out.append(f"{name}: cannot be read, R2 {float(r2[i]):.2f} on held-out episodes")
        else:
            weight[i] = r2[i]
    if float(weight.sum()) > 0:
        weight /= weight.sum()
    return Calibration(
        names=tuple(names),
        r2=tuple(float(x) if bool(torch.isfinite(x)) else 0.0 for x in r2),
        tolerance=tuple(map(float, tolerance)),
        weight=tuple(map(float, weight)),
        chance_by_dimension=tuple(map(float, chance)),
        left_out=tuple(left_out),
        transitions=len(commanded),
    )


def r_squared(read: Float[Tensor, "n q a"], commanded: Float[Tensor, "n q a"]) -> Float[Tensor, " a"]:
    """1 - squared error / variance of each dimension; minus infinity for one that never changes."""
    x, y = read.flatten(0, 1).double(), commanded.flatten(0, 1).double()
    left, all_of_it = (x - y).square().sum(0), (y - y.mean(0)).square().sum(0)
    moves = y.std(0, correction=0) > 1e-6 * (1 + y.abs().amax(0))
    return torch.where(moves, 1 - left / all_of_it.clamp(min=1e-30), -torch.inf).float()


def best_guess(
    reading: Reading, commanded: Float[Tensor, "n q a"], tolerance: Float[Tensor, " a"]
) -> tuple[Float[Tensor, " a"], Float[Tensor, " a"]]:
    """The constant of each dimension that agrees best with these commands, and its mean agreement.

    `reading` only says which head is meant: a guess of a binned one is a bin, with probability 1.
    """
    if reading.levels is None:
        seen = commanded.flatten(0, 1)
        low, high = seen.amin(0), seen.amax(0)
        guesses = low + torch.linspace(0, 1, GUESSES).to(seen)[:, None] * (high - low)
    else:
        guesses = reading.levels.T
    found = torch.stack([guess_agreement(reading, g, commanded, tolerance).mean((0, 1)) for g in guesses])
    best = found.argmax(0)
    each = torch.arange(commanded.shape[-1], device=best.device)
    return guesses[best, each], found[best, each]


def guess_agreement(
    reading: Reading, guess: Float[Tensor, " a"], commanded: Float[Tensor, "*n q a"], tolerance: Float[Tensor, " a"]
) -> Float[Tensor, "*n q a"]:
    """Agreement of a constant guess with every value."""
    if reading.levels is None:
        return torch.exp(-((guess - commanded) / tolerance).square() / 2)
    return ((guess - commanded).abs() <= tolerance * SLACK).to(commanded)


def _tolerance(reading: Reading, commanded: Tensor) -> Tensor:
    """The tolerance " a" of the largest gap between the agreement with true and with other actions."""
    if reading.levels is None:
        scale = commanded.flatten(0, 1).std(0, correction=0).clamp(min=1e-6)
        tried = [share * scale for share in FRACTIONS]
    else:
        bin_width = reading.levels[:, 1] - reading.levels[:, 0]
        tried = [n * bin_width for n in range(1, max(2, reading.levels.shape[1] // 4))]
    n = len(commanded)
    others = [commanded.roll(max(1, n * part // 7), 0) for part in (2, 3, 4)]  # other moments, mostly of other episodes
    gaps = []
    for tolerance in tried:
        own = agreement_of(reading, commanded, tolerance).mean((0, 1))
        other = torch.stack([agreement_of(reading, o, tolerance).mean((0, 1)) for o in others]).mean(0)
        gaps.append(own - other)
    best = torch.stack(gaps).argmax(0)
    return torch.stack(tried)[best, torch.arange(commanded.shape[-1], device=best.device)]
