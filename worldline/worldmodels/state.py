"""The state of a streaming world model: a ring of cached keys and values, the last frame, and each row's frame count."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamState:
    """n rows that may be at different frames (they are reset independently).

    `cache` is a ring: frame i of a row sits at slot i mod window. Its size does not depend on how long the dream is.
    """

    cache: Float[Tensor, "n depth 2 heads window d"]
    frames: Int[Tensor, " n"]  # how many frames the row holds
    latents: Mapping[str, Float[Tensor, "n c _h _w"]]  # whitened last frame, as the network saw it
    pose: Float[Tensor, "n p"]  # normalised last pose, as the network saw it
    motion: Float[Tensor, "n m"]  # of the last frame: its pose without noise, its last change, the block before it

    def __len__(self) -> int:
        return len(self.frames)

    def index(self, rows: Int[Tensor, " r"]) -> "StreamState":
        return StreamState(
            cache=self.cache[rows],
            frames=self.frames[rows],
            latents={camera: z[rows] for camera, z in self.latents.items()},
            pose=self.pose[rows],
            motion=self.motion[rows],
        )

    def where(self, mask: Bool[Tensor, " n"], other: "StreamState") -> "StreamState":
        def pick(new: Tensor, old: Tensor) -> Tensor:
            return torch.where(mask.view(-1, *[1] * (old.ndim - 1)), new, old)

        return StreamState(
            cache=pick(other.cache, self.cache),
            frames=pick(other.frames, self.frames),
            latents={camera: pick(other.latents[camera], z) for camera, z in self.latents.items()},
            pose=pick(other.pose, self.pose),
            motion=pick(other.motion, self.motion),
        )

    def visible(self) -> tuple[Int[Tensor, " n"], Bool[Tensor, "n window"]]:
        """For the next frame of each row: its slot, and the slots it may attend to once it is written there."""
        window = self.cache.shape[-2]
        slot = self.frames % window
        age = (slot[:, None] - torch.arange(window, device=slot.device)) % window  # 0 = the next frame itself
        return slot, age <= self.frames[:, None]
