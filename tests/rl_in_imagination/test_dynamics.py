"""The autoregressive baseline: it learns one step, and rolls out what a policy does."""

import pytest
import torch

from tests.worldmodels.test_trajectories import SPEC, wander
from worldline.data.minari import write_minari
from worldline.rl_in_imagination.dynamics import DynamicsConfig, DynamicsEnsemble
from worldline.trainers import dynamics
from worldline.trainers.loop import LoopConfig


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> DynamicsEnsemble:
    tmp_path = tmp_path_factory.mktemp("dynamics")
    data = write_minari(wander(500, edge=0.4), tmp_path / "data")
    config = dynamics.TrainDynamics(
        data=(str(data),),
        out=tmp_path / "model",
        model=DynamicsConfig(members=3, hidden=(32, 32)),
        loop=LoopConfig(steps=900, batch_size=128, lr=5e-3, warmup=10, cooldown=0.6, weight_decay=0.0, ema=0.9),
    )
    return DynamicsEnsemble.from_pretrained(dynamics.run(config, progress=False))


def test_an_ensemble_learns_the_step_its_reward_and_its_end_and_rolls_out_the_policy(model):
    seeds = torch.arange(300)
    x = 0.7 * torch.rand(300, 1, generator=torch.Generator().manual_seed(5)) - 0.35
    made = model.rollout(lambda now: -2 * now, x, steps=4, seeds=seeds, provenance={"policy": "p"})
    assert made.spec == SPEC and made.provenance[3] == {"policy": "p", "seed": "3"}
    assert torch.allclose(made.actions, -2 * made.observations, atol=1e-5)  # the policy that was given acts
    on = ~made.terminated  # after an end nothing follows
    moved = (made.next_observations - made.observations)[on]
    assert (moved - made.actions[on] / 4).square().mean().sqrt() < 0.2 * moved.square().mean().sqrt()
    assert (made.rewards + made.observations[:, 0].square()).abs().mean() < 0.05
    assert made.terminated.float().mean() < 0.07 and int(made.lengths.median()) == 3
    # outwards it ends where the data did, beyond 0.4
    out = model.rollout(lambda now: now.sign(), x, steps=6, seeds=seeds)
    assert out.terminated.float().mean() > 0.1
    assert out.observations.abs().max() < 1.3  # what goes on is held near the data, whose extent is 0.8


def test_a_row_of_a_rollout_is_of_its_seed_alone_and_members_differ(model):
    x, seeds = torch.zeros(5, 1), torch.tensor([4, 8, 15, 16, 23])
    whole = model.step(x, x + 0.5, seeds=seeds, at=2)
    one = model.step(x[2:3], x[2:3] + 0.5, seeds=seeds[2:3], at=2)
    assert torch.allclose(whole.observations[2:3], one.observations)
    assert not torch.allclose(whole.observations[0], whole.observations[1])  # noise of their own
    mean, _, _ = model._foretell(x.expand(3, -1, -1), x.expand(3, -1, -1))
    assert not torch.allclose(mean[0], mean[1])
