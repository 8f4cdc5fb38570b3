"""Flags that change how a trained world model is sampled, the same for every verb that dreams."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

import torch

from worldline.errors import WorldlineError
from worldline.rl_in_imagination.dream import Dream
from worldline.worldmodels import load_world_model


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingFlags:
    """Settings used instead of the checkpoint's own, where they are given."""

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


def load_dream(folder: Path, sampling: Mapping[str, Any] | None = None) -> Dream:
    """A dream from a world-model folder, on the GPU if there is one, sampled as `sampling` says instead of the checkpoint.

    Raises `WorldlineError` for settings that its training never showed.
    """
    model, tokenizer = load_world_model(folder)
    try:
        model = model.with_sampling(**(sampling or {}))
    except ValueError as error:  # the model's own check of its settings
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in sampling or {})
        raise WorldlineError(f"{flags}: {error}. Sample as training showed it.") from error
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return Dream(model.to(device), tokenizer.to(device))
