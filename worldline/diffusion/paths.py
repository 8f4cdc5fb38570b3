"""Probability paths between data (level 0) and noise (level 1), and every conversion, derived from four numbers.

A path maps a noise level in [0, 1] to (alpha, sigma, d_alpha, d_sigma): x = alpha * clean + sigma * noise, derivatives by
level. The path owns the relation between level and sigma; networks only ever see the level.
Linear path: flow matching / rectified flow (Lipman et al. 2210.02747, Liu et al. 2209.03003). Cosine: Nichol & Dhariwal
2102.09672 in its variance-preserving trigonometric form.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class Coefficients(NamedTuple):
    alpha: Tensor
    sigma: Tensor
    d_alpha: Tensor
    d_sigma: Tensor


Path = Callable[[Tensor], Coefficients]


def linear_path(level: Tensor) -> Coefficients:
    """alpha = 1 - level, sigma = level."""
    one = torch.ones_like(level)
    return Coefficients(1 - level, level, -one, one)


def cosine_path(level: Tensor) -> Coefficients:
    """alpha = cos(pi level / 2), sigma = sin(pi level / 2): variance preserving."""
    angle = level * (math.pi / 2)
    cos, sin = torch.cos(angle), torch.sin(angle)
    return Coefficients(cos, sin, -sin * (math.pi / 2), cos * (math.pi / 2))


def add_noise(path: Path, clean: Tensor, noise: Tensor, level: Tensor) -> Tensor:
    """x at `level`. `level` must broadcast against `clean` from the left: it is expanded with trailing axes."""
    c = path(expand(level, clean))
    return c.alpha * clean + c.sigma * noise


def noise_from_clean(path: Path, x: Tensor, clean: Tensor, level: Tensor) -> Tensor:
    """The noise that `x` at `level` holds if `clean` is its clean part. `level` > 0."""
    c = path(expand(level, x))
    return (x - c.alpha * clean) / c.sigma


def velocity_from_clean(path: Path, x: Tensor, clean: Tensor, level: Tensor) -> Tensor:
    """dx/dlevel along the path through `x` towards `clean`. `level` > 0."""
    c = path(expand(level, x))
    return c.d_alpha * clean + c.d_sigma * (x - c.alpha * clean) / c.sigma


def clean_from_velocity(path: Path, x: Tensor, velocity: Tensor, level: Tensor) -> Tensor:
    """Inverse of `velocity_from_clean`."""
    c = path(expand(level, x))
    return (c.d_sigma * x - c.sigma * velocity) / (c.alpha * c.d_sigma - c.sigma * c.d_alpha)


def expand(level: Tensor, like: Tensor) -> Tensor:
    """`level` of shape (b,) or (b, t) with trailing axes added until it broadcasts against `like`."""
    return level.reshape(level.shape + (1,) * (like.ndim - level.ndim))
