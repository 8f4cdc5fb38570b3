"""A sampler whose steps have exact densities: what reinforcement learning of a denoiser needs (DDPO 2305.13301, Flow-GRPO 2505.05470).

Each step from level to level goes to the clean estimate and noises it again, partly with fresh noise (DDIM 2010.02502, equations 12 and 16):
x' ~ N(alpha' clean + sqrt(sigma'^2 - std^2) kept, std^2), kept being the noise that x holds if `clean` is its clean part, and std `eta` times
that of ancestral sampling (eta 1: DDPM). More fresh noise than that would forget what is not yet decided, and shrink the samples' spread. The last
step is to the estimate itself: it has no density.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from worldline.diffusion.paths import Path, noise_from_clean
from worldline.diffusion.samplers import Predict


class Renoised(NamedTuple):
    """s steps with a density, and the sample that the last one, which has none, made of where they led."""

    x: list[Tensor]  # s + 1 states, the first pure noise
    mean: list[Tensor]  # s
    sample: Tensor


def sample_renoised(
    predict: Predict,
    x: Float[Tensor, "n ..."],
    levels: Sequence[float],
    path: Path,
    *,
    eta: float,
    noise: Callable[[int], Tensor],
) -> Renoised:
    """Args:
    levels: s + 2 of them, from 1 down to exactly 0.
    eta: fresh noise, above 0 and at most 1: as much as in ancestral sampling.
    noise: step number (from 1) to fresh noise in x's shape.
    """
    states, means = [x], []
    for step, (now, then) in enumerate(zip(levels[:-2], levels[1:-1]), start=1):
        clean = predict(x, torch.full((len(x),), now, device=x.device))
        means.append(renoised_mean(x, clean, now, then, path, eta=eta))
        x = means[-1] + renoised_std(now, then, path, eta=eta) * noise(step)
        states.append(x)
    return Renoised(states, means, predict(x, torch.full((len(x),), levels[-2], device=x.device)))


def renoised_mean(x: Tensor, clean: Tensor, now: float, then: float, path: Path, *, eta: float) -> Tensor:
    """Where a step from level `now` to `then` goes on average."""
    c = path(torch.tensor(then))
    kept = math.sqrt(max(0.0, float(c.sigma) ** 2 - renoised_std(now, then, path, eta=eta) ** 2))
    mean = float(c.alpha) * clean
    return mean + kept * noise_from_clean(path, x, clean, torch.full((len(x),), now, device=x.device)) if kept else mean


def renoised_std(now: float, then: float, path: Path, *, eta: float) -> float:
    """The spread of a step from level `now` to `then`."""
    before, after = (path(torch.tensor(level, dtype=torch.float64)) for level in (now, then))
    left = before.sigma**2 - (before.alpha / after.alpha * after.sigma) ** 2
    return eta * float(after.sigma / before.sigma * left.clamp(min=0).sqrt())


def gaussian_log_prob(x: Float[Tensor, "... d"], mean: Float[Tensor, "... d"], std: float) -> Float[Tensor, "..."]:
    """Log-density of x under N(mean, std^2) in every number, summed over the last axis."""
    d = x.shape[-1]
    return -0.5 * ((x - mean) / std).square().sum(-1) - d * (math.log(std) + 0.5 * math.log(2 * math.pi))
