"""World models: the autoregressive denoiser, the EDM U-Net, unified video-action models, their networks, and the trivial predictors they must beat."""

from collections.abc import Callable
from pathlib import Path

from worldline import checkpoint
from worldline.errors import CheckpointError
from worldline.tokenizers import Tokenizer, load_tokenizer
from worldline.worldmodels import autoregressive, edm_unet, video_action
from worldline.worldmodels.autoregressive import AutoregressiveConfig, AutoregressiveWorldModel
from worldline.worldmodels.baselines import CopyLastFrame
from worldline.worldmodels.edm_config import EDMConfig
from worldline.worldmodels.edm_unet import EDMWorldModel
from worldline.worldmodels.embodiments import MEMBER_KIND, MultiWorldModel, Robot, load_member, require_one
from worldline.worldmodels.state import StreamState
from worldline.worldmodels.transformer import SpaceTimeTransformer, TransformerConfig
from worldline.worldmodels.video_action import VideoActionConfig, VideoActionModel

__all__ = [
    "AutoregressiveConfig",
    "AutoregressiveWorldModel",
    "CopyLastFrame",
    "EDMConfig",
    "EDMWorldModel",
    "MultiWorldModel",
    "Robot",
    "SpaceTimeTransformer",
    "StreamState",
    "TrainedWorldModel",
    "TransformerConfig",
    "VideoActionConfig",
    "VideoActionModel",
    "load_world_model",
]


# all with `sampling`, `with_sampling`, `reads_instructions`
TrainedWorldModel = AutoregressiveWorldModel | EDMWorldModel | VideoActionModel

_LOADERS: dict[str, Callable[[Path], TrainedWorldModel]] = {
    autoregressive.KIND: AutoregressiveWorldModel.from_pretrained,
    MEMBER_KIND: load_member,
    edm_unet.KIND: EDMWorldModel.from_pretrained,
    video_action.KIND: VideoActionModel.from_pretrained,
}


def load_world_model(folder: str | Path) -> tuple[TrainedWorldModel, Tokenizer]:
    """A world model of any kind, or a member of one of several robots, and the tokenizer saved beside it."""
    folder = checkpoint.resolve(folder)
    require_one(folder)
    kind = checkpoint.load_config(folder, part="world-model")["kind"]
    if kind not in _LOADERS:
        raise CheckpointError(
            f"{folder}: a world model of kind {' or '.join(_LOADERS)} is required, this is of kind {kind!r}."
        )
    return _LOADERS[kind](folder), load_tokenizer(folder / "tokenizer")
