"""Clips that deserve no reward: a judge that is to be believed must call them bad.

Each function takes uint8 frames "t c h w" of one camera and gives as many: the actions commanded stay as they were.
"""

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from jaxtyping import UInt8
from torch import Tensor


def blur(frames: UInt8[Tensor, "n c h w"]) -> UInt8[Tensor, "n c h w"]:
    """Averaged over about a quarter of the picture: what is there cannot be told any more."""
    size = max(3, max(frames.shape[-2:]) // 4 | 1)
    return F.avg_pool2d(frames.float(), size, 1, size // 2, count_include_pad=False).to(torch.uint8)


def hold_still(frames: UInt8[Tensor, "t c h w"]) -> UInt8[Tensor, "t c h w"]:
    """The first frame throughout."""
    return frames[:1].expand_as(frames).contiguous()


def shuffle(frames: UInt8[Tensor, "t c h w"]) -> UInt8[Tensor, "t c h w"]:
    """In another order, the same for every camera and clip of this length."""
    return frames[torch.randperm(len(frames), generator=torch.Generator().manual_seed(len(frames)))]


def reverse(frames: UInt8[Tensor, "t c h w"]) -> UInt8[Tensor, "t c h w"]:
    """Backwards in time."""
    return frames.flip(0)


def keep_ends(frames: UInt8[Tensor, "t c h w"]) -> UInt8[Tensor, "t c h w"]:
    """The first frame for the first half, then the last one: right at both ends, and no motion between."""
    half = len(frames) // 2
    return torch.cat([frames[:1].expand_as(frames[:half]), frames[-1:].expand_as(frames[half:])])


SPOILED: Mapping[str, Callable[[Tensor], Tensor]] = {
    "static": hold_still,
    "blurred": blur,
    "shuffled": shuffle,
    "reversed": reverse,
    "ends": keep_ends,
}
