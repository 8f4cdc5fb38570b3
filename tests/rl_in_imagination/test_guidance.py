"""Which policies guide, and by what; and that guided trajectories are nearer to what the policy does."""

from dataclasses import replace

import pytest
import torch

from tests.worldmodels.test_trajectories import SPEC, TINY, wander
from worldline.data.trajectories import control_spec
from worldline.errors import SpecMismatch
from worldline.policies.states import StatePolicies, StatePolicy, StatePolicyConfig
from worldline.rl_in_imagination.guidance import policy_score
from worldline.types import TensorState
from worldline.worldmodels.trajectories import Guidance, TrajectoryDiffusion
from worldline.worldmodels.trajectories.layout import gather

ZERO, ONE = torch.zeros(1), torch.ones(1)


class Constant:
    """A plain policy: always the same action, no density."""

    def __init__(self, action: float, spec=SPEC) -> None:
        self.action, self.spec = action, spec

    def reset(self, n):
        return TensorState(tensors={}, rows=n)

    def act(self, observation, state, *, seeds):
        return torch.full((len(observation), 1, self.spec.action.dim), self.action), state


def states(kind: str) -> StatePolicy:
    return StatePolicy(StatePolicies(StatePolicyConfig(kind=kind, hidden=(16,)), SPEC, seeds=(3,), mean=ZERO, std=ONE))


@pytest.mark.parametrize("kind", ["deterministic", "gaussian", "tanh-gaussian"])
def test_a_policy_with_a_density_guides_by_its_slope(kind):
    policy = states(kind)
    x, a = torch.randn(3, 4, 1), (torch.rand(3, 4, 1) * 3 - 1.5).requires_grad_()
    flat = policy.policies.log_prob(x.reshape(1, -1, 1), a.reshape(1, -1, 1))
    (slope,) = torch.autograd.grad(flat.sum(), a)
    assert torch.allclose(policy_score(policy, SPEC)(x, a.detach()), slope, atol=1e-5)


def test_any_other_policy_counts_as_a_gaussian_of_half_the_range():
    x, a = torch.randn(3, 4, 1), torch.rand(3, 4, 1)
    found = policy_score(Constant(0.5), SPEC)(x, a)
    assert torch.allclose(found, (0.5 - a) / 4)  # the range is [-2, 2]


def test_policies_of_another_task_are_named():
    with pytest.raises(SpecMismatch, match=r"observation: required 1 numbers \['x'\], got 2"):
        policy_score(Constant(0.0, control_spec("toy", 2, [-2.0], [2.0], rate_hz=10.0)), SPEC)
    with pytest.raises(SpecMismatch, match=r"action.low: required \(-2.0,\), got \(-1.0,\)"):
        policy_score(Constant(0.0, control_spec("toy", ["x"], [-1.0], [1.0], rate_hz=10.0)), SPEC)
    chunks = Constant(0.0)
    chunks.chunk_length = 8
    with pytest.raises(SpecMismatch, match=r"one action at a time is required.*chunks of 8"):
        policy_score(chunks, SPEC)


def test_guidance_brings_trajectories_to_the_policy_and_leaves_their_dynamics_true():
    """The behaviour leans against x; the policy pushes up. The more guidance, the nearer the actions; next states keep following them."""
    torch.manual_seed(0)
    data = wander(400)
    model = TrajectoryDiffusion(replace(TINY, width=32), SPEC)
    model.layout.fit(data)
    rows, steps = data.windows(8, past_end=True), 900
    optimizer = torch.optim.Adam(model.parameters(), lr=4e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps)
    for _ in range(steps):
        optimizer.zero_grad()
        model.loss(gather(data, rows[torch.randint(len(rows), (64,))])).backward()
        optimizer.step()
        schedule.step()
    score, seeds = policy_score(Constant(1.0), SPEC), torch.arange(200)
    found = []
    for guidance in (
        None,
        Guidance(coefficient=0.01),
        Guidance(coefficient=0.2),
        Guidance(coefficient=0.2, on="denoised"),
    ):
        made = model.eval().generate(seeds, guidance=guidance, score=score)
        error = (made.next_observations - made.observations - made.actions / 4)[~made.terminated]
        found.append((float((made.actions - 1).abs().mean()), float(error.square().mean().sqrt())))
    distance = [d for d, _ in found]
    assert distance[0] > distance[1] > distance[2] and distance[3] < distance[0]
    assert distance[2] < 0.8 * distance[0]
    assert found[1][1] < 1.5 * found[0][1] + 0.01  # a little guidance costs little truth
