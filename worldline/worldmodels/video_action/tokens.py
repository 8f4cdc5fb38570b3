"""Frames, poses and action blocks as tokens of one sequence, and back.

    history (h frames)       coming frames 1..f         blocks 0..f-1     registers, text
    patches of every camera  patches of every camera    one token each
    and one pose token       and one pose token

The pose token of a coming frame is there if the frame is asked for; of a given frame no pose is known, as of video found somewhere.
A coming frame's tokens hold what is shown of it and, beside it, the current frame at the same place: what the network answers is the change
from that, and an untrained network answers the current frame. What modulates them is the block that leads to them, and where all given
blocks up to them take the arm, as a dense network foretells it (`worldmodels.guesses`).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor, nn

from worldline.errors import SpecMismatch
from worldline.worldmodels.guesses import STEP, PoseGuess
from worldline.worldmodels.layers import cut
from worldline.worldmodels.ports import Body
from worldline.worldmodels.video_action.config import VideoActionConfig
from worldline.worldmodels.video_action.queries import Role, Roles


@dataclass(frozen=True, slots=True, kw_only=True)
class Known:
    """What has been seen, in the network's units: the last `history` frames, of which the last `count` are real; the others are zeros."""

    frames: Mapping[str, Tensor]  # camera -> "n h c h w", whitened
    poses: Tensor  # "n h p", normalised
    count: Tensor  # "n"
    motion: Tensor  # "n p+p+k*a", of the arm now (`motion_of`)
    aim: Tensor  # "n p", to where commands have added up by now (`PoseGuess`); "n 0" where they are not added up
    text: Tensor | None = None  # "n e"
    level: Tensor | None = None  # "n h", of noise on the frames; None: clean

    def index(self, rows: Tensor) -> "Known":
        return Known(
            frames={c: x[rows] for c, x in self.frames.items()},
            poses=self.poses[rows],
            count=self.count[rows],
            motion=self.motion[rows],
            aim=self.aim[rows],
            text=None if self.text is None else self.text[rows],
            level=None if self.level is None else self.level[rows],
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Future:
    """What comes, in the network's units: f frames and poses, and the blocks that lead to them. What is absent is not looked at."""

    frames: Mapping[str, Tensor]  # camera -> "n f c h w"
    poses: Tensor  # "n f p"
    actions: Tensor  # "n f k*a"

    def index(self, rows: Tensor) -> "Future":
        return Future(
            frames={c: x[rows] for c, x in self.frames.items()}, poses=self.poses[rows], actions=self.actions[rows]
        )

    def pick(self, roles: Roles, other: "Future") -> "Future":
        """This where it is given, `other` elsewhere. Poses to come are never given: of video alone they are not known."""
        frames, actions = roles.frames == Role.GIVEN, roles.actions == Role.GIVEN
        return Future(
            frames={c: torch.where(frames[..., None, None, None], x, other.frames[c]) for c, x in self.frames.items()},
            poses=other.poses,
            actions=torch.where(actions[..., None], self.actions, other.actions),
        )

    def at(self, places: Tensor) -> "Future":
        """One frame of each row, "n", and the block that leads to it: f = 1."""
        rows = torch.arange(len(places), device=places.device)
        frames = {c: x[rows, places][:, None] for c, x in self.frames.items()}
        return Future(
            frames=frames, poses=self.poses[rows, places][:, None], actions=self.actions[rows, places][:, None]
        )

    def first(self, count: int) -> "Future":
        frames = {c: x[:, :count] for c, x in self.frames.items()}
        return Future(frames=frames, poses=self.poses[:, :count], actions=self.actions[:, :count])

    def flat(self) -> Tensor:
        """All numbers of a row in one vector "n d"."""
        parts = [*(self.frames[c] for c in sorted(self.frames)), self.poses, self.actions]
        return torch.cat([x.flatten(1) for x in parts], 1)

    def like(self, flat: Tensor) -> "Future":
        """The inverse of `flat`, in this one's shapes."""
        names = sorted(self.frames)
        parts = [*(self.frames[c] for c in names), self.poses, self.actions]
        cuts = flat.split([x[0].numel() for x in parts], 1)
        made = [x.reshape(len(flat), *part.shape[1:]) for x, part in zip(cuts, parts)]
        return Future(frames=dict(zip(names, made)), poses=made[-2], actions=made[-1])


@dataclass(frozen=True, slots=True, kw_only=True)
class Draw:
    """How an answer is sampled: noise is a function of a row's seed "n" and of the number of its current frame "n"; `steps` of the solver.

    plan: blocks "n f k*a" to begin from, at level `warm`, instead of pure noise. noise: "n f k*a", that of the blocks, instead of the
    seeds' own. rounds: passes in which a video is filled in; of UVA alone. steer: (estimate of the clean blocks, level "n") to what shall
    stand in its place: guidance.
    """

    seeds: Tensor
    frame: Tensor
    steps: int
    plan: Tensor | None = None
    noise: Tensor | None = None
    warm: float = 1.0
    rounds: int = 1
    steer: Callable[[Tensor, Tensor], Tensor] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Sequence:
    """Tokens "n l d" and which of them are there "n l" (None: all). First history, then the coming frames that some row has, then the
    blocks that some row has, then registers and text.

    `told` "n g d" is what modulates each of g groups of tokens: every frame, every block, and the rest; `group` "l" says whose is whose.
    """

    tokens: Tensor
    there: Tensor | None
    told: Tensor
    group: Tensor
    begin: int  # where the coming frames' tokens begin
    frames: Tensor  # indices of the coming frames that have tokens
    actions: Tensor  # and of the blocks
    foretold: Tensor  # "n f p", where given blocks take the arm


class Tokens(nn.Module):
    """Embeds and reads out. `marks` say of a token how it is shown: at which level, or masked."""

    def __init__(
        self,
        config: VideoActionConfig,
        body: Body,
        text_dim: int,
    ) -> None:
        super().__init__()
        trunk, shapes, pose_dim = config.trunk, body.shapes, body.pose_dim
        width, self.patch, self.shapes, self.pose_dim = trunk.width, trunk.patch, dict(shapes), pose_dim
        self.history, self.horizon = config.history, config.horizon
        for camera, (_, h, w) in shapes.items():
            if h % self.patch or w % self.patch:
                raise SpecMismatch(
                    f"latents of camera {camera} must be a multiple of trunk.patch={self.patch} in height and width, got {h}x{w}"
                )
        self.keys = {camera: camera.replace(".", "_") for camera in shapes}
        cells = {c: channels * self.patch**2 for c, (channels, _, _) in shapes.items()}
        self.places = {c: h * w // self.patch**2 for c, (_, h, w) in shapes.items()}
        self.seen = nn.ModuleDict({self.keys[c]: nn.Linear(cells[c], width) for c in shapes})
        self.coming = nn.ModuleDict({self.keys[c]: nn.Linear(2 * cells[c], width) for c in shapes})
        self.place = nn.ParameterDict({self.keys[c]: 0.5 * torch.randn(self.places[c], width) for c in shapes})
        self.pose_seen, self.pose_coming = nn.Linear(pose_dim, width), nn.Linear(3 * pose_dim, width)
        self.pose_place = nn.Parameter(0.5 * torch.randn(width))
        self.time_seen = nn.Parameter(0.5 * torch.randn(self.history, width))
        self.time_coming = nn.Parameter(0.5 * torch.randn(self.horizon, width))
        self.action = nn.Linear(body.action_dim, width)
        self.time_action = nn.Parameter(0.5 * torch.randn(self.horizon, width))
        self.led_by = nn.Linear(width, width)
        aims = config.aim and body.adds_up
        guesses = config.guess_width and pose_dim
        self.guess_pose = PoseGuess(config.guess_width, pose_dim, body.action_dim, aims=aims) if guesses else None
        lands = nn.Sequential(nn.Linear(2 * pose_dim, width), nn.SiLU(), nn.Linear(width, width))
        self.lands = lands if guesses else None
        self.registers = nn.Parameter(0.5 * torch.randn(trunk.registers, width))
        self.text = nn.Linear(text_dim, width) if text_dim else None

    def init_weights(self) -> None:
        """After the linear layers have theirs."""
        if self.guess_pose is not None:
            self.guess_pose.init_weights()

    @property
    def frame_size(self) -> int:
        """Tokens of one frame."""
        return sum(self.places.values()) + 1

    def current(self, known: Known) -> dict[str, Tensor]:
        """The patches "n s cells" of the current frame, by camera."""
        return {c: cut(x[:, -1], self.patch) for c, x in known.frames.items()}

    @torch.no_grad()
    def foretold(self, known: Known, actions: Tensor, roles: Roles) -> tuple[Tensor, Tensor]:
        """Where the blocks "n f k*a" that are given take the arm, "n f p", and up to which frame that is known, "n f" bool: from there on
        it is where it is now. By a network with a loss of its own (`model`), so without gradients."""
        now = known.poses[:, -1:].expand(-1, self.horizon, -1)
        told = (roles.actions == Role.GIVEN).cumprod(1).bool()
        if self.guess_pose is None:
            return now, torch.zeros_like(told)
        led = follow_from(self.guess_pose, known, actions)
        return torch.where(told[..., None], led, now), told

    def sequence(
        self,
        known: Known,
        shown: Future,
        roles: Roles,
        *,
        seen_marks: Tensor,
        frame_marks: Tensor,
        action_marks: Tensor,
    ) -> Sequence:
        """All tokens of n rows. Frames or blocks that are absent in every row get none.

        Args:
            seen_marks: "n h d". frame_marks: "n f d" or "n f s d". action_marks: "n f d".
        """
        n = len(known.poses)
        parts, there, told = [self._seen(known, seen_marks)], [self._seen_there(known)], [seen_marks]
        begin = parts[0].shape[1]
        in_frames, in_actions = roles.frames != Role.ABSENT, roles.actions != Role.ABSENT
        frames, actions = in_frames.any(0).nonzero().flatten(), in_actions.any(0).nonzero().flatten()
        blocks = self.action(shown.actions) + self.time_action + action_marks
        foretold, told_of = self.foretold(known, shown.actions, roles)
        if len(frames):
            led = (self.led_by(blocks) * in_actions[..., None])[:, frames]
            if self.lands is not None:
                way = torch.cat([foretold, (foretold - known.poses[:, -1:]) / STEP], -1)
                led = led + (self.lands(way) * told_of[..., None])[:, frames]
            parts.append(self._coming(known, shown, foretold, frame_marks, frames))
            there.append(self._coming_there(roles.frames[:, frames]))
            told.append(led + frame_marks[:, frames] if frame_marks.ndim == 3 else led)
        parts.append(blocks[:, actions])
        there.append(in_actions[:, actions])
        told.append(action_marks[:, actions])
        extra = self.registers.expand(n, -1, -1)
        if self.text is not None:
            assert known.text is not None
            extra = torch.cat([extra, self.text(known.text)[:, None]], 1)
        parts.append(extra)
        there.append(torch.ones(extra.shape[:2], dtype=torch.bool, device=extra.device))
        told.append(torch.zeros_like(seen_marks[:, :1]))
        mask = torch.cat(there, 1)
        sizes = [self.frame_size] * (self.history + len(frames)) + [1] * len(actions) + [extra.shape[1]]
        return Sequence(
            tokens=torch.cat(parts, 1),
            there=None if bool(mask.all()) else mask,
            told=torch.cat(told, 1),
            group=torch.arange(len(sizes), device=mask.device).repeat_interleave(
                torch.tensor(sizes, device=mask.device)
            ),
            begin=begin,
            frames=frames,
            actions=actions,
            foretold=foretold,
        )

    def _seen(self, known: Known, marks: Tensor) -> Tensor:
        views = [
            self.seen[self.keys[c]](cut(x, self.patch)) + self.place[self.keys[c]] for c, x in known.frames.items()
        ]
        pose = (self.pose_seen(known.poses) + self.pose_place)[:, :, None]
        frames = torch.cat([*views, pose], 2) + (self.time_seen + marks)[:, :, None]
        return frames.flatten(1, 2)

    def _seen_there(self, known: Known) -> Tensor:
        age = torch.arange(self.history - 1, -1, -1, device=known.count.device)
        return (age < known.count[:, None]).repeat_interleave(self.frame_size, 1)

    def _coming(self, known: Known, shown: Future, foretold: Tensor, marks: Tensor, frames: Tensor) -> Tensor:
        patches, pose = self.current(known), known.poses[:, -1]
        views = []
        for c, x in shown.frames.items():
            beside = patches[c][:, None].expand(-1, len(frames), -1, -1)
            both = torch.cat([cut(x[:, frames], self.patch), beside], -1)
            views.append(self.coming[self.keys[c]](both) + self.place[self.keys[c]])
        here = pose[:, None].expand(-1, len(frames), -1)
        poses = self.pose_coming(torch.cat([shown.poses[:, frames], here, foretold[:, frames]], -1)) + self.pose_place
        of_frames = self.time_coming[frames, None]
        marks = (marks[:, :, None] if marks.ndim == 3 else marks)[:, frames]
        return (torch.cat([*views, poses[:, :, None]], 2) + of_frames + marks).flatten(1, 2)

    def _coming_there(self, roles: Tensor) -> Tensor:
        """Patches of frames that are not absent; pose tokens of those that are asked for."""
        views = (roles != Role.ABSENT)[..., None].expand(-1, -1, self.frame_size - 1)
        return torch.cat([views, (roles == Role.DENOISED)[..., None]], 2).flatten(1)

    def split(self, sequence: Sequence, tokens: Tensor) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        """The trunk's tokens of the frames that have some, "n f s d" a camera and "n f d" of poses, and of blocks "n f d"."""
        count = len(sequence.frames) * self.frame_size
        frames = (
            tokens[:, sequence.begin : sequence.begin + count].unflatten(1, (-1, self.frame_size)) if count else None
        )
        begin = sequence.begin + count
        actions = tokens[:, begin : begin + len(sequence.actions)]
        if frames is None:
            return {}, tokens[:, :0], actions
        *views, pose = frames.split([*(self.places[c] for c in self.shapes), 1], 2)
        return dict(zip(self.shapes, views)), pose[:, :, 0], actions

    def joined(self, camera: str, patches: Tensor) -> Tensor:
        """Patches "n f s cells" as latents "n f c h w"."""
        c, h, w = self.shapes[camera]
        p = self.patch
        return rearrange(patches, "n f (h w) (c p q) -> n f c (h p) (w q)", h=h // p, w=w // p, c=c, p=p, q=p)


def follow_from(guess: PoseGuess, known: Known, actions: Tensor) -> Tensor:
    """Where blocks "n f k*a" take the arm from how it moves now, "n f p"."""
    n, f = actions.shape[:2]
    now = known.poses[:, -1:].expand(-1, f, -1)
    before = torch.full((n,), -1, device=actions.device)  # rows began before now
    return guess.follow(now, actions, known.aim[:, None], before, known.motion)


def led(x: Tensor, before: int) -> Tensor:
    """ "n t ..." with so many zero frames before."""
    return torch.cat([x.new_zeros(len(x), before, *x.shape[2:]), x], 1) if before else x
