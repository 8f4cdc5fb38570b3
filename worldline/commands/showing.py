"""Verb `show`: what a checkpoint folder is, how it was made, and what it was measured to do."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from worldline import checkpoint
from worldline.errors import CheckpointError


@dataclass(frozen=True, slots=True, kw_only=True)
class Show:
    """Print a checkpoint's spec, config, metrics and provenance.

    Example: worldline show runs/wm
    """

    folder: Path
    """A tokenizer, world model (of one robot, a member, or of several), policy, scorer, inverse model, probe, trajectory or dynamics model."""


def describe(folder: Path) -> dict[str, Any]:
    """Everything a checkpoint says of itself."""
    folder = checkpoint.resolve(folder)
    if not (folder / "config.json").is_file():
        hint = (
            f"That is a dataset: `worldline inspect {folder}`." if (folder / "meta").is_dir() else "Correct the path."
        )
        got = "a folder without config.json" if folder.is_dir() else "no such folder"
        raise CheckpointError(f"{folder}: a folder that `worldline train` wrote is required, got {got}. {hint}")
    config = checkpoint.read_json(folder / "config.json")
    if "part" not in config or "provenance" not in config:
        raise CheckpointError(
            f"{folder}/config.json: a worldline checkpoint required, this was written by something else."
        )
    tensors = checkpoint.read_tensors(checkpoint.weights_file(folder))
    return {
        "folder": str(folder),
        "part": config["part"],
        "kind": config["kind"],
        "weights": sum(t.numel() for t in tensors.values()),
        "provenance": config["provenance"],
        "config": config["config"],
        "spec": checkpoint.read_json(folder / "spec.json"),
    }


def run_show(config: Show) -> str:
    """The description as text."""
    return json.dumps(describe(config.folder), indent=2)
