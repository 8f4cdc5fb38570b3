"""What every tokenizer here shares: per-camera padding, chunked calls, statistics, storage.

A tokenizer maps each frame on its own (`frames_per_latent` = 1) with one network for all cameras. Frames whose size is
no multiple of `align` are padded by edge replication and cropped after decoding, so 180x320 works as it is.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from worldline import checkpoint
from worldline.errors import SpecMismatch
from worldline.types import CameraSpec, LatentSpec

# Frames are encoded and decoded in pieces of about this many pixels. On a CPU pieces that stay in its caches are 2.3 times as fast
# as pieces of 256 frames of 64x64; a GPU needs large ones to be filled.
_CHUNK_PIXELS, _CHUNK_PIXELS_CPU = 64 * 128 * 128, 32 * 64 * 64


class Tokenizer(nn.Module, ABC):
    """A `VideoTokenizer` of single frames. Subclasses give `downsample`, `channels`, `encode_images`, `decode_images`."""

    kind: str
    downsample: int
    channels: int

    def __init__(self, cameras: Sequence[CameraSpec]) -> None:
        super().__init__()
        self.cameras = tuple(cameras)
        self._mean: dict[str, tuple[float, ...]] = {c.name: (0.0,) * self.channels for c in cameras}
        self._std: dict[str, tuple[float, ...]] = {c.name: (1.0,) * self.channels for c in cameras}

    @abstractmethod
    def encode_images(self, images: Float[Tensor, "n 3 h w"]) -> Float[Tensor, "n c _h _w"]:
        """Images in [-1, 1] to raw latents."""

    @abstractmethod
    def decode_images(self, latents: Float[Tensor, "n c h w"]) -> Float[Tensor, "n 3 _h _w"]:
        """Raw latents to images in about [-1, 1]."""

    @abstractmethod
    def config(self) -> Any:
        """All that is needed, with the weights, to build this tokenizer again."""

    @property
    def align(self) -> int:
        """Padded sizes are multiples of this: twice the downsampling, so that a 2x2 patch fits the latents."""
        return 2 * self.downsample

    @property
    def fingerprint(self) -> str:
        cameras = checkpoint.to_json(self.cameras)
        return checkpoint.fingerprint(self.state_dict(), [self.kind, self.config(), cameras])

    @property
    def latent_spec(self) -> LatentSpec:
        shapes: dict[str, tuple[int, int, int]] = {}
        for c in self.cameras:
            height, width = self._padded(c)
            shapes[c.name] = (self.channels, height // self.downsample, width // self.downsample)
        return LatentSpec(fingerprint=self.fingerprint, shapes=shapes, mean=dict(self._mean), std=dict(self._std))

    def _padded(self, camera: CameraSpec) -> tuple[int, int]:
        height, width = (math.ceil(n / self.align) * self.align for n in (camera.height, camera.width))
        return height, width

    def _camera(self, name: str) -> CameraSpec:
        for camera in self.cameras:
            if camera.name == name:
                return camera
        raise SpecMismatch(f"camera {name!r} is not one this tokenizer was made for: {[c.name for c in self.cameras]}")

    @torch.no_grad()
    def encode(self, frames: Mapping[str, UInt8[Tensor, "b t c _h _w"]]) -> dict[str, Float[Tensor, "b t c2 _h _w"]]:
        """Raw latents of uint8 frames, camera by camera, on the tokenizer's device wherever the frames are."""
        latents = {}
        for name, video in frames.items():
            camera = self._camera(name)
            if tuple(video.shape[-2:]) != (camera.height, camera.width):
                raise SpecMismatch(
                    f"camera {name}: frames of {camera.height}x{camera.width} required, got {tuple(video.shape[-2:])}"
                )
            parts = [
                self.encode_images(self._pad(to_images(part), camera))
                for part in self._here(video).flatten(0, 1).split(self._chunk(camera))
            ]
            latents[name] = torch.cat(parts).unflatten(0, tuple(video.shape[:2]))
        return latents

    @torch.no_grad()
    def decode(self, latents: Mapping[str, Float[Tensor, "b t c _h _w"]]) -> dict[str, UInt8[Tensor, "b t c2 _h _w"]]:
        """uint8 frames of raw latents, camera by camera."""
        frames = {}
        for name, z in latents.items():
            camera = self._camera(name)
            parts = [
                to_uint8(self.decode_images(part)[..., : camera.height, : camera.width])
                for part in self._here(z).flatten(0, 1).split(self._chunk(camera))
            ]
            frames[name] = torch.cat(parts).unflatten(0, tuple(z.shape[:2]))
        return frames

    def _here(self, x: Tensor) -> Tensor:
        """On the device of the weights; where there are none, where it is."""
        weights = next(self.parameters(), None)
        return x if weights is None else x.to(weights.device)

    def _chunk(self, camera: CameraSpec) -> int:
        weights = next(self.parameters(), None)
        pixels = _CHUNK_PIXELS_CPU if weights is None or weights.device.type == "cpu" else _CHUNK_PIXELS
        return max(1, pixels // (camera.height * camera.width))

    def _pad(self, images: Tensor, camera: CameraSpec) -> Tensor:
        height, width = self._padded(camera)
        return F.pad(images, (0, width - camera.width, 0, height - camera.height), mode="replicate")

    def fit_statistics(self, frames: Mapping[str, UInt8[Tensor, "b t c _h _w"]]) -> None:
        """Set the whitening statistics from a sample of training frames."""
        for name, z in self.encode(frames).items():
            std, mean = torch.std_mean(z, dim=(0, 1, 3, 4))
            self._mean[name] = tuple(mean.tolist())
            self._std[name] = tuple(std.clamp(min=1e-4).tolist())

    def save_pretrained(self, folder: str | Path, *, provenance: Mapping[str, Any] | None = None) -> None:
        config = {"tokenizer": self.config(), "cameras": checkpoint.to_json(self.cameras)}
        checkpoint.save_part(
            folder,
            part="tokenizer",
            kind=self.kind,
            config=config,
            spec=self.latent_spec,
            tensors=self.state_dict(),
            provenance={"fingerprint": self.fingerprint, **(provenance or {})},
        )

    def restore_statistics(self, spec: LatentSpec) -> None:
        self._mean, self._std = dict(spec.mean), dict(spec.std)


def to_images(frames: UInt8[Tensor, "..."]) -> Float[Tensor, "..."]:
    """uint8 [0, 255] to float [-1, 1]."""
    return frames.float() / 127.5 - 1


def to_uint8(images: Float[Tensor, "..."]) -> UInt8[Tensor, "..."]:
    """Float [-1, 1] to uint8 [0, 255], rounded, out-of-range values clipped."""
    return ((images.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
