"""Unified video-action models: frames and actions in one network, which answers whatever a `Query` leaves open."""

from worldline.worldmodels.video_action.config import TrunkConfig, VideoActionConfig
from worldline.worldmodels.video_action.model import KIND, VideoActionModel
from worldline.worldmodels.video_action.queries import (
    FORWARD,
    INVERSE,
    JOINT,
    POLICY,
    QUERIES,
    VIDEO,
    Query,
    Role,
    VideoActions,
)

__all__ = [
    "FORWARD",
    "INVERSE",
    "JOINT",
    "KIND",
    "POLICY",
    "QUERIES",
    "VIDEO",
    "Query",
    "Role",
    "TrunkConfig",
    "VideoActionConfig",
    "VideoActionModel",
    "VideoActions",
]
