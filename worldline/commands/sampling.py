"""Flags that change how a trained world model, or a model of trajectories, is sampled: the same for every verb that does."""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

from worldline.checkpoint import best_device
from worldline.errors import WorldlineError
from worldline.eval.replays import Replays
from worldline.rl_in_imagination.doubt import Doubt, DoubtCalibration, calibrate
from worldline.rl_in_imagination.dream import Dream
from worldline.rl_in_imagination.success import SuccessScorer
from worldline.worldmodels import TrainedWorldModel, load_world_model
from worldline.worldmodels.trajectories import TrajectoryDiffusion, TrajectorySolver


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingFlags:
    """Settings used instead of the checkpoint's own, where they are given. A kind of world model that lacks one refuses it."""

    solver_steps: int | None = None
    """Steps of the solver instead of the checkpoint's own."""
    history_level: float | None = None
    """Noise level given to finished frames instead of the checkpoint's own; one that training showed."""
    guidance: float | None = None
    """How far to go from what would be imagined without the action to what is imagined with it, and beyond (1: exactly there).
    Needs a model trained with --model.action-dropout."""
    cache_write: Literal["clean", "last-step"] | None = None
    """What becomes history: the finished frame in a pass of its own, or the solver's last step as it was."""

    def sampling(self) -> dict[str, Any]:
        """Those that were given."""
        given = {f.name: getattr(self, f.name) for f in fields(SamplingFlags)}
        return {name: value for name, value in given.items() if value is not None}


@dataclass(frozen=True, slots=True, kw_only=True)
class SolverFlags:
    """How trajectories are denoised, where it is not to be as the model was trained to be."""

    steps: int | None = None
    """Steps of the solver instead of the checkpoint's own."""
    heun: bool | None = None
    """Correct each step by the slope at its end: twice the evaluations."""
    churn: float | None = None
    """EDM's S_churn: noise that is added again on the way. 0: none, the same noise gives the same trajectory."""
    churned: tuple[float, float] | None = None
    """Sigmas between which noise is added (S_tmin, S_tmax)."""
    inflate: float | None = None
    """Factor of the noise added (S_noise)."""

    def __post_init__(self) -> None:
        self.instead_of(TrajectorySolver())  # whose checks are made here, before a model is read

    def instead_of(self, own: TrajectorySolver) -> TrajectorySolver:
        """A checkpoint's own solver but for the settings that were given."""
        given = {f.name: value for f in fields(SolverFlags) if (value := getattr(self, f.name)) is not None}
        return replace(own, **given)


def load_trajectory_model(folder: Path, solver: SolverFlags) -> TrajectoryDiffusion:
    """A model of trajectories, on the GPU if there is one, denoised as `solver` says instead of the checkpoint."""
    model = TrajectoryDiffusion.from_pretrained(folder)
    model = model.with_solver(solver.instead_of(model.config.solver))
    return model.to(best_device())


def load_dream(folder: Path, sampling: Mapping[str, Any] | None = None) -> Dream:
    """A dream from a world-model folder, on the GPU if there is one, sampled as `sampling` says instead of the checkpoint.

    Raises `WorldlineError` for settings that this kind of world model lacks, or that its training never showed.
    """
    model, tokenizer = load_world_model(folder)
    _require_settings(folder, model, sampling or {})
    try:
        model = model.with_sampling(**(sampling or {}))
    except ValueError as error:  # the model's own check of its settings
        flags = ", ".join(map(_flag, sampling or {}))
        raise WorldlineError(f"{flags}: {error}. Sample as training showed it.") from error
    return Dream(model.to(best_device()), tokenizer.to(best_device()))


def load_scorer(folder: str | Path, *, device: str | None = None) -> SuccessScorer:
    """A success scorer, by default on the GPU if there is one."""
    return SuccessScorer.from_pretrained(folder).to(device or best_device())


def load_doubt(dream: Dream, solver_steps: int) -> Doubt:
    """What doubts frames of `dream`, without a limit yet. Raises `WorldlineError` for solver steps that training never showed."""
    try:
        return Doubt.of(dream, solver_steps=solver_steps)
    except ValueError as error:
        raise WorldlineError(f"--doubt-steps: {error}") from error


def calibrate_doubt(doubt: Doubt, replays: Replays, *, batch: int = 32, progress: bool = True) -> DoubtCalibration:
    """Its limit and its worth, from dreams of real episodes under their own actions."""
    real = {c: x[:, 1:] for c, x in replays.frames.items()}
    shown = "calibrate doubt" if progress else None
    return calibrate(doubt, replays.first, real, replays.actions, ends=replays.ends, batch=batch, progress=shown)


def _require_settings(folder: Path, model: TrainedWorldModel, sampling: Mapping[str, Any]) -> None:
    if lacking := [_flag(name) for name in sampling if name not in model.sampling]:
        has = [_flag(f.name) for f in fields(SamplingFlags) if f.name in model.sampling]
        raise WorldlineError(
            f"{', '.join(lacking)}: the {type(model).__name__} in {folder} has no such setting. Leave it out; of these flags it takes "
            f"{', '.join(has)}."
        )


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"
