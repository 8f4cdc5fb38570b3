"""Settings of the unified video-action models: their size, what training shows them, and how they are sampled.

A sampling setting that asks for a level that training never shows is refused here.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch

from worldline.diffusion import LevelDistribution, solver_levels
from worldline.worldmodels.video_action.queries import QUERIES

VIDEO_ONLY: Mapping[str, float] = {"video": 1.0}
"""Shares of UVA's first stage."""


def still_masked(rounds: int, done: int | None = None) -> float:
    """The share of places that is still masked after `done` of so many rounds (before the last: None): MAR's cosine schedule, few places
    first, many at the end."""
    return math.cos(math.pi / 2 * (rounds - 1 if done is None else done) / rounds)


@dataclass(frozen=True, slots=True, kw_only=True)
class TrunkConfig:
    """Sizes of the transformer over all tokens."""

    width: int = 192  # numbers of a token
    depth: int = 6  # layers
    heads: int = 6  # of attention; they divide the width
    patch: int = 2  # latent cells along one side of a token
    mlp_ratio: float = 4.0  # width of the MLPs, in widths of a token
    registers: int = 8  # tokens that stand for nothing and gather what concerns all (UWM's policies succeed in .88 with 8, in .78 without)

    def __post_init__(self) -> None:
        if self.width % self.heads:
            raise ValueError(f"width must be a multiple of heads, got width={self.width}, heads={self.heads}")
        if min(self.width, self.depth, self.patch) < 1 or self.registers < 0:
            raise ValueError(f"width, depth and patch of at least 1, registers of at least 0 required, got {self}")


@dataclass(frozen=True, slots=True, kw_only=True)
class VideoActionConfig:
    """`design` uwm: frames and actions are denoised in the trunk itself, each at a level of its own (Unified World Models, 2504.02792).
    uva: the trunk makes one masked joint latent of both, and light heads denoise from it; acting makes no video (Unified Video
    Action, 2503.00200)."""

    design: Literal["uwm", "uva"] = "uwm"
    """uwm: frames and actions are denoised in the trunk. uva: a joint latent, and light heads that denoise from it."""
    trunk: TrunkConfig = field(default_factory=TrunkConfig)
    history: int = 2  # frames seen, the current one included
    horizon: int = 4  # coming frames, and action blocks that lead to them
    # what training asks for, by the queries' names; rows whose actions are unknown are asked for video
    shares: Mapping[str, float] = field(
        default_factory=lambda: {"policy": 0.2, "forward": 0.5, "inverse": 0.1, "video": 0.05, "joint": 0.15}
    )
    targets: Literal["dense", "end"] = "dense"  # end: of the coming frames only the last is there (UWM as published)
    # levels at which frames and actions are shown where they are asked for; drawn apart, so that joint training meets each with the
    # other clean, noisy and gone
    frame_levels: LevelDistribution = field(default_factory=lambda: LevelDistribution(clean=0.05, pure=0.85, low=0.02))
    action_levels: LevelDistribution = field(default_factory=lambda: LevelDistribution(clean=0.1, pure=0.5, low=0.02))
    # noise on the known frames, in training
    history_levels: LevelDistribution = field(default_factory=lambda: LevelDistribution(clean=0.5, high=0.3))
    max_weight: float = 1.0  # cap of the loss weight 1/level^2
    pose_weight: float = 2.0  # of the poses in the loss
    action_weight: float = 0.3  # of the actions in the loss
    guess_width: int = 256  # of the dense network that guesses where given blocks take the arm; 0: none
    aim: bool = True  # it knows to where commands have added up, where they say how far to go
    text: str = "none"  # the instruction's encoder: none, hashed, or the name of a text model of transformers
    # uva
    masked: tuple[float, float] = (0.7, 1.0)  # of the coming frames' places, so much is masked in training
    head_width: int = 256  # width of the heads
    head_depth: int = 3  # layers of the heads
    head_draws: int = 4  # levels at which a token is asked for, for one pass of the trunk
    # sampling
    solver_steps: int = 1  # where frames alone are asked for, as in a dream, or blocks that given frames explain; 1: what may be expected
    action_steps: int = 4  # where it decides on blocks
    chunk: int = 1  # frames that `imagine` makes at a time
    span: int = 0  # frames imagined one at a time from the same known frame; 0: the horizon
    decode_rounds: int = 1  # uva: passes in which the places of a video are filled in
    warm_level: float = 1.0  # uwm, uva: where denoising of a chunk begins if there is a plan from before; 1: afresh
    execute: int = 0  # blocks of a chunk that a policy hands out before it is asked again; 0: all

    def __post_init__(self) -> None:
        if self.history < 1 or self.horizon < 1:
            raise ValueError(f"history and horizon of at least 1 required, got {self.history} and {self.horizon}")
        if unknown := sorted(set(self.shares) - set(QUERIES)):
            raise ValueError(f"shares: some of {', '.join(QUERIES)} required, got {', '.join(unknown)}")
        if not self.shares or min(self.shares.values()) < 0 or sum(self.shares.values()) <= 0:
            raise ValueError(f"shares: numbers of at least 0, one above, required, got {dict(self.shares)}")
        low, high = self.masked
        if not 0 < low <= high <= 1:
            raise ValueError(f"masked: 0 < low <= high <= 1 required, got {self.masked}")
        for name in ("head_width", "head_depth", "head_draws", "decode_rounds"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        hidden = still_masked(self.decode_rounds)
        if self.design == "uva" and hidden < low:
            raise ValueError(
                f"decode_rounds={self.decode_rounds} shows {1 - hidden:.0%} of the places to its last round, training at most {1 - low:.0%} "
                f"(masked={self.masked}): --model.masked {math.floor(100 * hidden) / 100:g} {high:g} in training allows it"
            )
        if not 1 <= self.chunk <= self.horizon:
            raise ValueError(f"chunk: from 1 to {self.horizon} frames (the horizon) required, got {self.chunk}")
        if self.guess_width < 0:
            raise ValueError(f"guess_width must be at least 0, got {self.guess_width}")
        if not 0 <= self.span <= self.horizon:
            raise ValueError(f"span: from 0 (all) to {self.horizon} frames (the horizon) required, got {self.span}")
        if self.targets == "end" and self.span > 1:
            raise ValueError(
                f"span: 1 required with targets='end', whose training never shows two coming frames, got {self.span}"
            )
        if self.targets == "end" and self.chunk > 1:
            raise ValueError(
                f"chunk: 1 required with targets='end', whose training never shows two coming frames, got {self.chunk}"
            )
        if not 0 <= self.execute <= self.horizon:
            raise ValueError(f"execute: from 0 to {self.horizon} blocks (the horizon) required, got {self.execute}")
        if not 0 < self.warm_level <= 1:
            raise ValueError(f"warm_level must be above 0 and at most 1, got {self.warm_level}")
        asked = [("solver_steps", self.frame_levels, x) for x in solver_levels(self.solver_steps)[:-1].tolist()]
        both = self.frame_levels, self.action_levels
        asked += [("action_steps", of, x) for of in both for x in solver_levels(self.action_steps)[:-1].tolist()]
        asked += [("warm_level", self.action_levels, x) for x in self.warm_levels[:-1].tolist()]
        for name, shown, level in asked:
            if not shown.contains(level):
                raise ValueError(
                    f"{name}={getattr(self, name)} asks for level {level:g}, which training never shows ({shown})"
                )
        if not self.history_levels.contains(0.0):
            raise ValueError(f"history_levels must hold level 0, at which history is given, got {self.history_levels}")

    @property
    def reach(self) -> int:
        """Frames imagined from one known frame: `span`, 0 meant."""
        return self.span or (self.horizon if self.targets == "dense" else 1)

    @property
    def warm_levels(self) -> torch.Tensor:
        """Those visited from a plan of before on."""
        return self.warm_level * solver_levels(self.action_steps)
