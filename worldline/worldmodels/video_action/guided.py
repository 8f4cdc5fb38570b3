"""Policy-guided diffusion (2404.06356) of action blocks: the estimate of the clean blocks is moved in every solver step but the last
(`Guidance.on` "denoised", whatever it says)."""

from collections.abc import Callable
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from worldline.errors import SpecMismatch
from worldline.worldmodels.trajectories.config import Guidance
from worldline.worldmodels.video_action.queries import Query, Role


def steering(
    physical: Callable[[Tensor], Tensor],
    query: Query,
    guidance: Guidance,
    score: Callable[[Tensor], Tensor],
    steps: int,
) -> Callable[[Tensor, Tensor], Tensor]:
    """What `Draw.steer` is, of the blocks that the query asks for.

    Args:
        physical: normalised blocks "n g k*a" to actions "n g k a", affine.
        score: gradient of a policy's log-density by physical blocks "n g k a".

    Raises `SpecMismatch` for a query that asks for no blocks.
    """
    asked = [i for i, role in enumerate(query.actions) if role == Role.DENOISED]
    if not asked:
        raise SpecMismatch("a query that asks for action blocks is required by guidance, got one that asks for none")

    guidance = replace(guidance, on="denoised")

    def steer(blocks: Float[Tensor, "n f ka"], level: Float[Tensor, " n"]) -> Float[Tensor, "n f ka"]:
        step = round((1 - float(level[0])) * steps) + 1
        if step >= steps:
            return blocks
        own = blocks[:, asked]
        actions, zero = physical(own), physical(torch.zeros_like(own))
        unit = physical(torch.ones_like(own)) - zero  # d action / d normalised number
        slope = (score(actions) * unit).flatten(2)
        moved = blocks.clone()
        moved[:, asked] += guidance.move(slope, step, steps)
        return moved

    return steer
