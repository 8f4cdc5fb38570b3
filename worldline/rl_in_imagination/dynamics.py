"""An ensemble of one-step dynamics models of low-dimensional tasks (PETS 1805.12114, as MBPO 1906.08253 uses it).

What policy-guided diffusion is measured against: trajectories rolled out step by step, from recorded states, by the policy itself. Each
member answers a Gaussian over (change of the observation, reward) and the probability that the episode ends there. In a rollout a member is
drawn anew at every step, and its errors add up.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from worldline import checkpoint
from worldline.data.trajectories import Trajectories
from worldline.diffusion import row_noise
from worldline.policies.batched_mlp import BatchedMLP
from worldline.types import WorldSpec
from worldline.worldmodels.trajectories import Windows
from worldline.worldmodels.trajectories.layout import CONSTANT, as_trajectories

PART, KIND = "dynamics", "ensemble"
_LEAST, _MOST = -10.0, 1.0  # bounds of the log-variance, in normalised units
_FARTHEST = (
    1.0  # of the data's own extent, beyond which a rolled-out observation is held: a rollout that explodes stays finite
)


@dataclass(frozen=True, slots=True, kw_only=True)
class DynamicsConfig:
    """Members and width of the ensemble."""

    members: int = 5
    """Networks of the ensemble; a step is that of one drawn at random."""
    hidden: tuple[int, ...] = (200, 200, 200)
    """Widths of their layers."""
    seed: int = 0
    """Of their first weights."""

    def __post_init__(self) -> None:
        if self.members < 1 or not self.hidden or min(self.hidden) < 1:
            raise ValueError(f"at least one member and hidden widths are required, got {self.members}, {self.hidden}")


class Step(NamedTuple):
    """What follows n decisions."""

    observations: Float[Tensor, "n o"]
    rewards: Float[Tensor, " n"]
    terminated: Bool[Tensor, " n"]


class DynamicsEnsemble(nn.Module):
    """`members` networks that foretell one step, each from batches of its own."""

    mean: Tensor
    std: Tensor
    change_mean: Tensor
    change_std: Tensor
    least: Tensor
    most: Tensor

    def __init__(self, config: DynamicsConfig, spec: WorldSpec) -> None:
        super().__init__()
        self.config, self.spec = config, spec
        o, a = len(spec.pose_names), spec.action.dim
        seeds = [config.seed * 1000 + j for j in range(config.members)]
        self.net = BatchedMLP((o + a, *config.hidden, 2 * (o + 1) + 1), seeds, stream=7)
        for name, width in (("mean", o + a), ("change_mean", o + 1), ("least", o)):
            self.register_buffer(name, torch.zeros(width))
        for name, width in (("std", o + a), ("change_std", o + 1), ("most", o)):
            self.register_buffer(name, torch.ones(width))

    @torch.no_grad()
    def fit(self, data: Trajectories) -> "DynamicsEnsemble":
        """Take normalisation from recorded steps."""
        given = torch.cat([data.observations, data.actions], 1)
        change = torch.cat([data.next_observations - data.observations, data.rewards[:, None]], 1)
        size = (
            given.abs().amax(0).double(),
            torch.cat([data.observations, data.rewards[:, None]], 1).abs().amax(0).double(),
        )
        for values, mean, std, of in (
            (given, self.mean, self.std, size[0]),
            (change, self.change_mean, self.change_std, size[1]),
        ):
            spread = values.double().std(0, correction=0)
            mean.copy_(values.double().mean(0))
            std.copy_(torch.where(spread > CONSTANT * of, spread, 1.0))
        extent = data.observations.amax(0) - data.observations.amin(0)
        self.least.copy_(data.observations.amin(0) - _FARTHEST * extent)
        self.most.copy_(data.observations.amax(0) + _FARTHEST * extent)
        return self

    def loss(self, data: Trajectories, rows: Int[Tensor, "e n"]) -> Float[Tensor, ""]:
        """Mean over members of the negative log-likelihood of recorded steps, each member's own, and the cross entropy of their ends."""
        device = self.change_mean.device
        observations, actions, after, rewards, terminated = (
            x[rows].to(device)
            for x in (data.observations, data.actions, data.next_observations, data.rewards, data.terminated)
        )
        change = torch.cat([after - observations, rewards[..., None]], -1)
        target = (change - self.change_mean) / self.change_std
        mean, log_variance, logit = self._foretell(observations, actions)
        nll = 0.5 * ((target - mean).square() * (-log_variance).exp() + log_variance).mean()
        return nll + F.binary_cross_entropy_with_logits(logit, terminated.to(logit))

    @torch.no_grad()
    def step(
        self,
        observations: Float[Tensor, "n o"],
        actions: Float[Tensor, "n a"],
        *,
        seeds: Int[Tensor, " n"],
        at: int,
    ) -> Step:
        """A sample of what follows: row i by its seed and the step's number `at` alone. Each row asks one member, drawn anew."""
        e, o = self.config.members, observations.shape[1]
        mean, log_variance, logit = self._foretell(observations.expand(e, -1, -1), actions.expand(e, -1, -1))
        noise = row_noise(seeds, at, 1, (o + 3,)).to(mean)
        chance = 0.5 * (1 + torch.erf(noise[:, -2:] / 2**0.5))  # uniform
        member = (chance[:, 0] * e).long().clamp(max=e - 1)
        rows = torch.arange(len(observations), device=observations.device)
        mean, spread = mean[member, rows], (0.5 * log_variance[member, rows]).exp()
        change = (mean + spread * noise[:, : o + 1]) * self.change_std + self.change_mean
        following = (observations + change[:, :o]).clamp(self.least, self.most)
        return Step(following, change[:, o], logit[member, rows].sigmoid() > chance[:, 1])

    def rollout(
        self,
        act: Callable[[Tensor], Tensor],
        starts: Float[Tensor, "n o"],
        *,
        steps: int,
        seeds: Int[Tensor, " n"],
        provenance: Mapping[str, str] | None = None,
    ) -> Trajectories:
        """Trajectories of `steps` - 1 transitions from `starts`, actions by `act(observations "n o") -> "n a"`; cut at their end."""
        now, parts = starts, []
        for at in range(steps):
            actions = act(now)
            then = self.step(now, actions, seeds=seeds, at=at)
            parts.append((now, actions, then.rewards, then.terminated))
            now = then.observations
        windows = Windows(*(torch.stack(x, 1).cpu() for x in zip(*parts)))
        about = tuple({**(provenance or {}), "seed": str(int(seed))} for seed in seeds)
        return as_trajectories(windows, self.spec, about)

    def _foretell(
        self, observations: Float[Tensor, "e n o"], actions: Float[Tensor, "e n a"]
    ) -> tuple[Float[Tensor, "e n c"], Float[Tensor, "e n c"], Float[Tensor, "e n"]]:
        """Mean and log-variance of the normalised change, logit of the end."""
        given = (torch.cat([observations, actions], -1) - self.mean) / self.std
        out = self.net(given)
        c = len(self.change_mean)
        raw = out[..., c : 2 * c]
        bounded = _MOST - F.softplus(_MOST - raw)
        return out[..., :c], _LEAST + F.softplus(bounded - _LEAST), out[..., -1]

    # --- storage ------------------------------------------------------------------------------------------------------

    def save_pretrained(self, folder: str | Path, *, provenance: Mapping[str, Any] | None = None) -> None:
        checkpoint.save_part(
            folder,
            part=PART,
            kind=KIND,
            config=checkpoint.to_json(self.config),
            spec=self.spec,
            tensors=self.state_dict(),
            provenance=provenance or {},
        )

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> "DynamicsEnsemble":
        return checkpoint.load_part(
            folder,
            part=PART,
            build=lambda config, spec, source: cls(checkpoint.from_json(DynamicsConfig, config, source=source), spec),
        )
