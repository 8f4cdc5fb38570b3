"""Stage `tokenizer`: train a small image autoencoder, or wrap pixel patches or a pretrained one."""

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from worldline import checkpoint
from worldline.tokenizers import AutoencoderConfig, AutoencoderTokenizer, PixelPatches, build_autoencoder, to_images
from worldline.trainers.inputs import FrameBatches, claim_output, contents, data_provenance, open_datasets
from worldline.trainers.loop import LoopConfig, train

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainTokenizer:
    """Train a video tokenizer on a dataset's frames.

    Example: worldline train tokenizer --data data/drawer --preset tiny --out runs/tok
    """

    data: tuple[Path, ...]
    """Dataset folders (LeRobotDataset v2.1 or v3.0)."""
    out: Path
    """Folder for the checkpoint. A run that was interrupted goes on there."""
    kind: Literal["autoencoder", "patches", "pretrained"] = "autoencoder"
    """autoencoder: trained here. patches: pixels folded into channels, no training. pretrained: any diffusers VAE."""
    pretrained: str | None = None
    """Hub name or folder of a diffusers AutoencoderKL or AutoencoderTiny (kind pretrained)."""
    patch: int = 8
    """Side of a pixel patch (kind patches)."""
    cameras: tuple[str, ...] = ()
    """Cameras to use; all by default."""
    autoencoder: AutoencoderConfig = field(default_factory=AutoencoderConfig)
    motion_weight: float = 6.0
    """How much more a pixel that differs from the episode's median frame counts: small moving objects are what matters."""
    loop: LoopConfig = field(default_factory=LoopConfig)

    def __post_init__(self) -> None:
        if self.patch < 1 or not 0 <= self.motion_weight < math.inf:
            raise ValueError(
                f"patch of at least 1 and motion_weight of at least 0 required, got {self.patch} and {self.motion_weight}"
            )


PRESETS: dict[str, tuple[str, dict[str, Any]]] = {
    "tiny": (
        "0.6M weights, 64x64 to 8x8x8; minutes on a 2-core CPU",
        {"loop": LoopConfig(steps=800, batch_size=48, lr=2e-3, cooldown=0.5)},
    ),
    "small": (
        "4M weights; an hour on one consumer GPU",
        {
            "autoencoder": AutoencoderConfig(blocks=(64, 128, 128), fold=2, latent_channels=8),
            "loop": LoopConfig(steps=20_000, batch_size=64, lr=5e-4),
        },
    ),
    "base": (
        "14M weights, 192x320; hours on one data-centre GPU",
        {
            "autoencoder": AutoencoderConfig(blocks=(128, 256, 256), fold=2, latent_channels=16),
            "loop": LoopConfig(steps=100_000, batch_size=64, lr=2e-4),
        },
    ),
    "large": (
        "Stable Diffusion's autoencoder from the Hugging Face Hub, as it is",
        {"kind": "pretrained", "pretrained": "stabilityai/sd-vae-ft-mse", "loop": LoopConfig(steps=1)},
    ),
}


class _TokenizerStage:
    name = "tokenizer"

    def __init__(self, model: AutoencoderTokenizer, batches: FrameBatches, held_out: FrameBatches) -> None:
        self.model, self.batches, self.held_out = model, batches, held_out

    def batch(self, seed: int, step: int, size: int) -> tuple[Tensor, Tensor]:
        return self.batches.batch(seed, step, size)

    def loss(
        self, model: Any, batch: tuple[Tensor, Tensor], generator: torch.Generator
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        device = next(model.parameters()).device
        images, weight = batch[0].to(device), batch[1].to(device)
        return model.loss(to_images(images).contiguous(memory_format=torch.channels_last), weight, generator)

    @torch.no_grad()
    def evaluate(self, model: Any) -> dict[str, float]:
        """Reconstruction PSNR on held-out frames, all pixels and those unlike the median frame."""
        return reconstruction_psnr(model, self.held_out)

    def save(self, model: Any, folder: Path, provenance: Mapping[str, Any]) -> None:
        fit_statistics(model, self.batches)
        model.save_pretrained(folder, provenance=provenance)


@torch.no_grad()
def reconstruction_psnr(model: Any, batches: FrameBatches) -> dict[str, float]:
    """PSNR in dB per camera, on all pixels and (`moving`) on those unlike the episode's median frame."""
    out = {}
    device = next(iter(model.parameters()), torch.zeros(())).device
    for i, camera in enumerate(model.cameras):
        images, weight = batches.batch(0, i, 64)
        decoded = model.decode(model.encode({camera.name: images[None].to(device)}))[camera.name][0].cpu()
        error = ((decoded.float() - images.float()) / 255).square().mean(1, keepdim=True)
        moving = weight > weight.amin((1, 2, 3), keepdim=True)
        out[f"psnr/{camera.name}"] = float(-10 * error.mean().log10())
        if moving.any():
            out[f"psnr_moving/{camera.name}"] = float(-10 * error[moving].mean().log10())
    return out


def fit_statistics(model: Any, batches: FrameBatches) -> None:
    """Whitening statistics from 256 training frames of each camera."""
    device = next(iter(model.parameters()), torch.zeros(())).device
    for i, camera in enumerate(model.cameras):
        images, _ = batches.batch(1, i, 256)
        model.fit_statistics({camera.name: images[None].to(device)})


def run(config: TrainTokenizer, *, progress: bool = True) -> Path:
    """Train and save. Returns the checkpoint folder."""
    cameras = config.cameras or None
    training = FrameBatches(open_datasets(config.data, "train", cameras=cameras), motion_weight=config.motion_weight)
    held_out = FrameBatches(open_datasets(config.data, "held-out", cameras=cameras), motion_weight=config.motion_weight)
    specs = training.spec.cameras
    claim_output(
        config.out,
        "tokenizer",
        config,
        identity=("data", "kind", "cameras", "autoencoder", "patch", "pretrained", "motion_weight"),
        made_from=contents(training.selections),
    )
    provenance = {
        **data_provenance(training.selections, config.out),
    }
    if config.kind == "autoencoder":
        torch.manual_seed(config.loop.seed)
        model = AutoencoderTokenizer(
            specs, build_autoencoder(config.autoencoder), kl_weight=config.autoencoder.kl_weight
        )
        return train(
            _TokenizerStage(model, training, held_out),
            config.loop,
            config.out,
            provenance=provenance,
            progress=progress,
        )
    if config.kind == "patches":
        ready: Any = PixelPatches(specs, size=config.patch)
    else:
        if config.pretrained is None:
            raise checkpoint.CheckpointError("--pretrained NAME is required with --kind pretrained, got none")
        ready = AutoencoderTokenizer.from_diffusers(specs, config.pretrained)
    fit_statistics(ready.eval(), training)
    ready.save_pretrained(config.out, provenance={**provenance, **reconstruction_psnr(ready, held_out)})
    return config.out
