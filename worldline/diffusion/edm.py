"""EDM (Karras et al. 2206.00364): the path, the preconditioning, the noise of training, and a sampler that may add noise.

The diffused variable is x = clean + sigma * noise. EDM fits the house's paths with alpha = 1: level 1 is the largest sigma that training
shows, and sigma = largest * level^rho. Then EDM's time steps (equation 5, linear in sigma^(1/rho)) are evenly spaced levels, and the
other samplers here take the path as it is.

DIAMOND's sampler asks the denoiser about sigma after added noise has raised the state to a higher one. Here the level that is told is
always the state's own; a test holds it.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from worldline.diffusion.paths import Coefficients, add_noise, expand, noise_from_clean
from worldline.diffusion.samplers import Predict

_ROUNDING = 1e-5  # relative: a sigma that went through its level and back


@dataclass(frozen=True, slots=True, kw_only=True)
class EDMPath:
    """A `Path`: alpha = 1, sigma = largest * level^rho."""

    largest: float
    rho: float = 7.0

    def __post_init__(self) -> None:
        if not self.largest > 0 or not self.rho >= 1:
            raise ValueError(f"largest > 0 and rho >= 1 required, got largest={self.largest}, rho={self.rho}")

    def __call__(self, level: Tensor) -> Coefficients:
        one = torch.ones_like(level)
        slope = self.largest * self.rho * level ** (self.rho - 1)
        return Coefficients(one, self.largest * level**self.rho, torch.zeros_like(level), slope)

    def level(self, sigma: Tensor) -> Tensor:
        """The level at which the noise has this standard deviation."""
        return (sigma / self.largest) ** (1 / self.rho)


class Preconditioning(NamedTuple):
    """Denoiser(x) = skip * x + out * network(into * x, noise): equation 7."""

    skip: Tensor
    out: Tensor
    into: Tensor
    noise: Tensor


def precondition(sigma: Tensor, sigma_data: float) -> Preconditioning:
    """Table 1, "Ours": the network sees and answers values of unit variance, and the least of its errors reaches the denoiser.

    Of Gaussian data with mean 0 and standard deviation `sigma_data`, skip * x is the ideal denoiser, so that an answer of 0 is right.
    """
    total = sigma**2 + sigma_data**2
    return Preconditioning(
        skip=sigma_data**2 / total,
        out=sigma * sigma_data * total.rsqrt(),
        into=total.rsqrt(),
        noise=sigma.log() / 4,
    )


def loss_weight(sigma: Tensor, sigma_data: float) -> Tensor:
    """1 / out^2: of an untrained network, which answers 0, the weighted squared error is 1 at every sigma (equation 8)."""
    return (sigma**2 + sigma_data**2) / (sigma * sigma_data) ** 2


@dataclass(frozen=True, slots=True, kw_only=True)
class LogNormalSigmas:
    """The noise that training shows: ln sigma ~ N(log_mean, log_std^2), cut to [low, high]; a share of exactly `high` besides, and a
    share of which the logarithm is even over [low, high].

    What is beyond an end is drawn at that end, as in DIAMOND: sampling starts at one, and takes its last look near the other.
    """

    log_mean: float = 0.3  # EDM's and DIAMOND's numbers are for data of standard deviation 0.5, these for 1
    log_std: float = 1.2  # standard deviation of ln sigma
    low: float = 0.004  # least sigma
    high: float = 10.0  # largest sigma
    pure: float = 0.0  # share at exactly `high`
    even: float = 0.0  # share with ln sigma uniform: where `high` is far out, the normal's tail shows next to nothing on the way there

    def __post_init__(self) -> None:
        if not 0 < self.low <= self.high < math.inf or not self.log_std >= 0:
            raise ValueError(f"0 < low <= high and log_std >= 0 required, got {self.low}, {self.high}, {self.log_std}")
        if not (self.pure >= 0 and self.even >= 0 and self.pure + self.even <= 1):
            raise ValueError(f"pure and even must be shares that sum to at most 1, got {self.pure} and {self.even}")

    def sample(self, shape: tuple[int, ...], generator: torch.Generator | None = None) -> Float[Tensor, "..."]:
        kind = torch.rand(shape, generator=generator)
        sigma = (
            (self.log_mean + self.log_std * torch.randn(shape, generator=generator)).exp().clamp(self.low, self.high)
        )
        if self.even:
            low, high = math.log(self.low), math.log(self.high)
            even = (low + (high - low) * torch.rand(shape, generator=generator)).exp()
            sigma = torch.where(kind >= 1 - self.even, even, sigma)
        return torch.where(kind < self.pure, torch.tensor(self.high), sigma)

    def contains(self, sigma: float) -> bool:
        """Whether training shows this sigma. With a share of 1 at `high` it shows no other."""
        low = self.high if self.pure == 1 else self.low
        return low * (1 - _ROUNDING) <= sigma <= self.high * (1 + _ROUNDING)


def edm_levels(steps: int, path: EDMPath, sigma_max: float, sigma_min: float) -> Float[Tensor, " levels"]:
    """`steps` levels from that of `sigma_max` to that of `sigma_min`, evenly spaced, then 0 (equation 5). One step: the first alone."""
    if steps < 1:
        raise ValueError(f"a solver needs at least 1 step, got {steps}")
    first, last = path.level(torch.tensor([sigma_max, sigma_min]))
    between = torch.linspace(0, 1, steps) if steps > 1 else torch.zeros(1)
    return torch.cat([torch.lerp(first, last, between), torch.zeros(1)])


def sample_edm(
    predict: Predict,
    x: Float[Tensor, "n ..."],
    levels: Float[Tensor, " levels"],
    path: EDMPath,
    *,
    churn: float = 0.0,
    churned: tuple[float, float] = (0.0, math.inf),
    inflate: float = 1.0,
    heun: bool = False,
    noise: Callable[[int], Tensor],
    nudge: Callable[[int, Tensor], Tensor] | None = None,
    correct: Callable[[int, Tensor], Tensor] | None = None,
) -> Float[Tensor, "n ..."]:
    """Algorithm 2: steps before each of which noise may be added, with (Heun) or without (Euler) the second-order correction.

    Args:
        predict: (x, level "n") to the clean estimate.
        x: the state at levels[0].
        levels: from above 0 down to 0 (`edm_levels`).
        churn: S_churn: a step first raises sigma by the factor 1 + min(churn / steps, sqrt(2) - 1), to the path's largest at most.
            0 is the deterministic sampler.
        churned: S_tmin and S_tmax: sigmas between which noise is added.
        inflate: S_noise: factor of the noise that is added.
        heun: correct each step but the last by the slope at its end: two predictions a step.
        noise: step number (from 1) to fresh noise in x's shape; not called without churn.
        nudge, correct: (step number, state) and (step number, clean estimate) to what shall stand in its place, in every step but the
            last; guidance. `nudge` is asked after noise was added, `correct` after every prediction.
    """
    steps = len(levels) - 1
    factor = 1 + min(churn / steps, math.sqrt(2) - 1)
    for step, (now, then) in enumerate(zip(levels[:-1], levels[1:]), start=1):
        level = now.expand(len(x)).to(x)
        sigma = path(now).sigma
        if churn and churned[0] <= sigma <= churned[1]:
            raised = (sigma * factor).clamp(max=path.largest)
            x = x + inflate * (raised**2 - sigma**2).clamp(min=0).sqrt().to(x) * noise(step)
            level = path.level(raised).expand(len(x)).to(x)  # the state's own, not the schedule's
        if then == 0:
            return predict(x, level)
        if nudge is not None:
            x = nudge(step, x)
        clean = predict(x, level)
        if correct is not None:
            clean = correct(step, clean)
        next_level = then.expand(len(x)).to(x)
        ahead = add_noise(path, clean, noise_from_clean(path, x, clean, level), next_level)
        if heun:
            again = predict(ahead, next_level)
            if correct is not None:
                again = correct(step, again)
            # the slope of x by sigma is the noise that x holds
            slope = noise_from_clean(path, x, clean, level) + noise_from_clean(path, ahead, again, next_level)
            has = path(expand(level, x)).sigma
            ahead = x + (path(then).sigma.to(x) - has) * slope / 2
        x = ahead
    return x
