"""Memory of long ago: a capped bank of past frames, found again by where the arm was when they were seen.

The key-value cache holds the last `window` frames. What lies further back is kept here as it was imagined or observed (latents
and pose, not keys), and a few frames are chosen for each frame that is to be imagined: some at fixed distances in the past,
and those whose pose is nearest to the pose the arm is about to take, because what a wrist camera will see then it has seen
there before. Ctrl-World (2510.10125) describes such retrieval; its released code has strided history only.

Chosen frames are encoded anew each time they are shown (`memory_reading`): nothing in the bank goes stale, and the same function
chooses in training and in rollouts. Poses are normalised; `frames` are frame numbers, -1 where a place is empty.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from worldline.errors import DatasetError

_FAR = 1e9
_SEEN, _LEVEL = "seen: ", "level: "  # beside the names of cameras


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryConfig:
    """How much is remembered, and what of it is shown for each frame. Without `start`, `recent` and `nearest` there is no memory."""

    start: bool = False  # the episode's first frame
    recent: int = 0  # frames at fixed distances behind the window
    stride: int = 8  # frames between those
    nearest: int = 0  # frames nearest by pose
    gap: int = 4  # those are at least so many frames apart from each other
    capacity: int = 32  # frames a bank holds; when it is full, of the two most alike in pose the older one goes
    every: int = 1  # each so manyth frame is kept

    def __post_init__(self) -> None:
        if min(self.recent, self.nearest) < 0 or min(self.stride, self.gap, self.every) < 1:
            raise ValueError(
                f"memory: recent and nearest of at least 0, stride, gap and every of at least 1, got {self}"
            )
        if self.capacity < max(2, self.size):
            raise ValueError(
                f"memory: a capacity of at least start + recent + nearest = {self.size} frames (and 2) required, got {self.capacity}"
            )

    @property
    def size(self) -> int:
        """Frames shown for each frame."""
        return self.start + self.recent + self.nearest

    def require_history(self, frames: int, window: int, *, source: str) -> None:
        """Raise `DatasetError` if episodes of `frames` frames can neither fill the bank nor reach back as far as is asked:
        a rollout would then do what training never showed."""
        if not self.size:
            return
        reach = window + max(0, self.recent - 1) * self.stride
        if self.capacity * self.every > frames or reach >= frames:
            raise DatasetError(
                f"{source}: a memory of {self.capacity} frames, every {self.every} kept, that looks back {reach} frames requires "
                f"episodes of at least {max(self.capacity * self.every, reach + 1)} frames, the longest has {frames}. Use a smaller "
                "--model.network.memory.capacity, recent or stride, or longer episodes."
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryBank:
    """Past frames of n rows. A `RowState`. `content` are tensors "n capacity ..." that travel with each frame."""

    poses: Float[Tensor, "n capacity p"]
    frames: Int[Tensor, "n capacity"]
    content: Mapping[str, Float[Tensor, "n capacity ..."]]

    @classmethod
    def empty(cls, n: int, capacity: int, pose_dim: int, content: Mapping[str, Tensor]) -> "MemoryBank":
        """`content`: a tensor "n ..." of each kind that will be pushed, for its shape and device."""
        device = next(iter(content.values())).device if content else torch.device("cpu")
        return cls(
            poses=torch.zeros(n, capacity, pose_dim, device=device),
            frames=torch.full((n, capacity), -1, dtype=torch.long, device=device),
            content={k: torch.zeros(n, capacity, *z.shape[1:], device=z.device) for k, z in content.items()},
        )

    def __len__(self) -> int:
        return len(self.frames)

    def index(self, rows: Int[Tensor, " r"]) -> "MemoryBank":
        content = {k: z[rows] for k, z in self.content.items()}
        return MemoryBank(poses=self.poses[rows], frames=self.frames[rows], content=content)

    def where(self, mask: Bool[Tensor, " n"], other: "MemoryBank") -> "MemoryBank":
        def pick(new: Tensor, old: Tensor) -> Tensor:
            return torch.where(mask.to(old.device).view(-1, *[1] * (old.ndim - 1)), new, old)

        return MemoryBank(
            poses=pick(other.poses, self.poses),
            frames=pick(other.frames, self.frames),
            content={k: pick(other.content[k], z) for k, z in self.content.items()},
        )

    def push(
        self, pose: Float[Tensor, "n p"], frame: Int[Tensor, " n"], content: Mapping[str, Tensor], kept: Tensor
    ) -> "MemoryBank":
        """One more frame in the rows where `kept` "n". A full bank gives up the older of its two frames most alike in pose, but
        never the episode's first frame: in a dream that one is real."""
        free = self.frames < 0
        slot = free.float().argmax(1)  # the first free place
        full = kept & ~free.any(1)
        if bool(full.any()):
            slot = torch.where(full, self._redundant(), slot)
        hot = F.one_hot(slot, self.frames.shape[1]).bool() & kept[:, None]

        def put(new: Tensor, old: Tensor) -> Tensor:
            return torch.where(hot.view(*hot.shape, *[1] * (old.ndim - 2)), new[:, None], old)

        return MemoryBank(
            poses=put(pose, self.poses),
            frames=put(frame, self.frames),
            content={k: put(content[k], z) for k, z in self.content.items()},
        )

    def _redundant(self) -> Tensor:
        """ "n": of the two frames with the nearest poses, the place of the older one; the episode's first frame stays."""
        capacity = self.frames.shape[1]
        apart = (self.poses[:, :, None] - self.poses[:, None]).square().sum(-1)
        apart = apart + _FAR * torch.eye(capacity, device=apart.device)
        first, second = (pair := apart.flatten(1).argmin(1)) // capacity, pair % capacity
        number = self.frames.gather(1, torch.stack([first, second], 1))
        number = torch.where(number == 0, int(_FAR), number)
        return torch.where(number[:, 0] < number[:, 1], first, second)


@dataclass(frozen=True, slots=True, kw_only=True)
class Memories:
    """The frames shown for each of l frames: whitened latents, and what the network is told of them."""

    latents: Mapping[str, Tensor]  # camera -> "b l m c h w"
    seen: Mapping[str, Tensor]  # camera -> "b l m" bool: whether that frame held the camera
    pose: Tensor  # "b l m p"
    age: Tensor  # "b l m", frames
    level: Tensor  # "b l m": noise that `latents` carry
    valid: Tensor  # "b l m" bool
    query: Tensor  # "b l p": the pose they were chosen for


def choose(
    bank: MemoryBank, query: Float[Tensor, "n p"], now: Int[Tensor, " n"], config: MemoryConfig, window: int
) -> tuple[Int[Tensor, "n m"], Bool[Tensor, "n m"]]:
    """The places in the bank of the frames shown for frame number `now`, and which of these places hold one.

    First, with `start`, the oldest frame there is, which is the episode's first; then `recent` frames: those nearest to ages
    window, window + stride, ...; then `nearest` frames, by the distance of their poses from `query`. Frames that the key-value cache still holds (younger than `window`) are never among them, and no
    frame is chosen twice.
    """
    age = now[:, None] - bank.frames
    open_ = (bank.frames >= 0) & (age >= window)
    apart = (bank.poses - query[:, None]).square().sum(-1)
    places, valid = [], []

    def take(cost: Tensor, around: int) -> None:
        nonlocal open_
        place = torch.where(open_, cost, _FAR).argmin(1)
        held = open_.gather(1, place[:, None])[:, 0]
        places.append(place)
        valid.append(held)
        near = (bank.frames - bank.frames.gather(1, place[:, None])).abs() < around
        open_ = open_ & ~(near & held[:, None])

    if config.start:
        take(bank.frames.float(), 1)
    for i in range(config.recent):
        take((age - window - i * config.stride).abs().float(), 1)
    for _ in range(config.nearest):
        take(apart, config.gap)
    return torch.stack(places, 1), torch.stack(valid, 1)


def frame_content(
    latents: Mapping[str, Tensor], seen: Mapping[str, Tensor], level: Float[Tensor, " n"]
) -> dict[str, Tensor]:
    """What a bank keeps of a frame: each camera's latents "n c h w", the noise level they are at, and whether it was there."""
    return {**latents, **{_SEEN + camera: there.float() for camera, there in seen.items()}, _LEVEL: level}


def recall(
    bank: MemoryBank, query: Float[Tensor, "n p"], now: Int[Tensor, " n"], config: MemoryConfig, window: int
) -> Memories:
    """What the bank shows for the next frame of each row (l = 1), number `now`, in which the arm will be at `query`.

    The bank's content is what `frame_content` made of the frames.
    """
    places, valid = choose(bank, query, now, config, window)
    rows = torch.arange(len(places), device=places.device)[:, None]
    shown = {name: z[rows, places][:, None] for name, z in bank.content.items()}
    level = shown.pop(_LEVEL)
    seen = {name.removeprefix(_SEEN): shown.pop(name) > 0 for name in tuple(shown) if name.startswith(_SEEN)}
    return Memories(
        latents=shown,
        seen=seen,
        level=level,
        pose=bank.poses[rows, places][:, None],
        age=(now[:, None] - bank.frames[rows, places])[:, None],
        valid=valid[:, None],
        query=query[:, None],
    )


def recall_in_training(
    latents: Mapping[str, Float[Tensor, "b e c _h _w"]],
    seen: Mapping[str, Bool[Tensor, "b e"]],
    poses: Float[Tensor, "b e p"],
    level: Float[Tensor, "b e"],
    length: Int[Tensor, " b"],
    query: Float[Tensor, "b l p"],
    config: MemoryConfig,
    window: int,
) -> Memories:
    """What a rollout's bank would show for the last l frames of each row, by the same `push` and `choose`.

    Args:
        latents, seen, poses, level: whole beginnings of episodes, right-aligned: the last `length` of e frames are there. The l
            frames that are imagined are the last ones, and the ones before them have been observed. Latents carry noise of
            `level`.
        query: for each of the l frames the pose it was to be chosen by.
    """
    b, e, asked = len(poses), poses.shape[1], query.shape[1]
    device = poses.device
    bank = MemoryBank.empty(b, config.capacity, poses.shape[2], {"place": torch.zeros(b, device=device)})
    chosen, valid, age = [], [], []
    for i in range(e - 1):
        number = length - e + i  # of this frame, counted from the episode's first
        kept = (number >= 0) & (number % config.every == 0)
        place = torch.full((b,), float(i), device=device)
        bank = bank.push(poses[:, i], number, {"place": place}, kept)
        if (target := i + 1 - (e - asked)) >= 0:
            places, held = choose(bank, query[:, target], number + 1, config, window)
            chosen.append(bank.content["place"].gather(1, places).long())
            age.append(number[:, None] + 1 - bank.frames.gather(1, places))
            valid.append(held)
    where = torch.stack(chosen, 1)
    rows = torch.arange(b, device=device)[:, None, None]
    return Memories(
        latents={camera: z[rows, where] for camera, z in latents.items()},
        seen={camera: there[rows, where] for camera, there in seen.items()},
        pose=poses[rows, where],
        level=level[rows, where],
        age=torch.stack(age, 1),
        valid=torch.stack(valid, 1),
        query=query,
    )
