"""World models: networks, the autoregressive denoiser, and the trivial predictors it must beat."""

from pathlib import Path

from worldline import checkpoint
from worldline.tokenizers import Tokenizer, load_tokenizer
from worldline.worldmodels.autoregressive import AutoregressiveConfig, AutoregressiveWorldModel
from worldline.worldmodels.baselines import CopyLastFrame
from worldline.worldmodels.embodiments import MEMBER_KIND, MultiWorldModel, Robot, load_member, require_one
from worldline.worldmodels.state import StreamState
from worldline.worldmodels.transformer import SpaceTimeTransformer, TransformerConfig

__all__ = [
    "AutoregressiveConfig",
    "AutoregressiveWorldModel",
    "CopyLastFrame",
    "MultiWorldModel",
    "Robot",
    "SpaceTimeTransformer",
    "StreamState",
    "TransformerConfig",
    "load_world_model",
]


def load_world_model(folder: str | Path) -> tuple[AutoregressiveWorldModel, Tokenizer]:
    """A world model, or a member of one of several robots, and the tokenizer saved beside it."""
    folder = checkpoint.resolve(folder)
    require_one(folder)
    member = checkpoint.load_config(folder, part="world-model")["kind"] == MEMBER_KIND
    model = load_member(folder) if member else AutoregressiveWorldModel.from_pretrained(folder)
    return model, load_tokenizer(folder / "tokenizer")
