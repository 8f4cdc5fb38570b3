"""Pixel patches: no training, no loss. Latents are p x p blocks of pixels folded into channels."""

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from worldline.tokenizers.base import Tokenizer
from worldline.types import CameraSpec


class PixelPatches(Tokenizer):
    """Folds `size` x `size` pixels into 3 size^2 channels; decoding is exact up to rounding to uint8."""

    kind = "patches"

    def __init__(self, cameras: Sequence[CameraSpec], *, size: int = 4) -> None:
        self.downsample, self.channels = size, 3 * size * size
        super().__init__(cameras)

    def encode_images(self, images: Tensor) -> Tensor:
        return F.pixel_unshuffle(images, self.downsample)

    def decode_images(self, latents: Tensor) -> Tensor:
        return F.pixel_shuffle(latents, self.downsample)

    def config(self) -> dict[str, Any]:
        return {"size": self.downsample}
