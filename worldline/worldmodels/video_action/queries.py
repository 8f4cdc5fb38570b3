"""What is asked of a unified model, as data: a role for every coming frame and every coming action block.

    role        in sampling                            in training
    GIVEN       known, as it is                        shown clean, not asked for
    DENOISED    what is wanted                         shown at a noise level, or masked, and asked for
    ABSENT      unknown and not wanted: no token       no token

The frames seen so far are always given; roles are about what comes: frames 1..f and the blocks 0..f-1 that lead to them::

    frame     now     1       2       3          POLICY    frames ABSENT    actions DENOISED
               |--0----|--1----|--2----|         FORWARD   frames DENOISED  actions GIVEN
                     action blocks               INVERSE   frames GIVEN     actions DENOISED
                                                 VIDEO     frames DENOISED  actions ABSENT
                                                 JOINT     frames DENOISED  actions DENOISED
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from enum import IntEnum

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from worldline.errors import SpecMismatch


class Role(IntEnum):
    GIVEN = 0
    DENOISED = 1
    ABSENT = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Query:
    """Roles of the coming frames and of the blocks that lead to them. One role stands for as many as there are (`at`).

    Raises `ValueError` if nothing is denoised: there would be nothing to sample.
    """

    frames: tuple[Role, ...]
    actions: tuple[Role, ...]

    def __post_init__(self) -> None:
        if not self.frames or not self.actions:
            raise ValueError(f"a role for frames and one for actions required, got {self}")
        if Role.DENOISED not in (*self.frames, *self.actions):
            raise ValueError(f"a query with something to denoise is required, got {self}: nothing would be sampled")

    @property
    def decides(self) -> bool:
        """Whether blocks are asked for that no given frame explains."""
        return Role.DENOISED in self.actions and Role.GIVEN not in self.frames

    def at(self, horizon: int) -> "Query":
        """With a role for each of `horizon` frames and blocks. Raises `ValueError` if it has roles for another number."""
        for name, roles in (("frames", self.frames), ("actions", self.actions)):
            if len(roles) not in (1, horizon):
                raise ValueError(f"{name}: one role or {horizon} of them required, got {len(roles)}")
        return Query(frames=_spread(self.frames, horizon), actions=_spread(self.actions, horizon))

    def first(self, count: int, horizon: int) -> "Query":
        """The same of the first `count` frames and blocks; those after them absent."""
        if not 1 <= count <= horizon:
            raise ValueError(f"from 1 to {horizon} frames required, got {count}")
        left, whole = (Role.ABSENT,) * (horizon - count), self.at(horizon)
        return Query(frames=whole.frames[:count] + left, actions=whole.actions[:count] + left)

    def rows(self, n: int) -> "Roles":
        """The same query of n rows."""
        return Roles(
            frames=torch.tensor([list(self.frames)]).expand(n, -1),
            actions=torch.tensor([list(self.actions)]).expand(n, -1),
        )


def _spread(roles: tuple[Role, ...], horizon: int) -> tuple[Role, ...]:
    return roles * horizon if len(roles) == 1 else roles


@dataclass(frozen=True, slots=True, kw_only=True)
class Roles:
    """Queries of n rows, which may differ, as numbers of `Role`."""

    frames: Int[Tensor, "n f"]
    actions: Int[Tensor, "n f"]

    def to(self, device: torch.device) -> "Roles":
        return Roles(frames=self.frames.to(device), actions=self.actions.to(device))

    def index(self, rows: Tensor) -> "Roles":
        return Roles(frames=self.frames[rows], actions=self.actions[rows])

    def upto(self, count: Int[Tensor, " n"]) -> "Roles":
        """The first so many frames and blocks of each row; those after them absent."""
        beyond = torch.arange(self.frames.shape[1], device=count.device) >= count[:, None]
        return Roles(
            frames=self.frames.masked_fill(beyond, Role.ABSENT), actions=self.actions.masked_fill(beyond, Role.ABSENT)
        )

    @property
    def with_frames(self) -> Tensor:
        """Rows "n" in which some frame has a token."""
        return (self.frames != Role.ABSENT).any(1)


POLICY = Query(frames=(Role.ABSENT,), actions=(Role.DENOISED,))
FORWARD = Query(frames=(Role.DENOISED,), actions=(Role.GIVEN,))
INVERSE = Query(frames=(Role.GIVEN,), actions=(Role.DENOISED,))
VIDEO = Query(frames=(Role.DENOISED,), actions=(Role.ABSENT,))
JOINT = Query(frames=(Role.DENOISED,), actions=(Role.DENOISED,))

QUERIES: Mapping[str, Query] = {
    "policy": POLICY,
    "forward": FORWARD,
    "inverse": INVERSE,
    "video": VIDEO,
    "joint": JOINT,
}
"""By the names that users type."""


@dataclass(frozen=True, slots=True, kw_only=True)
class VideoActions:
    """What a query found: the frames and blocks that are not absent, those given as they were. Raw latents, physical units."""

    latents: Mapping[str, Float[Tensor, "n _f c2 _h _w"]]
    poses: Float[Tensor, "n _f p"]
    actions: Float[Tensor, "n _g k a"]


def name_of(query: Query) -> str | None:
    """The named query that it is, of however many frames; None for others, as with some frames given and some asked for."""

    def kinds(of: Query) -> list[set[Role]]:
        return [set(roles) - {Role.ABSENT} for roles in (of.frames, of.actions)]

    return next((name for name, named in QUERIES.items() if kinds(named) == kinds(query)), None)


def require_learned(query: Query, shares: Mapping[str, float], also: Collection[str] = ()) -> None:
    """Raise `SpecMismatch` for a named query that training never asked: neither by `shares` nor `also`, by its data."""
    name = name_of(query)
    if name is None or shares.get(name) or name in also:
        return
    raise SpecMismatch(
        f"a video-action model that learned the {name} query is required, the share of that is 0 in this one ({dict(shares)}). Go on from it "
        f"with `worldline train video-action --init-from`, or train one, with a share of {name} in --model.shares."
    )


def draw_roles(
    shares: Mapping[str, float],
    n: int,
    horizon: int,
    generator: torch.Generator | None,
    *,
    sparse: bool = False,
    acted: Bool[Tensor, " n"] | None = None,
    imitated: Bool[Tensor, " n"] | None = None,
) -> Roles:
    """Queries of n training rows: the named ones by their shares, half of them of fewer frames than the horizon.

    Args:
        sparse: no frame but the last of each row's has a token (UWM's published end point).
        acted: rows whose actions are known; the others are asked for video. None: all.
        imitated: rows whose actions are what to do; the others are told theirs where they would be asked for them. None: all.
    """
    names = list(shares)
    weights = torch.tensor([shares[name] for name in names], dtype=torch.float64)
    kinds = torch.multinomial(weights, n, replacement=True, generator=generator)
    whole = torch.rand(n, generator=generator) < 0.5
    drawn = torch.randint(1, horizon + 1, (n,), generator=generator)
    counts = torch.where(whole, horizon, drawn)
    queries = [QUERIES[name].rows(1) for name in names]
    beyond = torch.arange(horizon)[None] >= counts[:, None]
    frames = torch.cat([q.frames for q in queries])[kinds].expand(-1, horizon).masked_fill(beyond, Role.ABSENT)
    actions = torch.cat([q.actions for q in queries])[kinds].expand(-1, horizon).masked_fill(beyond, Role.ABSENT)
    if sparse:
        frames = frames.masked_fill(torch.arange(horizon)[None] != counts[:, None] - 1, Role.ABSENT)
    roles = Roles(frames=frames, actions=actions)
    if imitated is not None:
        roles = not_imitated(roles, imitated, sparse=sparse)
    return roles if acted is None else video_alone(roles, acted, sparse=sparse)


def not_imitated(roles: Roles, imitated: Bool[Tensor, " n"], *, sparse: bool = False) -> Roles:
    """Rows whose actions are known but not to be imitated are not asked what to do: blocks that they would be asked for with no frame given are
    given, and the frames that those lead to asked for."""
    explained = (roles.frames == Role.GIVEN).any(1)
    asked = (roles.actions == Role.DENOISED) & ~(explained | imitated.cpu())[:, None]
    frames = asked
    if sparse:  # the last of a row's alone
        frames = asked & (asked.flip(1).cumsum(1).flip(1) == 1)
    return Roles(
        frames=torch.where(frames, Role.DENOISED, roles.frames), actions=torch.where(asked, Role.GIVEN, roles.actions)
    )


def video_alone(roles: Roles, acted: Bool[Tensor, " n"], *, sparse: bool = False) -> Roles:
    """Rows whose actions are not known (`acted` False) are asked the video query instead."""
    horizon = roles.frames.shape[1]
    whole = VIDEO.at(horizon).rows(len(acted))
    frames = whole.frames
    if sparse:
        frames = frames.masked_fill(torch.arange(horizon) != horizon - 1, Role.ABSENT)
    keep = acted.cpu()[:, None]
    return Roles(
        frames=torch.where(keep, roles.frames, frames), actions=torch.where(keep, roles.actions, whole.actions)
    )
