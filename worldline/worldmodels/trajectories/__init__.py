"""Diffusion over whole low-dimensional trajectories (Policy-Guided Diffusion)."""

from worldline.worldmodels.trajectories.config import Guidance, TrajectoryConfig, TrajectorySolver
from worldline.worldmodels.trajectories.layout import Layout, Windows
from worldline.worldmodels.trajectories.model import ScoreFunction, TrajectoryDiffusion

__all__ = [
    "Guidance",
    "Layout",
    "ScoreFunction",
    "TrajectoryConfig",
    "TrajectoryDiffusion",
    "TrajectorySolver",
    "Windows",
]
