"""Sizes, noise, solver and guidance of a trajectory model."""

import math
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

from worldline.diffusion import LogNormalSigmas

PUBLISHED_STEPS = 256  # of the paper's solver: its coefficients are for so many nudges


@dataclass(frozen=True, slots=True, kw_only=True)
class TrajectorySolver:
    """How trajectories are denoised. The paper's: 256 steps of Heun (511 evaluations), churn 80."""

    steps: int = 32
    """From the largest noise to none."""
    heun: bool = False
    """Correct each step by the slope at its end: twice the evaluations."""
    churn: float = 0.0
    """EDM's S_churn: noise that is added again on the way. 0: none, the same noise gives the same trajectory."""
    churned: tuple[float, float] = (0.05, 50.0)
    """Sigmas between which noise is added (S_tmin, S_tmax)."""
    inflate: float = 1.003
    """Factor of the noise added (S_noise)."""

    def __post_init__(self) -> None:
        if self.steps < 1 or self.churn < 0:
            raise ValueError(f"steps of at least 1 and churn of at least 0 required, got {self.steps} and {self.churn}")

    @property
    def evaluations(self) -> int:
        """Passes of the network a trajectory."""
        return 2 * self.steps - 1 if self.heun else self.steps


@dataclass(frozen=True, slots=True, kw_only=True)
class Guidance:
    """How far imagined actions are moved towards what a policy would do (PGD 2404.06356).

    In every solver step but the last, actions move by coefficient * schedule * gradient of the policy's log-density. What the data
    says is not divided out: samples stay near the behaviour's.
    """

    coefficient: float = 0.1
    """As published, for 256 solver steps; whatever the number of steps, all together move as far. 0: no guidance. Too large a value is noticed by what becomes of the trajectories, and refused."""
    on: Literal["noised", "denoised"] = "noised"
    """The trajectory that is moved, and at which the policy is asked: the solver's state, or its estimate of the clean one. What an
    estimate is moved by counts for the part of the way that a step goes, so its steps are not scaled by their number."""
    normalised: bool = True
    """Divide the gradient by its norm over a trajectory (published): the policy says where to, the coefficient how far."""

    def __post_init__(self) -> None:
        if not 0 <= self.coefficient < math.inf:
            raise ValueError(f"a coefficient of at least 0 is required, got {self.coefficient}")

    def weight(self, step: int, steps: int) -> float:
        """The factor of step `step` (from 1) of `steps`: the published schedule, with i = step - 1 of n = steps."""
        i = step - 1
        scale = PUBLISHED_STEPS / steps if self.on == "noised" else 1.0
        return self.coefficient * scale * ((1 - i / steps) + 0.3 * math.sin(math.pi * (i + 1) / steps))

    def move(self, slope: Tensor, step: int, steps: int) -> Tensor:
        """How far a step moves the actions of n rows, of the slope "n ..." of their log-density. A slope of zero moves nothing."""
        if self.normalised:
            norm = slope.flatten(1).norm(dim=1).view(-1, *[1] * (slope.ndim - 1))
            slope = slope / norm.where(norm > 0, 1.0)
        return self.weight(step, steps) * slope


@dataclass(frozen=True, slots=True, kw_only=True)
class TrajectoryConfig:
    """A network over sequences of [observation, action, reward, terminal].

    The paper's network is a U-Net of width 1024 that sees ln sigma ~ N(-1.2, 1.2) and is sampled from sigma 80, which that normal shows
    once in a million; here a share of the training is spread evenly over all that sampling asks for.
    """

    network: Literal["unet", "transformer"] = "unet"
    """unet: convolutions along time, as published. transformer: attention over steps."""
    length: int = 32
    """Steps of a trajectory, 8 to 64; a multiple of 2^(depth - 1) for a U-Net."""
    width: int = 64
    """Channels of the first resolution (unet), or of a token (transformer)."""
    depth: int = 3
    """unet: resolutions, each of half the steps and twice the width of the one before. transformer: layers."""
    heads: int = 4
    """Of attention (transformer)."""
    sigmas: LogNormalSigmas = field(
        default_factory=lambda: LogNormalSigmas(log_mean=-1.2, log_std=1.2, low=0.002, high=80.0, pure=0.02, even=0.18)
    )
    changes: bool = True
    """Diffuse how far each observation is from the one before it beside where it is (not in the paper): steps come out finer."""
    squash: bool = False
    """Diffuse atanh of an action's place in its range (the paper's), not the place itself."""
    rewards: Literal["read", "diffused"] = "read"
    """read: by a network of its own off each sampled transition (not in the paper): a diffused reward is blurred where the true one jumps, as at
    the edge of a goal, and policies are paid for passing by. diffused: a number of the step like any other (the paper's)."""
    rho: float = 7.0
    """How much of the solver's steps lies at small noise (EDM's rho)."""
    solver: TrajectorySolver = field(default_factory=TrajectorySolver)

    def __post_init__(self) -> None:
        if not 8 <= self.length <= 64:
            raise ValueError(f"a length of 8 to 64 steps is required, got {self.length}")
        if self.depth < 1 or self.width % 8:
            raise ValueError(
                f"a depth of at least 1 and a width that 8 divides are required, got {self.depth} and {self.width}"
            )
        if self.network == "transformer" and self.width % self.heads:
            raise ValueError(f"a width that the heads divide is required, got {self.width} and {self.heads} heads")
        if self.network == "unet":
            self.check_length(self.length)

    def check_length(self, length: int) -> None:
        """Raise `ValueError` for a length that the network cannot halve as often as it must."""
        halved = 2 ** (self.depth - 1)
        if length < 1 or (self.network == "unet" and length % halved):
            raise ValueError(
                f"a length that is a multiple of {halved} is required (a U-Net of depth {self.depth}), got {length}"
            )
        if self.network == "transformer" and length > self.length:
            raise ValueError(
                f"a length of at most {self.length} is required (a transformer trained on that), got {length}"
            )
