"""Offline agents of several seeds at once: members apart, what bootstraps, and a task both must solve."""

import math
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tests.rl_in_imagination.integrator import SPEC, best_return, record, true_return
from worldline.data.trajectories import join
from worldline.errors import DatasetError, SpecMismatch, WorldlineError
from worldline.rl_in_imagination.offline import (
    TD3BC,
    AgentConfig,
    Batch,
    OfflineConfig,
    Replay,
    Scaling,
    StateIQL,
    StateIQLConfig,
    SyntheticTables,
    TD3BCConfig,
    build_agent,
    episode_weights,
    fit_scaling,
    train_offline,
)
from worldline.rl_in_imagination.offline.replay import row_integers, step_weights
from worldline.rl_in_imagination.offline.synthesis import tables

SMALL = (16, 16)
TD3 = TD3BCConfig(hidden=SMALL, actor_lr=1e-3, critic_lr=1e-3)
AGENTS: dict[str, AgentConfig] = {
    "td3+bc": TD3,
    "four diverse critics": TD3BCConfig(hidden=SMALL, critics=4, diversity=0.5, maximise="least"),
    "iql": StateIQLConfig(hidden=SMALL),
    "iql, tanh": StateIQLConfig(hidden=SMALL, kind="tanh-gaussian", critics=3),
}
PLAIN = Scaling(mean=torch.zeros(2), std=torch.ones(2), reward=1.0)


def synthetic(seeds: Sequence[int], n: int = 50) -> SyntheticTables:
    """A table for each member that depends on its seed alone."""
    tables = []
    for seed in seeds:
        g = torch.Generator().manual_seed(100 + seed)
        draw = [torch.randn(n, 2, generator=g), 2 * torch.rand(n, 2, generator=g), torch.randn(n, generator=g)]
        tables.append([*draw, draw[0] + 0.1 * draw[1], torch.rand(n, generator=g) < 0.2])
    names = ("observations", "actions", "rewards", "next_observations", "terminated")
    return SyntheticTables(**{name: torch.stack(column) for name, column in zip(names, zip(*tables))})


def trained(config: AgentConfig, seeds: Sequence[int], updates: int = 20) -> TD3BC | StateIQL:
    real = record(10, 0)
    scaling = fit_scaling(real)
    agent = build_agent(config, SPEC, scaling, seeds=seeds, updates=updates)
    replay = Replay(real, agent.policies, scaling, seeds=seeds, batch_size=32, synthetic=24)
    replay.put(synthetic(seeds), update=0)
    for update in range(updates):
        agent.update(replay.batch(update), update)
    return agent


@pytest.mark.parametrize("name", AGENTS)
def test_a_member_learns_the_same_alone_and_among_eight(name: str) -> None:
    seeds = (3, 1, 4, 15, 9, 2, 6, 5)
    together, alone = trained(AGENTS[name], seeds), trained(AGENTS[name], seeds[2:3])
    before = build_agent(AGENTS[name], SPEC, fit_scaling(record(10, 0)), seeds=seeds[2:3], updates=20)
    for (key, many), (_, one), (_, first) in zip(
        together.named_parameters(), alone.named_parameters(), before.named_parameters(), strict=True
    ):
        of_many = many[2::8] if len(many) > len(one) else many  # critics are stacked: row k * 8 + member
        assert torch.allclose(of_many, one, atol=2e-5), key
        assert not torch.allclose(one, first, atol=1e-5) or "slow" in key, key


def one_row(terminated: bool) -> Batch:
    return Batch(
        observations=torch.tensor([[[0.3, -0.2]]]),
        actions=torch.tensor([[[0.5, 0.1]]]),
        rewards=torch.tensor([[2.0]]),
        next_observations=torch.tensor([[[0.4, 0.0]]]),
        terminated=torch.tensor([[terminated]]),
    )


def written_out(net: torch.nn.Module, row: Tensor, member: int = 0) -> Tensor:
    """The perceptron of one member by hand."""
    weights, biases = list(net.weights), list(net.biases)  # pyright: ignore
    for i, (weight, bias) in enumerate(zip(weights, biases)):
        row = row @ weight[member] + bias[member, 0]
        row = row.relu() if i < len(weights) - 1 else row
    return row


def test_truncation_bootstraps_and_termination_does_not() -> None:
    config = TD3BCConfig(hidden=SMALL, noise=0.0, discount=0.9, critics=3)
    agent = TD3BC(config, SPEC, PLAIN, seeds=(7,))
    assert float(agent.goal(one_row(True), 0)) == pytest.approx(2.0)
    after = one_row(False).next_observations[0, 0]
    action = written_out(agent.policies.net, after).tanh()
    q = [float(written_out(agent.critics.net, torch.cat([after, action]), k).detach()) for k in range(3)]
    assert float(agent.goal(one_row(False), 0)) == pytest.approx(2 + 0.9 * min(q), abs=1e-5)


def test_the_first_losses_by_hand() -> None:
    for terminated in (True, False):
        batch = one_row(terminated)
        seen, action, after = batch.observations[0, 0], batch.actions[0, 0], batch.next_observations[0, 0]
        agent = StateIQL(StateIQLConfig(hidden=SMALL, discount=0.9), SPEC, PLAIN, seeds=(7,), updates=10)
        q = [float(written_out(agent.critics.net, torch.cat([seen, action]), k).detach()) for k in range(2)]
        goal = 2 + 0.9 * float(written_out(agent.value, after).detach()) * (not terminated)
        value = float(written_out(agent.value, seen).detach())
        weight = min(math.exp(3 * (min(q) - value)), 100)
        mean = written_out(agent.policies.net, seen).tanh().detach()
        density = torch.distributions.Normal(mean, 1.0).log_prob(action).sum()
        shown = agent.update(batch, 0)
        assert float(shown["q_loss"]) == pytest.approx(sum((x - goal) ** 2 for x in q), rel=1e-4)
        assert float(shown["policy_loss"]) == pytest.approx(-weight * float(density), rel=1e-4)


def test_the_policys_loss_is_the_published_one() -> None:
    agent = TD3BC(TD3BCConfig(hidden=SMALL, alpha=2.5, critic_lr=0.0), SPEC, PLAIN, seeds=(7,))
    batch = one_row(False)
    chosen, _ = agent.policies.location(batch.observations)
    q = agent.critics(batch.observations, chosen)[0]
    expected = (chosen - batch.actions).square().mean() - 2.5 / q.abs().mean() * q.mean()
    assert float(agent.update(batch, 0)["policy_loss"]) == pytest.approx(float(expected.detach()), rel=1e-4)
    assert "policy_loss" not in agent.update(batch, 1)  # every second update


def test_the_policys_learning_rate_falls_along_a_cosine() -> None:
    agent = StateIQL(StateIQLConfig(hidden=SMALL, lr=1e-3), SPEC, PLAIN, seeds=(7,), updates=10)
    for step, expected in ((0, 1e-3), (5, 5e-4), (10, 0.0)):
        agent.update(one_row(False), step)
        assert agent.actor_optimizer.param_groups[0]["lr"] == pytest.approx(expected, abs=1e-9)
    assert agent.critic_optimizer.param_groups[0]["lr"] == 1e-3


@pytest.mark.parametrize(
    "config",
    [
        TD3BCConfig(hidden=(32, 32), discount=0.9, actor_lr=1e-3, critic_lr=1e-3, polyak=0.02),
        StateIQLConfig(hidden=(32, 32), discount=0.9, lr=1e-3, polyak=0.02, temperature=10.0),
    ],
    ids=["td3+bc", "iql"],
)
def test_both_do_far_better_than_the_behaviour_they_learned_from(config: AgentConfig) -> None:
    real = record(100, 0)
    run = train_offline(
        real,
        config,
        OfflineConfig(updates=400, batch_size=64, synthetic=0, rewards="return-range", log_every=400),
        seeds=(0, 1),
        progress=False,
    )
    behaviour, best = float(real.returns.mean()), best_return()
    assert behaviour < -5 and best > -0.2  # measured -6.3 and -0.15
    assert bool((true_return(run.policies)["return"] > best + 0.15 * (behaviour - best)).all())


# --- tables -----------------------------------------------------------------------------------------------------------


def test_a_batch_is_a_fixed_mix_of_each_members_own_rows_as_they_are() -> None:
    real, seeds = record(10, 0), (5, 8)
    scaling = fit_scaling(real)
    policies = build_agent(TD3, SPEC, scaling, seeds=seeds, updates=1).policies
    replay = Replay(real, policies, scaling, seeds=seeds, batch_size=16, synthetic=12)
    assert replay.batch(0).rewards.shape == (2, 16)  # before there is any synthetic data all are real
    made = synthetic(seeds)
    replay.put(made, update=0)
    batch = replay.batch(3)
    for member in range(2):
        assert torch.isin(batch.rewards[member, :12], made.rewards[member]).all()
        assert torch.isin(batch.rewards[member, 12:], real.rewards).all()
        rows = (made.rewards[member] == batch.rewards[member, :12, None]).nonzero()[:, 1]
        for name in ("observations", "next_observations"):
            seen = getattr(made, name)[member, rows]
            assert torch.allclose(getattr(batch, name)[member, :12], (seen - scaling.mean) / scaling.std, atol=1e-6)
        assert torch.allclose(2 * batch.actions[member, :12], made.actions[member, rows], atol=1e-6)  # range [-2, 2]
        assert torch.equal(batch.terminated[member, :12], made.terminated[member, rows])
    assert bool(batch.terminated.any())
    again = Replay(real, policies, scaling, seeds=seeds, batch_size=16, synthetic=12)
    again.put(made, update=0)
    assert torch.equal(again.batch(3).rewards, batch.rewards) and not torch.equal(
        replay.batch(4).rewards, batch.rewards
    )


def test_a_member_with_fewer_transitions_takes_none_from_the_others() -> None:
    """What the first draws is the same alone and beside one whose trajectories end at once."""
    real, drawn = record(10, 0), []
    scaling = fit_scaling(real)
    for sets in ([real], [real, real.select([3])]):
        seeds, made = (4, 5)[: len(sets)], tables(sets)
        assert made.counts is not None and made.counts.tolist() == [one.steps for one in sets]
        policies = build_agent(TD3, SPEC, scaling, seeds=seeds, updates=1).policies
        replay = Replay(real, policies, scaling, seeds=seeds, batch_size=256, synthetic=240)
        replay.put(made, update=0)
        drawn.append(replay.batch(7))
    alone, beside = drawn
    assert torch.equal(alone.observations[0], beside.observations[0]) and torch.equal(
        alone.rewards[0], beside.rewards[0]
    )
    assert torch.isin(beside.rewards[1, :240], real.select([3]).rewards).all()


def test_random_rows_are_even_and_of_the_seed_alone() -> None:
    drawn = row_integers(torch.tensor([1, 2]), 5, 20_000, 10, stream=0)
    assert bool((drawn >= 0).all() and (drawn < 10).all())
    share = torch.stack([row.bincount(minlength=10) for row in drawn]) / 20_000
    assert bool((share - 0.1).abs().max() < 0.01)  # five standard deviations
    assert torch.equal(drawn[1:], row_integers(torch.tensor([2]), 5, 20_000, 10, stream=0))


def test_scaling_as_published() -> None:
    real = record(10, 0)
    scaling = fit_scaling(real, rewards="return-range")
    assert torch.allclose(scaling.mean, real.observations.mean(0), atol=1e-6)
    assert torch.allclose(scaling.std, real.observations.std(0, correction=0) + 1e-3, atol=1e-6)
    assert scaling.reward == pytest.approx(20 / float(real.returns.max() - real.returns.min()))
    with pytest.raises(DatasetError, match="different return required, got 1 of"):
        fit_scaling(real.select([0]), rewards="return-range")


def test_good_episodes_count_more() -> None:
    returns = torch.tensor([-10.0, 0.0, 10.0])
    raw = torch.tensor([math.exp(-2), math.exp(-1), 1.0])  # returns to 0, 1/2, 1; over 0.5
    assert torch.allclose(episode_weights(returns, 0.5), raw / raw.mean())
    assert torch.allclose(episode_weights(torch.ones(3), 0.1), torch.ones(3))
    real = record(40, 0)
    scaling = fit_scaling(real)
    policies = build_agent(TD3, SPEC, scaling, seeds=(0,), updates=1).policies
    replay = Replay(real, policies, scaling, seeds=(0,), batch_size=20_000, synthetic=0, temperature=0.1)
    weights = episode_weights(real.returns, 0.1)[real.episode]
    expected = float((weights * real.rewards).sum() / weights.sum())
    assert float(replay.batch(0).rewards.mean()) == pytest.approx(expected, abs=0.01)
    assert expected > float(real.rewards.mean()) + 0.03


def test_imagined_pieces_are_weighed_among_themselves_and_do_not_scale_rewards() -> None:
    """A piece of five good steps has less return than a whole episode of twenty bad ones, and is not the worse for it."""
    real, pieces = record(20, 0), record(20, 1)
    steps = torch.cat([start + torch.arange(5) for start in pieces.starts])
    cut = replace(
        pieces,
        **{n: getattr(pieces, n)[steps] for n in ("observations", "actions", "rewards", "next_observations")},
        terminated=torch.zeros(len(steps), dtype=torch.bool),
        lengths=torch.full((20,), 5),
        provenance=({"trajectory_model": "sha"},) * 20,
    )
    mixed = join([real, cut])
    assert mixed.imagined.tolist() == [False] * 20 + [True] * 20 and not real.imagined.any()
    weights = step_weights(mixed, 0.1)
    assert torch.allclose(weights[: real.steps], step_weights(real, 0.1))
    assert torch.allclose(weights[real.steps :], episode_weights(cut.returns, 0.1)[cut.episode])
    assert fit_scaling(mixed, rewards="return-range").reward == fit_scaling(real, rewards="return-range").reward
    assert fit_scaling(cut, rewards="return-range").reward == pytest.approx(
        5 / float(cut.returns.max() - cut.returns.min())
    )


def test_what_cannot_be_learned_from_is_named() -> None:
    real, seeds = record(4, 0), (5, 8)
    scaling = fit_scaling(real)
    policies = build_agent(TD3, SPEC, scaling, seeds=seeds, updates=1).policies
    replay = Replay(real, policies, scaling, seeds=seeds, batch_size=16, synthetic=12)
    made = synthetic(seeds)
    made.rewards[1, 7] = math.nan
    with pytest.raises(
        WorldlineError, match=r"made at update 20: finite rewards.*1 of 100.*row 7 of member 1 \(seed 8\)"
    ):
        replay.put(made, update=20)
    made = synthetic(seeds)
    made.actions[0, 3] = 5.0
    with pytest.raises(WorldlineError, match=r"actions within.*got \[5, 5\] in row 3 of member 0 \(1 of 100"):
        replay.put(made, update=0)
    with pytest.raises(
        WorldlineError, match=r"observations of shape \(members 2, rows at least 1, 2\).*got \(3, 50, 2\)"
    ):
        replay.put(synthetic((1, 2, 3)), update=0)
    with pytest.raises(SpecMismatch, match="mean and positive std of 2 numbers"):
        TD3BC(TD3, SPEC, Scaling(mean=torch.zeros(3), std=torch.ones(3), reward=1.0), seeds=seeds)
    with pytest.raises(ValueError, match="discount in"):
        TD3BCConfig(discount=1.0)
    with pytest.raises(ValueError, match="expectile between"):
        StateIQLConfig(expectile=1.0)
