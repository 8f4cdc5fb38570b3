"""Stage `trajectory`: a diffusion model of whole low-dimensional trajectories (Policy-Guided Diffusion), from Minari datasets."""

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from worldline.checkpoint import fingerprint
from worldline.data.minari import read_minari
from worldline.data.splits import held_out_episodes
from worldline.data.trajectories import Trajectories, join
from worldline.diffusion import LogNormalSigmas
from worldline.errors import DatasetError
from worldline.policies.states import require_low_dimensional
from worldline.trainers.inputs import claim_output
from worldline.trainers.loop import LoopConfig, train
from worldline.worldmodels.trajectories import TrajectoryConfig, TrajectoryDiffusion, TrajectorySolver, Windows
from worldline.worldmodels.trajectories.layout import gather

_CHECKED = 512  # held-out windows that are looked at
_MOST_LOST = 0.01  # share of the steps that may be left out unasked: a recording's end cuts one episode short

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainTrajectory:
    """Train a diffusion model of whole trajectories, from which offline RL can draw data near the policy that it trains.

    Example: worldline train trajectory --data data/hopper-medium --out runs/hopper-trajectories
    """

    data: tuple[str, ...]
    """Minari datasets: folders, or ids that Minari has on this machine. Vectors only."""
    out: Path
    """Folder for the checkpoint. A run that was interrupted goes on there."""
    leave_out_short: bool = False
    """Leave out episodes that were cut short before they filled a window (--model.length). Terminated ones may be short."""
    model: TrajectoryConfig = field(default_factory=TrajectoryConfig)
    loop: LoopConfig = field(
        default_factory=lambda: LoopConfig(
            steps=6000,
            batch_size=64,
            lr=2e-3,
            warmup=300,
            cooldown=0.6,
            weight_decay=0.0,
            save_every=500,
            eval_every=500,
        )
    )


PRESETS: dict[str, tuple[str, dict[str, Any]]] = {
    "tiny": ("a quarter of an hour on a CPU core", {}),
    "small": (
        "twice the width, more steps; minutes on a GPU",
        {
            "model": TrajectoryConfig(width=128),
            "loop": LoopConfig(steps=50_000, batch_size=256, lr=1e-3, warmup=1000, cooldown=0.6, weight_decay=0.0),
        },
    ),
    "published": (
        "the paper's: width 1024, what it diffuses, its noise, its solver (256 Heun steps, churn 80); hours on a GPU",
        {
            "model": TrajectoryConfig(
                width=256,
                depth=3,
                sigmas=LogNormalSigmas(log_mean=-1.2, log_std=1.2, low=0.002, high=80.0),
                changes=False,
                squash=True,
                rewards="diffused",
                solver=TrajectorySolver(steps=256, heun=True, churn=80.0),
            ),
            "loop": LoopConfig(steps=300_000, batch_size=32, lr=2e-3, warmup=30_000, cooldown=0.9, weight_decay=0.0),
        },
    ),
}


class _TrajectoryStage:
    name = "trajectory"

    def __init__(self, model: TrajectoryDiffusion, data: Trajectories, held_out: Trajectories | None) -> None:
        self.model, self.data, self.held_out = model, data, held_out
        length = model.config.length
        self.rows = data.windows(length, past_end=True)
        self.checked = _some(held_out.windows(length, past_end=True)) if held_out is not None else None

    def batch(self, seed: int, step: int, size: int) -> Windows:
        generator = torch.Generator().manual_seed((seed * 1_000_003 + step) & 0x7FFF_FFFF_FFFF)
        chosen = torch.randint(len(self.rows), (size,), generator=generator)
        return gather(self.data, self.rows[chosen])

    def loss(self, model: Any, batch: Windows, generator: torch.Generator) -> tuple[Tensor, Mapping[str, Tensor]]:
        device = next(model.parameters()).device
        return model.loss(Windows(*(x.to(device) for x in batch)), generator), {}

    @torch.no_grad()
    def evaluate(self, model: Any) -> dict[str, float]:
        """The loss on held-out episodes, with the same noise every time."""
        if self.held_out is None or self.checked is None:
            return {}
        device = next(model.parameters()).device
        windows = Windows(*(x.to(device) for x in gather(self.held_out, self.checked)))
        return {"held_out_loss": float(model.loss(windows, torch.Generator().manual_seed(0)))}

    def save(self, model: Any, folder: Path, provenance: Mapping[str, Any]) -> None:
        model.save_pretrained(folder, provenance=provenance)


def _some(rows: Int[Tensor, "w t"]) -> Int[Tensor, "w2 t"]:
    return rows[torch.linspace(0, len(rows) - 1, min(_CHECKED, len(rows))).long()]


def open_trajectories(sources: Sequence[str]) -> Trajectories:
    """All episodes of Minari datasets of one task."""
    return join([read_minari(Path(source) if Path(source).exists() else source) for source in sources])


def provenance_of(data: Trajectories, sources: Sequence[str], out: Path) -> dict[str, Any]:
    """What a checkpoint in `out` says of its data; the fingerprint changes when any step does."""
    tensors = {f.name: x for f in fields(data) if isinstance(x := getattr(data, f.name), Tensor)}
    return {
        "data": list(sources),
        "data_from_here": [os.path.relpath(Path(s).resolve(), out.resolve()) for s in sources],
        "dataset_fingerprints": [fingerprint(tensors)],
        "transitions": data.steps,
    }


def claim_trajectories(config: Any, part: str, data: Trajectories) -> dict[str, Any]:
    """Make the output folder that of a `part` learned from these data; gives what its checkpoint says of them."""
    made_from = provenance_of(data, config.data, config.out)
    held = {"what the data hold": made_from["dataset_fingerprints"][0]}
    claim_output(config.out, part, config, identity=("data", "model"), made_from=held)
    return made_from


def whole_windows(data: Trajectories, length: int, *, leave_out: bool) -> Trajectories:
    """The episodes that windows of `length` meet.

    Raises `DatasetError` where more than a hundredth of the steps are in episodes cut short before that, unless they are to be left out.
    """
    short = data.outside_windows(length)
    lost = int(data.lengths[short].sum())
    if len(short) == len(data):
        raise DatasetError(
            f"episodes of at least {length} steps (--model.length), or terminated ones, required, got {len(data)} cut short at "
            f"{int(data.lengths.max())} or before. Use a shorter window or longer episodes."
        )
    if lost > _MOST_LOST * data.steps and not leave_out:
        raise DatasetError(
            f"episodes of at least {length} steps (--model.length), or terminated ones, required: {len(short)} of {len(data)} were cut short "
            f"before ({lost} of {data.steps} steps; first episode {short[0]} of {int(data.lengths[short[0]])} steps). Use a shorter window, or "
            "--leave-out-short True to learn without them."
        )
    if short:
        log.warning("%d of %d episodes are shorter than a window: %d steps are left out", len(short), len(data), lost)
    return data.select(sorted(set(range(len(data))) - set(short)))


def run(config: TrainTrajectory, *, progress: bool = True) -> Path:
    """Train and save. Returns the checkpoint folder. Raises `DatasetError` if episodes do not fill a window."""
    told = open_trajectories(config.data)
    require_low_dimensional(told.spec)
    data = whole_windows(told, config.model.length, leave_out=config.leave_out_short)
    out = set(held_out_episodes(range(len(data)), 0))
    training = data.select(i for i in range(len(data)) if i not in out)
    held_out = data.select(sorted(out)) if out else None
    made_from = claim_trajectories(config, "trajectory-model", told) | {"transitions": data.steps}
    torch.manual_seed(config.loop.seed)
    model = TrajectoryDiffusion(config.model, data.spec)
    model.layout.fit(training)
    provenance = made_from
    stage = _TrajectoryStage(model, training, held_out)
    return train(stage, config.loop, config.out, provenance=provenance, progress=progress)
