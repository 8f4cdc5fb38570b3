"""A point that actions push along each axis, with exact dynamics and a known best policy, and data of mixed quality."""

import torch
from torch import Tensor

from worldline.data.trajectories import Trajectories, control_spec
from worldline.policies.states import StatePolicies

AXES, PUSH, STEPS = 2, 0.2, 20
SPEC = control_spec("integrator", AXES, [-2.0] * AXES, [2.0] * AXES, rate_hz=10.0)


def step(position: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
    """Next position, and the reward: less the squared distance of where it came to. Best: action = -position / PUSH, clipped."""
    after = position + PUSH * action.clamp(-2, 2)
    return after, -after.square().sum(-1)


def record(episodes: int, seed: int, *, steps: int = STEPS, chance: float = 0.3) -> Trajectories:
    """Episodes from anywhere in [-1, 1], cut after `steps`: with probability `chance` an action is the best one, else any."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(*shape: int) -> Tensor:
        return 2 * torch.rand(*shape, generator=generator) - 1

    position, rows = uniform(episodes, AXES), []
    for _ in range(steps):
        best = (-position / PUSH).clamp(-2, 2)
        good = torch.rand(episodes, 1, generator=generator) < chance
        action = torch.where(good, best, 2 * uniform(episodes, AXES))
        after, reward = step(position, action)
        rows.append((position, action, reward, after))
        position = after
    seen, done, rewards, following = (torch.stack(column, 1).flatten(0, 1) for column in zip(*rows))
    return Trajectories(
        spec=SPEC,
        observations=seen,
        actions=done,
        rewards=rewards,
        next_observations=following,
        terminated=torch.zeros(len(rewards), dtype=torch.bool),
        lengths=torch.full((episodes,), steps),
    )


def true_return(policies: StatePolicies, update: int = 0) -> dict[str, Tensor]:
    """Each member's mean return from starts of its own evaluation."""
    position = (2 * torch.rand(64, AXES, generator=torch.Generator().manual_seed(99)) - 1).expand(
        policies.members, -1, -1
    )
    total = torch.zeros(policies.members)
    for _ in range(STEPS):
        position, reward = step(position, policies.act(position))
        total = total + reward.mean(-1)
    return {"return": total}


def best_return() -> float:
    """Of the best policy from the same starts."""
    position = 2 * torch.rand(64, AXES, generator=torch.Generator().manual_seed(99)) - 1
    total = 0.0
    for _ in range(STEPS):
        position, reward = step(position, (-position / PUSH).clamp(-2, 2))
        total += float(reward.mean())
    return total
