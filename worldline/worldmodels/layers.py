"""Layers shared by the networks: rotary time embedding, attention with per-head normalised queries, level embedding.

Modulation (shift, scale, gate) is computed once a frame and broadcast over the frame's tokens; computing it per token
costs as much as a quarter of the network.
"""

import math

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn


def cut(latents: Tensor, patch: int) -> Tensor:
    """Latents "... c h w" as tokens "... s n" of patch x patch cells."""
    return rearrange(latents, "... c (h p) (w q) -> ... (h w) (c p q)", p=patch, q=patch)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Layer-normalise "b l s d" tokens without own parameters, then shift and scale per frame ("b l d")."""
    return torch.addcmul(shift[:, :, None], F.layer_norm(x, x.shape[-1:]), 1 + scale[:, :, None])


class LevelEmbedding(nn.Module):
    """Sinusoids of a noise level in [0, 1], then a two-layer network. Level 0 and 1 are ordinary, distinct inputs."""

    rates: Tensor

    def __init__(self, width: int, frequencies: int = 64) -> None:
        super().__init__()
        self.register_buffer("rates", torch.exp(torch.linspace(0, math.log(500), frequencies)), persistent=False)
        self.net = nn.Sequential(nn.Linear(2 * frequencies, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, level: Tensor) -> Tensor:
        angle = level[..., None] * self.rates
        return self.net(torch.cat([angle.cos(), angle.sin()], dim=-1))


def rotary(time: Tensor, head_width: int, base: float = 1000.0) -> tuple[Tensor, Tensor]:
    """cos and sin of time x frequency, shape (*time, head_width / 2).

    Angles are formed in float64: a stream of any length keeps exact relative positions between its last frames.
    """
    rates = base ** (-torch.arange(0, head_width, 2, device=time.device, dtype=torch.float64) / head_width)
    angle = time.double()[..., None] * rates
    return angle.cos().float(), angle.sin().float()


def rotate(x: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate halves of the last axis; cos and sin must broadcast against x[..., : d/2]."""
    cos, sin = turn
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


class QKV(nn.Module):
    """One projection to queries, keys and values "... heads d"; queries and keys are RMS-normalised per head."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.scale = nn.Parameter(torch.ones(2, width // heads))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = rearrange(self.qkv(x), "... (three h d) -> three ... h d", three=3, h=self.heads)
        q = F.rms_norm(q, q.shape[-1:], self.scale[0].to(q))
        k = F.rms_norm(k, k.shape[-1:], self.scale[1].to(k))
        return q, k, v


class MLP(nn.Module):
    def __init__(self, width: int, ratio: float) -> None:
        super().__init__()
        hidden = int(width * ratio)
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x), approximate="tanh"))
