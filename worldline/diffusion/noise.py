"""Noise as a pure function of (row seed, frame, draw): a row's dream does not depend on its neighbours in the batch.

Counter-based: a splitmix64 hash (Steele, Lea & Flood 2014) of the key and the element's index, then Box-Muller. Works on
any device, needs no generator state, and gives the same numbers for a row whatever the batch.
"""

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

_GOLDEN = -7046029254386353131  # 0x9E3779B97F4A7C15 as a signed 64-bit integer; torch int64 arithmetic wraps
_MIX_1 = -4658895280553007687  # 0xBF58476D1CE4E5B9
_MIX_2 = -7723592293110705685  # 0x94D049BB133111EB


def _shift_right(z: Tensor, bits: int) -> Tensor:
    return (z >> bits) & ((1 << (64 - bits)) - 1)  # torch's >> keeps the sign: mask it away


def mix(z: Tensor) -> Tensor:
    """The splitmix64 finaliser: every input bit flips every output bit with probability near one half."""
    z = z + _GOLDEN
    z = (z ^ _shift_right(z, 30)) * _MIX_1
    z = (z ^ _shift_right(z, 27)) * _MIX_2
    return z ^ _shift_right(z, 31)


def row_noise(
    seeds: Int[Tensor, " n"], frame: Int[Tensor, " n"] | int, draw: int, shape: tuple[int, ...], *, stream: int = 0
) -> Float[Tensor, "n ..."]:
    """Standard normal noise "n *shape". Equal (seed, frame, draw, stream) give equal noise, on every device.

    Args:
        seeds: one integer a row.
        frame: index of the frame being made, for all rows or a row each.
        draw: 0 for the initial noise, then one number for each stochastic solver step.
        stream: distinguishes tensors drawn at the same (frame, draw), for example cameras.
    """
    key = mix(seeds.long())
    for part in (frame, draw, stream):
        key = mix(key ^ torch.as_tensor(part, device=seeds.device))
    count = math.prod(shape)
    pairs = (count + 1) // 2
    bits = mix(key[:, None] + torch.arange(pairs, device=seeds.device)[None] * _GOLDEN)
    u1 = (_shift_right(bits, 32).double() + 0.5) / 2**32  # in (0, 1): the log below is finite
    u2 = ((bits & 0xFFFFFFFF).double() + 0.5) / 2**32
    radius, angle = (-2 * u1.log()).sqrt(), 2 * math.pi * u2
    normal = torch.stack([radius * angle.cos(), radius * angle.sin()], dim=-1).flatten(1)[:, :count]
    return normal.float().reshape(len(seeds), *shape)
