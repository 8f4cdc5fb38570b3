"""Settings of the EDM U-Net world model: its size, the noise that training shows it, and how it is sampled.

A sampling setting that asks for noise that training never shows is refused here.
"""

from dataclasses import dataclass, field
from typing import Literal

from jaxtyping import Float
from torch import Tensor

from worldline.diffusion import EDMPath, LogNormalSigmas, edm_levels


@dataclass(frozen=True, slots=True, kw_only=True)
class EDMConfig:
    """Sizes, the noise of training, and how sampling is done. Sigmas are in units of the whitened (or scaled) values."""

    block_out_channels: tuple[int, ...] = (48, 96)
    """Of the U-Net's levels, each half as high and wide as the one before."""
    layers_per_block: int = 1  # residual blocks at a level
    attended: int = 1  # so many of the lowest levels attend over all places; the middle always does
    head_width: int = 8  # channels of an attention head
    norm_groups: int = 8  # of channels that are normalised together; it divides them all
    pose_width: int = 128  # of the network that foretells poses
    history: int = 4  # frames
    action_encoding: Literal["plain", "two-hot"] = "two-hot"
    """two-hot: weights of two neighbouring bins (World4RL). plain: normalised numbers."""
    bins: int = 21  # of each action dimension, with two-hot
    target: Literal["frame", "change"] = "change"
    """What is denoised: the next frame, or how it differs from the one before."""
    sigma_data: float = 1.0  # standard deviation of what is denoised
    sigmas: LogNormalSigmas = field(default_factory=LogNormalSigmas)
    rho: float = 7.0  # how much of the solver's steps lies at small noise (EDM's rho)
    # largest standard deviation of noise on a clip's history in training, drawn evenly from 0, told to nobody; dreams use none
    history_noise: float = 0.0
    pose_weight: float = 30.0  # a frame changes a normalised pose by about 0.1: squared, little beside the latents
    solver_steps: int = 3  # Euler's, as in DIAMOND
    sigma_max: float = 10.0  # where sampling starts
    sigma_min: float = 0.004  # of its last step
    churn: float = 0.0  # S_churn: noise added on the way

    def __post_init__(self) -> None:
        if self.history < 1:
            raise ValueError(f"history must be at least 1 frame, got {self.history}")
        if not 0 <= self.attended <= len(self.block_out_channels):
            raise ValueError(
                f"attended must be from 0 to the number of levels, {len(self.block_out_channels)}, got {self.attended}"
            )
        if not self.block_out_channels or any(c % self.norm_groups for c in self.block_out_channels):
            raise ValueError(
                f"block_out_channels that norm_groups={self.norm_groups} divides required, got {self.block_out_channels}"
            )
        if self.bins < 2:
            raise ValueError(f"bins must be at least 2, got {self.bins}")
        if self.solver_steps < 1:
            raise ValueError(f"solver_steps must be at least 1, got {self.solver_steps}")
        if not self.sigma_data > 0 or self.history_noise < 0 or self.churn < 0:
            raise ValueError(
                f"sigma_data > 0, history_noise >= 0 and churn >= 0 required, got {self.sigma_data}, {self.history_noise} and "
                f"{self.churn}"
            )
        if self.sigma_min > self.sigma_max:
            raise ValueError(f"sigma_min <= sigma_max required, got {self.sigma_min} and {self.sigma_max}")
        for sigma in self.path(self.levels)[1][:-1].tolist():
            if not self.sigmas.contains(sigma):
                raise ValueError(
                    f"solver_steps={self.solver_steps} from sigma_max={self.sigma_max:g} to sigma_min={self.sigma_min:g} asks for "
                    f"sigma {sigma:g}, which training never shows ({self.sigmas})"
                )

    @property
    def path(self) -> EDMPath:
        """Level 1 is the largest sigma of training."""
        return EDMPath(largest=self.sigmas.high, rho=self.rho)

    @property
    def levels(self) -> Float[Tensor, " levels"]:
        """Those that the solver visits, 0 included."""
        return edm_levels(self.solver_steps, self.path, self.sigma_max, self.sigma_min)
