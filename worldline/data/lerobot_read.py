"""Read LeRobotDatasets, v3.0 and v2.1, ours and other people's, as `Episode`s with lazily decoded frames.

Metadata are checked at opening, numbers when an episode is read, videos when frames are decoded; `validate` looks for
all of it without raising. What a dataset means is taken from the `WorldSpec` that worldline's writer left in
`meta/info.json`; without one it is inferred from the features, and the arguments say what cannot be inferred.
"""

import hashlib
import json
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import pyarrow as pa
import torch

from worldline.checkpoint import from_json
from worldline.data.lerobot_assemble import IMAGES
from worldline.data.lerobot_meta import (
    action_spec,
    camera_specs,
    column_names,
    file_end,
    in_order,
    known_rewards,
    matrix,
    named_episodes,
    read_episodes,
    read_info,
    read_parquet,
    read_tasks,
)
from worldline.data.splits import held_out_episodes, named_splits
from worldline.data.video import VideoFrames, packet_indices
from worldline.errors import DatasetError
from worldline.types import Episode, WorldSpec

OPEN_TABLES = 8  # parquet files kept in memory
STATES = "observation.environment_state"
OPTIONAL = (
    "frame_index",
    "next.reward",
    "next.success",
    "next.done",
    STATES,
    "timestamp",
)  # columns read where they are
UNKNOWN = "unknown"  # provenance["actions"] of video alone


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """Something wrong with one episode (or with the dataset, `episode` None)."""

    kind: str
    episode: int | None
    column: str  # a numeric column, a camera or a file
    detail: str


class LeRobotDataset:
    """A dataset folder. Raises `DatasetError` for other versions, absent files, columns or cameras.

    Args:
        root: folder holding `meta/`, `data/` and `videos/`.
        cameras: names to read, all by default.
        action_columns, pose_columns: columns joined, in this order, to actions and poses. By default what worldline's
            writer recorded, else "action" and "observation.state". Naming them sets worldline's own record aside.
        action_kind, action_space, action_source, embodiment: what the actions mean, when the dataset doesn't say.
        action_range: lowest and highest action (a number a dimension), when the dataset doesn't say; by default what was observed.
        success_column: a boolean or 0/1 column (one value a frame) whose last value is the episode's success.
        split_seed: for datasets that record no split of their own.
    """

    def __init__(
        self,
        root: str | Path,
        *,
        cameras: Sequence[str] | None = None,
        action_columns: Sequence[str] | None = None,
        pose_columns: Sequence[str] | None = None,
        action_kind: Literal["absolute", "delta", "velocity"] = "absolute",
        action_space: Literal["joint", "cartesian", "mixed"] = "joint",
        action_source: Literal["commanded", "achieved"] = "commanded",
        action_range: tuple[Sequence[float], Sequence[float]] | None = None,
        embodiment: str | None = None,
        success_column: str | None = None,
        split_seed: int = 0,
    ) -> None:
        self.root = Path(root)
        self.info = read_info(self.root)
        self.tasks = read_tasks(self.root, self.info)
        self.episode_table: pd.DataFrame = read_episodes(self.root, self.info)
        self._extras: dict[str, Any] = self.info.get("worldline", {})
        self._split_seed = split_seed
        self._success_column = success_column
        self._own = own = "spec" in self._extras
        default_poses = ["observation.state"] if "observation.state" in self.info["features"] else []
        self.action_columns = list(action_columns or ["action"])
        self.pose_columns = list(default_poses if pose_columns is None else pose_columns)
        self._keys, specs = self._choose_cameras(cameras)
        base = from_json(WorldSpec, self._extras["spec"], source=f"{self.root}/meta/info.json") if own else None
        meaning = {
            "kind": action_kind,
            "space": action_space,
            "source": action_source,
            "embodiment": embodiment or str(self.info.get("robot_type") or "unknown"),
        }
        if base is None or action_columns is not None:
            action, steps = action_spec(self.root, self.info, self.action_columns, meaning), 1
        else:
            action, steps = base.action, base.control_steps
        own_range = base is not None and action_columns is None and not self._extras.get("range_observed", False)
        self.range_observed = not own_range and action_range is None
        if action_range is not None:
            low, high = (tuple(map(float, bound)) for bound in action_range)
            action = replace(action, low=low, high=high)
        if base is not None and pose_columns is None:
            poses = base.pose_names
        else:
            poses = column_names(self.info, self.pose_columns)
        self.spec = WorldSpec(
            cameras=specs,
            fps=float(self.info["fps"]) if base is None else base.fps,
            control_steps=steps,
            action=action,
            pose_names=poses,
        )
        self._tables: OrderedDict[str, pa.Table] = OrderedDict()

    def with_range(self, low: Sequence[float], high: Sequence[float]) -> "LeRobotDataset":
        """The same dataset with this range of actions."""
        other = copy(self)
        other.spec = replace(self.spec, action=replace(self.spec.action, low=tuple(low), high=tuple(high)))
        other.range_observed = False
        return other

    def _choose_cameras(self, cameras: Sequence[str] | None) -> tuple[dict[str, str], tuple]:
        by_name = {spec.name: (key, spec) for key, spec in camera_specs(self.info).items()}
        stored = [key for key, entry in self.info["features"].items() if entry["dtype"] == "image"]
        unknown = [name for name in cameras or () if name not in by_name]
        if unknown or (cameras is None and stored):
            wanted = unknown or [key.removeprefix(IMAGES) for key in stored]
            hint = f" Stored as images, which are not read: {stored}. Convert them to video." if stored else ""
            raise DatasetError(f"{self.root}: cameras {wanted} required, got videos of {sorted(by_name)}.{hint}")
        chosen = list(by_name) if cameras is None else list(cameras)
        return {name: by_name[name][0] for name in chosen}, tuple(by_name[name][1] for name in chosen)

    def __len__(self) -> int:
        return len(self.episode_table)

    def length(self, index: int) -> int:
        """Frames of episode `index`."""
        return int(self._row(index)["length"])

    def terminated(self, index: int) -> bool:
        """Whether episode `index` came to an end of its own (success, a fall), rather than being cut. Where the recorder does not say: whether
        it was done (`next.done`) with a success in its last row."""
        said = self._row(index)["terminated"]
        if said is not None or not {"next.done", "next.success"} <= set(self.info["features"]):
            return bool(said)
        numbers = self.numbers(index)
        return bool(numbers["next.done"][-1, 0] > 0.5 and numbers["next.success"][-1, 0] > 0.5)

    def acts(self, index: int) -> bool:
        """Whether the actions of episode `index` are known. Those of video alone (`record --without-actions`) are not."""
        return self._row(index)["provenance"].get("actions") != UNKNOWN

    def episode(self, index: int) -> Episode:
        """Episode `index`. Its numbers are read and checked (`DatasetError` on NaN), its frames decoded on access.

        Actions that are not known (`acts`) are NaN: what uses them by mistake is found out.
        """
        row, numbers = self._row(index), self.numbers(index)
        for column in [*self.action_columns, *self.pose_columns]:
            self._require_finite(index, column, numbers)
        length = int(row["length"])
        blocks = np.concatenate([numbers[c] for c in self.action_columns], axis=1)[: length - 1]
        poses = [numbers[c] for c in self.pose_columns]
        states = numbers.get(STATES, np.zeros((length, 0), np.float32))
        reached = numbers.get("next.success")
        frame_success = None
        if reached is not None and np.isfinite(reached).all():
            start = bool(row["initial_success"])  # no control step led to frame 0 unless the recorder says so
            frame_success = torch.from_numpy(np.append(start, reached[: length - 1, 0] > 0.5))
            if not self._own:
                # what the last action led to has no frame: of an end at success that row is the only label
                frame_success[-1] |= bool(reached[-1, 0] > 0.5)
        success = self.success(index)
        from_column = success is not None and row["success"] is None
        scorer = {"scorer": f"dataset column {self._success_column or 'next.success'}"} if from_column else {}
        if not self.acts(index):
            blocks = np.full_like(blocks, np.nan)
        k, a, ended = self.spec.control_steps, self.spec.action.dim, self.terminated(index)
        return Episode(
            frames=self.frames(index),
            actions=torch.from_numpy(np.ascontiguousarray(blocks)).float().reshape(length - 1, k, a),
            poses=torch.from_numpy(np.concatenate(poses, axis=1) if poses else np.zeros((length, 0))).float(),
            states=torch.from_numpy(states).float(),
            rewards=known_rewards(numbers, last_counts=not self._own),
            frame_success=frame_success,
            success=success,
            terminated=ended,
            truncated=not ended if row["truncated"] is None else bool(row["truncated"]),
            instruction=row["instruction"],
            spec=self.spec,
            index=index,
            provenance={**row["provenance"], **scorer},
        )

    def success(self, index: int) -> bool | None:
        """What the recorder, or else the last value of `success_column`, or else any of `next.success`, says of episode `index`; None if
        unknown."""
        recorded = self._row(index)["success"]
        if recorded is not None:
            return recorded
        if self._success_column is None:
            if "next.success" not in self.info["features"]:
                return None
            reached = self.numbers(index)["next.success"]
            return bool((reached > 0.5).any()) if np.isfinite(reached).all() else None
        last = float(self.numbers(index)[self._success_column][-1, 0])
        return last > 0.5 if np.isfinite(last) else None

    def frames(self, index: int) -> Mapping[str, VideoFrames]:
        """Camera -> lazily decoded frames of episode `index`."""
        row = self._row(index)
        return {
            name: VideoFrames(
                path=Path(row[f"video:{key}"]),
                first=int(row[f"first:{key}"]),
                length=int(row["length"]),
                fps=float(self.info["fps"]),
                height=self.spec.camera(name).height,
                width=self.spec.camera(name).width,
            )
            for name, key in self._keys.items()
        }

    def numbers(self, index: int) -> dict[str, np.ndarray]:
        """Columns of episode `index` as float arrays (t, d), unchecked: nulls are NaN, an action is in every row."""
        row = self._row(index)
        table = self._table(row["data_file"])
        mine = in_order(table.filter(pa.array(table["episode_index"].to_numpy() == index)))
        if len(mine) != row["length"]:
            raise DatasetError(
                f"{row['data_file']}: {row['length']} rows of episode {index} required, got {len(mine)}. "
                "Fetch the file again."
            )
        return {name: matrix(mine[name], index, name) for name in table.schema.names if name != "episode_index"}

    def _table(self, path: str) -> pa.Table:
        if path not in self._tables:
            names = read_parquet(Path(path), columns=[]).schema.names
            wanted = [*self.action_columns, *self.pose_columns, self._success_column or "episode_index"]
            if absent := [name for name in ("episode_index", *wanted) if name not in names]:
                raise DatasetError(f"{path}: columns {absent} required, got {names}. Choose other columns.")
            optional = [n for n in OPTIONAL if n in names]
            columns = list(dict.fromkeys(["episode_index", *wanted, *optional]))
            self._tables[path] = read_parquet(Path(path), columns=columns)
            while len(self._tables) > OPEN_TABLES:
                self._tables.popitem(last=False)
        self._tables.move_to_end(path)
        return self._tables[path]

    def _row(self, index: int) -> Any:
        if index not in self.episode_table.index:
            raise DatasetError(
                f"{self.root}: {named_episodes(self.episode_table.index)} required, got {index}. Choose one of these."
            )
        return self.episode_table.loc[index]

    def _require_finite(self, index: int, column: str, numbers: Mapping[str, np.ndarray]) -> None:
        bad = np.argwhere(~np.isfinite(numbers[column]))
        if len(bad):
            raise DatasetError(
                f"{self.root}: finite numbers required, got NaN or infinity in episode {index}, column {column}, "
                f"row {bad[0, 0]} ({len(bad)} in all). Leave the episode out, or mend it."
            )

    def held_out(self, index: int) -> bool:
        """Whether episode `index` is not to be trained on: as `meta/info.json` names it, or the recorder, or by a hash."""
        return index in self._held_out

    @cached_property
    def _held_out(self) -> set[int]:
        every = [int(i) for i in self.episode_table.index]
        named = named_splits(self.info.get("splits") or {}, len(every))
        return named or set(self._extras.get("held_out", held_out_episodes(every, self._split_seed)))

    def split(self, name: str) -> list[int]:
        """Episodes of "train", "held-out" or "all". Raises `DatasetError` if there are none."""
        every = [int(i) for i in self.episode_table.index]
        chosen = {
            "all": every,
            "train": [i for i in every if not self.held_out(i)],
            "held-out": [i for i in every if self.held_out(i)],
        }.get(name)
        if chosen is None:
            raise DatasetError(f"split 'train', 'held-out' or 'all' required, got {name!r}.")
        if not chosen:
            raise DatasetError(
                f"{self.root}: the split {name!r} of {len(every)} episodes is empty. Record more, or use 'all'."
            )
        return chosen

    @cached_property
    def fingerprint(self) -> str:
        """Sixteen hex digits that change with metadata, episodes, their statistics, the columns read, or a file of numbers."""
        columns = [self.action_columns, self.pose_columns, self._success_column]
        digest = hashlib.sha256(json.dumps([self.info, columns], sort_keys=True).encode())
        digest.update(self.episode_table[["length", "instruction"]].to_csv().encode())
        for name in ("meta/stats.json", "meta/episodes_stats.jsonl"):
            if (self.root / name).is_file():
                digest.update((self.root / name).read_bytes())
        for path in sorted(set(self.episode_table["data_file"])):
            digest.update(file_end(Path(path)))
        return digest.hexdigest()[:16]

    def validate(self, episodes: Sequence[int] | None = None) -> list[Problem]:
        """Problems of the episodes named (default: all), found without decoding: NaN, absent rows, files or frames."""
        found: list[Problem] = []
        packets: dict[Path, np.ndarray | str] = {}
        for index in self.split("all") if episodes is None else episodes:
            found += self._number_problems(index)
            for camera, video in self.frames(index).items():
                if video.path not in packets:
                    packets[video.path] = _packets(video)
                found += _video_problem(index, camera, video, packets[video.path])
        return found

    def _number_problems(self, index: int) -> list[Problem]:
        try:
            numbers = self.numbers(index)
        except DatasetError as error:
            return [Problem(kind="data", episode=index, column="data", detail=str(error))]
        out = []
        for column in [*self.action_columns, *self.pose_columns]:
            bad = np.argwhere(~np.isfinite(numbers[column]))
            if len(bad):
                detail = f"{len(bad)} NaN or infinite numbers, first in row {bad[0, 0]}"
                out.append(Problem(kind="nan", episode=index, column=column, detail=detail))
        return out


def common_range(datasets: Sequence[LeRobotDataset]) -> list[LeRobotDataset]:
    """The datasets, in which a range of actions that was only observed is one that holds all of them.

    That of the first dataset that declares one, if it does; else from the lowest to the highest that any holds.
    """
    declared = [d.spec.action for d in datasets if not d.range_observed]
    wide = declared or [d.spec.action for d in datasets]
    if len(datasets) < 2 or len({len(a.names) for a in wide}) > 1:
        return list(datasets)
    low = wide[0].low if declared else [min(bounds) for bounds in zip(*(a.low for a in wide))]
    high = wide[0].high if declared else [max(bounds) for bounds in zip(*(a.high for a in wide))]
    return [d.with_range(low, high) if d.range_observed and d.spec.action.dim == len(low) else d for d in datasets]


def _packets(video: VideoFrames) -> np.ndarray | str:
    if not video.path.is_file():
        return f"no file {video.path}"
    try:
        return packet_indices(video.path, video.fps)
    except DatasetError as error:
        return str(error)


def _video_problem(index: int, camera: str, video: VideoFrames, packets: np.ndarray | str) -> list[Problem]:
    if isinstance(packets, str):
        kind = "missing video" if packets.startswith("no file") else "truncated video"
        return [Problem(kind=kind, episode=index, column=camera, detail=packets)]
    got = int(((packets >= video.first) & (packets < video.first + video.length)).sum())
    if got == video.length:
        return []
    detail = f"{video.path}: {video.length} frames required, got {got}"
    return [Problem(kind="truncated video", episode=index, column=camera, detail=detail)]


def require_actions(dataset: LeRobotDataset, episodes: Sequence[int]) -> None:
    """Raise `DatasetError` if the actions of some of these episodes are not known."""
    without = [i for i in episodes if not dataset.acts(i)]
    if without:
        raise DatasetError(
            f"{dataset.root}: episodes with actions are required, {len(without)} of {len(episodes)} are video alone (the first: "
            f"{without[0]}). Leave them out; `worldline train video-action` learns from them."
        )
