"""Verb `label`: a copy of action-free video with the actions that an inverse model reads off it."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from worldline.checkpoint import best_device, read_json, write_json
from worldline.data import DatasetWriter, FrameStore, LeRobotDataset
from worldline.errors import DatasetError
from worldline.rl_in_imagination.inverse import InverseModel
from worldline.rl_in_imagination.inverse_audit import check_inverse
from worldline.types import require_match

FITS = ("cameras", "control_steps", "fps", "action")
NOTES = "labeling.json"  # in the staging folder: what labels it


@dataclass(frozen=True, slots=True, kw_only=True)
class Label:
    """Write a copy of video without actions, with the actions that an inverse model reads off it. It trains world models like any other.

    Every episode says which model that was, and how well it reads each dimension (R2 on held-out episodes of its own data).

    Example: worldline label data/video --inverse runs/reward --out data/labelled
    """

    data: Path
    """Dataset folder (`worldline record --without-actions True`)."""
    inverse: Path
    """Inverse model (`worldline train inverse`), of the same cameras, sizes and frame rate."""
    out: Path
    """Folder for the new dataset. A run that was interrupted goes on there."""
    relabel: bool = False
    """Also take episodes that have actions, and replace those."""
    override_audit: bool = False
    """Use an inverse model that failed its audit. Every episode says so."""


def run_label(config: Label, *, progress: bool = True) -> Path:
    """Label and write; returns the new dataset's folder. Goes on with what was interrupted.

    Raises `SpecMismatch` if dataset and model differ in cameras, sizes, frame rate or actions, `DatasetError` for episodes that have
    actions, `WorldlineError` for a model that failed its audit.
    """
    failures = check_inverse(config.inverse, override=config.override_audit)
    model = InverseModel.from_pretrained(config.inverse).to(best_device())
    dataset = LeRobotDataset(config.data)
    if observed := dataset.range_observed and dataset.spec.action.names == model.spec.action.names:
        dataset = dataset.with_range(model.spec.action.low, model.spec.action.high)  # of what it will be given
    require_match(
        dataset.spec, model.spec, between=f"dataset {config.data} and inverse model {config.inverse}", only=FITS
    )
    episodes = dataset.split("all")
    if not config.relabel and (known := [i for i in episodes if dataset.acts(i)]):
        raise DatasetError(
            f"{config.data}: episodes without actions are required, {len(known)} of {len(episodes)} have some (the first: {known[0]}). "
            "Give --relabel True to replace them in the copy."
        )
    held_out = [number for number, index in enumerate(episodes) if dataset.held_out(index)]  # the same in the copy
    writer = DatasetWriter(config.out, dataset.spec, resume=True, held_out=held_out, range_observed=observed)
    _require_same(writer, {"inverse": model.name, "data": dataset.fingerprint})
    said = _provenance(model, failures)
    store, staged = FrameStore(dataset), writer.staged()
    for number, index in enumerate(tqdm(episodes, unit="episode", disable=not progress)):
        if number in staged:
            continue
        frames = {camera.name: store.frames(index, camera.name) for camera in dataset.spec.cameras}
        episode = dataset.episode(index)
        told = {**episode.provenance, **said}
        blocks = recovered_blocks(model, frames)
        writer.stage_episode(number, replace(episode, frames=frames, actions=blocks, provenance=told))
    return writer.finish()


def recovered_blocks(model: InverseModel, frames: Mapping[str, Tensor]) -> Tensor:
    """Blocks "t-1 k a" of one episode of uint8 frames "t c h w", clipped to the range of the model's action spec."""
    action = model.spec.action
    blocks = model.blocks({camera.name: frames[camera.name][None] for camera in model.spec.cameras})[0].cpu()
    return blocks.clamp(torch.tensor(action.low), torch.tensor(action.high)).contiguous()


def _provenance(model: InverseModel, failures: list[str]) -> dict[str, str]:
    """What every labelled episode says of its actions."""
    calibration = model.calibrated_by()
    r2 = ", ".join(f"{name} {value:.3f}" for name, value in zip(calibration.names, calibration.r2))
    said = {"actions": "recovered from video", "inverse_model": model.name, "inverse_r2": r2}
    if model.constant:
        said["inverse_constant"] = ", ".join(model.constant)
    return {**said, "inverse_audit": "; ".join(failures) or "passed"}


def _require_same(writer: DatasetWriter, made_from: Mapping[str, str]) -> None:
    """Raise `DatasetError` if the folder holds an interrupted recording, or a labelling of other things."""
    notes = writer.staging / NOTES
    before = read_json(notes) if notes.is_file() else {} if writer.staged() else dict(made_from)
    changed = [
        f"{k}: was {before.get(k, 'not labelled')}, is now {v}" for k, v in made_from.items() if before.get(k) != v
    ]
    if changed:
        raise DatasetError(
            f"{writer.root} holds something else that was interrupted ({'; '.join(changed)}). Choose another --out."
        )
    write_json(notes, before)
