"""Planted problems are found under their episode's number, and sound episodes are not accused."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.data.test_read import edit_rows
from tests.data.toy import toy_episode, toy_spec
from worldline.data import UNKNOWN, Inspection, LeRobotDataset, inspect_dataset, write_dataset
from worldline.types import CameraSpec, Episode

LENGTH = 40
SPEC = replace(toy_spec(control_steps=2, cameras=(CameraSpec(name="top", height=64, width=64),)), pose_names=("x", "y"))


def walking(index: int, lag: int = 0, frozen: bool = False, saturated: bool = False) -> Episode:
    """A square walks at random over the picture; the pose follows the commanded steps `lag` frames late."""
    random = np.random.default_rng(index)
    steps = random.uniform(-0.9, 0.9, (LENGTH - 1, 2, 2))
    if saturated:
        steps[:, :, 0] = np.where(random.random((LENGTH - 1, 2)) < 0.8, 1.0, steps[:, :, 0])
    moved = np.roll(steps.sum(axis=1), lag, axis=0)
    poses = np.concatenate([np.zeros((1, 2)), moved.cumsum(axis=0)])
    frames = torch.full((LENGTH, 3, 64, 64), 90, dtype=torch.uint8)
    for frame, (x, y) in zip(frames, poses, strict=True):
        left, top = int(20 + x) % 50, int(20 + y) % 50
        frame[:, top : top + 10, left : left + 10] = 220
    return toy_episode(
        index,
        LENGTH,
        SPEC,
        frames={"top": frames[:1].repeat(LENGTH, 1, 1, 1) if frozen else frames},
        actions=torch.from_numpy(steps).float(),
        poses=torch.from_numpy(poses).float(),
    )


def found(inspection: Inspection) -> set[tuple[str, int | None, str]]:
    return {(p.kind, p.episode, p.column) for p in inspection.problems}


@pytest.fixture(scope="module")
def inspection(tmp_path_factory: pytest.TempPathFactory) -> Inspection:
    """Episodes 0 and 2 sound, 1 frozen, 3 saturated, 4 NaN, 5 commanded earlier than the others, 6 cut off."""
    root = tmp_path_factory.mktemp("inspect") / "d"
    episodes = [walking(0), walking(1, frozen=True), walking(2), walking(3, saturated=True), walking(4)]
    write_dataset(root, [*episodes, walking(5, lag=3), walking(6)], video_mb=1e-4)  # one video file an episode

    def plant(rows) -> None:
        rows.at[4 * LENGTH + 7, "observation.state"] = np.array([np.nan, 0.0])

    edit_rows(root, plant)
    video = root / "videos/observation.images.top/chunk-000/file-006.mp4"
    video.write_bytes(video.read_bytes()[: video.stat().st_size * 7 // 10])
    return inspect_dataset(LeRobotDataset(root))


def test_every_planted_problem_is_found_and_nothing_else(inspection: Inspection) -> None:
    assert found(inspection) == {
        ("frozen camera", 1, "top"),
        ("saturated actions", 3, "dx"),
        ("nan", 4, "observation.state"),
        ("command lag", 5, "action"),
        ("truncated video", 6, "top"),
    }
    assert inspection.bad_episodes == [1, 3, 4, 5, 6]


def test_numbers_of_the_summary(inspection: Inspection) -> None:
    report = json.loads(json.dumps(inspection.to_dict(), allow_nan=False))
    assert (report["episodes"], report["frames"], report["fps"]) == (7, 7 * LENGTH, 20.0)
    assert report["hours"] == pytest.approx(7 * LENGTH / 20 / 3600)
    assert report["success_by_cause"] == {
        "expert": {"episodes": 4, "success": 4, "failure": 0, "unknown": 0},
        "noise": {"episodes": 3, "success": 0, "failure": 3, "unknown": 0},
    }
    assert report["lag"]["frames"] == 0 and report["lag"]["correlation"] > 0.7
    assert report["actions"]["dx"]["max"] == 1.0 and -0.9 <= report["actions"]["dy"]["p01"] < -0.8
    assert 0.1 < report["actions"]["dx"]["saturation"] < 0.2 and report["actions"]["dy"]["saturation"] == 0
    assert 0 < report["coverage"]["share"] < 1 and report["coverage"]["cells"] == 100
    assert report["problem_counts"]["frozen camera"] == 1


def test_pictures_show_first_middle_and_last_frames(inspection: Inspection) -> None:
    assert inspection.pictures["contact sheet top"].shape == (4 * 64, 3 * 64, 3)
    assert inspection.pictures["visits"].dtype == np.uint8 and inspection.pictures["visits"].std() > 0


def test_a_lag_of_the_whole_dataset_is_said_once(tmp_path: Path) -> None:
    root = write_dataset(tmp_path / "d", [walking(i, lag=2) for i in range(4)])
    assert found(inspect_dataset(LeRobotDataset(root))) == {("command lag", None, "action")}


def test_constant_columns_and_a_limited_number_of_episodes(recorded: Path) -> None:
    result = inspect_dataset(LeRobotDataset(recorded), max_episodes=2)
    assert result.summary["episodes_inspected"] == 2 and result.summary["episodes"] == 4
    assert ("constant column", None, "grip") in found(result)


def test_a_folder_without_its_videos_is_reported_not_raised(damaged: Path) -> None:
    for video in damaged.rglob("*.mp4"):
        video.unlink()
    result = inspect_dataset(LeRobotDataset(damaged))
    assert {p for p in found(result) if p[0] == "missing video"} == {
        ("missing video", i, camera) for i in range(4) for camera in ("front", "wrist")
    }
    assert set(result.pictures) == {"visits"}


def test_video_alone_is_inspected_for_what_it_has(tmp_path: Path) -> None:
    """Actions that are not known are in no table; of those that are, all is said."""
    episodes = [toy_episode(i) for i in range(4)]
    alone = [replace(e, provenance={**e.provenance, "actions": UNKNOWN}) for e in episodes]
    mixed = inspect_dataset(LeRobotDataset(write_dataset(tmp_path / "mixed", [*episodes[:2], *alone[2:]])))
    acted = inspect_dataset(LeRobotDataset(write_dataset(tmp_path / "acted", episodes[:2])))
    assert mixed.summary["episodes_without_actions"] == 2 and mixed.summary["actions"] == acted.summary["actions"]
    nothing = inspect_dataset(LeRobotDataset(write_dataset(tmp_path / "alone", alone)))
    assert nothing.summary["episodes_without_actions"] == 4 and nothing.summary["actions"] == {}
    json.dumps(nothing.to_dict(), allow_nan=False)
