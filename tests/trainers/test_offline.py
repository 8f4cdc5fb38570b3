"""Offline learning in the dot world: better than cloning the same mixed data, decisions cut where they end, resumed bit for bit."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.oracles import GOAL, SPEC, K, draw, move
from tests.policies.dots import observe, small_policy, starts
from tests.trainers.toy import FRAMES, dot_episode
from worldline import checkpoint
from worldline.data import write_dataset
from worldline.errors import CheckpointError, DatasetError
from worldline.policies import ClonedPolicy, EncoderConfig, PolicyConfig
from worldline.rl_in_imagination.iql import IQLConfig
from worldline.rl_in_imagination.success import episode_success
from worldline.trainers import offline, policy
from worldline.trainers.inputs import open_datasets
from worldline.trainers.loop import LoopConfig
from worldline.trainers.offline import TrainOffline, decisions, success_seen
from worldline.trainers.samples import SampleDraw
from worldline.trainers.scorer import frame_labels
from worldline.types import Episode

CHUNK = 4  # two frames a decision
SETTINGS = PolicyConfig(encoder=EncoderConfig(channels=(8, 16, 16), features=32, shift=0), hidden=64, chunk=CHUNK)
IQL = IQLConfig(discount=0.9, polyak=0.05, hidden=64)


def loop(steps: int, **options) -> LoopConfig:
    return LoopConfig(**({"steps": steps, "batch_size": 64, "lr": 3e-3, "warmup": 10, "ema": 0.95} | options))


def config(dots: Path, out: Path, **options) -> TrainOffline:
    return TrainOffline(**({"data": (dots,), "out": out, "policy": SETTINGS, "iql": IQL, "loop": loop(250)} | options))


def arrived(folder: Path, frames: int, rows: int = 200) -> float:
    """Share of dots that are beyond the goal within so many frames of the exact world."""
    acting, now = ClonedPolicy.from_pretrained(folder).eval(), starts(rows, seed=1).pose
    there = torch.zeros(rows, dtype=torch.bool)
    for _ in range(frames * K // CHUNK):
        chunk, _ = acting.act(observe(now), acting.reset(rows), seeds=torch.arange(rows))
        for block in chunk.split(K, dim=1):
            now = move(now, block)
            there |= now[:, 0] > GOAL
    return float(there.float().mean())


def test_it_beats_cloning_the_same_mixed_data(dots, tmp_path) -> None:
    """Half of the episodes walk to the goal, half drift away. Cloned alike they cancel out where both begin."""
    alike = policy.TrainPolicy(data=(dots,), out=tmp_path / "bc", demonstrations="all", policy=SETTINGS, loop=loop(250))
    cloned = arrived(policy.run(alike, progress=False), 10)
    out = offline.run(config(dots, tmp_path / "iql"), progress=False)
    learned = arrived(out, 10)
    assert learned > 0.9 and cloned < 0.7 and learned > cloned + 0.3, (learned, cloned)
    said = checkpoint.load_config(out, part="policy")["provenance"]
    assert said["one_step_error"] < 0.2 and 0.3 < said["value"] < 1 and said["rewarded_decisions"] >= said["successes"]


# --- which decisions there are --------------------------------------------------------------------------------------------


def labelled(done: list[bool], *, terminated: bool = False) -> Episode:
    """An episode of these labels, at k = 2; its actions count up."""
    frames = len(done)
    actions = torch.arange(float((frames - 1) * K * 2)).unflatten(0, (frames - 1, K, 2))
    return replace(
        dot_episode(0, expert=True),
        frames={"top": draw(torch.full((frames, 2), 0.5))},
        poses=torch.zeros(frames, 2),
        states=torch.zeros(frames, 2),
        actions=actions,
        frame_success=torch.tensor(done),
        success=any(done),
        terminated=terminated,
        truncated=not terminated,
    )


def outcomes(episode: Episode, *, chunk: int = CHUNK, persist: int = 2) -> tuple[list[int], list[int], list[int]]:
    """Frames of the decisions, rewarded ones, terminated ones."""
    times, rows = decisions(chunk, SPEC, stride=1, persist=persist)(episode)
    flat = episode.actions.flatten()
    for t, row in zip(times.tolist(), rows, strict=True):
        assert torch.equal(row[:-2], flat[t * K * 2 : t * K * 2 + chunk * 2])
    return times.tolist(), times[rows[:, -2] > 0.5].tolist(), times[rows[:, -1] > 0.5].tolist()


def test_decisions_end_where_success_is_seen() -> None:
    f, t = False, True
    # held from frame 4 on, and lost again at 6: seen at 5, which decisions from 3 and 4 reach; nothing of what came after counts
    assert outcomes(labelled([f, f, f, f, t, t, f, f, f])) == ([0, 1, 2, 3, 4], [3, 4], [3, 4])
    # one bright frame is no success, and the clock ran out: nothing is terminated
    assert outcomes(labelled([f, t, f, f, f, f])) == ([0, 1, 2, 3], [], [])
    # the same, but the recorder ended the episode: what reached its end is terminated, for nothing
    assert outcomes(labelled([f, t, f, f, f, f], terminated=True)) == ([0, 1, 2, 3], [], [3])
    # a world that ends at the first success cannot hold it any longer
    assert outcomes(labelled([f, f, f, f, f, t], terminated=True)) == ([0, 1, 2, 3], [3], [3])
    assert outcomes(labelled([f, f, f, f, f, t])) == ([0, 1, 2, 3], [], [])
    # done from the start on: no decision is left; too short for a chunk: none either
    assert outcomes(labelled([t, t, t, t]), persist=1)[0] == [] == outcomes(labelled([f, f]))[0]


def test_the_tail_of_a_chunk_is_not_sent() -> None:
    """Of five actions two blocks of two are sent: two frames a decision."""
    assert outcomes(labelled([False, False, False, True, True, True, True]), chunk=5) == ([0, 1, 2, 3], [2, 3], [2, 3])


@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("persist", [1, 2, 3])
def test_success_is_what_the_scorers_rule_says(stride: int, persist: int) -> None:
    generator = torch.Generator().manual_seed(stride * 10 + persist)
    for _ in range(20):
        episode = labelled((torch.rand(13, generator=generator) < 0.5).tolist())
        labels = frame_labels(stride)(episode)[1] > 0.5
        seen = success_seen(episode, stride=stride, persist=persist)
        for t in range(len(episode)):
            frames: Tensor = labels[t % stride : t + 1 : stride]
            assert bool(seen[t]) == bool(episode_success(frames[None], persist=persist)[0])


def test_what_is_seen_after_a_decision_is_the_frame_where_its_blocks_end(dots) -> None:
    selections = open_datasets((dots,), "train", stride=2)
    spec = selections[0].spec
    assert offline.frames_ahead(9, spec, 2) == 4 and spec.control_steps == 4
    drawn = SampleDraw(selections, decisions(9, spec, stride=2, persist=2), ahead=4)
    episode = selections[0].dataset.episode(selections[0].episodes[0])
    samples = drawn.gather(torch.tensor([0, 1]))
    assert samples.after is not None and torch.equal(samples.after.pose, episode.poses[[4, 5]])
    assert torch.equal(samples.after.images["top"], episode.frames["top"][:][[4, 5]])
    assert torch.equal(samples.observation.pose, episode.poses[[0, 1]])
    with pytest.raises(ValueError, match="moments with 9 frames after them required"):
        SampleDraw(selections, decisions(9, spec, stride=2, persist=2), ahead=9)


# --- as every stage -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["bc", "discrete"])
def test_interrupted_and_resumed_is_bit_exact(kind: str, dots, tmp_path, monkeypatch) -> None:
    options = {"kind": kind, "loop": loop(6, batch_size=8, save_every=2, eval_every=6)}
    straight = offline.run(config(dots, tmp_path / "straight", **options), progress=False)
    whole = offline._OfflineStage.batch

    def interrupted(self, seed, step, size):
        if step == 3:
            raise KeyboardInterrupt
        return whole(self, seed, step, size)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(offline._OfflineStage, "batch", interrupted)
        offline.run(config(dots, tmp_path / "resumed", **options), progress=False)
    offline.run(config(dots, tmp_path / "resumed", **options), progress=False)
    for name in ("model.safetensors", "training/state.safetensors"):
        a, b = checkpoint.read_tensors(straight / name), checkpoint.read_tensors(tmp_path / "resumed" / name)
        assert a.keys() == b.keys() and [k for k in a if k != "seconds" and not torch.equal(a[k], b[k])] == []
    state = checkpoint.read_tensors(straight / "training/state.safetensors")
    moved = [
        k
        for k in state
        if k.startswith("model/target.") and not torch.equal(state[k], state[k.replace("target", "critic", 1)])
    ]
    assert moved, "the target is state of its own"
    published = checkpoint.read_tensors(straight / "model.safetensors")
    assert published.keys() == ClonedPolicy.from_pretrained(straight).state_dict().keys(), "the critic is not published"


def test_it_goes_on_from_a_policy_and_keeps_its_normalisation(dots, tmp_path) -> None:
    before = small_policy("bc", chunk=CHUNK)
    before.save_pretrained(tmp_path / "before")
    options = {"init_from": tmp_path / "before", "loop": loop(1, lr=0.0)}
    out = offline.run(config(dots, tmp_path / "then", policy=before.config, **options), progress=False)
    then = ClonedPolicy.from_pretrained(out)
    assert then.action_normalizer == before.action_normalizer
    assert all(
        torch.allclose(a, b) for a, b in zip(then.state_dict().values(), before.state_dict().values(), strict=True)
    )
    with pytest.raises(CheckpointError, match=r"same kind and size is required:\n(?s:.*)policy.hidden"):
        offline.run(
            config(dots, tmp_path / "other", policy=replace(before.config, hidden=8), **options), progress=False
        )


def write(root: Path, **changes) -> Path:
    """Eight experts' episodes, changed."""
    made = (replace(dot_episode(i, expert=True), **changes) for i in range(8))
    return write_dataset(root, made, codec="libx264", crf=10, split_seed=9)


def test_what_cannot_be_learned_from_is_refused_before_anything_is_claimed(dots, tmp_path) -> None:
    unlabelled = write(tmp_path / "unlabelled", frame_success=None, success=None)
    failures = write(tmp_path / "failures", frame_success=torch.zeros(FRAMES, dtype=torch.bool), success=False)
    # on the last two frames only: a chunk of five actions that is recorded whole ends before it has held
    late = write(tmp_path / "late", frame_success=torch.arange(FRAMES) >= FRAMES - 2)
    for options, reason in (
        (
            {"data": (unlabelled,)},
            r"success labels of every frame .* (\d+) of \1 episodes have none. Record .*synthesize",
        ),
        ({"data": (failures,)}, r"success holds for 2 frames is required, got none of \d+"),
        (
            {"data": (late,), "policy": replace(SETTINGS, chunk=5)},
            r"a decision that reaches success is required, got none of \d+",
        ),
        ({"policy": replace(SETTINGS, chunk=1)}, r"chunks of at least 2 actions .* got 1"),
        ({"stride": 3}, r"chunks of at least 6 actions .* got 4"),
        ({"episodes": 1000}, r"1000 demonstrations \(all\) required"),
    ):
        with pytest.raises(DatasetError, match=reason):
            offline.run(config(dots, tmp_path / "out", **options), progress=False)
    assert not (tmp_path / "out").exists()


def test_settings_that_cannot_be_are_refused(dots, tmp_path) -> None:
    for options, reason in (
        ({"kind": "diffusion"}, r"kind bc or discrete.*got diffusion.*no closed form"),
        ({"persist": 0}, "persist must be at least 1, got 0"),
        ({"episodes": 0}, "episodes must be at least 1, got 0"),
    ):
        with pytest.raises(ValueError, match=reason):
            config(dots, tmp_path / "out", **options)
