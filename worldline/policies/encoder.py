"""Images and poses to one feature vector: the shared eyes of policies, scorers and inverse models.

A small convolutional network a camera (pixels folded by two first, which suits CPUs), read out by a spatial softmax,
whose expected coordinates say *where* things are (Finn et al. 1509.06113), and by a small flattened map, which says what
is there. Random shifts in training stand in for missing data (DrQ, 2004.13649).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from worldline.types import CameraSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class EncoderConfig:
    """`window` frames of each camera are stacked as channels; `shift` pixels of random shift in training."""

    channels: tuple[int, ...] = (24, 48, 48)
    """Of the convolutions, each of which halves the picture; multiples of 8."""
    features: int = 128
    """Numbers that a camera is summed up in."""
    window: int = 1
    """Frames seen at once."""
    shift: int = 4
    """Pixels of random shift in training."""
    size: int = 64  # larger frames are area-averaged to at most this many pixels a side

    def __post_init__(self) -> None:
        if not self.channels or any(c < 8 or c % 8 for c in self.channels):
            raise ValueError(f"channels must be multiples of 8 (groups are normalised), got {self.channels}")
        if min(self.features, self.window) < 1 or self.shift < 0 or self.size < 8:
            raise ValueError(f"features, window >= 1, shift >= 0 and size >= 8 required, got {self}")


class CameraEncoder(nn.Module):
    grid_x: Tensor
    grid_y: Tensor

    def __init__(self, config: EncoderConfig, camera: CameraSpec) -> None:
        super().__init__()
        self.config = config
        self.size = working_size(camera, config.size)
        widths = (12 * config.window, *config.channels)
        layers: list[nn.Module] = []
        for i, (before, after) in enumerate(zip(widths[:-1], widths[1:])):
            layers += [
                nn.Conv2d(before, after, 3, stride=1 if i == 0 else 2, padding=1),
                nn.GroupNorm(8, after),
                nn.SiLU(),
            ]
        self.net = nn.Sequential(*layers)
        self.net.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
        with torch.no_grad():
            h, w = self.net(torch.zeros(1, widths[0], self.size[0] // 2, self.size[1] // 2)).shape[-2:]
        self.squeeze = nn.Conv2d(widths[-1], 8, 1)
        self.register_buffer("grid_x", torch.linspace(-1, 1, w), persistent=False)
        self.register_buffer("grid_y", torch.linspace(-1, 1, h), persistent=False)
        self.out = nn.Linear(2 * widths[-1] + 8 * h * w, config.features)

    def forward(self, frames: Float[Tensor, "n c h w"]) -> Float[Tensor, "n d"]:
        if tuple(frames.shape[-2:]) != self.size:
            frames = F.interpolate(frames, self.size, mode="area")
        if self.training and self.config.shift:
            frames = random_shift(frames, self.config.shift)
        x = self.net(F.pixel_unshuffle(frames, 2).contiguous(memory_format=torch.channels_last))
        where = F.softmax(x.flatten(2), dim=-1).unflatten(2, x.shape[2:])
        places = torch.cat([(where.sum(2) * self.grid_x).sum(2), (where.sum(3) * self.grid_y).sum(2)], dim=1)
        return self.out(torch.cat([places, self.squeeze(x).flatten(1)], dim=1))


class ObservationEncoder(nn.Module):
    """Features "n d" of stacked uint8 frames per camera and a normalised pose."""

    def __init__(self, config: EncoderConfig, cameras: Sequence[CameraSpec], pose_dim: int) -> None:
        super().__init__()
        self.config = config
        self.names = [camera.name for camera in cameras]
        self.cameras = nn.ModuleList(CameraEncoder(config, camera) for camera in cameras)
        self.width = config.features * len(self.names) + pose_dim

    def forward(
        self, frames: Mapping[str, UInt8[Tensor, "n wc _h _w"]], pose: Float[Tensor, "n p"]
    ) -> Float[Tensor, "n d"]:
        seen = [net(frames[name].float() / 127.5 - 1) for name, net in zip(self.names, self.cameras)]
        return torch.cat([*seen, pose], dim=1)


def working_size(camera: CameraSpec, limit: int) -> tuple[int, int]:
    """The camera's size scaled down to fit `limit`, rounded to multiples of 8."""
    scale = min(1.0, limit / max(camera.height, camera.width))
    height, width = (max(8, round(n * scale / 8) * 8) for n in (camera.height, camera.width))
    return height, width


def random_shift(frames: Float[Tensor, "n c h w"], pixels: int) -> Float[Tensor, "n c h w"]:
    """Each image moved by up to `pixels` in x and y, edges repeated."""
    n, _, h, w = frames.shape
    padded = F.pad(frames, (pixels,) * 4, mode="replicate")
    dy, dx = torch.randint(0, 2 * pixels + 1, (2, n), device=frames.device)
    rows = dy[:, None] + torch.arange(h, device=frames.device)
    columns = dx[:, None] + torch.arange(w, device=frames.device)
    return padded[torch.arange(n, device=frames.device)[:, None, None], :, rows[:, :, None], columns[:, None]].permute(
        0, 3, 1, 2
    )


def mlp(inputs: int, hidden: int, outputs: int, layers: int = 2) -> nn.Sequential:
    """Linear and SiLU `layers` times, then a linear output."""
    widths = [inputs] + [hidden] * layers
    parts: list[nn.Module] = []
    for before, after in zip(widths[:-1], widths[1:]):
        parts += [nn.Linear(before, after), nn.SiLU()]
    return nn.Sequential(*parts, nn.Linear(widths[-1], outputs))
