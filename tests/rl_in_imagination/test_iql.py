"""Implicit Q-learning against closed forms: expectiles, weights, a chain whose values are known, and what may bootstrap."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tests.oracles import SPEC
from tests.policies.dots import small_policy
from worldline.data.normalization import RobustNormalizer
from worldline.errors import PolicyError
from worldline.policies import ClonedPolicy, EncoderConfig, PolicyConfig
from worldline.rl_in_imagination.iql import (
    ImplicitQLearner,
    IQLConfig,
    Transitions,
    advantage_weights,
    expectile_loss,
    one_step_return,
)
from worldline.types import Observation

STATES = 5


def argmin_of_expectile_loss(sample: Tensor, tau: float) -> float:
    """Newton's method: the loss is piecewise quadratic."""
    estimate = sample.mean().clone().requires_grad_()
    for _ in range(20):
        (slope,) = torch.autograd.grad(expectile_loss(sample - estimate, tau), estimate)
        bend = 2 * torch.where(sample < estimate, 1 - tau, tau).mean()
        estimate = (estimate - slope / bend).detach().requires_grad_()
    return float(estimate.detach())


def test_the_expectile_loss_is_minimal_at_the_expectile() -> None:
    sample = torch.tensor([0.0, 1.0], dtype=torch.float64)
    for tau in (0.1, 0.5, 0.7, 0.95):  # of {0, 1}: tau * (1 - e) = (1 - tau) * e
        assert argmin_of_expectile_loss(sample, tau) == pytest.approx(tau)
    # of {0, 1, 5} at 0.75, between 1 and 5: 0.75 * (5 - e) = 0.25 * (e + e - 1)
    assert argmin_of_expectile_loss(torch.tensor([0.0, 1.0, 5.0], dtype=torch.float64), 0.75) == pytest.approx(3.2)
    drawn = torch.randn(101, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert argmin_of_expectile_loss(drawn, 0.5) == pytest.approx(float(drawn.mean()))


def test_weights_by_hand() -> None:
    found = advantage_weights(torch.tensor([-0.1, 0.0, 0.1, 3.0]), temperature=10.0, max_weight=100.0)
    assert torch.allclose(found, torch.tensor([1 / math.e, 1.0, math.e, 100.0]))
    assert torch.equal(advantage_weights(torch.randn(4), temperature=0.0, max_weight=100.0), torch.ones(4))


def test_termination_does_not_bootstrap_and_everything_else_does() -> None:
    found = one_step_return(
        torch.tensor([1.0, 0.0, 0.0]), torch.full((3,), 0.5), torch.tensor([True, True, False]), discount=0.8
    )
    assert torch.allclose(found, torch.tensor([1.0, 0.0, 0.4]))


# --- a chain of states, told apart by their pose alone: right (dx = 1) leads to the goal, left (dx = -1) back ---------------

CHAIN = replace(SPEC, cameras=(), control_steps=1, pose_names=tuple(f"s{i}" for i in range(STATES)))


def seen(states: Tensor) -> Observation:
    return Observation(images={}, pose=torch.eye(STATES)[states], instruction=("go right",) * len(states))


def chain() -> Transitions:
    """Each of both actions once in every state; beyond the last state is the goal, which ends the episode with 1."""
    states = torch.arange(STATES).repeat(2)
    right = torch.arange(2 * STATES) < STATES
    goal = right & (states == STATES - 1)
    actions = torch.stack([torch.where(right, 1.0, -1.0), torch.zeros(2 * STATES)], -1)[:, None]
    after = torch.where(right, states + 1, states - 1).clamp(0, STATES - 1)
    return Transitions(
        observation=seen(states), actions=actions, reward=goal.float(), terminated=goal, after=seen(after)
    )


def learner(kind: str = "bc", **changes) -> ImplicitQLearner:
    torch.manual_seed(0)
    config = PolicyConfig(kind=kind, encoder=EncoderConfig(shift=0), hidden=32, chunk=1)
    same = [RobustNormalizer(low=(-1.0,) * d, high=(1.0,) * d) for d in (2, STATES)]
    policy = ClonedPolicy(config, CHAIN, action_normalizer=same[0], pose_normalizer=same[1])
    return ImplicitQLearner(policy, IQLConfig(**({"polyak": 0.1, "hidden": 64} | changes)))


def teach(model: ImplicitQLearner, batch: Transitions, steps: int) -> Tensor:
    """The values of the chain's states after `steps` full batches."""
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=5e-3)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 5e-3 * (1 - step / steps)
        optimizer.zero_grad()
        model.loss(batch)[0].backward()
        optimizer.step()
    with torch.no_grad():
        return model.critic.v(model.critic.features(seen(torch.arange(STATES))))


def exact(tau: float, discount: float) -> Tensor:
    """The fixed point by iteration: the expectile of two equally frequent values is tau * greater + (1 - tau) * lesser."""
    value = torch.zeros(STATES)
    for _ in range(500):
        right = torch.cat([discount * value[1:], torch.ones(1)])
        left = discount * torch.cat([value[:1], value[:-1]])
        value = tau * torch.maximum(left, right) + (1 - tau) * torch.minimum(left, right)
    return value


@pytest.mark.parametrize("tau", [0.5, 0.9])
def test_values_of_a_chain_are_the_known_ones(tau: float) -> None:
    found = teach(learner(expectile=tau, discount=0.8), chain(), 400)
    assert torch.allclose(found, exact(tau, 0.8), atol=0.03), (found, exact(tau, 0.8))


def test_towards_the_upper_expectile_the_values_are_the_optimal_ones() -> None:
    assert torch.allclose(exact(1.0, 0.8), 0.8 ** torch.arange(STATES - 1, -1, -1.0))
    assert (exact(0.9, 0.8) < exact(1.0, 0.8)).all() and (exact(0.9, 0.8) > exact(0.5, 0.8)).all()


@pytest.mark.parametrize("kind", ["bc", "discrete"])
def test_the_policy_prefers_what_leads_to_the_goal(kind: str) -> None:
    """Cloned alike (temperature 0), right and left cancel out."""
    moves = {}
    for temperature in (0.0, 30.0):
        model = learner(kind, expectile=0.9, discount=0.8, temperature=temperature)
        teach(model, chain(), 250)
        chunk, _ = model.eval().policy.act(
            seen(torch.arange(STATES)), model.policy.reset(STATES), seeds=torch.arange(STATES)
        )
        moves[temperature] = chunk[:, 0, 0]
    assert moves[0.0].abs().max() < 0.15 and moves[30.0].min() > 0.8


def test_a_loop_that_is_cut_is_worth_more_than_one_that_ends() -> None:
    """One state, one action, reward 1 a decision: 1 / (1 - discount) if it only was not recorded any further, 1 if it ended."""
    here = torch.zeros(4, dtype=torch.long)
    for ended, worth in ((True, 1.0), (False, 2.0)):
        batch = Transitions(
            observation=seen(here),
            actions=torch.zeros(4, 1, 2),
            reward=torch.ones(4),
            terminated=torch.full((4,), ended),
            after=seen(here),
        )
        assert float(teach(learner(discount=0.5), batch, 300)[0]) == pytest.approx(worth, abs=0.05)


def test_each_loss_reaches_its_own_weights_and_the_target_only_follows() -> None:
    model = learner(polyak=0.25)
    with torch.no_grad():
        for weight in model.critic.parameters():
            weight.add_(1.0)
    model.eval().loss(chain())[0].backward()
    assert all(torch.allclose(slow + 1, fast) for slow, fast in _pairs(model)), "evaluating moves nothing"
    assert all(weight.grad is None for weight in model.target.parameters())
    model.train().loss(chain())
    assert all(torch.allclose(slow + 0.75, fast) for slow, fast in _pairs(model))

    critic = {id(p) for p in model.critic.parameters()}
    for name, reached in (("policy_loss", False), ("critic", True)):
        model.zero_grad(set_to_none=True)
        frozen = model.policy if reached else model.critic
        frozen.requires_grad_(False)
        model.loss(chain())[0].backward()
        frozen.requires_grad_(True)
        moved = [p for p in model.parameters() if p.grad is not None]
        assert moved and all((id(p) in critic) == reached for p in moved), name


def _pairs(model: ImplicitQLearner) -> list[tuple[Tensor, Tensor]]:
    return list(zip(model.target.parameters(), model.critic.parameters(), strict=True))


def test_only_what_is_sent_of_a_chunk_has_a_value() -> None:
    """k is 2: of five actions the fifth is never sent."""
    model = ImplicitQLearner(small_policy("bc", chunk=5), IQLConfig())
    features, actions = torch.randn(3, model.critic.encoder.width), torch.rand(3, 5, 2)
    other = actions.clone()
    other[:, 4] = -1
    assert torch.equal(model.critic.q(features, actions)[0], model.critic.q(features, other)[0])
    other[:, 3] = -1
    assert not torch.equal(model.critic.q(features, actions)[0], model.critic.q(features, other)[0])


@pytest.mark.parametrize(
    "change", [{"expectile": 0.0}, {"expectile": 1.0}, {"discount": 0.0}, {"temperature": -1.0}, {"polyak": 0.0}]
)
def test_impossible_settings_are_refused(change: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(change))} .*required, got"):
        IQLConfig(**change)


def test_policies_without_a_density_and_chunks_below_a_block_are_refused() -> None:
    with pytest.raises(PolicyError, match=r"kind bc or discrete.*got diffusion.*no closed form"):
        ImplicitQLearner(small_policy("diffusion"), IQLConfig())
    with pytest.raises(PolicyError, match=r"at least 2 actions is required \(k = 2\), got 1"):
        ImplicitQLearner(small_policy("bc", chunk=1), IQLConfig())
