"""Small regressors on frames: a probe that says where an object is, and an inverse model that says which actions were taken.

Both are trained on real frames alone and then read imagined ones: what they see in the dream is what is in the dream.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from worldline import checkpoint
from worldline.data.normalization import RobustNormalizer
from worldline.policies.encoder import EncoderConfig, ObservationEncoder, mlp
from worldline.types import WorldSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbeConfig:
    """`names` label the outputs; `encoder.window` frames are looked at (1 for positions, 2 for actions)."""

    target: str
    names: tuple[str, ...]
    encoder: EncoderConfig = field(default_factory=lambda: EncoderConfig(shift=0))
    hidden: int = 256


class Probe(nn.Module):
    """Regresses a physical quantity from stacked frames of all cameras."""

    def __init__(self, config: ProbeConfig, spec: WorldSpec, normalizer: RobustNormalizer) -> None:
        super().__init__()
        self.config, self.spec, self.normalizer = config, spec, normalizer
        self.encoder = ObservationEncoder(config.encoder, spec.cameras, 0)
        self.head = mlp(self.encoder.width, config.hidden, len(config.names))

    def _normalized(self, frames: Mapping[str, Tensor]) -> Tensor:
        device = next(self.parameters()).device
        frames = {camera: x.to(device) for camera, x in frames.items()}
        n = len(next(iter(frames.values())))
        return self.head(self.encoder(frames, torch.zeros(n, 0, device=device)))

    def loss(self, frames: Mapping[str, Tensor], target: Float[Tensor, "n d"]) -> Tensor:
        """Huber loss in normalised units."""
        predicted = self._normalized(frames)
        return nn.functional.smooth_l1_loss(predicted, self.normalizer.normalize(target.to(predicted.device)), beta=0.1)

    @torch.no_grad()
    def forward(self, frames: Mapping[str, UInt8[Tensor, "n wc _h _w"]]) -> Float[Tensor, "n d"]:
        """Physical units, from stacked uint8 frames."""
        return self.normalizer.denormalize(self._normalized(frames)).cpu()

    def read_video(
        self, video: Mapping[str, UInt8[Tensor, "n t c _h _w"]], *, batch: int = 256
    ) -> Float[Tensor, "n t2 d"]:
        """Every window of `encoder.window` frames of n videos: t2 = t - window + 1 readings each."""
        window = self.config.encoder.window
        n, t = next(iter(video.values())).shape[:2]
        stacked = {
            c: torch.stack([x[:, i : i + window].flatten(1, 2) for i in range(t - window + 1)], 1).flatten(0, 1)
            for c, x in video.items()
        }
        parts = [self({c: x[i : i + batch] for c, x in stacked.items()}) for i in range(0, n * (t - window + 1), batch)]
        return torch.cat(parts).unflatten(0, (n, t - window + 1))

    def save_pretrained(self, folder: str | Path, *, provenance: Mapping[str, Any] | None = None) -> None:
        config = {"probe": checkpoint.to_json(self.config), "normalizer": self.normalizer.to_dict()}
        checkpoint.save_part(
            folder,
            part="probe",
            kind=self.config.target,
            config=config,
            spec=self.spec,
            tensors=self.state_dict(),
            provenance=provenance or {},
        )

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> "Probe":
        def build(config: Any, spec: WorldSpec, source: str) -> "Probe":
            normalizer = RobustNormalizer.from_dict(config["normalizer"])
            return cls(checkpoint.from_json(ProbeConfig, config["probe"], source=source), spec, normalizer)

        return checkpoint.load_part(folder, part="probe", build=build)
