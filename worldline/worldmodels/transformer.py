"""A block-causal space-time transformer over tokenised multi-view frames, with one noise level a frame.

- Factorised attention: over all tokens of a frame (every camera's patches and one pose token, jointly), then over time
  at each token position; one MLP after the pair.
- Time attention takes any (query frame, key frame) mask, so one network serves the banded causal pass, the doubled pass
  of training (clean history beside noisy targets) and streaming with a cache.
- Level and action block reach every block through adaptive normalisation, computed once a frame (DiT, 2212.09748).
- Dense networks (`guesses`) foretell the pose from the arm's motion and each view from the other views; their guesses are
  inputs: where the arm will be, and what comes into one camera's sight that has long been in another's.
- It predicts the change from the previous frame: with zero-initialised outputs an untrained network is exactly the
  copy-last-frame predictor.

The network knows nothing of noise schedules, tokenizers or normalisation.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from worldline.errors import SpecMismatch
from worldline.worldmodels.guesses import STEP, Guesses, PoseGuess, ViewGuess
from worldline.worldmodels.layers import MLP, QKV, LevelEmbedding, modulate, rotary, rotate

# Of the tokens' learned places at the start. Tokens are of size one: from the usual 0.02 trained models had grown theirs to
# 0.2, and from 0.5 the same steps give a better dream (docs/log.md).
PLACE_STD = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class TransformerConfig:
    """Sizes of the network. `window` counts frames, the current one included."""

    width: int = 192
    depth: int = 6  # blocks of (space attention, time attention, MLP)
    heads: int = 6
    window: int = 8
    patch: int = 2  # latent cells along one side of a token
    mlp_ratio: float = 4.0
    guess_width: int = 256  # of the dense networks that guess the pose, and each view from the others; 0: none
    actions: bool = True  # False: the action-free predictor, a baseline that every world model must beat

    def __post_init__(self) -> None:
        if self.width % self.heads or (self.width // self.heads) % 2:
            raise ValueError(f"width must be heads times an even number, got width={self.width}, heads={self.heads}")
        if min(self.width, self.depth, self.window, self.patch) < 1 or self.guess_width < 0:
            raise ValueError(f"width, depth, window and patch must be at least 1, guess_width at least 0, got {self}")


@dataclass(frozen=True, slots=True, kw_only=True)
class FrameBatch:
    """Network input of l frames: whitened noisy latents, the frames before them, and what conditions them.

    `action` is the normalised block that led to the frame, flattened; `has_action` False where a frame has none (the
    first of a clip). `time` orders frames for the rotary embedding: (l,) for all rows or (b, l).
    """

    latents: Mapping[str, Tensor]  # camera -> "b l c h w"
    previous: Mapping[str, Tensor]
    pose: Tensor  # "b l p"
    previous_pose: Tensor
    motion: Tensor  # "b l p+p+k*a", of the frame before: `motion_of`, zeros for the first of a clip
    level: Tensor  # "b l"
    action: Tensor  # "b l k*a"
    has_action: Tensor  # "b l" bool
    time: Tensor


class Block(nn.Module):
    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        width = config.width
        self.space, self.time = QKV(width, config.heads), QKV(width, config.heads)
        self.space_out, self.time_out = nn.Linear(width, width), nn.Linear(width, width)
        self.mlp = MLP(width, config.mlp_ratio)
        self.modulation = nn.Linear(width, 9 * width)

    def space_attention(self, x: Tensor) -> Tensor:
        b = len(x)
        q, k, v = self.space(x)
        q, k, v = (rearrange(z, "b l s h d -> (b l) h s d") for z in (q, k, v))
        return self.space_out(rearrange(F.scaled_dot_product_attention(q, k, v), "(b l) h s d -> b l s (h d)", b=b))

    def time_qkv(self, x: Tensor, turn: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values "b (s h) l d", queries and keys turned to their time."""
        q, k, v = (rearrange(z, "b l s h d -> b (s h) l d") for z in self.time(x))
        return rotate(q, turn), rotate(k, turn), v

    def time_output(self, attended: Tensor) -> Tensor:
        return self.time_out(rearrange(attended, "b (s h) l d -> b l s (h d)", h=self.time.heads))


class SpaceTimeTransformer(nn.Module):
    """Predicts the clean latents and pose of each frame.

    Args:
        shapes: camera -> (c, h, w) of its latents; h and w divisible by `config.patch`.
        pose_dim: p, may be 0.
        action_dim: length of a flattened action block (k * a).
    """

    def __init__(
        self, config: TransformerConfig, shapes: Mapping[str, tuple[int, int, int]], pose_dim: int, action_dim: int
    ) -> None:
        super().__init__()
        self.config, self.shapes, self.pose_dim = config, dict(shapes), pose_dim
        p, width = config.patch, config.width
        for camera, (_, h, w) in shapes.items():
            if h % p or w % p:
                raise SpecMismatch(
                    f"camera {camera}: latents of {h}x{w} cannot be cut into patches of {p}x{p}. Choose another patch size."
                )
        self.tokens = {camera: (h // p) * (w // p) for camera, (_, h, w) in shapes.items()}
        # nn.ModuleDict keys may not hold dots; cameras may
        self.keys = {camera: camera.replace(".", "_") for camera in shapes}
        channels = {self.keys[camera]: c * p * p for camera, (c, _, _) in shapes.items()}
        guessing = config.guess_width if config.actions else 0
        self.guess_pose = PoseGuess(guessing, pose_dim, action_dim) if guessing and pose_dim else None
        poses = 2 * pose_dim if self.guess_pose else pose_dim
        self.guess_views = (
            ViewGuess(config.guess_width, shapes, self.keys, poses + action_dim) if config.guess_width else None
        )
        inputs = 3 if config.guess_width else 2  # the noisy frame, the one before, the guess
        self.embed = nn.ModuleDict({key: nn.Linear(inputs * c, width) for key, c in channels.items()})
        self.place = nn.ParameterDict(
            {self.keys[camera]: nn.Parameter(torch.empty(n, width)) for camera, n in self.tokens.items()}
        )
        self.embed_pose = nn.Linear(pose_dim + poses, width)
        self.embed_level = LevelEmbedding(width)
        moves = action_dim + (poses if self.guess_pose else 0)  # the block, where it leads, and how far that is
        self.embed_action = nn.Sequential(nn.Linear(moves, width), nn.SiLU(), nn.Linear(width, width))
        self.no_action = nn.Parameter(torch.zeros(width))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.final_modulation = nn.Linear(width, 2 * width)
        self.unembed = nn.ModuleDict({key: nn.Linear(width, c) for key, c in channels.items()})
        self.unembed_pose = nn.Linear(width, pose_dim)
        self.init_weights()

    def init_weights(self) -> None:
        """Linear layers: Xavier uniform, biases 0; token places: normal(0, 0.5); but for two things.

        Gates start at 1: blocks work from the first step. Both output heads start at 0: the untrained network is
        copy-last-frame. (After 150 steps on the dot world the one-step error was .44 with normal(0, 0.02) and DiT's zero
        gates, .33 with gates at 1, .18 with Xavier as well: at these widths 0.02 starves the conditioning path.)
        """
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        for place in self.place.values():
            nn.init.normal_(place, std=PLACE_STD)
        for block in self._blocks():
            for gate in (2, 5, 8):  # of shift, scale, gate for space attention, time attention, MLP
                nn.init.ones_(block.modulation.bias[gate * self.config.width : (gate + 1) * self.config.width])
        last = [self.guess_pose.net[-1]] if self.guess_pose else []
        for linear in [self.unembed_pose, *self.unembed.values(), *last]:
            nn.init.zeros_(cast(nn.Linear, linear).weight)

    @property
    def tokens_per_frame(self) -> int:
        return sum(self.tokens.values()) + 1

    def _blocks(self) -> Iterator[Block]:
        for block in self.blocks:
            yield cast(Block, block)  # a ModuleList says only that it holds modules

    def guesses(self, frames: FrameBatch) -> Guesses:
        """Pose and views by the dense networks. The pose learns by its own loss alone: the views take it as given."""
        action = frames.action * frames.has_action[..., None]
        if not self.config.actions:
            action = torch.zeros_like(action)
        pose, known = None, [frames.previous_pose, action]
        if self.guess_pose is not None:
            pose = self.guess_pose(frames.motion, frames.action, frames.has_action)
            known.append(pose.detach())
        views = self.guess_views(frames.previous, torch.cat(known, dim=-1)) if self.guess_views is not None else {}
        return Guesses(views=views, pose=pose)

    def embed_frames(self, frames: FrameBatch, guesses: Guesses) -> tuple[Tensor, Tensor]:
        """Tokens "b l s d" and the conditioning vector of each frame "b l d"."""
        p = self.config.patch
        parts = []
        for camera, key in self.keys.items():
            inputs = [frames.latents[camera], frames.previous[camera]]
            if guesses.views:
                inputs.append(guesses.views[camera].detach())  # it learns by its own loss alone
            patches = rearrange(torch.cat(inputs, dim=2), "b l c (h p) (w q) -> b l (h w) (c p q)", p=p, q=p)
            parts.append(self.embed[key](patches) + self.place[key])
        poses, moves = [frames.pose, frames.previous_pose], [frames.action]
        if guesses.pose is not None:
            pose = guesses.pose.detach()
            poses.append(pose)
            moves += [pose, (pose - frames.motion[..., : self.pose_dim]) / STEP]
        action = self.embed_action(torch.cat(moves, dim=-1)) if self.config.actions else self.no_action
        action = torch.where(frames.has_action[..., None], action, self.no_action)
        parts.append((self.embed_pose(torch.cat(poses, dim=-1)) + action)[:, :, None])
        return torch.cat(parts, dim=2), F.silu(self.embed_level(frames.level) + action)

    def head(
        self, x: Tensor, condition: Tensor, frames: FrameBatch, guessed_pose: Tensor | None
    ) -> tuple[dict[str, Tensor], Tensor]:
        x = modulate(x, *self.final_modulation(condition).chunk(2, dim=-1))
        p = self.config.patch
        latents, start = {}, 0
        for camera, key in self.keys.items():
            change = self.unembed[key](x[:, :, start : start + self.tokens[camera]])
            start += self.tokens[camera]
            h = self.shapes[camera][1] // p
            change = rearrange(change, "b l (h w) (c p q) -> b l c (h p) (w q)", h=h, p=p, q=p)
            latents[camera] = frames.previous[camera] + change
        base = frames.previous_pose if guessed_pose is None else guessed_pose.detach()
        return latents, base + self.unembed_pose(x[:, :, -1])

    def forward(
        self, frames: FrameBatch, mask: Tensor, keep: slice = slice(None)
    ) -> tuple[dict[str, Tensor], Tensor, Guesses]:
        """All frames at once: latents, poses, and the guesses they were helped by.

        Args:
            mask: "l l", True where a query frame (row) may look at a key frame (column).
            keep: the frames whose predictions are wanted.
        """
        guesses = self.guesses(frames)
        x, condition = self.embed_frames(frames, guesses)
        turn = _broadcast_turn(rotary(frames.time, self.config.width // self.config.heads))
        for block in self._blocks():
            x = _apply(block, x, condition, lambda y, b: _masked(b, y, turn, mask))
        frames = FrameBatch(**{name: _keep(getattr(frames, name), keep) for name in FrameBatch.__slots__})
        guesses = guesses.keep(keep)
        latents, pose = self.head(x[:, keep], condition[:, keep], frames, guesses.pose)
        return latents, pose, guesses

    def stream(
        self, frames: FrameBatch, cache: Tensor, slot: Tensor, visible: Tensor
    ) -> tuple[dict[str, Tensor], Tensor]:
        """One frame (l = 1) against cached keys and values, which it overwrites at `slot`, in place.

        Args:
            cache: "n depth 2 (s heads) window d".
            slot: "n", the ring position of this frame in each row.
            visible: "n window", which ring positions each row may attend to (its own included).
        """
        guesses = self.guesses(frames)
        x, condition = self.embed_frames(frames, guesses)
        turn = _broadcast_turn(rotary(frames.time, self.config.width // self.config.heads))
        rows = torch.arange(len(x), device=x.device)
        for i, block in enumerate(self._blocks()):

            def attend(y: Tensor, block: Block, layer: Tensor = cache[:, i]) -> Tensor:
                q, k, v = block.time_qkv(y, turn)
                layer[rows, 0, :, slot], layer[rows, 1, :, slot] = k[:, :, 0], v[:, :, 0]
                attended = F.scaled_dot_product_attention(q, layer[:, 0], layer[:, 1], visible[:, None, None])
                return block.time_output(attended)

            x = _apply(block, x, condition, attend)
        return self.head(x, condition, frames, guesses.pose)


def _apply(block: Block, x: Tensor, condition: Tensor, time_attention: Callable[[Tensor, Block], Tensor]) -> Tensor:
    m = block.modulation(condition).chunk(9, dim=-1)
    x = torch.addcmul(x, m[2][:, :, None], block.space_attention(modulate(x, m[0], m[1])))
    x = torch.addcmul(x, m[5][:, :, None], time_attention(modulate(x, m[3], m[4]), block))
    return torch.addcmul(x, m[8][:, :, None], block.mlp(modulate(x, m[6], m[7])))


def _masked(block: Block, y: Tensor, turn: tuple[Tensor, Tensor], mask: Tensor) -> Tensor:
    q, k, v = block.time_qkv(y, turn)
    return block.time_output(F.scaled_dot_product_attention(q, k, v, mask))


def _broadcast_turn(turn: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """(l, d/2) or (b, l, d/2) to broadcast against "b (s h) l d/2"."""
    cos, sin = turn
    return (cos[:, None], sin[:, None]) if cos.ndim == 3 else (cos, sin)


def _keep(value: Any, frames: slice) -> Any:
    if isinstance(value, Mapping):
        return {camera: latents[:, frames] for camera, latents in value.items()}
    return value[..., frames] if value.ndim == 1 else value[:, frames]


def banded_causal_mask(frames: int, window: int, device: torch.device | None = None) -> Tensor:
    """True where key frame j is one of the last `window` frames up to query frame i: i - window < j <= i."""
    i = torch.arange(frames, device=device)
    return (i[None] <= i[:, None]) & (i[None] > i[:, None] - window)


def teacher_forcing_mask(frames: int, window: int, device: torch.device | None = None) -> Tensor:
    """Mask of the doubled pass: `frames` history frames 0..T-1, then `frames` noisy targets 1..T.

    History frame i sees history as in the banded causal pass. Target i+1 sees itself and the window-1 history frames
    before it: exactly what streaming sees.
    """
    i = torch.arange(frames, device=device)
    history = banded_causal_mask(frames, window, device)
    past = (i[None] <= i[:, None]) & (i[None] > i[:, None] + 1 - window)  # target of row i is frame i+1
    return torch.cat(
        [
            torch.cat([history, torch.zeros_like(history)], dim=1),
            torch.cat([past, torch.eye(frames, dtype=torch.bool, device=device)], dim=1),
        ]
    )
