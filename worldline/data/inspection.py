"""What is in a dataset and what is wrong with it, before anything is trained on it.

Bad episodes are found, named and counted here, never raised. Every frame of the episodes looked at is decoded (about 900
frames a second), which is the only way to find a camera that stood still or a file damaged in the middle.
"""

from collections import Counter
from collections.abc import Mapping, Sequence, Set
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from matplotlib import colormaps
from torch import Tensor

from worldline.data.lerobot_read import LeRobotDataset, Problem
from worldline.errors import DatasetError

STILL_LEVELS = 4  # grey levels that coding alone may change in a still picture
MOVED = 0.05  # a pose that covers this share of the dataset's range has moved
SATURATED = 0.5  # an action dimension at its limits in this share of an episode's control steps
MAX_LAG = 8  # frames
GRID = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class Inspection:
    """`summary` holds plain JSON types; `pictures` are uint8 (h, w, 3) by name."""

    summary: Mapping[str, Any]
    problems: tuple[Problem, ...]
    pictures: Mapping[str, UInt8[np.ndarray, "_h _w 3"]]

    @property
    def bad_episodes(self) -> list[int]:
        """Episodes with at least one problem of their own."""
        return sorted({p.episode for p in self.problems if p.episode is not None})

    def to_dict(self) -> dict[str, Any]:
        """Everything but the pictures, for `report.json`."""
        return {
            **self.summary,
            "problems": [asdict(p) for p in self.problems],
            "problem_counts": dict(Counter(p.kind for p in self.problems)),
            "bad_episodes": self.bad_episodes,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class _Numbers:
    """One readable episode's poses and control steps."""

    episode: int
    poses: Float[np.ndarray, "t p"]
    actions: Float[np.ndarray, "t-1 k a"]


def inspect_dataset(dataset: LeRobotDataset, *, max_episodes: int | None = None) -> Inspection:
    """Look at all episodes, or at `max_episodes` of them evenly spread."""
    every = dataset.split("all")
    count = len(every) if max_episodes is None else min(max_episodes, len(every))
    chosen = [every[i] for i in np.unique(np.linspace(0, len(every) - 1, count).astype(int))]
    problems = dataset.validate(chosen)
    unreadable = {p.episode for p in problems if p.kind in ("data", "nan")}
    numbers = [_read(dataset, i) for i in chosen if i not in unreadable]
    acted = [n for n in numbers if dataset.acts(n.episode)]
    problems += _constant_columns(dataset, numbers) + _saturated(dataset, acted)
    lag, lag_problems = _lags(dataset, acted)
    moved = _moved(numbers)
    sheets: dict[str, list[np.ndarray]] = {}
    broken = {(p.episode, p.column) for p in problems}
    for episode in chosen:
        problems += _look(dataset, episode, moved.get(episode, False), broken, sheets)
    coverage, visits = _coverage(dataset, numbers)
    summary = {
        "dataset": str(dataset.root),
        "episodes": len(dataset),
        "episodes_inspected": len(chosen),
        "frames": sum(dataset.length(i) for i in every),
        "hours": sum(dataset.length(i) for i in every) / dataset.spec.fps / 3600,
        "fps": dataset.spec.fps,
        "control_steps": dataset.spec.control_steps,
        "cameras": {c.name: [c.height, c.width] for c in dataset.spec.cameras},
        "tasks": dict(Counter(dataset.episode_table["instruction"])),
        "success_by_cause": _success_table(dataset, chosen, absent={p.episode for p in problems if p.kind == "data"}),
        "episodes_without_actions": len(numbers) - len(acted),
        "actions": _action_table(dataset, acted),
        "lag": lag,
        "coverage": coverage,
    }
    pictures = {f"contact sheet {camera}": np.concatenate(rows) for camera, rows in sheets.items()}
    if visits is not None:
        pictures["visits"] = visits
    return Inspection(summary=summary, problems=tuple(problems + lag_problems), pictures=pictures)


def _read(dataset: LeRobotDataset, index: int) -> _Numbers:
    episode = dataset.episode(index)
    return _Numbers(episode=index, actions=episode.actions.numpy(), poses=episode.poses.numpy())


def _constant_columns(dataset: LeRobotDataset, numbers: Sequence[_Numbers]) -> list[Problem]:
    found = []
    for names, values in (
        (
            dataset.spec.action.names,
            [n.actions.reshape(-1, dataset.spec.action.dim) for n in numbers if dataset.acts(n.episode)],
        ),
        (dataset.spec.pose_names, [n.poses for n in numbers]),
    ):
        spread = np.ptp(np.concatenate(values), axis=0) if values else np.ones(len(names))
        found += [
            Problem(kind="constant column", episode=None, column=name, detail="one value in all episodes inspected")
            for name, width in zip(names, spread, strict=True)
            if width == 0
        ]
    return found


def _at_limit(dataset: LeRobotDataset, actions: np.ndarray) -> np.ndarray:
    """Which numbers of (..., a) lie at or beyond the range of the action spec."""
    low, high = np.array(dataset.spec.action.low), np.array(dataset.spec.action.high)
    slack = 1e-4 * (high - low)
    return (actions <= low + slack) | (actions >= high - slack)


def _switches(dataset: LeRobotDataset, numbers: Sequence[_Numbers]) -> np.ndarray:
    """Grippers and dimensions of at most three values: at a limit nearly always, by design."""
    values = np.concatenate([n.actions.reshape(-1, dataset.spec.action.dim) for n in numbers])
    named = ["grip" in name.lower() for name in dataset.spec.action.names]
    return np.array([len(np.unique(column)) <= 3 for column in values.T]) | np.array(named)


def _saturated(dataset: LeRobotDataset, numbers: Sequence[_Numbers]) -> list[Problem]:
    if not numbers:
        return []
    switch, found = _switches(dataset, numbers), []
    for n in numbers:
        share = _at_limit(dataset, n.actions).mean(axis=(0, 1))
        for name, value, is_switch in zip(dataset.spec.action.names, share, switch, strict=True):
            if value > SATURATED and not is_switch:
                detail = f"at its limit in {value:.0%} of control steps"
                found.append(Problem(kind="saturated actions", episode=n.episode, column=name, detail=detail))
    return found


def _action_table(dataset: LeRobotDataset, numbers: Sequence[_Numbers]) -> dict[str, dict[str, float]]:
    if not numbers:
        return {}
    spec = dataset.spec.action
    values = np.concatenate([n.actions.reshape(-1, spec.dim) for n in numbers])
    limits, quantiles = _at_limit(dataset, values).mean(axis=0), np.quantile(values, [0, 0.01, 0.5, 0.99, 1], axis=0)
    return {
        name: {
            "low": spec.low[i],
            "high": spec.high[i],
            **dict(zip(("min", "p01", "p50", "p99", "max"), quantiles[:, i].tolist(), strict=True)),
            "saturation": float(limits[i]),
        }
        for i, name in enumerate(spec.names)
    }


# --- Lag between command and motion -----------------------------------------------------------------------------------


def _paired_dimensions(dataset: LeRobotDataset) -> list[tuple[int, int]]:
    """(action, pose) dimensions of one name, where "dx", "delta_x" and "x_velocity" all mean x."""

    def plain(name: str) -> str:
        name = name.lower().removeprefix("delta_").removesuffix("_velocity")
        return name[1:] if len(name) > 1 and name[0] == "d" and name[1:] in poses else name

    poses = {name.lower().removeprefix("hand_"): i for i, name in enumerate(dataset.spec.pose_names)}
    return [(i, poses[plain(n)]) for i, n in enumerate(dataset.spec.action.names) if plain(n) in poses]


def _lag_scores(n: _Numbers, pairs: Sequence[tuple[int, int]], absolute: bool) -> np.ndarray:
    """Correlation of command and later motion, per lag 0..MAX_LAG, averaged over dimensions that move."""
    scores = np.full((len(pairs), MAX_LAG + 1), np.nan)
    for row, (a, p) in enumerate(pairs):
        motion = np.diff(n.poses[:, p])
        command = n.actions[:, -1, a] - n.poses[:-1, p] if absolute else n.actions[:, :, a].sum(axis=1)
        for lag in range(min(MAX_LAG + 1, len(motion) - 4)):
            one, other = command[: len(command) - lag], motion[lag:]
            if one.std() > 1e-9 and other.std() > 1e-9:
                scores[row, lag] = np.corrcoef(one, other)[0, 1]
    known = np.isfinite(scores)
    total = np.where(known, scores, 0).sum(axis=0)
    return np.where(known.any(axis=0), total / np.maximum(known.sum(axis=0), 1), np.nan)


def _lags(dataset: LeRobotDataset, numbers: Sequence[_Numbers]) -> tuple[dict[str, Any], list[Problem]]:
    """The lag, in frames, at which motion follows command best. 0: within the block's own frame interval."""
    pairs = _paired_dimensions(dataset)
    absolute = dataset.spec.action.kind == "absolute"
    scores = {n.episode: _lag_scores(n, pairs, absolute) for n in numbers} if pairs else {}
    scores = {episode: s for episode, s in scores.items() if np.isfinite(s).any()}
    if not scores:
        return {"frames": None, "correlation": None, "note": "no action and pose dimensions of one name"}, []
    stacked = np.stack(list(scores.values()))
    known = np.isfinite(stacked)
    mean = np.where(known, stacked, 0).sum(axis=0) / np.maximum(known.sum(axis=0), 1)
    usual = int(mean.argmax())
    found = []
    if usual >= 2:
        detail = f"motion follows the command {usual} frames late (correlation {mean[usual]:.2f})"
        found.append(Problem(kind="command lag", episode=None, column="action", detail=detail))
    for episode, s in scores.items():
        lag = int(np.nanargmax(s))
        if abs(lag - usual) >= 2 and s[lag] > 0.5 and not s[lag] <= s[usual] + 0.2:
            detail = f"motion follows the command {lag} frames late, {usual} in the dataset"
            found.append(Problem(kind="command lag", episode=episode, column="action", detail=detail))
    return {"frames": usual, "correlation": float(mean[usual]), "by_lag": mean.tolist()}, found


# --- Success, coverage, pictures --------------------------------------------------------------------------------------


def _success_table(
    dataset: LeRobotDataset, chosen: Sequence[int], *, absent: Set[int | None]
) -> dict[str, dict[str, int]]:
    """Of the episodes `absent`, whose numbers cannot be read, only what the recorder noted is known."""
    table: dict[str, dict[str, int]] = {}
    for index in chosen:
        row = dataset.episode_table.loc[index]
        cause = row["provenance"].get("cause", "unknown")
        entry = table.setdefault(cause, {"episodes": 0, "success": 0, "failure": 0, "unknown": 0})
        entry["episodes"] += 1
        success = row["success"] if index in absent else dataset.success(index)
        entry[{True: "success", False: "failure", None: "unknown"}[success]] += 1
    return table


def _coverage(
    dataset: LeRobotDataset, numbers: Sequence[_Numbers]
) -> tuple[dict[str, Any], UInt8[np.ndarray, "_h _w 3"] | None]:
    """Share of grid cells visited over the first two or three pose dimensions, and a picture of visits to the first two."""
    names = dataset.spec.pose_names[:3]
    if not numbers or len(names) < 2:
        return {"dimensions": list(names), "share": None}, None
    poses = np.concatenate([n.poses[:, : len(names)] for n in numbers])
    low, high = poses.min(axis=0), poses.max(axis=0)
    bounds = [(a, b if b > a else a + 1) for a, b in zip(low, high, strict=True)]
    visited, _ = np.histogramdd(poses, bins=GRID, range=bounds)
    counts, _, _ = np.histogram2d(poses[:, 0], poses[:, 1], bins=4 * GRID, range=bounds[:2])
    shade = np.log1p(counts) / np.log1p(counts.max())
    picture = (colormaps["viridis"](shade.T[::-1])[..., :3] * 255).astype(np.uint8)
    share = {"dimensions": list(names), "low": low.tolist(), "high": high.tolist(), "cells": int(visited.size)}
    share["share"] = float((visited > 0).mean())
    return share, picture.repeat(8, axis=0).repeat(8, axis=1)


def _moved(numbers: Sequence[_Numbers]) -> dict[int, bool]:
    """Which episodes' poses cover a fair part of the range that poses cover in the dataset."""
    if not numbers or numbers[0].poses.shape[1] == 0:
        return {}
    whole = np.ptp(np.concatenate([n.poses for n in numbers]), axis=0)
    return {n.episode: bool((np.ptp(n.poses, axis=0)[whole > 0] > MOVED * whole[whole > 0]).any()) for n in numbers}


def _look(
    dataset: LeRobotDataset,
    episode: int,
    moved: bool,
    broken: set[tuple[int | None, str]],
    sheets: dict[str, list[np.ndarray]],
) -> list[Problem]:
    """Decode an episode's cameras: damaged videos and frozen cameras; adds a row to the contact sheets' first four."""
    found = []
    for camera, video in dataset.frames(episode).items():
        if (episode, camera) in broken:
            continue
        try:
            frames = video[:]
        except DatasetError as error:
            found.append(Problem(kind="damaged video", episode=episode, column=camera, detail=str(error)))
            continue
        if moved and _still(frames):
            detail = "all frames alike while the pose moves"
            found.append(Problem(kind="frozen camera", episode=episode, column=camera, detail=detail))
        if len(sheets.setdefault(camera, [])) < 4:
            shown = frames[[0, len(frames) // 2, len(frames) - 1]]
            sheets[camera].append(np.concatenate(list(shown.permute(0, 2, 3, 1).numpy()), axis=1))
    return found


def _still(frames: UInt8[Tensor, "t c h w"]) -> bool:
    """Whether no frame differs from the first by more than coding noise, in any but a few pixels."""
    first = frames[0].to(torch.int16)
    for frame in frames[1:]:
        changed = ((frame.to(torch.int16) - first).abs() > STILL_LEVELS).float().mean()
        if changed > 5e-4:
            return False
    return True
