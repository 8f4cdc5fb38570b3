"""Memory of long ago: a capped bank of past frames, found again by where the arm was when they were seen.

The key-value cache holds the last `window` frames. What lies further back is kept here as it was imagined or observed (latents
and pose, not keys), and a few frames are chosen for each frame that is to be imagined: some at fixed distances in the past,
and those whose pose is nearest to the pose the arm is about to take, because what a wrist camera will see then it has seen
there before. Ctrl-World (2510.10125) describes such retrieval; its released code has strided history only.

Chosen frames are encoded anew each time, with their age and the way from their pose to the coming one told to the network, and
are read by attention without rotary turns: nothing in the bank goes stale, and the same function chooses in training
and in rollouts. Poses are normalised; `frames` are frame numbers, -1 where a place is empty.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from worldline.errors import DatasetError

_FAR = 1e9
_SEEN = "seen: "


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryConfig:
    """How much is remembered, and what of it is shown for each frame. Without `recent` and `nearest` there is no memory."""

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
                f"memory: a capacity of at least recent + nearest = {self.size} frames (and 2) required, got {self.capacity}"
            )

    @property
    def size(self) -> int:
        """Frames shown for each frame."""
        return self.recent + self.nearest

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
            return torch.where(mask.view(-1, *[1] * (old.ndim - 1)), new, old)

        return MemoryBank(
            poses=pick(other.poses, self.poses),
            frames=pick(other.frames, self.frames),
            content={k: pick(other.content[k], z) for k, z in self.content.items()},
        )

    def push(
        self, pose: Float[Tensor, "n p"], frame: Int[Tensor, " n"], content: Mapping[str, Tensor], kept: Tensor
    ) -> "MemoryBank":
        """One more frame in the rows where `kept` "n". A full bank gives up the older of its two frames most alike in pose."""
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
        """ "n": of the two frames with the nearest poses, the place of the older one."""
        capacity = self.frames.shape[1]
        apart = (self.poses[:, :, None] - self.poses[:, None]).square().sum(-1)
        apart = apart + _FAR * torch.eye(capacity, device=apart.device)
        first, second = (pair := apart.flatten(1).argmin(1)) // capacity, pair % capacity
        ages = self.frames.gather(1, torch.stack([first, second], 1))
        return torch.where(ages[:, 0] < ages[:, 1], first, second)


@dataclass(frozen=True, slots=True, kw_only=True)
class Memories:
    """The frames shown for each of l frames: whitened latents, and what the network is told of them."""

    latents: Mapping[str, Tensor]  # camera -> "b l m c h w"
    seen: Mapping[str, Tensor]  # camera -> "b l m" bool: whether that frame held the camera
    pose: Tensor  # "b l m p"
    age: Tensor  # "b l m", frames
    valid: Tensor  # "b l m" bool
    query: Tensor  # "b l p": the pose they were chosen for


def choose(
    bank: MemoryBank, query: Float[Tensor, "n p"], now: Int[Tensor, " n"], config: MemoryConfig, window: int
) -> tuple[Int[Tensor, "n m"], Bool[Tensor, "n m"]]:
    """The places in the bank of the frames shown for frame number `now`, and which of these places hold one.

    First `recent` frames: those nearest to ages window, window + stride, ...; then `nearest` frames, by the distance of their
    poses from `query`. Frames that the key-value cache still holds (younger than `window`) are never among them, and no
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

    for i in range(config.recent):
        take((age - window - i * config.stride).abs().float(), 1)
    for _ in range(config.nearest):
        take(apart, config.gap)
    return torch.stack(places, 1), torch.stack(valid, 1)


def frame_content(latents: Mapping[str, Tensor], seen: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What a bank keeps of a frame: each camera's latents "n c h w" and whether it was there "n"."""
    return {**latents, **{_SEEN + camera: there.float() for camera, there in seen.items()}}


def recall(
    bank: MemoryBank, query: Float[Tensor, "n p"], now: Int[Tensor, " n"], config: MemoryConfig, window: int
) -> Memories:
    """What the bank shows for the next frame of each row (l = 1), number `now`, in which the arm will be at `query`.

    The bank's content is what `frame_content` made of the frames.
    """
    places, valid = choose(bank, query, now, config, window)
    rows = torch.arange(len(places), device=places.device)[:, None]
    return Memories(
        latents={name: z[rows, places][:, None] for name, z in bank.content.items() if not name.startswith(_SEEN)},
        seen={
            name.removeprefix(_SEEN): z[rows, places][:, None] > 0
            for name, z in bank.content.items()
            if name.startswith(_SEEN)
        },
        pose=bank.poses[rows, places][:, None],
        age=(now[:, None] - bank.frames[rows, places])[:, None],
        valid=valid[:, None],
        query=query[:, None],
    )


def recall_in_training(
    latents: Mapping[str, Float[Tensor, "b e c _h _w"]],
    seen: Mapping[str, Bool[Tensor, "b e"]],
    poses: Float[Tensor, "b e p"],
    length: Int[Tensor, " b"],
    query: Float[Tensor, "b l p"],
    config: MemoryConfig,
    window: int,
) -> Memories:
    """What a rollout's bank would show for the last l frames of each row, by the same `push` and `choose`.

    Args:
        latents, seen, poses: whole beginnings of episodes, right-aligned: the last `length` of e frames are there. The l frames
            that are imagined are the last ones, and the ones before them have been observed.
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
        age=torch.stack(age, 1),
        valid=torch.stack(valid, 1),
        query=query,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryTokens:
    """Remembered frames as the network takes them in."""

    tokens: Tensor  # "b l n d": to be attended to
    readable: Tensor  # "b l n" bool
    beside: Tensor  # "b l s d": of the one frame nearest by pose, for the frame's own tokens at the same places


class MemoryEncoder(nn.Module):
    """Tokens of remembered frames: patches, their place, and what tells of the frame: age, pose, the way to the coming pose.

    The frame nearest by pose (without `nearest`, the first one shown) is also laid beside the frame that is imagined, place
    by place: from almost the same pose it shows almost the same, and copying it need not wait until attention has learned to.
    """

    def __init__(
        self, width: int, channels: Mapping[str, int], pose_dim: int, config: MemoryConfig, ages: int = 8
    ) -> None:
        super().__init__()
        self.nearest = config.recent if config.nearest else 0
        self.lay_beside = nn.Linear(width, width)
        self.embed = nn.ModuleDict({key: nn.Linear(c, width) for key, c in channels.items()})
        self.tell = nn.Sequential(nn.Linear(2 * pose_dim + 2 * ages, width), nn.SiLU(), nn.Linear(width, width))
        self.ages = ages
        self.nothing = nn.Parameter(torch.zeros(1, width))  # always there: attention needs something to look at

    def forward(
        self, memories: Memories, patches: Mapping[str, Tensor], seen: Mapping[str, Tensor], place: Mapping[str, Tensor]
    ) -> MemoryTokens:
        """n = 1 + m*s tokens for each of l frames.

        Args:
            patches: key -> "b l m s c", the remembered latents cut up; seen: key -> "b l m".
            place: key -> "s d", the learned places of a frame's tokens.
        """
        rates = 2.0 ** torch.arange(self.ages, device=memories.age.device)
        angle = torch.log1p(memories.age.clamp(min=0).float())[..., None] * rates / 8
        way = memories.query[:, :, None] - memories.pose
        told = self.tell(torch.cat([memories.pose, way, angle.cos(), angle.sin()], dim=-1))
        tokens = [self.embed[key](x) + place[key] + told[:, :, :, None] for key, x in patches.items()]
        joined = torch.cat(tokens, dim=3)
        there = torch.cat(
            [(memories.valid & seen[key])[..., None].expand(*x.shape[:4]) for key, x in patches.items()], dim=3
        )
        nothing = self.nothing.expand(*joined.shape[:2], 1, -1)
        beside = self.lay_beside(joined[:, :, self.nearest]) * there[:, :, self.nearest, :, None]
        return MemoryTokens(
            tokens=torch.cat([nothing, joined.flatten(2, 3)], dim=2),
            readable=F.pad(there.flatten(2), (1, 0), value=True),
            beside=beside,
        )


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
