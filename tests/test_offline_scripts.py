"""What the scripts of offline RL rely on: intervals that cover the truth, and a recording that goes on without losing its beginning."""

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
from torch import Tensor

from tests.worldmodels.test_trajectories import wander
from worldline.eval.trajectories import step_errors

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))

import bench_trajectories


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
