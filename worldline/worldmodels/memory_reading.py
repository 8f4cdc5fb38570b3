"""Remembered frames as the network reads them: tokens for attention, and the nearest one moved to where it is wanted.

Attention reads them without rotary turns, told how old and how noisy each is and the way from its pose to the coming one. The frame nearest by
pose is also laid beside the frame that is imagined, place by place, once a `Warp` has moved it as the two poses say. The warp has
a loss of its own, to be like the true frame: so copying what was seen need not wait until attention has learned to (docs/log.md).
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from worldline.worldmodels.layers import cut
from worldline.worldmodels.memory import Memories, MemoryConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryTokens:
    """Remembered frames as the network takes them in."""

    tokens: Tensor  # "b l n d": to be attended to
    readable: Tensor  # "b l n" bool
    beside: Tensor  # "b l s d": of the one frame nearest by pose, for the frame's own tokens at the same places
    moved: Mapping[str, Tensor]  # camera -> "b l c h w": that frame, moved
    held: Mapping[str, Tensor]  # camera -> "b l" bool: whether there is one; `moved` is zeros where not


class Warp(nn.Module):
    """Moves a remembered picture to where another pose would see it: an affine map for each camera (a Spatial Transformer,
    1506.02025), decided by the pose then and the way to the pose now. Before training it moves nothing.

    Exact for a camera that looks straight at a plane, an approximation elsewhere; a camera that stands still learns to stand still.
    """

    def __init__(self, pose_dim: int, cameras: int, hidden: int = 128) -> None:
        super().__init__()
        self.net = nn.Sequential(
            *(nn.Linear(2 * pose_dim, hidden), nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU()),
            nn.Linear(hidden, 6 * cameras),
        )

    def init_weights(self) -> None:
        last = self.net[-1]
        assert isinstance(last, nn.Linear)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)

    def forward(self, pictures: Mapping[str, Tensor], pose: Tensor, way: Tensor) -> dict[str, Tensor]:
        """camera -> "b l c h w" from the same; what comes from outside the picture is zero. `pose`, `way`: "b l p"."""
        change = self.net(torch.cat([pose, way], dim=-1)).unflatten(-1, (len(pictures), 2, 3)).flatten(0, 1)
        still = torch.eye(2, 3, device=change.device)
        moved = {}
        for i, (camera, z) in enumerate(pictures.items()):
            flat = z.flatten(0, 1).float()
            grid = F.affine_grid(change[:, i].float() + still, list(flat.shape), align_corners=False)
            moved[camera] = F.grid_sample(flat, grid, align_corners=False).unflatten(0, z.shape[:2])
        return moved


class MemoryEncoder(nn.Module):
    """Tokens of remembered frames: patches, their place, and what tells of the frame: age, noise level, pose, the way to
    the coming pose.

    `keys`: camera -> its name among modules; `channels`: camera -> c of its latents.
    """

    def __init__(
        self,
        width: int,
        patch: int,
        keys: Mapping[str, str],
        channels: Mapping[str, int],
        pose_dim: int,
        config: MemoryConfig,
        ages: int = 8,
    ) -> None:
        super().__init__()
        self.keys, self.patch, self.ages = dict(keys), patch, ages
        self.nearest = config.start + config.recent if config.nearest else 0  # without `nearest`: the first one shown
        self.warp = Warp(pose_dim, len(channels))
        area = patch * patch
        self.embed = nn.ModuleDict({keys[camera]: nn.Linear(c * area, width) for camera, c in channels.items()})
        # one channel more: whether the warp found a place inside the picture
        self.lay_beside = nn.ModuleDict(
            {keys[camera]: nn.Linear((c + 1) * area, width) for camera, c in channels.items()}
        )
        self.tell = nn.Sequential(nn.Linear(2 * pose_dim + 2 * ages + 1, width), nn.SiLU(), nn.Linear(width, width))
        self.nothing = nn.Parameter(torch.zeros(1, width))  # always there: attention needs something to look at

    def forward(self, memories: Memories, place: Mapping[str, Tensor]) -> MemoryTokens:
        """n = 1 + m*s tokens for each of l frames. `place`: key -> "s d", the learned places of a frame's tokens."""
        rates = 2.0 ** torch.arange(self.ages, device=memories.age.device)
        angle = torch.log1p(memories.age.clamp(min=0).float())[..., None] * rates / 8
        way = memories.query[:, :, None] - memories.pose
        told = self.tell(torch.cat([memories.pose, way, angle.cos(), angle.sin(), memories.level[..., None]], dim=-1))
        there = {camera: memories.valid & seen for camera, seen in memories.seen.items()}
        tokens, readable = [], []
        for camera, key in self.keys.items():
            x = self.embed[key](cut(memories.latents[camera], self.patch)) + place[key] + told[:, :, :, None]
            tokens.append(x.flatten(2, 3))
            readable.append(there[camera].repeat_interleave(x.shape[3], dim=2))
        nothing = self.nothing.expand(*memories.query.shape[:2], 1, -1)
        held = {camera: seen[:, :, self.nearest] for camera, seen in there.items()}
        beside, moved = self._beside(memories, held, told)
        return MemoryTokens(
            tokens=torch.cat([nothing, *tokens], dim=2),
            readable=F.pad(torch.cat(readable, dim=2), (1, 0), value=True),
            beside=beside,
            moved=moved,
            held=held,
        )

    def _beside(self, memories: Memories, held: Mapping[str, Tensor], told: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Tokens "b l s d" of the nearest frame, moved, and that frame."""
        i = self.nearest
        pictures = {camera: memories.latents[camera][:, :, i] for camera in self.keys}
        marked = {
            camera: F.pad(z, (0, 0, 0, 0, 0, 1), value=1.0) * held[camera][..., None, None, None]
            for camera, z in pictures.items()
        }
        moved = self.warp(marked, memories.pose[:, :, i], memories.query - memories.pose[:, :, i])
        tokens = []
        for camera, key in self.keys.items():
            x = self.lay_beside[key](cut(moved[camera].detach(), self.patch)) + told[:, :, i, None]
            tokens.append(x * held[camera][..., None, None])
        return torch.cat(tokens, dim=2), {camera: z[:, :, :-1] for camera, z in moved.items()}


class MemoryReader(nn.Module):
    """Attention from the tokens of a frame to the tokens of the frames remembered for it; keys are not turned by time."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key_value, self.out = (nn.Linear(width, n * width) for n in (1, 2, 1))

    def keys(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values "b l h n d": computed once a frame, whatever the number of solver steps."""
        tokens = F.layer_norm(tokens, tokens.shape[-1:])
        k, v = rearrange(self.key_value(tokens), "b l n (two h d) -> two b l h n d", two=2, h=self.heads)
        return F.rms_norm(k, k.shape[-1:]), v

    def forward(self, x: Tensor, keys: tuple[Tensor, Tensor], readable: Tensor) -> Tensor:
        q = rearrange(self.query(F.layer_norm(x, x.shape[-1:])), "b l s (h d) -> b l h s d", h=self.heads)
        q = F.rms_norm(q, q.shape[-1:])
        attended = F.scaled_dot_product_attention(q, *keys, attn_mask=readable[:, :, None, None])
        return x + self.out(rearrange(attended, "b l h s d -> b l s (h d)"))
