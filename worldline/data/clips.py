"""Windows of episodes as training clips, and the one function that pairs frames with action blocks.

With stride s a clip holds frames i, i+s, i+2s, ... and each of its blocks joins the s recorded blocks between two of
them, in order::

    recorded frames   i     i+1    i+2    i+3    i+4
    recorded blocks     |a_i |a_i+1 |a_i+2 |a_i+3 |
    stride 2          i            i+2           i+4      block 0 = (a_i, a_i+1), block 1 = (a_i+2, a_i+3)

What is drawn at a training step is a function of (seed, step) alone, so a run resumes exactly from its step number.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import overload

import torch
from jaxtyping import Float
from torch import Tensor

from worldline.data.lerobot_read import LeRobotDataset
from worldline.data.store import FrameStore
from worldline.errors import DatasetError
from worldline.types import Clip, Episode, WorldSpec

log = logging.getLogger(__name__)


def strided(spec: WorldSpec, stride: int) -> WorldSpec:
    """The spec of frames `stride` apart: fewer frames a second, longer action blocks, the same control rate."""
    if stride < 1:
        raise DatasetError(f"a stride of at least 1 required, got {stride}.")
    return replace(spec, fps=spec.fps / stride, control_steps=spec.control_steps * stride)


def action_blocks(
    row_actions: Float[Tensor, "rows k_row a"], stride: int, start: int, frames: int
) -> Float[Tensor, "{frames-1} k a"]:
    """Blocks between frames start, start+stride, ... (`frames` of them), k = stride * k_row.

    `row_actions[i]` takes frame i to frame i+1. Raises `DatasetError` if the rows do not reach that far.
    """
    span = (frames - 1) * stride
    if start < 0 or frames < 1 or start + span > len(row_actions):
        raise DatasetError(
            f"{frames} frames from frame {start} at stride {stride} need {start + span} action blocks, got "
            f"{len(row_actions)}. Use fewer frames or a smaller stride."
        )
    rows, (k, a) = row_actions[start : start + span], row_actions.shape[1:]
    return rows.reshape(frames - 1, stride * k, a)


def draw(count: int, seed: int, step: int, batch_size: int) -> list[int]:
    """Indices below `count` for training step `step`: consecutive pieces of one permutation after another."""
    first = step * batch_size
    return [int(_permutation(count, seed, i // count)[i % count]) for i in range(first, first + batch_size)]


@lru_cache(maxsize=4)
def _permutation(count: int, seed: int, epoch: int) -> Tensor:
    generator = torch.Generator().manual_seed((seed * 1_000_003 + epoch) & 0x7FFF_FFFF_FFFF_FFFF)
    return torch.randperm(count, generator=generator)


class Windows(Sequence[tuple[int, int]]):
    """(position in `lengths`, start) of every window of `span` frames, in order. Takes memory by the sequence, not by the window."""

    def __init__(self, lengths: Sequence[int], span: int) -> None:
        self._counts = (torch.tensor(lengths, dtype=torch.long) - span + 1).clamp(min=0)
        self._ends = self._counts.cumsum(0)

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    @overload
    def __getitem__(self, index: int) -> tuple[int, int]: ...
    @overload
    def __getitem__(self, index: slice) -> list[tuple[int, int]]: ...
    def __getitem__(self, index: int | slice) -> tuple[int, int] | list[tuple[int, int]]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(f"an index below {len(self)} required, got {index}")
        index %= len(self)
        position = int(torch.searchsorted(self._ends, index, right=True))
        return position, index - int(self._ends[position] - self._counts[position])


def collate(clips: Sequence[Clip]) -> Clip:
    """Clips of one shape and lead, joined along the batch axis. Cameras must be the same in all."""
    leds = [clip.led for clip in clips if clip.led is not None]
    return Clip(
        frames={camera: torch.cat([clip.frames[camera] for clip in clips]) for camera in clips[0].frames},
        actions=torch.cat([clip.actions for clip in clips]),
        poses=torch.cat([clip.poses for clip in clips]),
        present={camera: torch.cat([clip.present[camera] for clip in clips]) for camera in clips[0].present},
        instruction=sum((clip.instruction for clip in clips), ()),
        lead=clips[0].lead,
        led=torch.cat(leds) if len(leds) == len(clips) else None,
    )


def with_lead(clip: Clip, before: int, lead: int) -> Clip:
    """A clip whose first `before` frames are what came before it, padded with zeros to a lead of `lead` frames."""
    if not lead:
        return clip

    def padded(x: Tensor) -> Tensor:
        return torch.cat([x.new_zeros(x.shape[0], lead - before, *x.shape[2:]), x], dim=1)

    return replace(
        clip,
        frames={camera: padded(x) for camera, x in clip.frames.items()},
        actions=padded(clip.actions),
        poses=padded(clip.poses),
        lead=lead,
        led=torch.full((len(clip.poses),), before) if clip.led is None else clip.led,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Numbers:
    actions: Tensor  # (t-1, k_row, a)
    poses: Tensor  # (t, p)
    instruction: str


class ClipSampler:
    """Every window of `frames` frames, `stride` apart, of the episodes named.

    Episodes too short for one window are left out and counted in `skipped`; `DatasetError` if none is left.
    """

    def __init__(
        self,
        dataset: LeRobotDataset,
        episodes: Sequence[int],
        *,
        frames: int,
        stride: int = 1,
        cameras: Sequence[str] | None = None,
        store: FrameStore | None = None,
    ) -> None:
        self.spec = strided(dataset.spec, stride)
        self.cameras = [c.name for c in dataset.spec.cameras] if cameras is None else list(cameras)
        self.spec = replace(self.spec, cameras=tuple(self.spec.camera(name) for name in self.cameras))
        self.dataset, self.frames, self.stride = dataset, frames, stride
        self.store = store or FrameStore(dataset)
        self.span = (frames - 1) * stride + 1
        self.episodes = [i for i in episodes if dataset.length(i) >= self.span]
        self.skipped = len(episodes) - len(self.episodes)
        if not self.episodes:
            raise DatasetError(
                f"{dataset.root}: episodes of at least {self.span} frames required ({frames} frames at stride {stride}), "
                f"got none among {len(episodes)}. Use fewer frames or a smaller stride."
            )
        if self.skipped:
            log.warning("%d of %d episodes are shorter than %d frames", self.skipped, len(episodes), self.span)
        self.windows = Windows([dataset.length(i) for i in self.episodes], self.span)
        self._numbers: dict[int, _Numbers] = {}

    def __len__(self) -> int:
        return len(self.windows)

    def clip(self, index: int) -> Clip:
        """Window `index` as a clip with b = 1."""
        position, start = self.windows[index]
        episode = self.episodes[position]
        numbers = self._episode(episode)
        chosen = slice(start, start + self.span, self.stride)
        return Clip(
            frames={camera: self.store.window(episode, camera, chosen)[None] for camera in self.cameras},
            actions=action_blocks(numbers.actions, self.stride, start, self.frames)[None],
            poses=numbers.poses[chosen][None],
            instruction=(numbers.instruction,),
        )

    def batch(self, seed: int, step: int, batch_size: int) -> Clip:
        """The clips of training step `step`."""
        return collate([self.clip(i) for i in draw(len(self), seed, step, batch_size)])

    def _episode(self, episode: int) -> _Numbers:
        if episode not in self._numbers:
            read: Episode = self.dataset.episode(episode)
            self._numbers[episode] = _Numbers(actions=read.actions, poses=read.poses, instruction=read.instruction)
        return self._numbers[episode]
