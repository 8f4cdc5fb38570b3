"""The edge-of-reach problem on a plane with known values, and what an ensemble makes of it (2402.12527)."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from worldline.data.trajectories import Trajectories, control_spec
from worldline.policies.states import StatePolicies
from worldline.rl_in_imagination.offline import (
    Critics,
    OfflineConfig,
    OfflineRun,
    TD3BCConfig,
    likeness,
    pessimistic,
    reach_aware,
    train_offline,
)

DISCOUNT, NEAR, FAR = 0.9, 1.0, 2.0
BEST = 1 / (1 - DISCOUNT)  # rewards are at most 1: no policy is worth more, anywhere
SPEC = control_spec("plane", 2, [-1.0, -1.0], [1.0, 1.0], rate_hz=1.0)
PLAIN = TD3BCConfig(hidden=(32, 32), discount=DISCOUNT, alpha=None, actor_lr=1e-3, critic_lr=1e-3, polyak=0.02)


def reward(place: Tensor) -> Tensor:
    """Best, 1, where both coordinates are pi / 8 (or a period from it); zero on average."""
    return (4 * place).sin().mean(-1)


def rollouts_of_one_step(width: float) -> Trajectories:
    """Exact dynamics, place + action within [-FAR, FAR]. From starts up to NEAR, 44 of 100 next places lie beyond every start."""
    generator = torch.Generator().manual_seed(0)
    place = width * (2 * torch.rand(4000, 2, generator=generator) - 1)
    action = 2 * torch.rand(4000, 2, generator=generator) - 1
    return Trajectories(
        spec=SPEC,
        observations=place,
        actions=action,
        rewards=reward(place),
        next_observations=(place + action).clamp(-FAR, FAR),
        terminated=torch.zeros(4000, dtype=torch.bool),  # cut, not ended: all of them bootstrap
        lengths=torch.ones(4000, dtype=torch.long),
    )


def trained(agent: TD3BCConfig, width: float) -> OfflineRun:
    config = OfflineConfig(updates=1500, batch_size=128, synthetic=0, log_every=500)
    return train_offline(rollouts_of_one_step(width), agent, config, seeds=(0, 1), progress=False)


def true_value(policies: StatePolicies) -> Tensor:
    """What each member's policy is worth from starts up to NEAR."""
    place = NEAR * (2 * torch.rand(200, 2, generator=torch.Generator().manual_seed(5)) - 1)
    place, value = place.expand(policies.members, -1, -1), torch.zeros(policies.members)
    for i in range(60):
        value = value + DISCOUNT**i * reward(place).mean(-1)
        place = (place + policies.act(place)).clamp(-FAR, FAR)
    return value


def believed(run: OfflineRun) -> Tensor:
    """Each member's mean value of the data's actions at the end."""
    return run.history["train/q"][-1][1]


def test_values_run_away_from_the_edge_of_reach_and_an_ensemble_keeps_them() -> None:
    plain = trained(PLAIN, NEAR)
    assert bool((believed(plain) > 2 * BEST).all())  # measured 46 and 55, where no value exceeds 10
    halfway = plain.history["train/q"][1][1]
    assert bool((believed(plain) > 2 * halfway).all())  # and growing
    assert bool((true_value(plain.policies) < 0).all())  # the policy heads for the void
    aware = trained(reach_aware(PLAIN), NEAR)
    assert bool((believed(aware) < BEST).all() and (believed(aware) > -BEST).all())
    # starting within one step of the best place a policy is worth about the first reward, 0 on average, and then 9
    assert bool((true_value(aware.policies) > 8).all())


def test_where_every_state_is_some_rollouts_first_pessimism_is_harmless() -> None:
    aware = trained(reach_aware(PLAIN), FAR)
    assert bool((believed(aware) < BEST).all() and (believed(aware) > -1).all())
    assert bool((true_value(aware.policies) > 6.5).all())


def test_the_least_of_k() -> None:
    values = torch.randn(5, 2, 7)
    assert torch.equal(pessimistic(values), values.min(0).values)
    assert torch.equal(pessimistic(values[:2]), values[:2].min(0).values)
    assert torch.equal(pessimistic(values[:1]), values[0])


def test_likeness_by_hand() -> None:
    """Of linear critics, whose slopes are what they are made of."""
    slopes = torch.tensor([[1.0, 0.0], [0.0, 2.0], [-3.0, 0.0]])  # cosines: 0, -1, 0
    actions = torch.randn(3, 1, 4, 2).requires_grad_()
    found = likeness((actions * slopes[:, None, None]).sum(-1), actions)
    assert torch.allclose(found, torch.full((1, 4), 2 * -1 / 2), atol=1e-6)
    found = likeness((actions * slopes[:1, None, None]).sum(-1), actions)
    assert torch.allclose(found, torch.full((1, 4), 3.0), atol=1e-6)  # K = 3 alike


def test_diversity_parts_the_critics_slopes() -> None:
    def after(diversity: float) -> float:
        agent = reach_aware(PLAIN, critics=4, diversity=diversity)
        run = train_offline(
            rollouts_of_one_step(NEAR),
            agent,
            OfflineConfig(updates=150, batch_size=64, synthetic=0, log_every=150),
            seeds=(0,),
            progress=False,
        )
        return float(run.history["train/likeness"][-1][1])

    assert after(10.0) < -0.9 < 0.0 < after(1e-9)  # the least possible is -K / (K - 1) = -4/3


def test_more_critics_are_more_not_others_and_a_batch_of_one_gradient_reaches_each() -> None:
    few, many = (Critics(3, 2, (8,), count=k, seeds=(4, 9)) for k in (2, 5))
    seen, actions = torch.randn(2, 6, 3), torch.randn(2, 6, 2)
    assert torch.allclose(many(seen, actions)[:2], few(seen, actions), atol=1e-6)
    assert torch.allclose(many(seen, actions, first=True)[0], many(seen, actions)[0], atol=1e-6)
    values, own = many.with_own_actions(seen, actions)
    assert torch.allclose(values, many(seen, actions), atol=1e-6) and own.shape == (5, 2, 6, 2)


def test_what_cannot_be_is_refused() -> None:
    assert reach_aware(PLAIN) == replace(PLAIN, critics=10, maximise="least")
    with pytest.raises(ValueError, match="2 critics for diversity required, got 2 and 1"):
        replace(PLAIN, critics=1, diversity=1.0)
