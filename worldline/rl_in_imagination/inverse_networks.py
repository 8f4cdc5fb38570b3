"""Two networks that read motion off a window of frames, unlike each other on purpose: what fools one may not fool the other.

`FrameReader` sees every frame alone, as places of features (spatial softmax), and compares them at the end: the inverse model of
EVA (2603.17808). `DifferenceReader` never sees a whole picture: only what changed from frame to frame, in patches that attend to
each other. A reward from one can therefore be judged by the other.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, UInt8
from torch import Tensor, nn

from worldline.policies.encoder import EncoderConfig, ObservationEncoder, mlp, working_size
from worldline.types import CameraSpec
from worldline.worldmodels.layers import cut


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenConfig:
    """Attention over patches of frame differences."""

    width: int = 96
    """Numbers of a token."""
    depth: int = 3
    """Layers of attention."""
    heads: int = 4
    """Of attention; they divide the width."""
    patch: int = 8
    """Pixels along one side of a token: 2, 4 or 8."""
    size: int = 64
    """Larger frames are averaged to at most this many pixels a side."""

    def __post_init__(self) -> None:
        if self.patch not in (2, 4, 8):
            raise ValueError(f"patch: 2, 4 or 8 required (frames are multiples of 8 pixels), got {self.patch}")
        if min(self.width, self.depth, self.heads) < 1 or self.width % self.heads or self.size < 8:
            raise ValueError(f"width (a multiple of heads), depth >= 1 and size >= 8 required, got {self}")


class FrameReader(nn.Module):
    """A convolutional encoder a frame and camera, then a dense network over all frames of the window."""

    def __init__(
        self, config: EncoderConfig, cameras: Sequence[CameraSpec], *, window: int, hidden: int, outputs: int
    ) -> None:
        super().__init__()
        self.encoder = ObservationEncoder(config, cameras, 0)
        self.head = mlp(window * self.encoder.width, hidden, outputs)

    def forward(self, frames: Mapping[str, UInt8[Tensor, "n w c _h _w"]]) -> Float[Tensor, "n o"]:
        return self.head(self._features(frames).flatten(1))

    def along(
        self, frames: Mapping[str, UInt8[Tensor, "n t c _h _w"]], rows: Int[Tensor, "m w"]
    ) -> Float[Tensor, "n m o"]:
        """What `forward` gives for the windows `rows` of each clip; every frame is encoded once."""
        return self.head(self._features(frames)[:, rows].flatten(2))

    def _features(self, frames: Mapping[str, Tensor]) -> Tensor:
        n, t = next(iter(frames.values())).shape[:2]
        flat = {camera: x.flatten(0, 1) for camera, x in frames.items()}
        nothing = torch.zeros(n * t, 0, device=next(iter(flat.values())).device)
        return self.encoder(flat, nothing).unflatten(0, (n, t))


class DifferenceReader(nn.Module):
    """Attention over patches of the differences between neighbouring frames, all cameras together."""

    def __init__(
        self, config: TokenConfig, cameras: Sequence[CameraSpec], *, window: int, hidden: int, outputs: int
    ) -> None:
        super().__init__()
        self.config, self.names = config, [camera.name for camera in cameras]
        self.sizes = {camera.name: working_size(camera, config.size) for camera in cameras}
        width, inputs = config.width, 3 * (window - 1) * config.patch**2
        self.embed = nn.ModuleList(
            nn.Sequential(nn.Linear(inputs, 2 * width), nn.GELU(), nn.Linear(2 * width, width)) for _ in cameras
        )
        counts = [h * w // config.patch**2 for h, w in self.sizes.values()]
        self.places = nn.ParameterList(nn.Parameter(0.02 * torch.randn(count, width)) for count in counts)
        self.asked = nn.Parameter(0.02 * torch.randn(1, width))  # the token that the answer is read from
        layer = nn.TransformerEncoderLayer(
            width, config.heads, 4 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.blocks = nn.TransformerEncoder(layer, config.depth, nn.LayerNorm(width), enable_nested_tensor=False)
        self.head = mlp(width, hidden, outputs, 1)

    def forward(self, frames: Mapping[str, UInt8[Tensor, "n w c _h _w"]]) -> Float[Tensor, "n o"]:
        tokens = [self.asked.expand(len(next(iter(frames.values()))), 1, -1)]
        for name, embed, places in zip(self.names, self.embed, self.places):
            video = frames[name].float() / 127.5 - 1
            if tuple(video.shape[-2:]) != self.sizes[name]:
                video = F.interpolate(video.flatten(0, 1), self.sizes[name], mode="area").unflatten(0, video.shape[:2])
            changed = 4 * video.diff(dim=1).flatten(1, 2)  # differences are small: brought to about unit size
            tokens.append(embed(cut(changed, self.config.patch)) + places)
        return self.head(self.blocks(torch.cat(tokens, dim=1))[:, 0])

    def along(
        self, frames: Mapping[str, UInt8[Tensor, "n t c _h _w"]], rows: Int[Tensor, "m w"]
    ) -> Float[Tensor, "n m o"]:
        """What `forward` gives for the windows `rows` of each clip."""
        n = len(next(iter(frames.values())))
        windows = {camera: x[:, rows].flatten(0, 1) for camera, x in frames.items()}
        return self(windows).unflatten(0, (n, len(rows)))
