"""Two offline agents on low-dimensional data, e members trained at once by batched matrix products.

- TD3+BC (Fujimoto & Gu 2106.06860): TD3 (1802.09477) whose policy is also drawn to the action in the data.
- IQL (Kostrikov et al. 2110.06169): an expectile value, and advantage-weighted regression.

Losses are means over a member's rows and sums over members, networks do not share weights and Adam works number by number, so no member
influences another. Truncated transitions bootstrap, terminated ones do not (`one_step_return`).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from worldline.diffusion import row_noise
from worldline.policies.batched_mlp import BatchedMLP
from worldline.policies.states import StatePolicies, StatePolicyConfig
from worldline.rl_in_imagination.iql import advantage_weights, expectile_loss, one_step_return
from worldline.rl_in_imagination.offline.critics import Critics, follow, slow_copy
from worldline.rl_in_imagination.offline.reach import likeness, pessimistic
from worldline.rl_in_imagination.offline.replay import Batch, Scaling
from worldline.types import WorldSpec

_VALUE_STREAM = 500  # of the value's initial weights
_SMOOTHING_STREAM = 103  # of random numbers


@dataclass(frozen=True, slots=True, kw_only=True)
class TD3BCConfig:
    """As published, but for the last three, which `reach_aware` sets."""

    hidden: tuple[int, ...] = (256, 256)
    """Widths of the layers of actor and critics."""
    discount: float = 0.99
    """Of later rewards, a step."""
    alpha: float | None = 2.5
    """Weight of Q, brought to a mean size of 1, against the squared distance from the data's action; None: Q alone (plain TD3)."""
    actor_lr: float = 3e-4
    """Learning rate of the policy."""
    critic_lr: float = 3e-4
    """Learning rate of the critics."""
    polyak: float = 0.005
    """Share by which targets follow, at every update of the policy."""
    noise: float = 0.2
    """Standard deviation of what smooths the target's action, in unit coordinates."""
    noise_clip: float = 0.5
    """Most of that smoothing noise."""
    delay: int = 2
    """Critic updates for one of the policy and the targets."""
    critics: int = 2
    """K: the least of them is learned from."""
    diversity: float = 0.0
    """Weight, in the critics' loss, of how alike their slopes along the action are (EDAC's eta)."""
    maximise: Literal["first", "least"] = "first"
    """What the policy maximises: critic 0 as published, or the least of all."""

    def __post_init__(self) -> None:
        _check(self.discount, self.polyak, self.hidden, self.critics, min(self.actor_lr, self.critic_lr))
        if (self.alpha is not None and self.alpha < 0) or min(self.noise, self.noise_clip, self.diversity) < 0:
            raise ValueError(
                f"alpha, noise, noise_clip and diversity of at least 0 required, got {self.alpha}, {self.noise}, {self.noise_clip}, "
                f"{self.diversity}"
            )
        if self.delay < 1 or (self.critics < 2 and self.diversity > 0):
            raise ValueError(
                f"delay of at least 1, and 2 critics for diversity required, got {self.delay} and {self.critics}"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class StateIQLConfig:
    """As published for locomotion."""

    hidden: tuple[int, ...] = (256, 256)
    """Widths of the layers of policy, critics and value."""
    kind: Literal["gaussian", "tanh-gaussian"] = "gaussian"
    """The policy's distribution."""
    discount: float = 0.99
    """Of later rewards, a step."""
    expectile: float = 0.7
    """Of the critics' values that the value follows: 0.5 their mean, towards 1 their best."""
    temperature: float = 3.0
    """Factor of the advantage in a weight's exponent (the paper's beta)."""
    max_weight: float = 100.0
    """Most that a step weighs in cloning."""
    lr: float = 3e-4
    """Learning rate of all networks."""
    decay: bool = True
    """The policy's learning rate falls to 0 along a cosine over the whole run."""
    polyak: float = 0.005
    """Share by which the critics' targets follow, at every update."""
    critics: int = 2
    """K: the least of them is what the value follows."""

    def __post_init__(self) -> None:
        _check(self.discount, self.polyak, self.hidden, self.critics, self.lr)
        if not 0 < self.expectile < 1 or self.temperature < 0 or not self.max_weight > 0:
            raise ValueError(
                f"expectile between 0 and 1, temperature of at least 0 and max_weight above 0 required, got {self.expectile}, "
                f"{self.temperature} and {self.max_weight}"
            )


def reach_aware(config: TD3BCConfig, *, critics: int = 10, diversity: float = 0.0) -> TD3BCConfig:
    """The same agent with an ensemble of critics whose least value is learned from and maximised (see `reach`).

    `diversity` counts beside squared errors of values, so its size depends on theirs: published values (1 and more) are for values in
    the hundreds. On the plane of tests/rl_in_imagination/test_reach.py, values up to 10, more critics were the cure, a diversity of 0.01
    changed nothing, and one of 0.1 or 1 did harm.
    """
    return replace(config, critics=critics, diversity=diversity, maximise="least")


AgentConfig = TD3BCConfig | StateIQLConfig
Metrics = Mapping[str, Float[Tensor, " e"]]


class OfflineAgent(nn.Module):
    """Policies, what teaches them, and their optimisers, whose state belongs to the agent's."""

    policies: StatePolicies
    optimizers: tuple[torch.optim.Optimizer, ...]

    def update(self, batch: Batch, step: int) -> Metrics:
        """One update of every member; `step` counts them from 0. Detached numbers a member."""
        raise NotImplementedError

    def tensors(self) -> dict[str, Tensor]:
        """All that must be kept for training to go on as if it had not stopped."""
        state = {f"model/{name}": value for name, value in self.state_dict().items()}
        for which, optimizer in enumerate(self.optimizers):
            for index, slots in optimizer.state_dict()["state"].items():
                state |= {f"optimizer/{which}/{index}/{name}": torch.as_tensor(v) for name, v in slots.items()}
        return state

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """What `tensors` gave; other keys are let be."""
        self.load_state_dict({k.removeprefix("model/"): v for k, v in tensors.items() if k.startswith("model/")})
        for which, optimizer in enumerate(self.optimizers):
            slots: dict[int, dict[str, Tensor]] = {}
            for key, value in tensors.items():
                if key.startswith(f"optimizer/{which}/"):
                    _, _, index, name = key.split("/")
                    slots.setdefault(int(index), {})[name] = value
            optimizer.load_state_dict({"state": slots, "param_groups": optimizer.state_dict()["param_groups"]})


class TD3BC(OfflineAgent):
    """TD3+BC of `len(seeds)` members."""

    seeds: Tensor

    def __init__(self, config: TD3BCConfig, spec: WorldSpec, scaling: Scaling, *, seeds: Sequence[int]) -> None:
        super().__init__()
        self.config = config
        kind = StatePolicyConfig(kind="deterministic", hidden=config.hidden)
        self.policies = StatePolicies(kind, spec, seeds=seeds, mean=scaling.mean, std=scaling.std)
        self.critics = Critics(len(spec.pose_names), spec.action.dim, config.hidden, count=config.critics, seeds=seeds)
        self.slow_policies, self.slow_critics = slow_copy(self.policies), slow_copy(self.critics)
        self.register_buffer("seeds", torch.tensor(seeds), persistent=False)
        self.critic_optimizer = torch.optim.Adam(self.critics.parameters(), lr=config.critic_lr, fused=True)
        self.actor_optimizer = torch.optim.Adam(self.policies.parameters(), lr=config.actor_lr, fused=True)
        self.optimizers = (self.critic_optimizer, self.actor_optimizer)

    def update(self, batch: Batch, step: int) -> Metrics:
        config = self.config
        goal = self.goal(batch, step)
        if config.diversity:
            values, own = self.critics.with_own_actions(batch.observations, batch.actions)
        else:
            values, own = self.critics(batch.observations, batch.actions), None
        q_loss = (values - goal).square().mean(-1).sum(0)  # "e"
        shown = {"q_loss": q_loss.detach(), "q": values.detach().mean((0, 2)), "goal": goal.mean(-1)}
        total = q_loss.sum()
        if own is not None:
            alike = likeness(values, own).mean(-1)
            total = total + config.diversity * alike.sum()
            shown["likeness"] = alike.detach()
        self.critic_optimizer.zero_grad()
        total.backward()
        self.critic_optimizer.step()
        if step % config.delay == 0:
            shown |= self._update_policies(batch)
            follow(self.slow_policies, self.policies, config.polyak)
            follow(self.slow_critics, self.critics, config.polyak)
        return shown

    @torch.no_grad()
    def goal(self, batch: Batch, step: int) -> Float[Tensor, "e n"]:
        """What the critics should learn: the reward and, unless it ended, the least slow value of the slow policy's smoothed action."""
        config, after = self.config, batch.next_observations
        chosen, _ = self.slow_policies.location(after)
        noise = row_noise(self.seeds, step, 0, tuple(chosen.shape[1:]), stream=_SMOOTHING_STREAM)
        noise = (config.noise * noise).clamp(-config.noise_clip, config.noise_clip)
        value = pessimistic(self.slow_critics(after, (chosen + noise).clamp(-1, 1)))
        return _one_step(batch, value, config.discount)

    def _update_policies(self, batch: Batch) -> dict[str, Tensor]:
        config = self.config
        chosen, _ = self.policies.location(batch.observations)
        value = pessimistic(self.critics(batch.observations, chosen, first=config.maximise == "first"))
        if config.alpha is None:
            loss, distance = -value.mean(-1), torch.zeros_like(value[:, 0])
        else:
            scale = config.alpha / value.detach().abs().mean(-1)
            distance = (chosen - batch.actions).square().mean((1, 2))
            loss = distance - scale * value.mean(-1)
        self.actor_optimizer.zero_grad()
        loss.sum().backward(inputs=list(self.policies.parameters()))
        self.actor_optimizer.step()
        return {"policy_loss": loss.detach(), "policy_q": value.detach().mean(-1), "distance": distance.detach()}


class StateIQL(OfflineAgent):
    """IQL of `len(seeds)` members. `updates`: of the whole run, over which the policy's learning rate falls."""

    def __init__(
        self, config: StateIQLConfig, spec: WorldSpec, scaling: Scaling, *, seeds: Sequence[int], updates: int
    ) -> None:
        super().__init__()
        self.config, self.updates = config, updates
        kind = StatePolicyConfig(kind=config.kind, hidden=config.hidden)
        o, a = len(spec.pose_names), spec.action.dim
        self.policies = StatePolicies(kind, spec, seeds=seeds, mean=scaling.mean, std=scaling.std)
        self.critics = Critics(o, a, config.hidden, count=config.critics, seeds=seeds)
        self.value = BatchedMLP((o, *config.hidden, 1), seeds, stream=_VALUE_STREAM)
        self.slow_critics = slow_copy(self.critics)
        teachers = [*self.critics.parameters(), *self.value.parameters()]
        self.critic_optimizer = torch.optim.Adam(teachers, lr=config.lr, fused=True)
        self.actor_optimizer = torch.optim.Adam(self.policies.parameters(), lr=config.lr, fused=True)
        self.optimizers = (self.critic_optimizer, self.actor_optimizer)

    def update(self, batch: Batch, step: int) -> Metrics:
        """The three losses reach their own weights only, so one backward pass serves them all."""
        config, policies = self.config, self.policies
        with torch.no_grad():
            best = pessimistic(self.slow_critics(batch.observations, batch.actions))
            goal = _one_step(batch, self.value(batch.next_observations)[..., 0], config.discount)
        value = self.value(batch.observations)[..., 0]
        values = self.critics(batch.observations, batch.actions)
        advantage = best - value.detach()
        weight = advantage_weights(
            advantage.flatten(), temperature=config.temperature, max_weight=config.max_weight
        ).view_as(advantage)
        density = policies.density(policies.location(batch.observations), batch.actions)
        policy_loss = -(weight * density).mean(-1)
        q_loss = (values - goal).square().mean(-1).sum(0)
        # the mean over all rows, times the members: the sum of the members' means
        value_loss = expectile_loss((best - value).flatten(), config.expectile) * len(best)
        if config.decay:
            rate = 0.5 * config.lr * (1 + math.cos(math.pi * min(step / self.updates, 1)))
            self.actor_optimizer.param_groups[0]["lr"] = rate
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        (policy_loss.sum() + q_loss.sum() + value_loss).backward()
        for optimizer in self.optimizers:
            optimizer.step()
        follow(self.slow_critics, self.critics, config.polyak)
        return {
            "q_loss": q_loss.detach(),
            "q": values.detach().mean((0, 2)),
            "goal": goal.mean(-1),
            "policy_loss": policy_loss.detach(),
            "value": value.detach().mean(-1),
            "weight": weight.mean(-1),
        }


def build_agent(
    config: AgentConfig, spec: WorldSpec, scaling: Scaling, *, seeds: Sequence[int], updates: int
) -> TD3BC | StateIQL:
    """The untrained agent that a config tells of."""
    if isinstance(config, TD3BCConfig):
        return TD3BC(config, spec, scaling, seeds=seeds)
    return StateIQL(config, spec, scaling, seeds=seeds, updates=updates)


def _one_step(batch: Batch, after: Tensor, discount: float) -> Tensor:
    rows = (batch.rewards.flatten(), after.flatten(), batch.terminated.flatten())
    return one_step_return(*rows, discount=discount).view_as(after)


def _check(discount: float, polyak: float, hidden: tuple[int, ...], critics: int, lr: float) -> None:
    if not 0 <= discount < 1 or not 0 < polyak <= 1 or critics < 1 or lr < 0 or any(width < 1 for width in hidden):
        raise ValueError(
            "discount in [0, 1), polyak above 0 and at most 1, at least 1 critic, learning rates of at least 0 and hidden widths of at "
            f"least 1 required, got {discount}, {polyak}, {critics}, {lr} and {hidden}"
        )
