"""Remembered frames as the network reads them: tokens for attention, and the nearest ones moved to where they are wanted.

Attention reads them without rotary turns, told how old and how noisy each is and the way from its pose to the coming one. The frames
nearest by pose are also laid beside the frame that is imagined, place by place, once a `Warp` has moved them as the poses say. The
warp learns from frames that follow each other (`Warp.error`): so copying what was seen need not wait until attention has
learned to (docs/log.md).
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
    beside: Tensor  # "b l s d": of the frames nearest by pose, moved: for the frame's own tokens at the same places
    moved: Mapping[str, Tensor]  # camera -> "b l c h w": what is laid beside
    sight: Mapping[str, Tensor]  # camera -> "b l 1 h w" in [0, 1]: how much of a place it tells of


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

    def forward(self, pictures: Mapping[str, Tensor], pose: Tensor, way: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        """camera -> moved latents "... c h w" and how much of each place comes from inside the picture, "... 1 h w" in [0, 1].

        `pictures`: the latents; `pose`: of them; `way`: from there to the pose that is wanted, "... p".
        """
        change = self.net(torch.cat([pose, way], dim=-1)).unflatten(-1, (len(pictures), 2, 3)).flatten(0, -4).float()
        still = torch.eye(2, 3, device=change.device)
        moved = {}
        for i, (camera, z) in enumerate(pictures.items()):
            flat = F.pad(z.float().flatten(0, -4), (0, 0, 0, 0, 0, 1), value=1.0)
            grid = F.affine_grid(change[:, i] + still, list(flat.shape), align_corners=False)
            found = F.grid_sample(flat, grid, align_corners=False).unflatten(0, z.shape[:-3])
            moved[camera] = found[..., :-1, :, :], found[..., -1:, :, :]
        return moved

    def error(
        self, frames: Mapping[str, Tensor], poses: Tensor, there: Mapping[str, Tensor], apart: int
    ) -> dict[str, Tensor]:
        """camera -> mean squared error of each frame moved to the pose `apart` frames later, against the frame there, in sight.

        Frames that follow each other overlap, and what a warp learns of short ways holds for long ones. From frames that
        were remembered it does not learn: from far off, every place looks as wrong as the next.

        Args:
            frames: camera -> "b e c h w"; poses: "b e p"; there: camera -> "b e" bool, which frames hold the camera.
        """
        early, late = slice(None, -apart), slice(apart, None)
        pictures = {camera: z[:, early] for camera, z in frames.items()}
        errors = {}
        for camera, (moved, sight) in self(pictures, poses[:, early], poses[:, late] - poses[:, early]).items():
            both = there[camera][:, early] & there[camera][:, late]
            weight = sight * both[..., None, None, None]
            missed = (moved - frames[camera][:, late]).square().mean(2, keepdim=True)
            errors[camera] = (missed * weight).sum() / weight.sum().clamp(min=1.0)
        return errors


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
        self.first = (
            config.start + config.recent if config.nearest else 0
        )  # of those laid beside; without `nearest` all are
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
        moved, sight = self._mosaic(memories, there)
        beside = []
        for camera, key in self.keys.items():
            patches = cut(torch.cat([moved[camera], sight[camera]], dim=2).detach(), self.patch)
            any_there = there[camera][:, :, self.first :].any(2)[..., None, None]
            beside.append((self.lay_beside[key](patches) + told[:, :, self.first, None]) * any_there)
        return MemoryTokens(
            tokens=torch.cat([nothing, *tokens], dim=2),
            readable=F.pad(torch.cat(readable, dim=2), (1, 0), value=True),
            beside=torch.cat(beside, dim=2),
            moved=moved,
            sight=sight,
        )

    def _mosaic(self, memories: Memories, there: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """camera -> what the frames laid beside show of the coming one, "b l c h w", and where they tell of it, "b l 1 h w".

        Each is moved; where the nearest one shows nothing the next one fills in.
        """
        pictures = {camera: memories.latents[camera][:, :, self.first :] for camera in self.keys}
        poses = memories.pose[:, :, self.first :]
        moved, sights = {}, {}
        for camera, (pieces, sight) in self.warp(pictures, poses, memories.query[:, :, None] - poses).items():
            sight = sight * there[camera][:, :, self.first :, None, None, None]
            picture, covered = torch.zeros_like(pieces[:, :, 0]), torch.zeros_like(sight[:, :, 0])
            for i in range(pieces.shape[2]):
                share = (1 - covered) * sight[:, :, i]
                # what comes from the rim is mixed with zeros as far as it is out of sight
                picture = picture + share * pieces[:, :, i] / sight[:, :, i].clamp(min=0.1)
                covered = covered + share
            moved[camera], sights[camera] = picture, covered
        return moved, sights


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
