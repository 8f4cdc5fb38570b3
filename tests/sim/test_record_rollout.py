"""Recording and rolling out: same result for any number of processes, resumable, as the simulator gave it."""

import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch

from tests.sim.toys import POINT, Push, push_broken, push_reach
from worldline.commands.recording import Record, run_record
from worldline.data.lerobot_read import UNKNOWN, LeRobotDataset
from worldline.data.lerobot_write import DatasetWriter
from worldline.errors import DatasetError, PolicyError, SimulatorError, SpecMismatch
from worldline.sim import WorldPool, episode_seed, make_world, record, rollout_actions, rollout_policy

REACH = "metaworld/reach-v3"
SMALL = {"cameras": ("gripperPOV",), "size": 32, "horizon": 24, "progress": False, "seed": 5}


def contents(root: Path) -> list:
    data = LeRobotDataset(root)
    out = []
    for i in range(len(data)):
        e = data.episode(i)
        frames = {camera: frame[:] for camera, frame in e.frames.items()}
        out.append((frames, e.actions, e.poses, e.states, e.rewards, e.frame_success, e.success, dict(e.provenance)))
    return out


def same(a: list, b: list) -> bool:
    def equal(x: object, y: object) -> bool:
        if isinstance(x, dict) and isinstance(y, dict):
            return x.keys() == y.keys() and all(equal(x[k], y[k]) for k in x)
        return torch.equal(x, y) if isinstance(x, torch.Tensor) and isinstance(y, torch.Tensor) else x == y

    return len(a) == len(b) and all(equal(x, y) for left, right in zip(a, b) for x, y in zip(left, right))


def test_two_processes_and_a_kill_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = contents(record(REACH, tmp_path / "whole", episodes=5, **SMALL))
    assert [e[7]["seed"] for e in whole] == [str(episode_seed(5, i)) for i in range(5)]
    assert all(e[7]["cause"] and e[7]["policy"] == "mixed" and e[7]["simulator"] == REACH for e in whole)
    assert whole[0][0]["gripperPOV"].shape == (7, 3, 32, 32) and whole[0][1].shape == (6, 4, 4)
    assert all(e[1].abs().max() <= 1.0 for e in whole)

    staged = DatasetWriter.stage

    def killed(self: DatasetWriter, index: int, **episode: object) -> None:
        if index == 2:
            raise KeyboardInterrupt
        staged(self, index, **episode)  # type: ignore[arg-type]

    monkeypatch.setattr(DatasetWriter, "stage", killed)
    with pytest.raises(KeyboardInterrupt):
        record(REACH, tmp_path / "killed", episodes=5, **SMALL)
    monkeypatch.undo()
    with pytest.raises(DatasetError, match="interrupted"):
        record(REACH, tmp_path / "killed", episodes=5, **SMALL)
    with pytest.raises(DatasetError, match="seed"):
        record(REACH, tmp_path / "killed", episodes=5, resume=True, **{**SMALL, "seed": 6})
    with pytest.raises(DatasetError, match="provenance"):  # half of it without actions
        record(REACH, tmp_path / "killed", episodes=5, resume=True, provenance={"actions": UNKNOWN}, **SMALL)
    resumed = contents(record(REACH, tmp_path / "killed", episodes=5, processes=2, resume=True, **SMALL))
    assert same(whole, resumed)


def test_a_killed_recording_leaves_no_process_behind(tmp_path: Path) -> None:
    """Killed as the system does when memory is short: nothing of it gets to clean up, and each worker holds a simulator."""
    settings = [
        "--episodes",
        "500",
        "--horizon",
        "24",
        "--size",
        "32",
        "--processes",
        "2",
        "--out",
        str(tmp_path / "d"),
    ]
    command = [
        sys.executable,
        "-c",
        "import sys; from worldline.cli import main; main(sys.argv[1:])",
        "record",
        REACH,
        *settings,
    ]
    running = psutil.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 120
        while not list(tmp_path.rglob("*.mp4")):
            assert running.poll() is None and time.monotonic() < deadline
            time.sleep(0.2)
        workers = running.children(recursive=True)
    finally:
        running.kill()
        running.wait()
    assert len(workers) >= 2
    left = [w for w in psutil.wait_procs(workers, timeout=30)[1] if w.status() != psutil.STATUS_ZOMBIE]
    for worker in left:
        worker.kill()
    assert not left


def test_recorded_actions_lead_to_the_recorded_frames(tmp_path: Path) -> None:
    """Time alignment: sending actions[:, i] from frame i gives pose i + 1."""
    record(REACH, tmp_path / "d", episodes=1, policy="noise", **SMALL)
    episode = LeRobotDataset(tmp_path / "d").episode(0)
    world = make_world(REACH, cameras=(), horizon=24)
    poses = [world.reset(int(episode.provenance["seed"])).pose]
    poses += [world.step(block).frame.pose for block in episode.actions]
    assert torch.allclose(torch.stack(poses), episode.poses, atol=1e-6)


def test_a_trained_policy_records_and_a_failing_one_names_the_episode(tmp_path: Path) -> None:
    settings = {**SMALL, "cameras": (), "horizon": 8}
    record(REACH, tmp_path / "p", episodes=2, policy=push_reach, label="push", **settings)
    episode = LeRobotDataset(tmp_path / "p").episode(1)
    assert episode.provenance["policy"] == "push" and episode.provenance["cause"] == "policy:push"
    assert bool((episode.actions >= 0.3).all())
    with pytest.raises(ZeroDivisionError) as caught:
        record(REACH, tmp_path / "b", episodes=2, policy=push_broken, **settings)
    assert any("episode 0" in note for note in caught.value.__notes__)
    with pytest.raises(SimulatorError, match="expert"):
        record(REACH, tmp_path / "n", episodes=2, policy="expret", **settings)


def test_gymnasium_records_random_actions(tmp_path: Path) -> None:
    record(f"gym/{POINT}", tmp_path / "g", episodes=2, policy="random", size=16, horizon=16, progress=False)
    data = LeRobotDataset(tmp_path / "g")
    assert len(data) == 2 and data.episode(0).success is not None
    with pytest.raises(SimulatorError, match="random"):
        record(f"gym/{POINT}", tmp_path / "h", episodes=2, policy="expert", progress=False)


@pytest.mark.parametrize("processes", [0, 2])
def test_rollouts_are_what_each_world_alone_gives(processes: int) -> None:
    settings = {"cameras": ("gripperPOV",), "size": 32, "horizon": 12}
    seeds = [7, 11, 2**40 + 1]
    with WorldPool(REACH, rows=2, processes=processes, **settings) as pool:
        policy = Push(pool.spec, 0.3)
        results = rollout_policy(pool, policy, seeds=seeds, keep_frames=True)
        again = rollout_policy(pool, policy, seeds=seeds[2:])
    assert policy.rows_asked[:4] == [2, 2, 2, 1]
    assert torch.equal(again[0].poses, results[2].poses) and again[0].frames is None
    world = make_world(REACH, **settings)
    for seed, result in zip(seeds, results):
        assert result.seed == seed and result.truncated and result.success is False
        frame = world.reset(seed)
        assert torch.equal(result.first_images["gripperPOV"], frame.images["gripperPOV"])
        assert torch.equal(result.first.pose[0], frame.pose)
        assert result.frames is not None
        for i, block in enumerate(result.actions):
            frame = world.step(block).frame
            assert torch.equal(result.frames["gripperPOV"][i + 1], frame.images["gripperPOV"])
            assert torch.equal(result.poses[i + 1], frame.pose)
    world.close()


def test_rows_that_end_early_stop_alone() -> None:
    world = f"gym/{POINT}"
    spec = make_world(world, cameras=()).spec
    results = rollout_policy(world, Push(spec, 0.05), seeds=[1, 2, 3, 4], rows=4, cameras=())
    alone = [rollout_policy(world, Push(spec, 0.05), seeds=[seed], cameras=())[0] for seed in [1, 2, 3, 4]]
    assert all(result.success and result.terminated for result in results)
    assert len({len(result.poses) for result in results}) > 1
    for together, single in zip(results, alone):
        assert torch.equal(together.poses, single.poses)


def test_given_actions_repeat_the_rollout_they_come_from() -> None:
    settings = {"cameras": ("gripperPOV",), "size": 32, "horizon": 12}
    seeds = [7, 11, 5]
    with WorldPool(REACH, rows=2, **settings) as pool:
        first = rollout_policy(pool, Push(pool.spec, 0.3), seeds=seeds)
        actions = torch.stack([result.actions for result in first])
        again = rollout_actions(pool, actions, seeds=seeds)
        short = rollout_actions(pool, actions[:, :1], seeds=seeds)
        with pytest.raises(SimulatorError, match="each of 2 starts"):
            rollout_actions(pool, actions, seeds=seeds[:2])
    for one, two, three in zip(first, again, short):
        assert torch.equal(one.poses, two.poses) and torch.equal(one.poses[:2], three.poses[:2])
        assert len(three.poses) == len(one.poses) and bool((three.actions[1:] == 0).all())


def test_rollout_mistakes_are_named() -> None:
    spec = make_world(f"gym/{POINT}", cameras=()).spec
    with pytest.raises(SpecMismatch, match="action"):
        rollout_policy(REACH, Push(spec, 0.0), seeds=[0], cameras=(), horizon=8)
    with pytest.raises(PolicyError, match="NaN"):
        rollout_policy(f"gym/{POINT}", Push(spec, float("nan")), seeds=[0], cameras=())
    with pytest.raises(SimulatorError, match="seed"):
        rollout_policy(f"gym/{POINT}", Push(spec, 0.0), seeds=[], cameras=())


def test_without_experts_the_default_policy_is_random(tmp_path: Path) -> None:
    run_record(Record(world=f"gym/{POINT}", out=tmp_path / "g", episodes=2, size=16, horizon=16), progress=False)
    assert LeRobotDataset(tmp_path / "g").episode(0).provenance["policy"] == "random"
