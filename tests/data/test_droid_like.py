"""Datasets of other makers: both LeRobot versions of one drawn dataset read alike, with columns of one's choice."""

import importlib.util
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from worldline.data import ClipSampler, LeRobotDataset

SCRIPT = Path(__file__).parents[2] / "scripts/make_droid_like.py"
COLUMNS = {
    "action_columns": ["action.cartesian_position", "action.gripper_position"],
    "pose_columns": ["observation.state.cartesian_position", "observation.state.gripper_position"],
    "action_space": "cartesian",
}


@pytest.fixture(scope="module")
def script() -> ModuleType:
    found = importlib.util.spec_from_file_location("make_droid_like", SCRIPT)
    assert found is not None and found.loader is not None
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def roots(script: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    base = tmp_path_factory.mktemp("droid")
    return {
        version: script.main(script.Config(out=base / version, episodes=3, frames=16, version=version, size="90x160"))
        for version in ("v2.1", "v3.0")
    }


def test_both_versions_read_alike(roots: dict[str, Path]) -> None:
    old, new = (LeRobotDataset(roots[version], **COLUMNS) for version in ("v2.1", "v3.0"))
    assert old.spec == new.spec and old.tasks == new.tasks and len(old) == len(new) == 3
    assert [c.name for c in old.spec.cameras] == ["exterior_1_left", "exterior_2_left", "wrist_left"]
    assert old.spec.pose_names == old.spec.action.names == ("x", "y", "z", "roll", "pitch", "yaw", "gripper")
    assert (old.spec.fps, old.spec.control_steps, old.spec.action.embodiment) == (15.0, 1, "droid-like")
    for index in range(3):
        one, other = old.episode(index), new.episode(index)
        assert torch.equal(one.actions, other.actions) and torch.equal(one.poses, other.poses)
        assert one.instruction == other.instruction != ""
        assert (one.success, one.rewards, one.frame_success) == (None, None, None)
        assert one.actions.shape == (len(one) - 1, 1, 7)  # the last row's action has no frame to lead to
        for camera in one.frames:
            assert torch.equal(one.frames[camera][:], other.frames[camera][:])
    assert old.validate() == new.validate() == []


def test_the_range_of_actions_is_the_observed_one(roots: dict[str, Path]) -> None:
    for root in roots.values():
        dataset = LeRobotDataset(root, **COLUMNS)
        seen = np.concatenate([dataset.numbers(i)["action.cartesian_position"] for i in range(3)])
        assert dataset.spec.action.low[:6] == pytest.approx(seen.min(axis=0).tolist(), abs=1e-6)
        assert dataset.spec.action.high[:6] == pytest.approx(seen.max(axis=0).tolist(), abs=1e-6)


def test_what_the_wrist_sees_depends_on_the_actions(script: ModuleType, roots: dict[str, Path]) -> None:
    motion = script.simulate(0, 20)
    assert np.abs(np.diff(motion.pose[:, :3], axis=0)).max() > 0.01
    still = script.Motion(
        command=motion.command, pose=np.repeat(motion.pose[:1], 20, 0), blocks=motion.blocks, instruction=""
    )
    moving, frozen = script.draw(motion, "wrist_left", 90, 160), script.draw(still, "wrist_left", 90, 160)
    assert np.abs(moving[5].astype(int) - frozen[5]).mean() > 1


def test_clips_of_three_cameras(roots: dict[str, Path]) -> None:
    sampler = ClipSampler(LeRobotDataset(roots["v2.1"], **COLUMNS), [0, 1, 2], frames=4, stride=3)
    clip = sampler.batch(0, 0, 2)
    assert {name: tuple(f.shape) for name, f in clip.frames.items()} == dict.fromkeys(
        ("exterior_1_left", "exterior_2_left", "wrist_left"), (2, 4, 3, 90, 160)
    )
    assert clip.actions.shape == (2, 3, 3, 7) and sampler.spec.fps == 5.0


def test_default_columns_are_lerobots(roots: dict[str, Path]) -> None:
    dataset = LeRobotDataset(roots["v3.0"])
    assert dataset.spec.action.dim == 8 and len(dataset.spec.pose_names) == 8
