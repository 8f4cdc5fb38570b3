"""Diffusion mathematics as pure functions of tensors: no modules, no config objects, no devices."""

from worldline.diffusion.edm import (
    EDMPath,
    LogNormalSigmas,
    Preconditioning,
    edm_levels,
    loss_weight,
    precondition,
    sample_edm,
)
from worldline.diffusion.levels import LevelDistribution, solver_levels
from worldline.diffusion.noise import row_noise
from worldline.diffusion.paths import (
    Coefficients,
    Path,
    add_noise,
    clean_from_velocity,
    cosine_path,
    expand,
    linear_path,
    noise_from_clean,
    velocity_from_clean,
)
from worldline.diffusion.samplers import sample_euler, sample_heun

__all__ = [
    "Coefficients",
    "EDMPath",
    "LevelDistribution",
    "LogNormalSigmas",
    "Path",
    "Preconditioning",
    "add_noise",
    "clean_from_velocity",
    "cosine_path",
    "edm_levels",
    "expand",
    "linear_path",
    "loss_weight",
    "noise_from_clean",
    "precondition",
    "row_noise",
    "sample_edm",
    "sample_euler",
    "sample_heun",
    "solver_levels",
    "velocity_from_clean",
]
