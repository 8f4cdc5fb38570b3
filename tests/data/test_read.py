"""Damaged, foreign and unsuitable datasets: the message says which file, episode, column or camera."""

import json
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from tests.data.toy import frame_number, toy_dataset, toy_episode
from worldline.data import LeRobotDataset
from worldline.data.splits import held_out_episodes
from worldline.errors import DatasetError

FRONT = "videos/observation.images.front/chunk-000/file-000.mp4"


def edit_info(root: Path, **changes) -> None:
    path = root / "meta/info.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_rows(root: Path, change) -> None:
    path = root / "data/chunk-000/file-000.parquet"
    schema, rows = pq.read_schema(path), pd.read_parquet(path)
    change(rows)
    pq.write_table(pa.Table.from_pandas(rows, schema=schema, preserve_index=False), path)


@pytest.mark.parametrize("version", ["v2.0", "v4.0", None])
def test_other_versions_are_refused(damaged: Path, version: str | None) -> None:
    edit_info(damaged, codebase_version=version)
    with pytest.raises(DatasetError, match=rf"v2\.1 or v3\.0 required, got {version}"):
        LeRobotDataset(damaged)


def test_not_a_dataset(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="a LeRobotDataset required"):
        LeRobotDataset(tmp_path)


@pytest.mark.parametrize("share", [0.9, 0.6, 0.3, 0.02])
def test_truncated_video_is_never_silent(damaged: Path, share: float) -> None:
    path = damaged / FRONT
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * share)])
    dataset = LeRobotDataset(damaged)
    with pytest.raises(DatasetError, match=r"file-000\.mp4: 5 frames required .* got 0"):
        dataset.episode(3).frames["front"][:]
    assert frame_number(dataset.episode(3).frames["wrist"][:]) == list(range(5))  # the other camera is whole
    assert {(p.kind, p.column) for p in dataset.validate()} == {("truncated video", "front")}
    assert 3 in {p.episode for p in dataset.validate()}


def test_episodes_before_the_cut_still_decode(damaged: Path) -> None:
    path = damaged / FRONT
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * 0.9)])
    dataset = LeRobotDataset(damaged)
    bad = {p.episode for p in dataset.validate()}
    assert 0 not in bad and frame_number(dataset.episode(0).frames["front"][:]) == list(range(12))


def test_missing_video(damaged: Path) -> None:
    (damaged / FRONT).unlink()
    dataset = LeRobotDataset(damaged)
    with pytest.raises(DatasetError, match="video file required, but there is no such file"):
        dataset.episode(0).frames["front"][0:1]
    assert [(p.kind, p.episode) for p in dataset.validate()] == [("missing video", i) for i in range(4)]
    assert frame_number(LeRobotDataset(damaged, cameras=["wrist"]).episode(0).frames["wrist"][:2]) == [0, 1]


def test_wrong_size_in_the_metadata(damaged: Path) -> None:
    info = json.loads((damaged / "meta/info.json").read_text())
    info["features"]["observation.images.front"]["shape"] = [96, 96, 3]
    edit_info(damaged, features=info["features"])
    with pytest.raises(DatasetError, match=r"96x96 required .* got 64x64"):
        LeRobotDataset(damaged).episode(0).frames["front"][:]


@pytest.mark.parametrize("column", ["action", "observation.state"])
def test_nan_names_episode_column_and_row(damaged: Path, column: str) -> None:
    def plant(rows: pd.DataFrame) -> None:
        rows.at[15, column] = rows.at[15, column] * float("nan")

    edit_rows(damaged, plant)
    dataset = LeRobotDataset(damaged)
    with pytest.raises(DatasetError, match=f"episode 1, column {column}, row 3 "):
        dataset.episode(1)
    dataset.episode(0)
    assert [(p.kind, p.episode, p.column) for p in dataset.validate()] == [("nan", 1, column)]


def test_missing_rows(damaged: Path) -> None:
    edit_rows(damaged, lambda rows: rows.drop(index=[13], inplace=True))
    with pytest.raises(DatasetError, match="9 rows of episode 1 required, got 8"):
        LeRobotDataset(damaged).episode(1)


def test_unknown_camera_column_episode_and_split(recorded: Path) -> None:
    with pytest.raises(DatasetError, match=r"cameras \['left'\] required, got videos of \['front', 'wrist'\]"):
        LeRobotDataset(recorded, cameras=["left"])
    with pytest.raises(DatasetError, match=r"column 'action\.joint' required, got columns"):
        LeRobotDataset(recorded, action_columns=["action.joint"])
    with pytest.raises(DatasetError, match="episodes 0 to 3 required, got 9"):
        LeRobotDataset(recorded).episode(9)
    with pytest.raises(DatasetError, match="'train', 'held-out' or 'all' required"):
        LeRobotDataset(recorded).split("val")


def test_cameras_can_be_chosen_and_ordered(recorded: Path) -> None:
    dataset = LeRobotDataset(recorded, cameras=["wrist"])
    assert [c.name for c in dataset.spec.cameras] == ["wrist"] and list(dataset.episode(0).frames) == ["wrist"]
    assert [c.name for c in LeRobotDataset(recorded, cameras=["wrist", "front"]).spec.cameras] == ["wrist", "front"]


def test_splits_partition_the_episodes(recorded: Path) -> None:
    dataset = LeRobotDataset(recorded)
    train, held_out = dataset.split("train"), dataset.split("held-out")
    assert len(held_out) == 1 and sorted(train + held_out) == dataset.split("all") == [0, 1, 2, 3]


def test_held_out_share_and_stability() -> None:
    chosen = held_out_episodes(range(2000), seed=0)
    assert 250 < len(chosen) < 350
    assert set(held_out_episodes(range(1000), seed=0)) == {i for i in chosen if i < 1000}
    assert chosen != held_out_episodes(range(2000), seed=1)
    assert held_out_episodes([0], seed=0) == [] and len(held_out_episodes([0, 1], seed=0)) == 1


def test_splits_that_the_dataset_names_are_used(damaged: Path) -> None:
    edit_info(damaged, splits={"train": "0:2", "val": "2:3", "test": "3:4"})
    dataset = LeRobotDataset(damaged)
    assert dataset.split("held-out") == [2, 3] and dataset.split("train") == [0, 1]
    edit_info(damaged, splits={"val": "0:9"})
    with pytest.raises(DatasetError, match="splits: episodes 0 to 3 required"):
        LeRobotDataset(damaged).split("train")


def test_empty_split(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="split 'held-out' of 1 episodes is empty"):
        toy_dataset(tmp_path / "d", (4,)).split("held-out")


def test_without_worldlines_record_the_features_are_used(damaged: Path) -> None:
    info = json.loads((damaged / "meta/info.json").read_text())
    del info["worldline"]
    (damaged / "meta/info.json").write_text(json.dumps(info))
    dataset = LeRobotDataset(damaged, action_kind="delta", action_space="cartesian")
    assert dataset.spec.control_steps == 1 and dataset.spec.action.dim == 6
    assert dataset.spec.action.embodiment == "toy" and dataset.spec.action.rate_hz == dataset.spec.fps == 20
    assert dataset.spec.pose_names == ("x", "y", "grip")
    assert dataset.spec.action.high[0] == pytest.approx(10 / 50)
    want = toy_episode(0).actions.reshape(11, 1, 6)
    assert torch.equal(dataset.episode(0).actions, want)  # the last row's action leaves the last frame: dropped


def test_fingerprint_follows_content(recorded: Path, damaged: Path, tmp_path: Path) -> None:
    assert LeRobotDataset(recorded).fingerprint == LeRobotDataset(damaged).fingerprint
    assert LeRobotDataset(recorded).fingerprint != toy_dataset(tmp_path / "d", (12, 9, 12, 6)).fingerprint


def test_cameras_stored_as_images_are_not_dropped_silently(damaged: Path) -> None:
    info = json.loads((damaged / "meta/info.json").read_text())
    info["features"]["observation.images.front"]["dtype"] = "image"
    edit_info(damaged, features=info["features"])
    with pytest.raises(DatasetError, match=r"cameras \['front'\] required, got videos of \['wrist'\].*Convert"):
        LeRobotDataset(damaged)
    assert list(LeRobotDataset(damaged, cameras=["wrist"]).episode(0).frames) == ["wrist"]
