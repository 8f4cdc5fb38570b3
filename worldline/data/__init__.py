"""LeRobot datasets in and out, clips, normalisation, the latent cache and dataset inspection."""

from worldline.data.clips import ClipSampler, action_blocks, collate, draw, strided, with_lead
from worldline.data.inspection import Inspection, inspect_dataset
from worldline.data.latents import LatentCache
from worldline.data.lerobot_read import UNKNOWN, LeRobotDataset, Problem, common_range, require_actions
from worldline.data.lerobot_write import DatasetWriter, write_dataset
from worldline.data.normalization import NormalizerSet, RobustNormalizer
from worldline.data.store import FrameStore
from worldline.data.video import VideoFrames

__all__ = [
    "UNKNOWN",
    "ClipSampler",
    "DatasetWriter",
    "FrameStore",
    "Inspection",
    "LatentCache",
    "LeRobotDataset",
    "NormalizerSet",
    "Problem",
    "RobustNormalizer",
    "VideoFrames",
    "action_blocks",
    "collate",
    "common_range",
    "draw",
    "inspect_dataset",
    "require_actions",
    "strided",
    "with_lead",
    "write_dataset",
]
