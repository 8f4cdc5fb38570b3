"""Implicit Q-learning (IQL, Kostrikov et al. 2110.06169) on recorded decisions: no model, no step taken, no action that was not recorded.

A value V and two action values Q are learned from decisions alone. V follows the upper expectile of Q over the chunks that the data
holds (equation 5), Q the reward and V of what came next (equation 6), so nothing is ever asked of a chunk that nobody took. The policy
is drawn out of them by advantage-weighted regression (equation 7): cloning, in which better chunks count more.

Differences from the paper, which has no chunks and sees states: an action is a whole chunk of what is sent; Q and V share one pair of
eyes; weights are divided by their mean in the batch, so that the policy's gradient keeps its size whatever the temperature is.
The discount is of a decision, not of a control step.
"""

import copy
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from worldline.data.normalization import RobustNormalizer
from worldline.errors import PolicyError
from worldline.policies.cloned import ClonedPolicy
from worldline.policies.encoder import EncoderConfig, ObservationEncoder, mlp
from worldline.types import Observation, WorldSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class IQLConfig:
    """How recorded decisions become values and weights."""

    discount: float = 0.95
    """Of a decision."""
    expectile: float = 0.8
    """Which expectile of Q over recorded chunks V is: 0.5 their mean (the value of whoever recorded), towards 1 their best."""
    temperature: float = 40.0
    """Factor of the advantage in the exponent of a chunk's weight (the paper's beta): 0 clones everything alike. A decision wasted
    on the way to the one reward of 1 costs about (1 - discount) times the value, so this is larger than for dense rewards."""
    max_weight: float = 100.0
    """Cap on a chunk's weight."""
    polyak: float = 0.02
    """Share by which the target of Q follows Q in a batch."""
    hidden: int = 256
    """Width of the heads of Q and V."""

    def __post_init__(self) -> None:
        if not 0 < self.discount <= 1:
            raise ValueError(f"discount above 0 and at most 1 required, got {self.discount}")
        if not 0 < self.expectile < 1:
            raise ValueError(f"expectile between 0 and 1 (both excluded) required, got {self.expectile}")
        if self.temperature < 0 or not self.max_weight > 0:
            raise ValueError(
                f"temperature of at least 0 and max_weight above 0 required, got {self.temperature} and {self.max_weight}"
            )
        if not 0 < self.polyak <= 1 or self.hidden < 1:
            raise ValueError(
                f"polyak above 0 and at most 1, and hidden of at least 1 required, got {self.polyak} and {self.hidden}"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Transitions:
    """n recorded decisions: what was seen, the chunk that followed, what it earned, what was seen after it."""

    observation: Observation
    actions: Float[Tensor, "n m a"]  # physical units
    reward: Float[Tensor, " n"]  # the sum over the decision's frames
    terminated: Bool[Tensor, " n"]  # nothing follows; a recording that was merely cut is not terminated
    after: Observation


def expectile_loss(error: Float[Tensor, " n"], expectile: float) -> Float[Tensor, ""]:
    """Asymmetric squares of `error` = sample - estimate (2110.06169, equation 4): |tau - 1(error < 0)| * error^2.

    The estimate that minimises it is the samples' tau-expectile; at 0.5 it is their mean.
    """
    weight = torch.where(error < 0, 1 - expectile, expectile)
    return (weight * error.square()).mean()


def advantage_weights(advantage: Float[Tensor, " n"], *, temperature: float, max_weight: float) -> Float[Tensor, " n"]:
    """exp(temperature * advantage), at most `max_weight` (2110.06169, equation 7)."""
    return (temperature * advantage).exp().clamp(max=max_weight)


def one_step_return(
    reward: Float[Tensor, " n"], after: Float[Tensor, " n"], terminated: Bool[Tensor, " n"], *, discount: float
) -> Float[Tensor, " n"]:
    """What Q should learn: the reward and, unless the decision ended the episode, the discounted value of what came after."""
    return reward + discount * after * ~terminated


class ChunkCritic(nn.Module):
    """V of what is seen, and two Qs of it with a chunk, on one encoder of their own.

    Args:
        steps: actions of a chunk that are sent, and so count.
        action_normalizer, pose_normalizer: the policy's.
    """

    def __init__(
        self,
        config: EncoderConfig,
        spec: WorldSpec,
        *,
        steps: int,
        action_normalizer: RobustNormalizer,
        pose_normalizer: RobustNormalizer,
        hidden: int,
    ) -> None:
        super().__init__()
        self.steps = steps
        self.action_normalizer, self.pose_normalizer = action_normalizer, pose_normalizer
        self.encoder = ObservationEncoder(config, spec.cameras, len(spec.pose_names))
        self.value = mlp(self.encoder.width, hidden, 1)
        self.first, self.second = (mlp(self.encoder.width + steps * spec.action.dim, hidden, 1) for _ in range(2))

    def features(self, observation: Observation) -> Float[Tensor, "n d"]:
        """What the heads are given."""
        device = next(self.parameters()).device
        frames = {camera: observation.images[camera].to(device) for camera in self.encoder.names}
        return self.encoder(frames, self.pose_normalizer.normalize(observation.pose.to(device)))

    def v(self, features: Float[Tensor, "n d"]) -> Float[Tensor, " n"]:
        """The return to be expected."""
        return self.value(features)[:, 0]

    def q(
        self, features: Float[Tensor, "n d"], actions: Float[Tensor, "n m a"]
    ) -> tuple[Float[Tensor, " n"], Float[Tensor, " n"]]:
        """Two estimates of the return after a chunk in physical units."""
        sent = self.action_normalizer.normalize(actions[:, : self.steps].to(features.device)).flatten(1)
        given = torch.cat([features, sent], dim=1)
        return self.first(given)[:, 0], self.second(given)[:, 0]


class ImplicitQLearner(nn.Module):
    """A policy with what teaches it: the critic, and the critic's slow copy. Only the policy is worth publishing.

    Raises `PolicyError` for a diffusion policy, and for chunks that do not fill one frame.
    """

    def __init__(self, policy: ClonedPolicy, config: IQLConfig) -> None:
        super().__init__()
        require_density(policy.config.kind)
        k = policy.spec.control_steps
        if policy.config.chunk < k:
            raise PolicyError(f"a chunk of at least {k} actions is required (k = {k}), got {policy.config.chunk}")
        self.config, self.policy = config, policy
        self.critic = ChunkCritic(
            policy.config.encoder,
            policy.spec,
            steps=policy.config.chunk // k * k,
            action_normalizer=policy.action_normalizer,
            pose_normalizer=policy.pose_normalizer,
            hidden=config.hidden,
        )
        self.target = copy.deepcopy(self.critic).requires_grad_(False)

    def loss(
        self, batch: Transitions, generator: torch.Generator | None = None
    ) -> tuple[Float[Tensor, ""], Mapping[str, Tensor]]:
        """The sum of the three losses, each of which reaches its own weights only, and metrics.

        In training mode the target first takes a step towards Q as the last update left it.
        """
        if self.training:
            self.follow()
        config, critic = self.config, self.critic
        best, goal = self.estimates(batch)
        features = critic.features(batch.observation)
        value = critic.v(features)
        value_loss = expectile_loss(best - value, config.expectile)
        q_loss = sum((q - goal).square().mean() for q in critic.q(features, batch.actions))
        advantage = best - value.detach()
        weight = advantage_weights(advantage, temperature=config.temperature, max_weight=config.max_weight)
        policy_loss = (weight / weight.mean() * self.policy.losses(batch.observation, batch.actions, generator)).mean()
        shown = {
            "policy_loss": policy_loss,
            "value_loss": value_loss,
            "q_loss": q_loss,
            "value": value.mean(),
            "advantage_spread": advantage.std(),
            # of n equal weights it is 1: how many chunks of a batch the policy in effect learns from
            "effective_share": weight.sum().square() / (len(weight) * weight.square().sum()),
        }
        return policy_loss + value_loss + q_loss, {name: torch.as_tensor(x).detach() for name, x in shown.items()}

    @torch.no_grad()
    def estimates(self, batch: Transitions) -> tuple[Float[Tensor, " n"], Float[Tensor, " n"]]:
        """Of each decision: the lesser of the target's two Qs, and the one-step return."""
        best = torch.minimum(*self.target.q(self.target.features(batch.observation), batch.actions))
        after = self.critic.v(self.critic.features(batch.after))
        goal = one_step_return(
            batch.reward.to(after), after, batch.terminated.to(after.device), discount=self.config.discount
        )
        return best, goal

    @torch.no_grad()
    def follow(self) -> None:
        """Move the target by `polyak` towards the critic."""
        for slow, fast in zip(self.target.parameters(), self.critic.parameters(), strict=True):
            slow.lerp_(fast, self.config.polyak)


def require_density(kind: str) -> None:
    """Raise `PolicyError` for kinds of policy that advantage-weighted regression cannot draw out."""
    if kind == "diffusion":
        raise PolicyError(
            "a policy with a density is required (kind bc or discrete), got diffusion: advantage-weighted regression raises the "
            "log-density of the better chunks, and that of a diffusion policy has no closed form. Clone one from successes instead: "
            "worldline train policy --kind diffusion --demonstrations success."
        )
