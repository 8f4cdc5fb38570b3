"""Where one robot's data enters and leaves the network: everything that depends on its cameras, poses and actions.

A `Port` cuts frames into tokens, embeds poses and action blocks, and turns tokens back into latents and poses. What lies
between, the trunk of blocks (`transformer`), knows of none of these, so several robots with other cameras and other actions can
share it.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace

import torch
from einops import rearrange
from torch import Tensor, nn

from worldline.errors import SpecMismatch
from worldline.worldmodels.guesses import STEP, Guesses, PoseGuess, ViewGuess
from worldline.worldmodels.layers import cut, modulate
from worldline.worldmodels.memory import Memories, MemoryConfig
from worldline.worldmodels.memory_reading import MemoryEncoder, MemoryTokens

# Of the tokens' learned places at the start. Tokens are of size one: from the usual 0.02 trained models had grown theirs to
# 0.2, and from 0.5 the same steps give a better dream (docs/log.md).
PLACE_STD = 0.5
ONLY = "robot"  # the port's name in a network of one robot


@dataclass(frozen=True, slots=True, kw_only=True)
class Body:
    """Sizes of one robot's data.

    shapes: camera -> (c, h, w) of its latents; pose_dim: p, may be 0; action_dim: length of a flattened action block (k * a);
    adds_up: whether actions say how far to go, and not where to be.
    """

    shapes: Mapping[str, tuple[int, int, int]]
    pose_dim: int
    action_dim: int
    adds_up: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class FrameBatch:
    """Network input of l frames: whitened noisy latents, the frames before them, and what conditions them.

    `action` is the normalised block that led to the frame, flattened; `has_action` False where a frame has none (the
    first of a clip) or it is not to be told. `time` orders frames for the rotary embedding: (l,) for all rows or (b, l).
    Cameras not named in `seen` were there in all frames; where one was not, its latents are zeros.
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
    seen: Mapping[str, Tensor] = field(default_factory=dict)  # camera -> "b l" bool, of `latents`
    previous_seen: Mapping[str, Tensor] = field(default_factory=dict)  # and of `previous`
    aim: Tensor | None = None  # "b l p", of the frame before (`PoseGuess`); the pose then, where it is not known
    text: Tensor | None = None  # "b e": the instruction's embedding

    def keep(self, frames: slice) -> "FrameBatch":
        """The frames named. The instruction belongs to all."""

        def cut(name: str) -> object:
            value = getattr(self, name)
            if value is None:
                return None
            if isinstance(value, Mapping):
                return {camera: z[:, frames] for camera, z in value.items()}
            return value[..., frames] if value.ndim == 1 else value[:, frames]

        return replace(self, **{f.name: cut(f.name) for f in fields(self) if f.name != "text"})

    def then(self, other: "FrameBatch") -> "FrameBatch":
        """These frames and then those of `other`, of the same rows. `time` must be given by row."""

        def join(name: str) -> object:
            mine, theirs = getattr(self, name), getattr(other, name)
            if mine is None:
                return None
            if isinstance(mine, Mapping):
                return {camera: torch.cat([z, theirs[camera]], dim=1) for camera, z in mine.items()}
            return torch.cat([mine, theirs], dim=1)

        return replace(self, **{f.name: join(f.name) for f in fields(self) if f.name != "text"})


class Port(nn.Module):
    """Tokens in, latents and poses out, for one `Body`.

    `experts`: actions are embedded by what all embodiments share (`experts`), not here.

    Raises `SpecMismatch` if a camera's latents cannot be cut into patches.
    """

    def __init__(
        self,
        body: Body,
        *,
        width: int,
        patch: int,
        guess_width: int,
        actions: bool,
        aim: bool,
        cross_view: bool,
        memory: MemoryConfig,
        experts: bool = False,
    ) -> None:
        super().__init__()
        self.body, self.patch, self.actions, self.cross_view = body, patch, actions, cross_view
        for camera, (_, h, w) in body.shapes.items():
            if h % patch or w % patch:
                raise SpecMismatch(
                    f"camera {camera}: latents of {h}x{w} cannot be cut into patches of {patch}x{patch}. Choose another patch size."
                )
        self.tokens = {camera: (h // patch) * (w // patch) for camera, (_, h, w) in body.shapes.items()}
        # nn.ModuleDict keys may not hold dots; cameras may
        self.keys = {camera: camera.replace(".", "_") for camera in body.shapes}
        channels = {self.keys[camera]: c * patch * patch for camera, (c, _, _) in body.shapes.items()}
        pose_dim, action_dim = body.pose_dim, body.action_dim
        guessing_pose = guess_width and actions and pose_dim
        aims = aim and body.adds_up
        self.guess_pose = PoseGuess(guess_width, pose_dim, action_dim, aims=aims) if guessing_pose else None
        poses = 2 * pose_dim if self.guess_pose else pose_dim
        guessing = guess_width > 0 and cross_view
        self.guess_views = ViewGuess(guess_width, body.shapes, self.keys, poses + action_dim) if guessing else None
        inputs = 3 if guessing else 2  # the noisy frame, the one before, the guess
        self.embed = nn.ModuleDict({key: nn.Linear(inputs * c, width) for key, c in channels.items()})
        self.place = nn.ParameterDict(
            {self.keys[camera]: nn.Parameter(torch.empty(n, width)) for camera, n in self.tokens.items()}
        )
        self.unseen = nn.ParameterDict({key: nn.Parameter(torch.zeros(2, width)) for key in channels})
        self.embed_pose = nn.Linear(pose_dim + poses, width)
        self.move_dim = action_dim + (poses if self.guess_pose else 0)  # the block, where it leads, and how far that is
        embed_action = nn.Sequential(nn.Linear(self.move_dim, width), nn.SiLU(), nn.Linear(width, width))
        self.embed_action = None if experts else embed_action
        self.no_action = nn.Parameter(torch.zeros(width))
        deep = {camera: c for camera, (c, _, _) in body.shapes.items()}
        self.memory = MemoryEncoder(width, patch, self.keys, deep, pose_dim, memory) if memory.size else None
        self.unembed = nn.ModuleDict({key: nn.Linear(width, c) for key, c in channels.items()})
        self.unembed_pose = nn.Linear(width, pose_dim)

    def init_weights(self) -> None:
        """After the linear layers have theirs. Both ways out start at 0: the untrained network is copy-last-frame."""
        for place in self.place.values():
            nn.init.normal_(place, std=PLACE_STD)
        if self.memory is not None:
            self.memory.warp.init_weights()
        if self.guess_pose is not None:
            self.guess_pose.init_weights()
        for linear in [self.unembed_pose, *self.unembed.values()]:
            assert isinstance(linear, nn.Linear)
            nn.init.zeros_(linear.weight)

    @property
    def tokens_per_frame(self) -> int:
        return sum(self.tokens.values()) + 1

    def view_mask(self, device: torch.device) -> Tensor | None:
        """ "s s": which tokens of a frame may look at which. None: all at all. Without `cross_view` a camera's tokens see that
        camera alone; the pose token sees everything, and nothing sees it."""
        if self.cross_view:
            return None
        view = torch.cat([torch.full((n,), i) for i, n in enumerate(self.tokens.values())] + [torch.tensor([-1])])
        return ((view[:, None] == view[None]) | (view == -1)[:, None]).to(device)

    def guesses(self, frames: FrameBatch) -> Guesses:
        """Pose and views by the dense networks. The pose learns by its own loss alone: the views take it as given."""
        action = frames.action * frames.has_action[..., None]
        if not self.actions:
            action = torch.zeros_like(action)
        pose, known = None, [frames.previous_pose, action]
        if self.guess_pose is not None:
            pose = self.guess_pose(frames.motion, frames.action, frames.has_action, frames.aim)
            known.append(pose.detach())
        views = self.guess_views(frames.previous, torch.cat(known, dim=-1)) if self.guess_views is not None else {}
        return Guesses(views=views, pose=pose)

    @torch.no_grad()
    def foretell(self, frames: FrameBatch) -> Tensor:
        """ "b l p": where the arm is about to be, as far as is known before the frame is imagined. Memory is searched by it."""
        if self.guess_pose is None:
            return frames.previous_pose
        return self.guess_pose(frames.motion, frames.action, frames.has_action, frames.aim)

    def moves(self, frames: FrameBatch, guesses: Guesses) -> Tensor:
        """ "b l m": the normalised block that led to each frame, where the arm is guessed to be by it, and how far that is."""
        moves = [frames.action]
        if guesses.pose is not None:
            pose = guesses.pose.detach()
            moves += [pose, (pose - frames.motion[..., : self.body.pose_dim]) / STEP]
        return torch.cat(moves, dim=-1)

    def tokenize(
        self, frames: FrameBatch, guesses: Guesses, action: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens "b l s d" (every camera's patches, then one for the pose), and what each frame's action and pose are, "b l d".

        `action` "b l d": its embedding, where that is not made here.
        """
        parts = []
        for camera, key in self.keys.items():
            inputs = [frames.latents[camera], frames.previous[camera]]
            if guesses.views:
                inputs.append(guesses.views[camera].detach())  # it learns by its own loss alone
            tokens = self.embed[key](cut(torch.cat(inputs, dim=2), self.patch)) + self.place[key]
            for seen, unseen in zip((frames.seen, frames.previous_seen), self.unseen[key]):
                if camera in seen:
                    tokens = tokens + (~seen[camera])[..., None, None] * unseen
            parts.append(tokens)
        poses = [frames.pose, frames.previous_pose]
        if guesses.pose is not None:
            poses.append(guesses.pose.detach())
        if self.actions and action is None and self.embed_action is not None:
            action = self.embed_action(self.moves(frames, guesses))
        told = self.no_action if action is None else action
        action = torch.where(frames.has_action[..., None], told, self.no_action)
        pose_token = self.embed_pose(torch.cat(poses, dim=-1))
        parts.append((pose_token + action)[:, :, None])
        return torch.cat(parts, dim=2), action, pose_token

    def remember(self, memories: Memories) -> MemoryTokens:
        """Remembered frames as tokens."""
        assert self.memory is not None
        return self.memory(memories, dict(self.place.items()))

    def output(
        self, x: Tensor, shift: Tensor, scale: Tensor, frames: FrameBatch, guessed_pose: Tensor | None
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Latents "b l c h w" and poses "b l p" from tokens: changes of the frame before (poses: of the guess)."""
        x = modulate(x, shift, scale)
        latents, start, p = {}, 0, self.patch
        for camera, key in self.keys.items():
            change = self.unembed[key](x[:, :, start : start + self.tokens[camera]])
            start += self.tokens[camera]
            h = self.body.shapes[camera][1] // p
            change = rearrange(change, "b l (h w) (c p q) -> b l c (h p) (w q)", h=h, p=p, q=p)
            latents[camera] = frames.previous[camera] + change
        base = frames.previous_pose if guessed_pose is None else guessed_pose.detach()
        return latents, base + self.unembed_pose(x[:, :, -1])
