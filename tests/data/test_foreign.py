"""Datasets that others made: where their episodes end, how they are numbered and ordered, and what their files hold."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from tests.data.toy import frame_number, toy_frames
from worldline.data import LeRobotDataset, inspect_dataset, write_dataset
from worldline.data.lerobot_assemble import RawEpisode, assemble, vector_feature
from worldline.data.lerobot_meta import camera_specs
from worldline.data.video import VideoFrames
from worldline.errors import DatasetError
from worldline.types import CameraSpec

FLAG = {"dtype": "bool", "shape": [1], "names": None}
REWARD = {"dtype": "float32", "shape": [1], "names": None}


def foreign(root: Path, lengths: tuple[int, ...] = (10, 12, 11, 9), *, done: bool = True, **options) -> Path:
    """Rows of (observation, action, reward, success) as LeRobot's own recorders write them: an episode is over with its success, in its last row."""
    features = {
        "observation.state": vector_feature(["x", "y"]),
        "action": vector_feature(["x", "y"]),
        "next.reward": REWARD,
        "next.success": FLAG,
        "next.done": FLAG,
    }
    episodes = []
    for number, length in enumerate(lengths):
        last, row = np.arange(length) == length - 1, np.arange(length)
        pair = np.stack([row, np.full(length, number)], 1).astype(np.float32)
        columns = {"observation.state": pair, "action": pair / 100, "next.reward": last.astype(np.float32)}
        episodes.append(
            RawEpisode(
                length=length, task="push the T", columns=columns | {"next.success": last, "next.done": last & done}
            )
        )
    (root / "meta").mkdir(parents=True)
    assemble(root, episodes, features, fps=10.0, robot_type="unknown", **options)
    return root


def edit(root: Path, files: str, change: Callable[[pa.Table], pa.Table]) -> None:
    for path in root.glob(files):
        pq.write_table(change(pq.read_table(path)), path)


def renumbered(table: pa.Table) -> pa.Table:
    at = table.schema.get_field_index("episode_index")
    return table.set_column(at, "episode_index", pa.array(2 * table["episode_index"].to_numpy()))


@pytest.mark.parametrize("done", [True, False])
def test_success_and_reward_of_the_last_row_are_those_of_the_last_frame(tmp_path: Path, done: bool) -> None:
    dataset = LeRobotDataset(foreign(tmp_path / "data", done=done))
    episode = dataset.episode(0)
    assert episode.success is True and episode.frame_success is not None and episode.rewards is not None
    assert episode.frame_success.tolist() == [False] * 9 + [True]
    assert episode.rewards.tolist() == [0.0] * 8 + [1.0]
    assert episode.terminated is done and episode.truncated is not done and dataset.terminated(0) is done


def test_gaps_in_the_numbers_change_neither_what_is_held_out_nor_what_is_read(tmp_path: Path) -> None:
    root = foreign(tmp_path / "data", lengths=(6,) * 40)
    for files in ("meta/episodes/*/*.parquet", "data/*/*.parquet"):
        edit(root, files, renumbered)
    source = LeRobotDataset(root)
    every = source.split("all")
    assert every == list(range(0, 80, 2)) and float(source.episode(74).poses[0, 1]) == 37
    copy = LeRobotDataset(write_dataset(tmp_path / "copy", (source.episode(i) for i in every), like=source))
    assert [every[i] for i in copy.split("held-out")] == source.split("held-out")
    with pytest.raises(DatasetError, match=r"one of 40 episodes \(0, 2, 4, 6, 8, 10, \.\.\.\) required, got 1"):
        source.episode(1)


def test_rows_are_read_in_the_order_of_their_frames(tmp_path: Path) -> None:
    root = foreign(tmp_path / "data")
    before = LeRobotDataset(root).episode(1)
    edit(root, "data/*/*.parquet", lambda table: table.take(pa.array(np.arange(len(table))[::-1])))
    after = LeRobotDataset(root).episode(1)
    assert torch.equal(after.poses, before.poses) and torch.equal(after.actions, before.actions)


def test_a_label_that_cannot_be_understood_is_not_made_up(tmp_path: Path) -> None:
    root = foreign(tmp_path / "data")
    edit(root, "meta/episodes/*/*.parquet", lambda table: table.append_column("success", pa.array(["failure"] * 4)))
    with pytest.raises(
        DatasetError, match=r"column success: true, false, 1, 0 or nothing required, got 'failure'\. Rename"
    ):
        LeRobotDataset(root)


def test_an_absent_file_of_numbers_is_reported_by_inspection(tmp_path: Path) -> None:
    root = foreign(tmp_path / "data", data_mb=0.0001)
    files = sorted(root.glob("data/*/*.parquet"))
    assert len(files) > 1
    files[1].unlink()
    found = inspect_dataset(LeRobotDataset(root))
    lost = {p.episode for p in found.problems if p.kind == "data"}
    counts = found.summary["success_by_cause"]["unknown"]
    assert lost and counts == {"episodes": 4, "success": 4 - len(lost), "failure": 0, "unknown": len(lost)}


def test_the_fingerprint_is_of_the_columns_and_numbers_that_are_read(tmp_path: Path) -> None:
    root = foreign(tmp_path / "data")
    begun = LeRobotDataset(root).fingerprint
    assert LeRobotDataset(root).fingerprint == begun == LeRobotDataset(root, action_columns=["action"]).fingerprint
    assert LeRobotDataset(root, action_columns=["observation.state"]).fingerprint != begun
    assert LeRobotDataset(root, pose_columns=[]).fingerprint != begun

    def larger(table: pa.Table) -> pa.Table:
        at = table.schema.get_field_index("action")
        values = [[10 * x for x in row] for row in table["action"].to_pylist()]
        return table.set_column(at, "action", pa.array(values, type=table.schema.field(at).type))

    edit(root, "data/*/*.parquet", larger)
    assert LeRobotDataset(root).fingerprint != begun


def test_no_pose_columns_are_no_pose(tmp_path: Path) -> None:
    """Of worldline's own data too, whose record names some."""
    source = LeRobotDataset(foreign(tmp_path / "data"))
    own = write_dataset(tmp_path / "own", (source.episode(i) for i in range(4)))
    dataset = LeRobotDataset(own, pose_columns=[])
    assert dataset.spec.pose_names == () and dataset.episode(0).poses.shape == (10, 0)
    assert LeRobotDataset(own).spec.pose_names == ("x", "y")


def test_shapes_of_cameras_are_read_with_and_without_names() -> None:
    def told(shape: list[int], names: list[str] | None) -> dict:
        return {"features": {"observation.images.top": {"dtype": "video", "shape": shape, "names": names}}}

    expected = {"observation.images.top": CameraSpec(name="top", height=48, width=64)}
    assert camera_specs(told([3, 48, 64], None)) == camera_specs(told([48, 64, 3], None)) == expected
    assert camera_specs(told([3, 48, 64], ["channels", "height", "width"])) == expected
    with pytest.raises(DatasetError, match=r"got \['height', 'width', 'channels'\] of \[48, 64\]"):
        camera_specs(told([48, 64], ["height", "width", "channels"]))


def test_windows_of_hevc_are_those_of_the_whole_film(tmp_path: Path) -> None:
    """Its open groups of pictures cannot be decoded from the key frame that a seek finds."""
    camera = CameraSpec(name="top", height=64, width=64)
    frames = toy_frames(40, camera)
    path = tmp_path / "open.mp4"
    open_groups(frames, path)
    video = VideoFrames(path=path, first=0, length=40, fps=20.0, height=64, width=64)
    whole = video[:]
    assert frame_number(whole) == list(range(40))
    for start in range(39):
        assert torch.equal(video[start : start + 2], whole[start : start + 2]), start


def open_groups(frames: torch.Tensor, path: Path) -> None:
    """With B-frames before key frames, as encoders make them by default."""
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream(
            "libx265", rate=20, options={"g": "6", "crf": "12", "x265-params": "log-level=none:open-gop=1"}
        )
        stream.height, stream.width, stream.pix_fmt = 64, 64, "yuv420p"
        for image in frames.permute(0, 2, 3, 1).numpy():
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")))
        container.mux(stream.encode())
