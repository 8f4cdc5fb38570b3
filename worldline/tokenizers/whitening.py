"""Raw latents to unit scale and back, by the statistics in a `LatentSpec`. The only implementation, used by all models.

Raw latents are what is cached and what crosses every contract; models whiten on the way in and un-whiten on the way out,
so statistics may change without encoding a dataset again.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from worldline.types import LatentSpec


def _statistics(spec: LatentSpec, camera: str, like: Tensor) -> tuple[Tensor, Tensor]:
    mean = torch.tensor(spec.mean[camera], dtype=like.dtype, device=like.device)
    std = torch.tensor(spec.std[camera], dtype=like.dtype, device=like.device)
    return mean[:, None, None], std[:, None, None]


def whiten(latents: Mapping[str, Tensor], spec: LatentSpec) -> dict[str, Tensor]:
    """Each "... c h w" to zero mean and unit variance per camera and channel."""
    out = {}
    for camera, z in latents.items():
        mean, std = _statistics(spec, camera, z)
        out[camera] = (z - mean) / std
    return out


def unwhiten(latents: Mapping[str, Tensor], spec: LatentSpec) -> dict[str, Tensor]:
    """Inverse of `whiten`."""
    out = {}
    for camera, z in latents.items():
        mean, std = _statistics(spec, camera, z)
        out[camera] = z * std + mean
    return out
