"""The state of a streaming world model: a ring of cached keys and values, the last frame, a bank of older ones, and each row's
frame count."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from worldline.worldmodels.memory import MemoryBank
from worldline.worldmodels.ports import FrameBatch


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamState:
    """n rows that may be at different frames (they are reset independently).

    `cache` is a ring: frame i of a row sits at slot i mod window. The last frame may still be `unwritten`: it goes through the
    network together with the first look at the next one. No part's size depends on how long the dream is.
    """

    cache: Float[Tensor, "n depth 2 heads window d"]
    frames: Int[Tensor, " n"]  # how many frames the row holds
    latents: Mapping[str, Float[Tensor, "n c _h _w"]]  # whitened last frame, as the network saw it
    seen: Mapping[str, Bool[Tensor, " n"]]  # whether that camera was there
    pose: Float[Tensor, "n p"]  # normalised last pose, as the network saw it
    motion: Float[Tensor, "n m"]  # of the last frame: its pose without noise, its last change, the block before it
    aim: Float[Tensor, "n q"]  # to where commands have added up; q is 0 where that is not known
    text: Float[Tensor, "n e"]  # the instruction; e is 0 where the network is not told it
    bank: MemoryBank | None
    unwritten: FrameBatch | None  # what the network is to be shown of the last frame

    def __len__(self) -> int:
        return len(self.frames)

    def index(self, rows: Int[Tensor, " r"]) -> "StreamState":
        return self._each(lambda value: value.index(rows) if isinstance(value, MemoryBank) else value[rows])

    def where(self, mask: Bool[Tensor, " n"], other: "StreamState") -> "StreamState":
        def pick(old: Any, new: Any) -> Any:
            if isinstance(old, MemoryBank):
                return old.where(mask, new)
            return torch.where(mask.to(old.device).view(-1, *[1] * (old.ndim - 1)), new, old)

        return self._each(pick, other)

    def _each(self, function: Callable[..., Any], *others: "StreamState") -> "StreamState":
        """`function` of each tensor and of the bank, with those at the same place in the other states."""

        def apply(*values: Any) -> Any:
            if values[0] is None:
                assert all(value is None for value in values), "states of one way of sampling"
                return None
            if isinstance(values[0], Mapping):
                return {key: apply(*(value[key] for value in values)) for key in values[0]}
            if isinstance(values[0], FrameBatch):
                named = [f.name for f in fields(FrameBatch)]
                return FrameBatch(**{name: apply(*(getattr(value, name) for value in values)) for name in named})
            return function(*values)

        parts = {f.name: apply(*(getattr(state, f.name) for state in (self, *others))) for f in fields(self)}
        return StreamState(**parts)

    def visible(self, numbers: Int[Tensor, "n l"]) -> tuple[Int[Tensor, "n l"], Bool[Tensor, "n l window"]]:
        """For the frames of these numbers: their slots, and the slots each may attend to once it is written there."""
        window = self.cache.shape[-2]
        slot = numbers % window
        age = (slot[..., None] - torch.arange(window, device=slot.device)) % window  # 0 = the frame itself
        return slot, age <= numbers[..., None]
