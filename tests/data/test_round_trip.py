"""What is recorded is what is read: numbers exactly, video closely, unknown as unknown."""

import json
import os
import pickle
import shutil
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from threading import Event, Thread

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch

from tests.data.toy import frame_number, stage, toy_dataset, toy_episode, toy_spec
from worldline.data import DatasetWriter, LeRobotDataset, write_dataset
from worldline.data.lerobot_write import STAGING
from worldline.data.video import VideoFrames, encode_video
from worldline.errors import DatasetError
from worldline.types import CameraSpec, FrameSequence


def test_numbers_come_back_exactly(recorded: Path) -> None:
    dataset = LeRobotDataset(recorded)
    assert len(dataset) == 4 and dataset.spec == toy_spec()
    for index, length in enumerate((12, 9, 12, 5)):
        want, got = toy_episode(index, length), dataset.episode(index)
        assert len(got) == length
        for name in ("actions", "poses", "states", "rewards", "frame_success"):
            assert torch.equal(getattr(got, name), getattr(want, name)), name
        for name in ("success", "terminated", "truncated", "instruction", "index", "provenance", "spec"):
            assert getattr(got, name) == getattr(want, name), name


def test_video_comes_back_closely_from_joined_files(recorded: Path) -> None:
    dataset = LeRobotDataset(recorded)
    assert len(list((recorded / "videos/observation.images.front").rglob("*.mp4"))) == 1  # four episodes in one file
    for index, length in enumerate((12, 9, 12, 5)):
        want = toy_episode(index, length)
        for camera, frames in dataset.episode(index).frames.items():
            assert isinstance(frames, FrameSequence) and len(frames) == length
            error = (frames[:].float() - torch.as_tensor(want.frames[camera][:]).float()).pow(2).mean()
            assert 10 * torch.log10(255**2 / error) > 40
            assert frame_number(frames[:]) == list(range(length))


@pytest.mark.parametrize("chosen", [slice(3, 7), slice(8, 9), slice(1, 11, 3), slice(None, None, -4), slice(5, 5)])
def test_slices_of_frames_are_list_slices(recorded: Path, chosen: slice) -> None:
    frames = LeRobotDataset(recorded).episode(2).frames["wrist"]
    assert frame_number(frames[chosen]) == list(range(12))[chosen]
    assert tuple(frames[chosen].shape[1:]) == (3, 48, 80)


def test_unknown_stays_unknown(tmp_path: Path) -> None:
    writer = DatasetWriter(tmp_path / "d", toy_spec())
    stage(writer, toy_episode(0), success=None, rewards=None, frame_success=None)
    stage(writer, toy_episode(1))
    dataset = LeRobotDataset(writer.finish())
    unknown, known = dataset.episode(0), dataset.episode(1)
    assert (unknown.success, unknown.rewards, unknown.frame_success) == (None, None, None)
    assert known.success is False and known.rewards is not None and known.frame_success is not None


def test_one_control_step_without_cameras_and_small_names(tmp_path: Path) -> None:
    spec = toy_spec(control_steps=1)
    spec = type(spec)(cameras=(), fps=spec.fps, control_steps=1, action=spec.action, pose_names=spec.pose_names)
    dataset = LeRobotDataset(write_dataset(tmp_path / "d", [toy_episode(0, 7, spec), toy_episode(1, 4, spec)]))
    assert dataset.info["features"]["action"]["names"] == ["dx", "dy"]
    assert dataset.episode(1).frames == {} and torch.equal(dataset.episode(1).actions, toy_episode(1, 4, spec).actions)


def test_action_column_is_flattened_step_by_step_and_padded(recorded: Path) -> None:
    info = json.loads((recorded / "meta/info.json").read_text())
    assert info["features"]["action"]["names"] == ["dx@0", "dy@0", "dx@1", "dy@1", "dx@2", "dy@2"]
    rows = pd.read_parquet(recorded / "data/chunk-000/file-000.parquet").query("episode_index == 1")
    assert rows["action_is_pad"].tolist() == [False] * 8 + [True]
    assert not np.any(rows["action"].iloc[-1])
    assert np.allclose(rows["action"].iloc[3], np.array([3.0, 1, 3.1, 1, 3.2, 1]) / 50)
    assert rows["timestamp"].tolist() == pytest.approx([i / 20 for i in range(9)])


def test_layout_is_what_lerobot_expects(recorded: Path) -> None:
    """Facts that LeRobot 0.4 relies on when it opens a v3.0 dataset."""
    info = json.loads((recorded / "meta/info.json").read_text())
    assert info["codebase_version"] == "v3.0" and info["fps"] == 20 and info["total_frames"] == 38
    tasks = pd.read_parquet(recorded / "meta/tasks.parquet")
    assert tasks.loc["move to 1"].task_index == 1 and tasks.iloc[0].name == "move to 0"
    schema = pq.read_schema(recorded / "data/chunk-000/file-000.parquet")
    for key, feature in info["features"].items():
        if feature["dtype"] == "video":
            assert key not in schema.names
        elif feature["shape"] == [1]:
            assert not str(schema.field(key).type).startswith("fixed_size_list"), key
        else:
            assert schema.field(key).type.list_size == feature["shape"][0], key
    episodes = pd.read_parquet(recorded / "meta/episodes/chunk-000/file-000.parquet")
    assert episodes["dataset_from_index"].tolist() == [0, 12, 21, 33]
    assert episodes["dataset_to_index"].tolist() == [12, 21, 33, 38]
    starts = episodes["videos/observation.images.wrist/from_timestamp"].tolist()
    assert starts == pytest.approx([0, 0.6, 1.05, 1.65])
    stats = json.loads((recorded / "meta/stats.json").read_text())
    assert set(stats["action"]) == {"min", "max", "mean", "std", "count", "q01", "q10", "q50", "q90", "q99"}
    assert np.shape(stats["observation.images.front"]["mean"]) == (3, 1, 1)
    assert 0 < stats["observation.images.front"]["mean"][0][0][0] < 1
    assert stats["observation.state"]["max"] == [11.0, 3.0, 0.0]


def test_files_are_split_at_their_limits(tmp_path: Path) -> None:
    dataset = toy_dataset(tmp_path / "d", (4, 5, 6), data_mb=1e-4, video_mb=1e-4)
    assert len(list(dataset.root.glob("data/*/*.parquet"))) == 3 and len(list(dataset.root.rglob("*.mp4"))) == 6
    for index, length in enumerate((4, 5, 6)):
        assert frame_number(dataset.episode(index).frames["front"][:]) == list(range(length))
        assert torch.equal(dataset.episode(index).poses, toy_episode(index, length).poses)


def test_interrupted_recording_resumes(tmp_path: Path) -> None:
    first = DatasetWriter(tmp_path / "d", toy_spec())
    stage(first, toy_episode(0, 4))
    (first.staging / ".episode-000001-killed").mkdir()  # what a killed process leaves
    with pytest.raises(DatasetError, match="interrupted recording of 1 episodes"):
        DatasetWriter(tmp_path / "d", toy_spec())
    with pytest.raises(DatasetError, match="interrupted: resume"):
        LeRobotDataset(tmp_path / "d")
    with pytest.raises(DatasetError, match="another spec"):
        DatasetWriter(tmp_path / "d", toy_spec(control_steps=2), resume=True)
    with pytest.raises(DatasetError, match="another held_out"):
        DatasetWriter(tmp_path / "d", toy_spec(), resume=True, held_out=[0])
    again = DatasetWriter(tmp_path / "d", toy_spec(), resume=True)
    assert again.staged() == {0}
    with pytest.raises(DatasetError, match="already staged"):
        stage(again, toy_episode(0, 4))
    stage(again, toy_episode(1, 5))
    dataset = LeRobotDataset(again.finish())
    assert len(dataset) == 2 and not (dataset.root / STAGING).exists()


def test_finish_that_was_interrupted_can_be_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = DatasetWriter(tmp_path / "d", toy_spec())
    stage(writer, toy_episode(0, 4))
    rename = os.rename

    def full_disk(source, target):
        if str(target).endswith("meta"):
            raise OSError(28, "No space left on device")
        rename(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", full_disk)
        with pytest.raises(DatasetError, match="No space left"):
            writer.finish()
    assert not (tmp_path / "d/meta/info.json").exists()
    dataset = LeRobotDataset(DatasetWriter(tmp_path / "d", toy_spec(), resume=True).finish())
    assert frame_number(dataset.episode(0).frames["front"][:]) == [0, 1, 2, 3]


def test_gaps_and_nothing_are_refused(tmp_path: Path) -> None:
    writer = DatasetWriter(tmp_path / "d", toy_spec())
    with pytest.raises(DatasetError, match=r"not staged: \[0\]"):
        writer.finish()
    stage(writer, toy_episode(2, 4))
    with pytest.raises(DatasetError, match=r"not staged: \[0, 1\]"):
        writer.finish()


def test_folder_of_something_else_is_left_alone(tmp_path: Path, recorded: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(DatasetError, match="holds something else"):
        DatasetWriter(tmp_path, toy_spec())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["notes.txt"]
    with pytest.raises(DatasetError, match="already holds a finished dataset"):
        DatasetWriter(recorded, toy_spec(), resume=True)


def test_bad_input_names_episode_and_column(tmp_path: Path) -> None:
    writer = DatasetWriter(tmp_path / "d", toy_spec())
    episode = toy_episode(7)
    poses = episode.poses.clone()
    poses[4, 1] = torch.nan
    for changes, message in (
        ({"poses": poses}, r"episode 7, poses: .*NaN or infinity at frame 4"),
        ({"actions": episode.actions[:, :2]}, r"episode 7, actions: shape \(11, 3, 2\) required, got \(11, 2, 2\)"),
        ({"frames": {"front": episode.frames["front"]}}, "episode 7: cameras .*required, got"),
        ({"frames": {**episode.frames, "wrist": torch.zeros(12, 3, 48, 64, dtype=torch.uint8)}}, "camera wrist"),
    ):
        with pytest.raises(DatasetError, match=message):
            stage(writer, episode, **changes)
    assert writer.staged() == set() and [p.name for p in writer.staging.iterdir()] == ["settings.json"]


def test_sizes_the_encoder_refuses_say_so(tmp_path: Path) -> None:
    spec = toy_spec(cameras=(CameraSpec(name="odd", height=33, width=64),))
    with pytest.raises(DatasetError, match="must be even"):
        stage(DatasetWriter(tmp_path / "d", spec), toy_episode(0, 4, spec))
    spec = toy_spec(cameras=(CameraSpec(name="tiny", height=16, width=16),))
    with pytest.raises(DatasetError, match="codec 'nonsense' could not encode"):
        stage(DatasetWriter(tmp_path / "e", spec, codec="nonsense"), toy_episode(0, 4, spec))


@pytest.mark.skipif(not hasattr(os, "sched_getscheduler"), reason="schedulers are asked for on Linux only")
@pytest.mark.parametrize("size", [64, 16])
def test_encoding_leaves_the_priority_of_the_process_as_it_was(size: int, tmp_path: Path) -> None:
    """As root the encoder makes a real-time thread of the one that opens it, also where it then refuses the size."""
    before = os.sched_getscheduler(0)
    with suppress(DatasetError):
        encode_video(tmp_path / "x.mp4", torch.zeros(4, 3, size, size, dtype=torch.uint8), fps=10.0)
    assert {os.sched_getscheduler(int(thread)) for thread in os.listdir("/proc/self/task")} == {before}


@pytest.mark.skipif(not hasattr(os, "sched_getscheduler"), reason="schedulers are asked for on Linux only")
@pytest.mark.parametrize("encodes", [False, True])
def test_a_control_loop_stays_the_real_time_thread_that_it_is(encodes: bool, tmp_path: Path) -> None:
    """Where another thread encodes, and where it does so itself. Says something as root alone, who may have such threads."""
    begun, done, found = Event(), Event(), []

    def encode() -> None:
        encode_video(tmp_path / "x.mp4", torch.zeros(4, 3, 64, 64, dtype=torch.uint8), fps=10.0)

    def control() -> None:
        with suppress(PermissionError):
            os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))
        found.append((os.sched_getscheduler(0), os.sched_getparam(0).sched_priority))
        begun.set()
        if encodes:
            encode()
        else:
            done.wait()
        found.append((os.sched_getscheduler(0), os.sched_getparam(0).sched_priority))

    loop = Thread(target=control, daemon=True)
    loop.start()
    begun.wait()
    if not encodes:
        encode()
    done.set()
    loop.join()
    assert len(found) == 2 and found[0] == found[1]


def test_small_frames_and_h264(tmp_path: Path) -> None:
    spec = toy_spec(cameras=(CameraSpec(name="tiny", height=16, width=16),))
    for codec, name in (("libsvtav1", "av1"), ("libx264", "h264")):
        root = write_dataset(tmp_path / codec, [toy_episode(i, 6, spec) for i in range(2)], codec=codec)
        dataset = LeRobotDataset(root)
        assert dataset.info["features"]["observation.images.tiny"]["info"]["video.codec"] == name
        assert frame_number(dataset.episode(1).frames["tiny"][:]) == list(range(6))


def test_rewriting_what_was_read_changes_no_number(recorded: Path, tmp_path: Path) -> None:
    source = LeRobotDataset(recorded)
    copy = LeRobotDataset(write_dataset(tmp_path / "d", (source.episode(i) for i in range(len(source)))))
    for i in range(len(source)):
        assert torch.equal(source.episode(i).actions, copy.episode(i).actions)
        assert source.episode(i).provenance == copy.episode(i).provenance
    shutil.rmtree(copy.root)


def test_copies_of_a_writer_stage_at_the_same_time(tmp_path: Path) -> None:
    """What worker processes do: each unpickles its own copy of the writer."""
    writer = DatasetWriter(tmp_path / "d", toy_spec())
    copies = [pickle.loads(pickle.dumps(writer)) for _ in range(4)]  # noqa: S301
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda i: stage(copies[i % 4], toy_episode(i, 5)), range(8)))
    assert writer.staged() == set(range(8))
    dataset = LeRobotDataset(writer.finish())
    assert [float(dataset.episode(i).poses[0, 1]) for i in range(8)] == list(range(8))


def test_colour_survives_half_resolution_chroma(tmp_path: Path) -> None:
    """FFmpeg's own conversion of these frames loses 10 dB more by repeating colour pixels."""
    coarse = 0.2 + 0.6 * torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    image = torch.nn.functional.interpolate(coarse, size=(64, 64), mode="bicubic").clamp(0, 1)
    frames = (255 * image).to(torch.uint8).repeat(6, 1, 1, 1)
    encode_video(tmp_path / "a.mp4", frames, fps=20.0)
    read = VideoFrames(path=tmp_path / "a.mp4", first=0, length=6, fps=20.0, height=64, width=64)[:]
    assert 10 * torch.log10(255**2 / (read.float() - frames.float()).pow(2).mean()) > 36


def test_a_copy_holds_out_what_the_original_did(tmp_path: Path) -> None:
    original = toy_dataset(tmp_path / "a", lengths=(4,) * 12)
    path = tmp_path / "a/meta/info.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"splits": {"train": "0:9", "val": "9:12"}}))
    original = LeRobotDataset(tmp_path / "a")
    assert original.split("held-out") == [9, 10, 11]
    every = [original.episode(i) for i in range(12)]
    copied = LeRobotDataset(write_dataset(tmp_path / "b", every, held_out=original.split("held-out")))
    assert copied.split("held-out") == [9, 10, 11] and copied.split("train") == list(range(9))
    with pytest.raises(DatasetError, match=r"held_out of episodes 0 to 11 required, got \[12\]"):
        write_dataset(tmp_path / "c", every, held_out=[3, 12])
