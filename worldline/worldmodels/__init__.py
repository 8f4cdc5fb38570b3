"""World models: networks, the autoregressive denoiser, and the trivial predictors it must beat."""

from pathlib import Path

from worldline import checkpoint
from worldline.tokenizers import Tokenizer, load_tokenizer
from worldline.worldmodels.autoregressive import AutoregressiveConfig, AutoregressiveWorldModel
from worldline.worldmodels.baselines import CopyLastFrame
from worldline.worldmodels.state import StreamState
from worldline.worldmodels.transformer import SpaceTimeTransformer, TransformerConfig

__all__ = [
    "AutoregressiveConfig",
    "AutoregressiveWorldModel",
    "CopyLastFrame",
    "SpaceTimeTransformer",
    "StreamState",
    "TransformerConfig",
    "load_world_model",
]


def load_world_model(folder: str | Path) -> tuple[AutoregressiveWorldModel, Tokenizer]:
    """A world model and the tokenizer saved beside it."""
    folder = checkpoint.resolve(folder)
    return AutoregressiveWorldModel.from_pretrained(folder), load_tokenizer(folder / "tokenizer")
