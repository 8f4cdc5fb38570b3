"""Image autoencoders of `diffusers` as tokenizers: small ones trained here, or any pretrained one.

`AutoencoderTiny` is deterministic and fast; `AutoencoderKL` has a Gaussian posterior (trained with a small KL weight,
encoded by its mode). Raw latents are what the autoencoder gives; a pretrained model's scaling factor is not applied, the
whitening statistics take its place.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from diffusers.models.auto_model import AutoModel
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.autoencoders.autoencoder_tiny import AutoencoderTiny
from jaxtyping import Float
from torch import Tensor

from worldline.errors import CheckpointError
from worldline.tokenizers.base import Tokenizer
from worldline.types import CameraSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class AutoencoderConfig:
    """`family` names the diffusers class; `blocks` the channels from full resolution down (one halving between each).

    `fold`: squares of this many pixels are folded into channels before the first convolution. Convolutions at full
    resolution are what a CPU spends its time on: folding by 2 doubles the frames/s, by 4 makes it five times as many.
    """

    family: Literal["tiny", "kl"] = "kl"
    """diffusers' class: kl (AutoencoderKL) or tiny (AutoencoderTiny)."""
    blocks: tuple[int, ...] = (32, 48, 48)
    """Channels from full resolution down; each next one is half as high and wide."""
    fold: int = 2
    """Squares of so many pixels become channels first: 2 doubles the frames/s, 4 makes it five times as many."""
    latent_channels: int = 8
    """Numbers of a latent cell."""
    kl_weight: float = 1e-6
    """Of the divergence that keeps latents near a normal distribution."""

    def __post_init__(self) -> None:
        if self.fold < 1 or self.latent_channels < 1:
            raise ValueError(
                f"fold and latent_channels of at least 1 required, got {self.fold} and {self.latent_channels}"
            )
        if len(self.blocks) < 2:
            raise ValueError(f"blocks must hold at least two widths (one halving), got {self.blocks}")
        if self.family == "tiny" and len(set(self.blocks)) != 1:
            raise ValueError(f"AutoencoderTiny needs equal widths in blocks, got {self.blocks}; use family='kl'")


def build_autoencoder(config: AutoencoderConfig) -> torch.nn.Module:
    """An untrained diffusers autoencoder of these sizes."""
    levels = len(config.blocks)
    if config.family == "tiny":
        return AutoencoderTiny(
            in_channels=3 * config.fold**2,
            out_channels=3 * config.fold**2,
            encoder_block_out_channels=config.blocks,
            decoder_block_out_channels=config.blocks,
            num_encoder_blocks=(1,) * levels,
            num_decoder_blocks=(1,) * levels,
            latent_channels=config.latent_channels,
        )
    return AutoencoderKL(
        in_channels=3 * config.fold**2,
        out_channels=3 * config.fold**2,
        # diffusers annotates these as tuples of one
        down_block_types=("DownEncoderBlock2D",) * levels,  # pyright: ignore[reportArgumentType]
        up_block_types=("UpDecoderBlock2D",) * levels,  # pyright: ignore[reportArgumentType]
        block_out_channels=config.blocks,  # pyright: ignore[reportArgumentType]
        layers_per_block=1,
        latent_channels=config.latent_channels,
        norm_num_groups=8,
        mid_block_add_attention=False,
    )


class AutoencoderTokenizer(Tokenizer):
    """A diffusers image autoencoder behind the tokenizer contract.

    Args:
        cameras: the cameras it will encode.
        model: `diffusers.AutoencoderTiny` or `AutoencoderKL`.
        kl_weight: weight of the KL term in `loss` (AutoencoderKL only).
    """

    kind = "autoencoder"

    def __init__(self, cameras: Sequence[CameraSpec], model: Any, *, kl_weight: float = 0.0) -> None:
        if not isinstance(model, (AutoencoderTiny, AutoencoderKL)):
            raise CheckpointError(f"AutoencoderTiny or AutoencoderKL required, got {type(model).__name__}")
        self.channels = model.config["latent_channels"]
        blocks = model.config.get("block_out_channels") or model.config["encoder_block_out_channels"]
        self.fold = math.isqrt(model.config["in_channels"] // 3)
        self.downsample = self.fold * 2 ** (len(blocks) - 1)
        self.kl_weight = kl_weight
        super().__init__(cameras)
        # on CPUs channels_last convolutions are up to 1.5 times as fast, on GPUs they suit the tensor cores
        self.model = model.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]

    @classmethod
    def from_diffusers(cls, cameras: Sequence[CameraSpec], name: str, **options: Any) -> "AutoencoderTokenizer":
        """A pretrained autoencoder by hub name or folder, for example `stabilityai/sd-vae-ft-mse` or `madebyollin/taesd`.

        `options` go to diffusers' `from_pretrained` (`subfolder="vae"`). Raises `CheckpointError` if it cannot be had.
        """
        try:
            model = AutoModel.from_pretrained(name, **options)
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{name}: no diffusers autoencoder could be loaded from there ({error})") from error
        return cls(cameras, model)

    def encode_images(self, images: Tensor) -> Tensor:
        encoded = self.model.encode(F.pixel_unshuffle(images, self.fold))
        return encoded.latents if hasattr(encoded, "latents") else encoded.latent_dist.mode()

    def decode_images(self, latents: Tensor) -> Tensor:
        return F.pixel_shuffle(self.model.decode(latents).sample, self.fold)

    def loss(
        self, images: Float[Tensor, "n 3 h w"], weight: Float[Tensor, "n 1 h w"], generator: torch.Generator
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Weighted absolute plus squared error of the reconstruction (and the KL term), with detached metrics.

        `weight` has mean about one; it lifts pixels that move over the static background that fills most of a frame.
        """
        encoded = self.model.encode(F.pixel_unshuffle(images, self.fold))
        kl = torch.zeros((), device=images.device)
        if hasattr(encoded, "latents"):
            latents = encoded.latents
        else:
            posterior = encoded.latent_dist
            noise = torch.randn(posterior.mean.shape, generator=generator).to(images)
            latents = posterior.mean + posterior.std * noise
            kl = posterior.kl().mean() / latents[0].numel()
        decoded = self.decode_images(latents)
        error = F.l1_loss(decoded, images, reduction="none") + F.mse_loss(decoded, images, reduction="none")
        loss = (error * weight).mean() + self.kl_weight * kl
        mse = F.mse_loss(decoded.detach().clamp(-1, 1), images) / 4  # images span [-1, 1]: a range of 2
        return loss, {"psnr": -10 * mse.log10(), "kl": kl.detach()}

    def config(self) -> dict[str, Any]:
        options = {k: v for k, v in dict(self.model.config).items() if not k.startswith("_")}
        return {"family": type(self.model).__name__, "options": options, "kl_weight": self.kl_weight}
