"""Frames and action blocks stay paired at every stride, and what is drawn is a function of (seed, step)."""

from itertools import pairwise
from pathlib import Path

import pytest
import torch

from tests.data.toy import frame_number
from worldline.data import ClipSampler, FrameStore, LeRobotDataset, action_blocks, collate, draw, strided
from worldline.data.clips import Windows
from worldline.errors import DatasetError


def rows(length: int, k: int = 3) -> torch.Tensor:
    """Row i, control step j holds i + j / 10."""
    return (torch.arange(length - 1)[:, None] + torch.arange(k)[None] / 10)[..., None]


@pytest.mark.parametrize("stride", [1, 2, 4])
@pytest.mark.parametrize("start", [0, 3])
def test_a_block_holds_exactly_the_actions_between_its_frames(stride: int, start: int) -> None:
    blocks = action_blocks(rows(20), stride, start, 4)
    assert blocks.shape == (3, stride * 3, 1)
    for i in range(3):
        between = [frame + j / 10 for frame in range(start + i * stride, start + (i + 1) * stride) for j in range(3)]
        assert blocks[i, :, 0].tolist() == pytest.approx(between)


def test_blocks_beyond_the_episode_are_refused() -> None:
    assert action_blocks(rows(5), 2, 0, 3).shape == (2, 6, 1)
    with pytest.raises(DatasetError, match="need 5 action blocks, got 4"):
        action_blocks(rows(5), 2, 1, 3)


@pytest.mark.parametrize("stride", [1, 2, 3])
def test_every_clip_pairs_frames_poses_and_blocks(recorded: Path, stride: int) -> None:
    dataset = LeRobotDataset(recorded)
    sampler = ClipSampler(dataset, [0, 1, 2], frames=3, stride=stride)
    assert len(sampler) == sum(length - 2 * stride for length in (12, 9, 12))
    for index in range(0, len(sampler), 5):
        clip = sampler.clip(index)
        shown = frame_number(clip.frames["front"][0])
        assert shown == frame_number(clip.frames["wrist"][0]) == clip.poses[0, :, 0].int().tolist()
        assert [later - earlier for earlier, later in pairwise(shown)] == [stride, stride]
        assert (clip.poses[0, :, 1] == clip.poses[0, 0, 1]).all()  # one episode
        times = clip.actions[0, :, :, 0] * 50
        want = [[f + s + j / 10 for s in range(stride) for j in range(3)] for f in shown[:-1]]
        assert torch.allclose(times, torch.tensor(want), atol=1e-4)


@pytest.mark.parametrize("lengths", [(12, 9, 12), (3, 2, 0, 5, 1, 3), (1,), ()])
def test_windows_are_all_and_in_order_and_cost_nothing_each(lengths: tuple[int, ...]) -> None:
    expected = [(i, start) for i, length in enumerate(lengths) for start in range(length - 2)]
    windows = Windows(lengths, 3)
    assert list(windows) == expected and len(windows) == len(expected)
    assert windows[1:4] == expected[1:4] and [windows[-1 - i] for i in range(len(expected))] == expected[::-1]
    with pytest.raises(IndexError, match=f"below {len(expected)} required"):
        windows[len(expected)]
    droid = Windows([250] * 76_000, 16)  # as many episodes as DROID has: a list of these windows took 1.2 GB
    assert len(droid) == 76_000 * 235 and droid[17_000_000] == divmod(17_000_000, 235)


def test_strided_spec_keeps_the_control_rate(recorded: Path) -> None:
    spec = LeRobotDataset(recorded).spec
    twice = strided(spec, 2)
    assert (twice.fps, twice.control_steps, twice.action) == (10.0, 6, spec.action)
    assert twice.fps * twice.control_steps == spec.fps * spec.control_steps
    with pytest.raises(DatasetError, match="stride of at least 1"):
        strided(spec, 0)


def test_short_episodes_are_counted_and_none_left_is_an_error(recorded: Path) -> None:
    dataset = LeRobotDataset(recorded)
    sampler = ClipSampler(dataset, [0, 1, 2, 3], frames=6, stride=2)
    assert (sampler.episodes, sampler.skipped) == ([0, 2], 2)
    with pytest.raises(DatasetError, match=r"at least 13 frames required .* none among 4"):
        ClipSampler(dataset, [0, 1, 2, 3], frames=13)


def test_batches_depend_on_seed_and_step_alone(recorded: Path) -> None:
    def batch(seed: int, step: int, camera: str = "front") -> torch.Tensor:
        fresh = ClipSampler(LeRobotDataset(recorded), [0, 1, 2], frames=4, cameras=[camera])
        return fresh.batch(seed, step, 5).poses

    sampler = ClipSampler(LeRobotDataset(recorded), [0, 1, 2], frames=4)
    in_order = [sampler.batch(7, step, 5).poses for step in range(8)]
    assert torch.equal(batch(7, 6), in_order[6]) and torch.equal(batch(7, 6, "wrist"), in_order[6])
    assert not torch.equal(batch(8, 6), in_order[6]) and not torch.equal(batch(7, 5), in_order[6])


def test_every_epoch_visits_every_window_once() -> None:
    drawn = [i for step in range(6) for i in draw(15, 3, step, 5)]
    assert sorted(drawn[:15]) == sorted(drawn[15:]) == list(range(15)) and drawn[:15] != drawn[15:]
    assert len(draw(3, 0, 0, 8)) == 8  # a batch may be larger than the data


def test_collate_joins_along_the_batch(recorded: Path) -> None:
    sampler = ClipSampler(LeRobotDataset(recorded), [0, 1], frames=3)
    batch = collate([sampler.clip(0), sampler.clip(11)])
    assert batch.frames["wrist"].shape == (2, 3, 3, 48, 80) and batch.actions.shape == (2, 2, 3, 2)
    assert batch.instruction == ("move to 0", "move to 1")
    assert torch.equal(batch.poses[1:], sampler.clip(11).poses)


@pytest.mark.parametrize("budget", [10, 12 * 3 * 64 * 64 + 1, 2**30])
def test_a_small_budget_changes_memory_and_not_frames(recorded: Path, budget: int) -> None:
    dataset = LeRobotDataset(recorded, cameras=["front"])
    store = FrameStore(dataset, budget)
    for episode in (0, 1, 2, 0):
        assert frame_number(store.window(episode, "front", slice(2, 9, 3))) == [2, 5, 8]
        assert frame_number(store.frames(episode, "front"))[:3] == [0, 1, 2]
        assert store.bytes <= max(budget, 12 * 3 * 64 * 64)
