"""Stage `dynamics`: an ensemble of one-step models of a low-dimensional task, the baseline of trajectory diffusion."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from worldline.data.splits import held_out_episodes
from worldline.data.trajectories import Trajectories
from worldline.policies.states import require_low_dimensional
from worldline.rl_in_imagination.dynamics import DynamicsConfig, DynamicsEnsemble
from worldline.trainers.loop import LoopConfig, train
from worldline.trainers.trajectory import claim_trajectories, open_trajectories


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainDynamics:
    """Train an ensemble that foretells one step of a low-dimensional task.

    Example: worldline train dynamics --data data/hopper-medium --out runs/hopper-dynamics
    """

    data: tuple[str, ...]
    """Minari datasets: folders, or ids that Minari has on this machine. Vectors only."""
    out: Path
    """Folder for the checkpoint. A run that was interrupted goes on there."""
    model: DynamicsConfig = field(default_factory=DynamicsConfig)
    loop: LoopConfig = field(
        default_factory=lambda: LoopConfig(
            steps=10_000, batch_size=256, lr=1e-3, cooldown=0.5, weight_decay=1e-4, save_every=1000, eval_every=1000
        )
    )


PRESETS: dict[str, tuple[str, dict[str, Any]]] = {"tiny": ("two minutes on a CPU core", {})}


class _DynamicsStage:
    name = "dynamics"

    def __init__(self, model: DynamicsEnsemble, data: Trajectories, held_out: Trajectories | None) -> None:
        self.model, self.data, self.held_out = model, data, held_out

    def batch(self, seed: int, step: int, size: int) -> Int[Tensor, "e n"]:
        """Rows of each member's own batch."""
        generator = torch.Generator().manual_seed((seed * 1_000_003 + step) & 0x7FFF_FFFF_FFFF)
        return torch.randint(self.data.steps, (self.model.config.members, size), generator=generator)

    def loss(
        self, model: Any, batch: Int[Tensor, "e n"], generator: torch.Generator
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        return model.loss(self.data, batch), {}

    @torch.no_grad()
    def evaluate(self, model: Any) -> dict[str, float]:
        """The loss on held-out steps."""
        if self.held_out is None:
            return {}
        rows = torch.arange(self.held_out.steps).expand(model.config.members, -1)
        return {"held_out_loss": float(model.loss(self.held_out, rows))}

    def save(self, model: Any, folder: Path, provenance: Mapping[str, Any]) -> None:
        model.save_pretrained(folder, provenance=provenance)


def run(config: TrainDynamics, *, progress: bool = True) -> Path:
    """Train and save. Returns the checkpoint folder."""
    data = open_trajectories(config.data)
    require_low_dimensional(data.spec)
    out = set(held_out_episodes(range(len(data)), 0))
    training = data.select(i for i in range(len(data)) if i not in out)
    made_from = claim_trajectories(config, "dynamics", data)
    torch.manual_seed(config.loop.seed)
    model = DynamicsEnsemble(config.model, data.spec).fit(training)
    stage = _DynamicsStage(model, training, data.select(sorted(out)) if out else None)
    return train(stage, config.loop, config.out, provenance=made_from, progress=progress)
