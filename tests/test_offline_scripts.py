"""What the scripts of offline RL rely on: intervals that cover the truth, and a recording that goes on without losing its beginning."""

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.worldmodels.test_trajectories import wander
from worldline.eval.trajectories import step_errors
from worldline.sim.control import make_control

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))

import bench_trajectories
import make_offline_data


def test_intervals_over_trajectories_cover_the_truth_though_steps_of_one_go_wrong_together() -> None:
    """Forty trajectories, each with one error at all of its steps. Over single steps (as if each were a trajectory) half the intervals miss."""
    rng, truth = np.random.default_rng(0), 1.0
    covered = {"trajectories": 0, "steps": 0}
    for _ in range(60):
        errors = np.repeat(np.abs(rng.normal(size=40)), 30)
        for over, episode in (("trajectories", np.repeat(np.arange(40), 30)), ("steps", np.arange(1200))):
            low, high = bench_trajectories.squares_interval(errors, episode, resamples=200)
            covered[over] += low <= truth <= high
    assert covered["trajectories"] >= 50 and covered["steps"] <= 40, covered


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> make_offline_data.MakeOfflineData:
    """Judged every 60 steps by one episode, and never good enough."""
    pytest.importorskip("stable_baselines3", reason='an extra: pip install "worldline[sb3]"')
    pytest.importorskip("mujoco", reason='an extra: pip install "worldline[offline]"')
    monkeypatch.setattr(make_offline_data, "EVERY", 60)
    monkeypatch.setattr(make_offline_data, "JUDGED", 1)
    return make_offline_data.MakeOfflineData(out=tmp_path, tasks=("hopper",), budget=120, level=1e9, width=8)


def test_a_training_whose_budget_is_raised_keeps_all_that_it_did(small) -> None:
    """The kept agent had room for its old budget: past it the replay buffer began again and the data set lost its first steps."""
    task = make_control("hopper")
    with pytest.raises(SystemExit, match=r"after 120 steps .* Raise --budget"):
        make_offline_data.Training(task, small).run()
    first = make_offline_data.Training(task, small).replay()
    training = make_offline_data.Training(task, replace(small, budget=240))
    with pytest.raises(SystemExit, match="after 240 steps"):
        training.run()
    whole = training.replay()
    assert first.steps == 120 and whole.steps == 240
    assert torch.equal(whole.observations[:120], first.observations) and torch.equal(whole.rewards[:120], first.rewards)
    lower = make_offline_data.Training(task, small)  # a budget below what was done: all of it is there none the less
    assert torch.equal(lower.replay().observations, whole.observations)


def test_a_replay_that_has_lost_steps_is_refused(small) -> None:
    task = make_control("hopper")
    training = make_offline_data.Training(task, small)
    with pytest.raises(SystemExit):
        training.run()
    training.agent.learn(60, reset_num_timesteps=False)  # beyond the budget, as no run does
    with pytest.raises(AssertionError, match="room for all 180 steps required, got one of 121 that has wrapped"):
        training.replay()
    kept = training.home / "at-120" / "replay.npz"
    numbers = dict(np.load(kept))
    np.savez(kept, **{name: values[50:] for name, values in numbers.items()})
    with pytest.raises(AssertionError, match=r"all 120 steps of the training required .* got 70"):
        make_offline_data.Training(task, small)


class Exact:
    """The dynamics of `wander`."""

    def step_from(self, observations: Tensor, actions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        after = observations + actions / 4
        return after, -observations[:, 0].square(), (after.abs() > 0.8)[:, 0]


def test_errors_of_steps_say_whose_they_are() -> None:
    """One trajectory is wrong, some end, and steps far out are left out: what is wrong is still told to be that one's."""
    real = wander(20)
    where = (real.episode == 7)[:, None]
    made = replace(real, next_observations=real.next_observations + where)
    errors = step_errors(Exact(), made, real, clipped=0.6)
    assert real.terminated.any() and (real.observations.abs() >= 0.6).any(), "or this tests nothing"
    assert len(errors.episode) == len(errors.observation) < real.steps
    assert errors.episode[errors.observation > 0.1].unique().tolist() == [7]
    assert (errors.observation[errors.episode == 7] > 0.1).all() and (errors.episode == 7).any()
