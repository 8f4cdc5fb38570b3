"""`meta/` of a LeRobotDataset, v3.0 or v2.1, as one table of episodes with the place of each in the data files.

Both versions end up as the same pandas table, so that nothing after this module asks for the version.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from worldline.data.lerobot_assemble import IMAGES
from worldline.errors import DatasetError
from worldline.types import ActionSpec, CameraSpec

VERSIONS = ("v2.1", "v3.0")


def read_info(root: Path) -> dict[str, Any]:
    """`meta/info.json`, its version checked."""
    path = root / "meta/info.json"
    if not path.is_file():
        hint = "Its recording was interrupted: resume it." if (root / ".staging").is_dir() else "Correct the path."
        raise DatasetError(f"{root}: a LeRobotDataset required, but there is no {path}. {hint}")
    info = _load_json(path)
    version = info.get("codebase_version")
    if version not in VERSIONS:
        raise DatasetError(
            f"{path}: codebase_version v2.1 or v3.0 required, got {version}. Convert it with LeRobot's conversion scripts."
        )
    if absent := [name for name in ("fps", "features", "data_path", "total_episodes") if name not in info]:
        raise DatasetError(f"{path}: {', '.join(absent)} required, but absent. Fetch the file again.")
    return info


def read_episodes(root: Path, info: Mapping[str, Any]) -> pd.DataFrame:
    """One row an episode, indexed by episode_index: length, instruction, data_file, first_row, extras and, per camera
    feature KEY, video:KEY (path) and first:KEY (frame of the file)."""
    table = _episodes_v3(root, info) if info["codebase_version"] == "v3.0" else _episodes_v21(root, info)
    if len(table) != info["total_episodes"]:
        raise DatasetError(
            f"{root}/meta: {info['total_episodes']} episodes required (info.json), {len(table)} described. Fetch meta/ again."
        )
    return table


def _episodes_v3(root: Path, info: Mapping[str, Any]) -> pd.DataFrame:
    files = sorted((root / "meta/episodes").glob("*/*.parquet"))
    if not files and info["total_episodes"]:
        raise DatasetError(f"{root}/meta/episodes: parquet files required, got none. Fetch meta/ again.")
    parts = []
    for path in files:
        names = [name for name in read_parquet(path, columns=[]).schema.names if not name.startswith("stats/")]
        parts.append(read_parquet(path, columns=names).to_pandas())
    raw = pd.concat(parts, ignore_index=True).sort_values("episode_index").set_index("episode_index")
    table = pd.DataFrame({"length": raw["length"].astype(int)})
    table["instruction"] = [str(tasks[0]) if len(tasks) else "" for tasks in raw["tasks"]]
    table["data_file"] = [
        str(root / info["data_path"].format(chunk_index=int(chunk), file_index=int(file)))
        for chunk, file in zip(raw["data/chunk_index"], raw["data/file_index"], strict=True)
    ]
    for key in video_keys(info):
        prefix = f"videos/{key}/"
        table[f"video:{key}"] = [
            str(root / info["video_path"].format(video_key=key, chunk_index=int(chunk), file_index=int(file)))
            for chunk, file in zip(raw[prefix + "chunk_index"], raw[prefix + "file_index"], strict=True)
        ]
        table[f"first:{key}"] = np.round(raw[prefix + "from_timestamp"].to_numpy() * info["fps"]).astype(int)
    for name in ("success", "terminated", "truncated", "initial_success"):
        table[name] = (
            [_optional(value, f"{root}/meta/episodes, column {name}") for value in raw[name]] if name in raw else None
        )
        table[name] = table[name].astype(object)
    table["provenance"] = [json.loads(text) for text in raw["provenance"]] if "provenance" in raw else _empty(table)
    return table


def _episodes_v21(root: Path, info: Mapping[str, Any]) -> pd.DataFrame:
    raw = _read_jsonl(root / "meta/episodes.jsonl")
    table = pd.DataFrame(
        {
            "length": [int(row["length"]) for row in raw],
            "instruction": [str(row["tasks"][0]) if row.get("tasks") else "" for row in raw],
        },
        index=pd.Index([int(row["episode_index"]) for row in raw], name="episode_index"),
    ).sort_index()
    size = info.get("chunks_size", 1000)
    table["data_file"] = [
        str(root / info["data_path"].format(episode_chunk=i // size, episode_index=i)) for i in table.index
    ]
    for key in video_keys(info):
        table[f"video:{key}"] = [
            str(root / info["video_path"].format(video_key=key, episode_chunk=i // size, episode_index=i))
            for i in table.index
        ]
        table[f"first:{key}"] = 0
    for name in ("success", "terminated", "truncated", "initial_success"):
        table[name] = pd.Series([None] * len(table), index=table.index, dtype=object)
    table["provenance"] = _empty(table)
    return table


def read_tasks(root: Path, info: Mapping[str, Any]) -> list[str]:
    """Task texts in order of task_index."""
    if info["codebase_version"] == "v2.1":
        return [row["task"] for row in sorted(_read_jsonl(root / "meta/tasks.jsonl"), key=lambda r: r["task_index"])]
    table = read_parquet(root / "meta/tasks.parquet").to_pandas()
    return [str(task) for task in table.sort_values("task_index").index]


def column_ranges(root: Path, info: Mapping[str, Any], column: str) -> tuple[np.ndarray, np.ndarray] | None:
    """Smallest and largest value of each dimension of a column, from the dataset's own statistics; None without them."""
    if info["codebase_version"] == "v2.1":
        path = root / "meta/episodes_stats.jsonl"
        entries = [row["stats"].get(column) for row in _read_jsonl(path)] if path.is_file() else []
    else:
        path = root / "meta/stats.json"
        entries = [_load_json(path).get(column)] if path.is_file() else []
    entries = [entry for entry in entries if entry]
    if not entries:
        return None
    low = np.stack([np.asarray(entry["min"], dtype=float).reshape(-1) for entry in entries])
    high = np.stack([np.asarray(entry["max"], dtype=float).reshape(-1) for entry in entries])
    return low.min(axis=0), high.max(axis=0)


def video_keys(info: Mapping[str, Any]) -> list[str]:
    return [key for key, entry in info["features"].items() if entry["dtype"] == "video"]


def camera_specs(info: Mapping[str, Any]) -> dict[str, CameraSpec]:
    """Feature key -> camera. The name is the part after "observation.images."."""
    cameras = {}
    for key in video_keys(info):
        entry = info["features"][key]
        sizes = [int(n) for n in entry["shape"]]
        channels_first = len(sizes) == 3 and sizes[0] in (1, 3, 4) and sizes[2] not in (1, 3, 4)
        usual = ["channels", "height", "width"] if channels_first else ["height", "width", "channels"]
        names = list(entry.get("names") or usual)
        if not {"height", "width"} <= set(names) or len(names) != len(sizes):
            raise DatasetError(
                f"meta/info.json, {key}: names height, width and channels of a shape of three required, got {names} of {sizes}."
            )
        shape = dict(zip(names, sizes, strict=True))
        cameras[key] = CameraSpec(name=key.removeprefix(IMAGES), height=shape["height"], width=shape["width"])
    return cameras


def column_names(info: Mapping[str, Any], columns: Sequence[str]) -> tuple[str, ...]:
    """Names of the dimensions of several columns joined. Columns without names get COLUMN_0, COLUMN_1, ..."""
    out: list[str] = []
    for column in columns:
        entry = info["features"].get(column)
        if entry is None:
            numeric = [k for k, e in info["features"].items() if e["dtype"] not in ("video", "image")]
            raise DatasetError(
                f"column {column!r} required, got columns {numeric}. Say which hold actions and poses (action_columns=, pose_columns=: docs/data.md)."
            )
        names, width = entry.get("names"), int(np.prod(entry["shape"]))
        if isinstance(names, dict):  # {"axes": [...]} or {"motors": [...]}
            names = [name for group in names.values() for name in (group if isinstance(group, list) else [group])]
        fits = isinstance(names, list) and len(names) == width
        out += [str(name) for name in names] if fits else [f"{column}_{i}" for i in range(width)]
    return tuple(out)


def action_spec(root: Path, info: Mapping[str, Any], columns: Sequence[str], meaning: Mapping[str, Any]) -> ActionSpec:
    """What the action columns of a dataset without worldline's extras hold; the range is the observed one."""
    names = column_names(info, columns)
    ranges = [column_ranges(root, info, column) for column in columns]
    if any(entry is None for entry in ranges):
        raise DatasetError(
            f"{root}/meta: statistics (min, max) of {list(columns)} required, but absent. "
            "Recompute them with LeRobot, or choose other action columns."
        )
    low = np.concatenate([entry[0] for entry in ranges if entry is not None])
    high = np.concatenate([entry[1] for entry in ranges if entry is not None])
    return ActionSpec(
        names=names,
        low=tuple(low.tolist()),
        high=tuple(high.tolist()),
        rate_hz=float(info["fps"]),
        **meaning,
    )


def read_parquet(path: Path, columns: list[str] | None = None) -> pa.Table:
    """A parquet file; with `columns=[]` no rows, only its schema. Raises `DatasetError`."""
    if not path.is_file():
        raise DatasetError(f"{path}: required, but there is no such file. Fetch the dataset again.")
    try:
        return pq.read_schema(path).empty_table() if columns == [] else pq.read_table(path, columns=columns)
    except pa.ArrowInvalid as error:
        raise DatasetError(f"{path}: not a readable parquet file ({error}). Fetch the file again.") from error


def known_rewards(numbers: Mapping[str, np.ndarray], *, last_counts: bool) -> torch.Tensor | None:
    """Of the blocks between frames. That of the last row, which leads to no frame, goes to the last block where others recorded one there."""
    rewards = numbers.get("next.reward")
    if rewards is None or not np.isfinite(rewards).all():
        return None
    known = rewards[:-1, 0].copy()
    if last_counts and len(known):
        known[-1] += rewards[-1, 0]
    return torch.from_numpy(known)


def named_episodes(index: pd.Index) -> str:
    """For messages: which episodes there are."""
    every = [int(i) for i in index]
    if every == list(range(len(every))):
        return f"episodes 0 to {len(every) - 1}"
    return f"one of {len(every)} episodes ({', '.join(map(str, every[:6]))}{', ...' if len(every) > 6 else ''})"


def matrix(column: pa.ChunkedArray, episode: int, name: str) -> np.ndarray:
    """A column as float32 (t, d); nulls are NaN. Raises `DatasetError` for vectors of several widths."""
    rows = len(column)
    nested = pa.types.is_nested(column.type)
    flat = pa.chunked_array([chunk.flatten() for chunk in column.chunks]) if nested else column
    if len(flat) % max(rows, 1):
        raise DatasetError(f"episode {episode}, column {name}: vectors of one width required. Fetch the file again.")
    if pa.types.is_boolean(flat.type):
        flat = flat.cast(pa.uint8())
    return np.array(flat.to_pandas(), dtype=np.float32).reshape(rows, -1)


def in_order(rows: pa.Table) -> pa.Table:
    """An episode's rows by `frame_index`, where there is one."""
    if "frame_index" not in rows.schema.names:
        return rows
    number = rows["frame_index"].to_numpy()
    return rows if (np.diff(number) > 0).all() else rows.take(pa.array(np.argsort(number, kind="stable")))


def file_end(path: Path, size: int = 16_384) -> bytes:
    """Length and last bytes of a file, empty if it is not there: of parquet the part that says where each column is and what range it has."""
    if not path.is_file():
        return b""
    with open(path, "rb") as file:
        length = file.seek(0, 2)
        file.seek(max(0, length - size))
        return str(length).encode() + file.read()


def _load_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise DatasetError(f"{path}: not valid JSON ({error}). Fetch the file again.") from error


def _read_jsonl(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        raise DatasetError(f"{path}: required, but there is no such file. Fetch meta/ again.")
    try:
        return [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
    except json.JSONDecodeError as error:
        raise DatasetError(f"{path}: not valid JSON lines ({error}). Fetch the file again.") from error


def _optional(value: Any, where: str) -> bool | None:
    """A flag that may be unknown. Anything but true, false, 1 and 0 raises: of a text it cannot be known what it says."""
    if value is None or value != value:
        return None
    if not isinstance(value, (bool, int, float, np.bool_, np.number)) or value not in (0, 1):
        raise DatasetError(
            f"{where}: true, false, 1, 0 or nothing required, got {value!r}. Rename the column, or correct it."
        )
    return bool(value)


def _empty(table: pd.DataFrame) -> list[dict[str, str]]:
    return [{} for _ in range(len(table))]
