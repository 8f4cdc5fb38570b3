"""Networks over noised trajectories: a temporal U-Net (Diffuser 2205.09991, as PGD uses it) and a transformer.

Both take steps "n t d" and ln(sigma)/4 "n", and answer steps. Neither is causal: a trajectory is made as a whole.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from worldline.worldmodels.layers import LevelEmbedding

GROUPS = 8
_LEAST, _MOST = -2.0, 1.5  # ln(sigma)/4 of sigma 0.0003 and 400: the embedding's range


class NoiseEmbedding(nn.Module):
    """ln(sigma)/4, brought to [0, 1], through sinusoids and two layers."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.net = LevelEmbedding(width)

    def forward(self, noise: Float[Tensor, " n"]) -> Float[Tensor, "n e"]:
        return F.silu(self.net(((noise - _LEAST) / (_MOST - _LEAST)).clamp(0, 1)))


class ResidualBlock(nn.Module):
    """Two convolutions over time; the noise scales and shifts between them."""

    def __init__(self, inner: int, outer: int, embedding: int) -> None:
        super().__init__()
        self.first, self.second = nn.Conv1d(inner, outer, 3, padding=1), nn.Conv1d(outer, outer, 3, padding=1)
        self.before, self.between = nn.GroupNorm(GROUPS, inner), nn.GroupNorm(GROUPS, outer, affine=False)
        self.modulation = nn.Linear(embedding, 2 * outer)
        self.skip = nn.Conv1d(inner, outer, 1) if inner != outer else nn.Identity()
        nn.init.zeros_(self.second.weight)
        nn.init.zeros_(self.modulation.weight)

    def forward(self, x: Float[Tensor, "n c t"], embedded: Float[Tensor, "n e"]) -> Float[Tensor, "n c2 t"]:
        h = self.first(F.silu(self.before(x)))
        scale, shift = self.modulation(embedded)[..., None].chunk(2, dim=1)
        h = self.second(F.silu(torch.addcmul(shift, self.between(h), 1 + scale)))
        return self.skip(x) + h


class RewardReader(nn.Sequential):
    """The normalised reward of transitions, by their numbers (`Layout.transitions`)."""

    def __init__(self, numbers: int, width: int = 256) -> None:
        super().__init__(
            nn.Linear(numbers, width),
            nn.SiLU(),
            nn.Linear(width, width),
            nn.SiLU(),
            nn.Linear(width, width),
            nn.SiLU(),
            nn.Linear(width, 1),
        )


class TemporalUNet(nn.Module):
    """Convolutions over time at `depth` resolutions, each of half the steps and twice the width."""

    def __init__(self, steps_width: int, width: int, depth: int) -> None:
        super().__init__()
        widths, embedding = [width * 2**i for i in range(depth)], 4 * width
        self.embed = NoiseEmbedding(embedding)
        self.enter = nn.Conv1d(steps_width, width, 3, padding=1)
        self.down = nn.ModuleList(ResidualBlock(w, w, embedding) for w in widths)
        self.narrow = nn.ModuleList(nn.Conv1d(w, v, 4, stride=2, padding=1) for w, v in zip(widths, widths[1:]))
        self.bottom = ResidualBlock(widths[-1], widths[-1], embedding)
        self.widen = nn.ModuleList(nn.ConvTranspose1d(v, w, 4, stride=2, padding=1) for w, v in zip(widths, widths[1:]))
        self.up = nn.ModuleList(ResidualBlock(2 * w, w, embedding) for w in widths)
        last = nn.Conv1d(width, steps_width, 3, padding=1)
        nn.init.zeros_(last.weight)
        self.leave = nn.Sequential(nn.GroupNorm(GROUPS, width), nn.SiLU(), last)

    def forward(self, steps: Float[Tensor, "n t d"], noise: Float[Tensor, " n"]) -> Float[Tensor, "n t d"]:
        embedded, held = self.embed(noise), []
        h = self.enter(steps.transpose(1, 2))
        for i, block in enumerate(self.down):
            h = block(h, embedded)
            held.append(h)
            if i < len(self.narrow):
                h = self.narrow[i](h)
        h = self.bottom(h, embedded)
        for i in reversed(range(len(self.up))):
            h = self.up[i](torch.cat([h, held[i]], dim=1), embedded)
            if i:
                h = self.widen[i - 1](h)
        return self.leave(h).transpose(1, 2)


class TemporalTransformer(nn.Module):
    """A token a step, with a learned place and the noise added to each."""

    def __init__(self, steps_width: int, width: int, depth: int, heads: int, longest: int) -> None:
        super().__init__()
        self.embed, self.enter = NoiseEmbedding(width), nn.Linear(steps_width, width)
        self.place = nn.Parameter(torch.randn(longest, width))
        layer = nn.TransformerEncoderLayer(
            width, heads, 4 * width, dropout=0.0, activation=F.gelu, batch_first=True, norm_first=True
        )
        self.layers = nn.TransformerEncoder(layer, depth, norm=nn.LayerNorm(width), enable_nested_tensor=False)
        self.leave = nn.Linear(width, steps_width)
        nn.init.zeros_(self.leave.weight)

    def forward(self, steps: Float[Tensor, "n t d"], noise: Float[Tensor, " n"]) -> Float[Tensor, "n t d"]:
        tokens = self.enter(steps) + self.embed(noise)[:, None] + self.place[: steps.shape[1]]
        return self.leave(self.layers(tokens))
