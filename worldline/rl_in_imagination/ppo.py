"""Policy updates on imagined decisions: PPO (1707.06347), and GRPO (2402.03300), which needs no critic.

The loss of both is PPO's clipped one plus `kl` times the divergence from the cloned policy, which keeps the policy where the world
model has seen data. They differ in the advantage: PPO's is the generalised estimate by a critic; GRPO's compares the episodes of
rows that began alike, and counts every decision of an episode alike.
The cap on a Gaussian policy's standard deviation (at most 1, World4RL 2509.19080) is the policy's own (`policies.heads`).
"""

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.distributions import kl_divergence

from worldline.data.normalization import RobustNormalizer
from worldline.errors import WorldlineError
from worldline.policies.encoder import EncoderConfig, ObservationEncoder, mlp
from worldline.rl_in_imagination.collect import Actor, Decisions
from worldline.rl_in_imagination.returns import advantages, group_advantages, require_finite
from worldline.types import Observation, WorldSpec

# Advantages are divided by their spread, but not by less than this: where nothing was rewarded, what is left is the critic's error.
LEAST_SPREAD = 0.05


@dataclass(frozen=True, slots=True, kw_only=True)
class PPOConfig:
    """How decisions become updates. Discounts are per decision."""

    algorithm: Literal["ppo", "grpo"] = "ppo"
    """ppo: a critic says what a decision was worth. grpo: other rows that began alike do."""
    group: int = 8
    """Rows that begin alike (grpo)."""
    discount: float = 0.97
    """Of later rewards, a decision."""
    smoothing: float = 0.95
    """Lambda of the generalised advantage estimate (ppo)."""
    clip: float = 0.2
    """How far the probability ratio may go from 1."""
    kl: float = 0.3
    """Weight of the divergence from the cloned policy, in nats a decision. With 0.02 a policy was ruined in a dream whose weak spots it had
    found, with 0.3 the same one gained (docs/results.md); where the dream is right about what decides, less of it may gain more."""
    entropy: float = 0.0
    """Weight of the entropy of a choice, in nats a decision."""
    epochs: int = 4
    """Passes over the decisions of an iteration."""
    minibatch: int = 128
    """Decisions of a gradient step."""
    lr: float = 3e-5
    """Learning rate of the policy."""
    critic_lr: float = 5e-4
    """Learning rate of the critic."""
    max_norm: float = 0.5
    """Largest gradient norm."""
    target_kl: float = 0.05
    """An iteration's passes end early once the policy has moved this far from where it began, in nats a decision."""
    max_kl: float = 100.0
    """Farther than this from the cloned policy the refinement stops with an error."""

    def __post_init__(self) -> None:
        if not 0 < self.discount <= 1 or not 0 <= self.smoothing <= 1:
            raise ValueError(
                f"discount above 0 and smoothing from 0 on required, both at most 1, got {self.discount} and {self.smoothing}"
            )
        for name in ("clip", "lr", "critic_lr", "max_norm", "target_kl", "max_kl"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)}")
        for name in ("epochs", "minibatch"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if min(self.kl, self.entropy) < 0:
            raise ValueError(f"kl and entropy must be at least 0, got {self.kl} and {self.entropy}")
        if self.algorithm == "grpo" and self.group < 2:
            raise ValueError(f"group must be at least 2, got {self.group}")


class ValueNetwork(nn.Module):
    """A `Critic` from pixels and poses, with eyes of its own."""

    def __init__(
        self, config: EncoderConfig, spec: WorldSpec, *, pose_normalizer: RobustNormalizer, hidden: int = 256
    ) -> None:
        super().__init__()
        self.pose_normalizer = pose_normalizer
        self.encoder = ObservationEncoder(config, spec.cameras, len(spec.pose_names))
        self.head = mlp(self.encoder.width, hidden, 1)

    def forward(self, observation: Observation) -> Float[Tensor, " n"]:
        device = next(self.parameters()).device
        frames = {camera: observation.images[camera].to(device) for camera in self.encoder.names}
        pose = self.pose_normalizer.normalize(observation.pose.to(device))
        return self.head(self.encoder(frames, pose))[:, 0]


def clipped_loss(
    log_ratio: Float[Tensor, " n"], advantage: Float[Tensor, " n"], clip: float
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """The clipped surrogate (1707.06347, equation 7), to be minimised, and the share of decisions that it no longer moves."""
    ratio = log_ratio.exp()
    kept = torch.minimum(ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage)
    stopped = torch.where(advantage > 0, ratio > 1 + clip, ratio < 1 - clip)
    return -kept.mean(), stopped.float().mean().detach()


def advantages_of(decisions: Decisions, config: PPOConfig) -> Float[Tensor, "n t"]:
    """Of every decision; those that do not count are 0. Raises `WorldlineError` for rewards that are not finite."""
    require_finite(decisions.reward)
    if config.algorithm == "ppo":
        found = advantages(
            decisions.reward,
            decisions.value,
            decisions.after,
            decisions.terminated | decisions.left,
            decisions.truncated,
            discount=config.discount,
            smoothing=config.smoothing,
        )
    else:
        steps = config.discount ** torch.arange(decisions.reward.shape[1])
        total = (decisions.reward * decisions.live * steps).sum(1)
        found = group_advantages(total, config.group)[:, None].expand_as(decisions.reward)
    return found * decisions.live


class Updater:
    """Moves `actor` (and `critic`) by decisions. The cloned policy is kept as it was for the divergence."""

    def __init__(self, actor: Actor, critic: ValueNetwork | None, config: PPOConfig) -> None:
        assert isinstance(actor, nn.Module)
        self.actor, self.critic, self.config = actor, critic, config
        self.reference = copy.deepcopy(actor).eval().requires_grad_(False)
        self.optimizer = torch.optim.Adam([p for p in actor.parameters() if p.requires_grad], lr=config.lr, eps=1e-5)
        self.critic_optimizer = (
            None if critic is None else torch.optim.Adam(critic.parameters(), lr=config.critic_lr, eps=1e-5)
        )

    def update(self, decisions: Decisions, *, generator: torch.Generator, move: bool = True) -> dict[str, float]:
        """One iteration: `epochs` passes over the decisions, in minibatches drawn by `generator`.

        `move`: whether the policy learns, or (while it is still poor) the critic alone.

        Returns mean metrics. Raises `WorldlineError` if the policy has gone farther than `max_kl` from the cloned one, or where a
        loss is not finite.
        """
        config, critic, live = self.config, self.critic, decisions.live.flatten()
        advantage = advantages_of(decisions, config).flatten()
        target = advantage + decisions.value.flatten()
        spread, mean = advantage[live].std(), advantage[live].mean()
        scaled = (advantage - mean) / spread.clamp(min=LEAST_SPREAD) if config.algorithm == "ppo" else advantage
        old = decisions.log_prob.flatten()
        seen: list[dict[str, float]] = []
        for _ in range(config.epochs):
            moved = []
            for rows in _minibatches(live, config.minibatch, generator):
                observation, choice = decisions.rows(rows)
                shown = {}
                if critic is not None and self.critic_optimizer is not None:
                    missed = (critic(observation).cpu() - target[rows]).square().mean()
                    self._step(self.critic_optimizer, critic, missed)
                    shown["value_error"] = float(missed.detach())
                if move:
                    shown |= self._move(observation, choice, old[rows], scaled[rows])
                    moved.append(shown["step_kl"])
                seen.append(shown)
            if move and sum(moved) / len(moved) > config.target_kl:
                break
        found = {name: sum(s[name] for s in seen) / len(seen) for name in seen[0]}
        if found.get("kl", 0.0) > config.max_kl:
            raise WorldlineError(
                f"the policy is {found['kl']:.3g} nats a decision away from the cloned one, at most {config.max_kl:g} required. "
                "Lower --rl.ppo.lr, raise --rl.ppo.kl, or allow more with --rl.ppo.max-kl."
            )
        if critic is not None:
            variance = float(target[live].var())
            found["explained"] = 1 - found["value_error"] / variance if variance > 0 else 0.0
        return found

    def _move(self, observation: Observation, choice: Tensor, old: Tensor, advantage: Tensor) -> dict[str, float]:
        config = self.config
        ours = self.actor.distribution(observation)
        device = next(self.reference.parameters()).device
        log_ratio = ours.log_prob(choice.to(device)).cpu() - old
        loss, stopped = clipped_loss(log_ratio, advantage, config.clip)
        with torch.no_grad():
            theirs = self.reference.distribution(observation)
        away = kl_divergence(ours, theirs).mean().cpu()
        entropy = ours.entropy().mean().cpu()
        self._step(self.optimizer, self.actor, loss + config.kl * away - config.entropy * entropy)
        # of the old from the new policy, without bias and never negative (Schulman 2020)
        step = (log_ratio.exp() - 1 - log_ratio).mean()
        return {
            "policy_loss": float(loss.detach()),
            "kl": float(away.detach()),
            "entropy": float(entropy.detach()),
            "clipped": float(stopped),
            "step_kl": float(step.detach()),
        }

    def _step(self, optimizer: torch.optim.Optimizer, module: nn.Module, loss: Tensor) -> None:
        if not torch.isfinite(loss):
            raise WorldlineError(f"a finite loss is required, got {float(loss.detach())}. Lower --rl.ppo.lr.")
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(module.parameters(), self.config.max_norm)
        optimizer.step()


def _minibatches(live: Bool[Tensor, " n"], size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Numbers of the decisions that count, in an order drawn, in even parts of about `size`."""
    numbers = live.nonzero().flatten()
    order = numbers[torch.randperm(len(numbers), generator=generator)]
    yield from order.tensor_split(max(1, round(len(order) / size)))
