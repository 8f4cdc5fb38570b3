"""Deterministic samplers of the probability-flow ODE, as functions (predict, x, levels) -> x.

`predict(x, level)` returns the clean estimate; `level` has shape (n,). Euler in the path's own coordinates (DDIM, Song et
al. 2010.02502; for the linear path identical to Euler on the velocity), Heun as in Karras et al. 2206.00364, algorithm 1
without churn.
"""

from collections.abc import Callable

from jaxtyping import Float
from torch import Tensor

from worldline.diffusion.paths import Path, add_noise, noise_from_clean, velocity_from_clean

Predict = Callable[[Tensor, Tensor], Tensor]


def sample_euler(
    predict: Predict, x: Float[Tensor, "n ..."], levels: Float[Tensor, " levels"], path: Path
) -> Float[Tensor, "n ..."]:
    """First order. `levels` descends to 0; one call of `predict` a step; the last returns the clean estimate itself."""
    for now, then in zip(levels[:-1], levels[1:]):
        level = now.expand(len(x)).to(x.device)
        clean = predict(x, level)
        if then == 0:
            return clean
        x = add_noise(path, clean, noise_from_clean(path, x, clean, level), then.expand(len(x)).to(x.device))
    return x


def sample_heun(
    predict: Predict, x: Float[Tensor, "n ..."], levels: Float[Tensor, " levels"], path: Path
) -> Float[Tensor, "n ..."]:
    """Second order: two calls of `predict` a step but one in the last, where the velocity at level 0 is undefined."""
    for now, then in zip(levels[:-1], levels[1:]):
        level, next_level = now.expand(len(x)).to(x.device), then.expand(len(x)).to(x.device)
        clean = predict(x, level)
        if then == 0:
            return clean
        velocity = velocity_from_clean(path, x, clean, level)
        ahead = x + (then - now) * velocity
        again = velocity_from_clean(path, ahead, predict(ahead, next_level), next_level)
        x = x + (then - now) * (velocity + again) / 2
    return x
