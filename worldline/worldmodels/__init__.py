"""World models: networks, the autoregressive denoiser, and the trivial predictors it must beat."""

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
]
