"""Settings of the autoregressive-denoising world model: its size, what training shows it, and how it is sampled.

A sampling setting that asks for something training never shows is refused here.
"""

from dataclasses import dataclass, field
from typing import Literal

from worldline.diffusion import LevelDistribution, solver_levels
from worldline.worldmodels.transformer import TransformerConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class AutoregressiveConfig:
    """Sizes, levels shown in training, and how sampling is done."""

    network: TransformerConfig = field(default_factory=TransformerConfig)
    history: LevelDistribution = field(default_factory=lambda: LevelDistribution(clean=0.5, high=0.3))
    target: LevelDistribution = field(default_factory=lambda: LevelDistribution(pure=0.5, low=0.02))
    max_weight: float = 4.0  # cap of the loss weight 1/level^2
    pose_weight: float = 30.0  # a frame changes a normalised pose by about 0.1: squared, little beside the latents
    own_history: float = 0.0  # share of batches whose history is what the network itself imagines
    own_rounds: int = 2  # so many frames of its own errors at the most
    action_dropout: float = 0.0  # share of targets that are not told their action: what guidance compares with
    # share of clips of which no action is known at all: what a dream by the instruction alone asks for
    actionless: float = 0.0
    camera_dropout: float = 0.0  # share of a clip's cameras that are not seen up to a frame drawn
    # share of a clip's cameras that are noisy up to a frame drawn, by a level that is not told
    camera_noise: float = 0.0
    text: str = "none"  # the instruction's encoder: none, hashed, or the name of a text model of transformers
    balance_weight: float = 0.01  # of the experts' load-balancing loss
    # how experts are chosen: learned, shuffled, uniform, fixed, or an embodiment's name: as for that one
    router: str = "learned"
    solver_steps: int = 1  # of a frame, in sampling; 1: what may be expected
    history_level: float = 0.0  # level given to finished frames when they become history in sampling
    guidance: float = 1.0  # s in free + s * (told - free), free being what is imagined without the action; 1: none
    # what becomes history: the finished frame, in a pass of its own, or what the solver's last step was given, at its level
    cache_write: Literal["clean", "last-step"] = "clean"

    def __post_init__(self) -> None:
        for name in ("action_dropout", "actionless", "camera_dropout", "camera_noise", "own_history"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be a share, at least 0 and below 1, got {getattr(self, name)}")
        if not self.max_weight > 0 or not self.pose_weight >= 0:
            raise ValueError(
                f"max_weight above 0 and pose_weight of at least 0 required, got {self.max_weight:g} and {self.pose_weight:g}"
            )
        if self.own_rounds < 1:
            raise ValueError(f"own_rounds must be at least 1, got {self.own_rounds}")
        if self.balance_weight < 0:
            raise ValueError(f"balance_weight must be at least 0, got {self.balance_weight}")
        if self.router != "learned" and not self.network.experts:
            raise ValueError(f"router={self.router!r} requires experts (network.experts), got none")
        if self.guidance != 1 and not self.action_dropout:
            raise ValueError(
                f"guidance={self.guidance:g} compares with a frame imagined without its action, which this model never was "
                "trained on (action_dropout=0)"
            )
        if self.cache_write == "last-step" and self.network.memory.size:
            raise ValueError(
                "cache_write='last-step' caches what a frame became while it read memory, and training shows history that never did: "
                f"cache_write='clean' required with a memory of {self.network.memory.size} frames (network.memory)"
            )
        last = solver_levels(self.solver_steps)[-2].item()
        if self.cache_write == "last-step" and not self.history.contains(last):
            raise ValueError(
                f"cache_write='last-step' makes history of level {last:g} at {self.solver_steps} solver steps, which training "
                f"never shows ({self.history})"
            )
        if not self.history.contains(self.history_level):
            raise ValueError(
                f"history_level must be a level that training shows to history ({self.history}), got {self.history_level}"
            )
        for level in solver_levels(self.solver_steps)[:-1].tolist():
            if not self.target.contains(level):
                raise ValueError(
                    f"solver_steps={self.solver_steps} asks for level {level:g}, which training never shows ({self.target})"
                )
