"""Video to latents and back: pixel patches, autoencoders trained here, pretrained autoencoders. And actions to codes."""

from pathlib import Path

import diffusers

from worldline import checkpoint
from worldline.errors import CheckpointError
from worldline.tokenizers.actions import TwoHot
from worldline.tokenizers.autoencoder import AutoencoderConfig, AutoencoderTokenizer, build_autoencoder
from worldline.tokenizers.base import Tokenizer, to_images, to_uint8
from worldline.tokenizers.patches import PixelPatches
from worldline.tokenizers.whitening import unwhiten, whiten
from worldline.types import CameraSpec, LatentSpec

__all__ = [
    "AutoencoderConfig",
    "AutoencoderTokenizer",
    "PixelPatches",
    "Tokenizer",
    "TwoHot",
    "build_autoencoder",
    "load_tokenizer",
    "to_images",
    "to_uint8",
    "unwhiten",
    "whiten",
]


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """The tokenizer saved in `folder`. Raises `CheckpointError`."""
    folder = checkpoint.resolve(folder)
    data = checkpoint.load_config(folder, part="tokenizer")
    config = data["config"]
    cameras = checkpoint.from_json(_Cameras, config["cameras"], source=f"{folder}/config.json")
    if data["kind"] == PixelPatches.kind:
        tokenizer: Tokenizer = PixelPatches(cameras, size=config["tokenizer"]["size"])
    elif data["kind"] == AutoencoderTokenizer.kind:
        family = getattr(diffusers, config["tokenizer"]["family"])
        model = family.from_config(config["tokenizer"]["options"])
        tokenizer = AutoencoderTokenizer(cameras, model, kl_weight=config["tokenizer"]["kl_weight"])
    else:
        raise CheckpointError(f"{folder}: tokenizer kind 'patches' or 'autoencoder' required, got {data['kind']!r}")
    checkpoint.load_tensors(tokenizer, folder)
    spec = checkpoint.from_json(LatentSpec, checkpoint.read_json(folder / "spec.json"), source=f"{folder}/spec.json")
    tokenizer.restore_statistics(spec)
    if tokenizer.fingerprint != spec.fingerprint:
        raise CheckpointError(
            f"{folder}: fingerprint {spec.fingerprint} required, the weights give {tokenizer.fingerprint}"
        )
    return tokenizer.eval().requires_grad_(False)


_Cameras = tuple[CameraSpec, ...]
