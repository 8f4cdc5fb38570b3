"""Episodes with their encoded videos into a LeRobotDataset v3.0 folder: parquet files, joined videos, statistics.

Nothing is encoded here: videos of several episodes become one file by copying packets. Files are closed when the next
episode would take them over LeRobot's size limits, so an episode never spans two files.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from worldline.data.statistics import column_stats, image_stats, to_lists
from worldline.data.video import join_videos, same_stream
from worldline.types import CameraSpec

CODEBASE_VERSION = "v3.0"
IMAGES = "observation.images."
DATA_PATH = "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
VIDEO_PATH = "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4"
EPISODES_PATH = "meta/episodes/chunk-000/file-000.parquet"
CHUNK_FILES = 1000
DATA_MB = 100
VIDEO_MB = 200

Feature = dict[str, Any]
INDEX_FEATURES: dict[str, Feature] = {
    "timestamp": {"dtype": "float32", "shape": [1], "names": None},
    "frame_index": {"dtype": "int64", "shape": [1], "names": None},
    "episode_index": {"dtype": "int64", "shape": [1], "names": None},
    "index": {"dtype": "int64", "shape": [1], "names": None},
    "task_index": {"dtype": "int64", "shape": [1], "names": None},
}


@dataclass(frozen=True, slots=True, kw_only=True)
class RawEpisode:
    """One episode ready to be filed. A column that is None is unknown in this episode and stored as nulls."""

    length: int
    task: str
    columns: Mapping[str, np.ndarray | None]  # feature -> (t,) or (t, d)
    videos: Mapping[str, Path] = field(default_factory=dict)  # feature -> mp4 of this episode alone
    histograms: Mapping[str, np.ndarray] = field(default_factory=dict)  # feature -> (3, 256) pixel counts
    extras: Mapping[str, Any] = field(default_factory=dict)  # further columns of meta/episodes


def video_feature(camera: CameraSpec, *, fps: float, codec: str) -> Feature:
    """The entry of `meta/info.json` for a camera."""
    return {
        "dtype": "video",
        "shape": [camera.height, camera.width, 3],
        "names": ["height", "width", "channels"],
        "info": {
            "video.height": camera.height,
            "video.width": camera.width,
            "video.codec": codec,
            "video.pix_fmt": "yuv420p",
            "video.is_depth_map": False,
            "video.fps": whole(fps),
            "video.channels": 3,
            "has_audio": False,
        },
    }


def vector_feature(names: Sequence[str], dtype: str = "float32") -> Feature:
    return {"dtype": dtype, "shape": [len(names)], "names": list(names)}


def whole(fps: float) -> int | float:
    """LeRobot writes whole frame rates as integers."""
    return int(fps) if float(fps).is_integer() else float(fps)


def assemble(
    folder: Path,
    episodes: Iterable[RawEpisode],
    features: Mapping[str, Feature],
    *,
    fps: float,
    robot_type: str,
    extra_info: Mapping[str, Any] | None = None,
    extra_types: Mapping[str, pa.DataType] | None = None,
    data_mb: int | float = DATA_MB,
    video_mb: int | float = VIDEO_MB,
) -> None:
    """Write `data/`, `videos/` and `meta/` under `folder`. Episodes are numbered in the order given."""
    features = {**features, **INDEX_FEATURES}
    tables = _TableFiles(folder, features, data_mb)
    videos = {
        key: _VideoFiles(folder, key, fps, video_mb) for key, entry in features.items() if entry["dtype"] == "video"
    }
    tasks: dict[str, int] = {}
    rows: list[dict[str, Any]] = []
    seen: dict[str, list[np.ndarray]] = {}
    frames = 0
    for number, episode in enumerate(episodes):
        task = tasks.setdefault(episode.task, len(tasks))
        columns = {**episode.columns, **index_columns(number, frames, episode.length, fps, task)}
        row = {
            "episode_index": number,
            "tasks": [episode.task],
            "length": episode.length,
            **tables.add(columns),
            "dataset_from_index": frames,
            "dataset_to_index": frames + episode.length,
        }
        for key, files in videos.items():
            row |= files.add(episode.videos[key], episode.length)
        row |= {**episode.extras, "meta/episodes/chunk_index": 0, "meta/episodes/file_index": 0}
        rows.append(row | _flat_stats(columns, episode.histograms, seen))
        frames += episode.length
    tables.close()
    for files in videos.values():
        files.close()
    _write_meta(folder, rows, tasks, features, seen, extra_types or {})
    info = {
        "codebase_version": CODEBASE_VERSION,
        "robot_type": robot_type,
        "total_episodes": len(rows),
        "total_frames": frames,
        "total_tasks": len(tasks),
        "chunks_size": CHUNK_FILES,
        "data_files_size_in_mb": data_mb,
        "video_files_size_in_mb": video_mb,
        "fps": whole(fps),
        "splits": {"train": f"0:{len(rows)}"},
        "data_path": DATA_PATH,
        "video_path": VIDEO_PATH if videos else None,
        "features": features,
        **(extra_info or {}),
    }
    (folder / "meta/info.json").write_text(json.dumps(info, indent=4, allow_nan=False) + "\n")


def index_columns(number: int, first: int, length: int, fps: float, task: int) -> dict[str, np.ndarray]:
    """The columns every LeRobotDataset has; `number` the episode, `first` the index of its first row."""
    counted = np.arange(length)
    return {
        "timestamp": (counted / fps).astype(np.float32),
        "frame_index": counted,
        "episode_index": np.full(length, number),
        "index": first + counted,
        "task_index": np.full(length, task),
    }


def _flat_stats(
    columns: Mapping[str, np.ndarray | None],
    histograms: Mapping[str, np.ndarray],
    seen: dict[str, list[np.ndarray]],
) -> dict[str, Any]:
    """This episode's statistics as columns of meta/episodes; raw values go to `seen` for the whole dataset's."""
    stats = {}
    for key, values in columns.items():
        if values is not None:
            values = values.reshape(len(values), -1)
            seen.setdefault(key, []).append(values)
            stats[key] = column_stats(values.astype(np.float64))
    for key, histogram in histograms.items():
        seen.setdefault(key, []).append(histogram)
        stats[key] = image_stats(histogram)
    return {f"stats/{key}/{name}": value for key, entry in to_lists(stats).items() for name, value in entry.items()}


def _write_meta(
    folder: Path,
    rows: list[dict[str, Any]],
    tasks: Mapping[str, int],
    features: Mapping[str, Feature],
    seen: Mapping[str, list[np.ndarray]],
    extra_types: Mapping[str, pa.DataType],
) -> None:
    names = list(dict.fromkeys(name for row in rows for name in row))
    table = pa.table({name: pa.array([row.get(name) for row in rows], type=extra_types.get(name)) for name in names})
    path = folder / EPISODES_PATH
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path)
    index = pd.Index(list(tasks), name="task")
    pd.DataFrame({"task_index": list(tasks.values())}, index=index).to_parquet(folder / "meta/tasks.parquet")
    stats = {
        key: image_stats(np.sum(values, axis=0))
        if features[key]["dtype"] == "video"
        else column_stats(np.concatenate(values).astype(np.float64))
        for key, values in seen.items()
    }
    (folder / "meta/stats.json").write_text(json.dumps(to_lists(stats), indent=4, allow_nan=False) + "\n")


def numeric_table(columns: Mapping[str, np.ndarray | None], features: Mapping[str, Feature], length: int) -> pa.Table:
    """One episode's rows: scalars for features of shape [1], fixed-size lists for longer vectors."""
    return pa.table(
        {
            key: _column(columns[key], entry, length)
            for key, entry in features.items()
            if entry["dtype"] not in ("video", "image")
        }
    )


def _column(values: np.ndarray | None, feature: Feature, length: int) -> pa.Array:
    dtype = "bool" if feature["dtype"] == "bool" else feature["dtype"]
    width = feature["shape"][0]
    inner = pa.from_numpy_dtype(np.dtype(dtype))
    if values is None:
        return pa.nulls(length, inner if width == 1 else pa.list_(inner, width))
    flat = pa.array(np.ascontiguousarray(values).astype(dtype).reshape(-1))
    return flat if width == 1 else pa.FixedSizeListArray.from_arrays(flat, width)


def _place(count: int) -> dict[str, int]:
    return {"chunk_index": count // CHUNK_FILES, "file_index": count % CHUNK_FILES}


class _TableFiles:
    """Collects episodes' rows and writes a parquet file whenever the next episode would exceed the limit."""

    def __init__(self, folder: Path, features: Mapping[str, Feature], limit_mb: int | float) -> None:
        self.folder, self.features, self.limit = folder, features, limit_mb * 2**20
        self.pending: list[pa.Table] = []
        self.count = 0

    def add(self, columns: Mapping[str, np.ndarray | None]) -> dict[str, int]:
        length = len(columns["frame_index"])  # pyright: ignore[reportArgumentType]  # never None
        table = numeric_table(columns, self.features, length)
        if self.pending and sum(t.nbytes for t in self.pending) + table.nbytes > self.limit:
            self.close()
        self.pending.append(table)
        return {f"data/{name}": value for name, value in _place(self.count).items()}

    def close(self) -> None:
        if self.pending:
            path = self.folder / DATA_PATH.format(**_place(self.count))
            path.parent.mkdir(parents=True, exist_ok=True)
            pq.write_table(pa.concat_tables(self.pending), path)
            self.pending, self.count = [], self.count + 1


class _VideoFiles:
    """Collects one camera's episode videos and joins them into files below the limit."""

    def __init__(self, folder: Path, key: str, fps: float, limit_mb: int | float) -> None:
        self.folder, self.key, self.fps, self.limit = folder, key, fps, limit_mb * 2**20
        self.paths: list[Path] = []
        self.lengths: list[int] = []
        self.size = 0
        self.count = 0

    def add(self, path: Path, length: int) -> dict[str, Any]:
        size = path.stat().st_size
        if self.paths and (self.size + size > self.limit or not same_stream(self.paths[0], path)):
            self.close()
        first = sum(self.lengths)
        self.paths.append(path)
        self.lengths.append(length)
        self.size += size
        place = {
            **_place(self.count),
            "from_timestamp": first / self.fps,
            "to_timestamp": (first + length) / self.fps,
        }
        return {f"videos/{self.key}/{name}": value for name, value in place.items()}

    def close(self) -> None:
        if self.paths:
            path = self.folder / VIDEO_PATH.format(video_key=self.key, **_place(self.count))
            path.parent.mkdir(parents=True, exist_ok=True)
            join_videos(self.paths, self.lengths, path, fps=self.fps)
            self.paths, self.lengths, self.size, self.count = [], [], 0, self.count + 1
