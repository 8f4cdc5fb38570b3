"""Policies of low-dimensional observations: several members side by side, and one of them behind the house's protocols.

Inside, an action dimension is in *unit* coordinates u = (action - centre) / radius, so that its range is [-1, 1]. Three kinds:

- deterministic (TD3, 1802.09477): u = tanh(network).
- tanh-gaussian (SAC, 1801.01290, appendix C): u = tanh(z), z normal, its spread given by the network.
- gaussian (IQL, 2110.06169): u normal around tanh(network), a learned spread alike for all observations; clipped when it acts.

Densities are of actions in physical units. A deterministic policy counts as a Gaussian of unit variance, in unit coordinates, around its
action, as policy-guided diffusion (2404.06356) has it; so its score points from an action to its own, (own - u) / radius.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from worldline import checkpoint
from worldline.diffusion import row_noise
from worldline.errors import PolicyError, SpecMismatch
from worldline.policies.batched_mlp import BatchedMLP
from worldline.types import Observation, TensorState, WorldSpec

KIND = "state-"  # and the kind of the config
LEAST_LOG_STD, GREATEST_LOG_STD = -5.0, 2.0
INSIDE = 1 - 1e-6  # the greatest |u| at which a tanh-Gaussian is asked; at 1 its z is infinite
_HALF_LOG_2PI = 0.5 * math.log(2 * math.pi)


@dataclass(frozen=True, slots=True, kw_only=True)
class StatePolicyConfig:
    """`sample`: policies with a spread act by a sample, not by their mode."""

    kind: Literal["deterministic", "tanh-gaussian", "gaussian"] = "deterministic"
    hidden: tuple[int, ...] = (256, 256)
    sample: bool = False

    def __post_init__(self) -> None:
        if any(width < 1 for width in self.hidden):
            raise ValueError(f"hidden widths of at least 1 required, got {self.hidden}")


class StatePolicies(nn.Module):
    """`e` policies of one task, their networks side by side. Observations and actions are in physical units.

    Args:
        spec: no cameras, one control step a frame, a finite action range. Raises `SpecMismatch` otherwise.
        seeds: one a member; member j is what a single policy of that seed is.
        mean, std: of each number of the observation, subtracted and divided by.
    """

    mean: Tensor
    std: Tensor
    centre: Tensor
    radius: Tensor

    def __init__(
        self,
        config: StatePolicyConfig,
        spec: WorldSpec,
        *,
        seeds: Sequence[int],
        mean: Float[Tensor, " o"],
        std: Float[Tensor, " o"],
    ) -> None:
        super().__init__()
        require_low_dimensional(spec)
        self.config, self.spec = config, spec
        o, a = len(spec.pose_names), spec.action.dim
        if mean.shape != (o,) or std.shape != (o,) or not bool((std > 0).all()):
            raise SpecMismatch(
                f"mean and positive std of {o} numbers required by the spec, got {tuple(mean.shape)} and {tuple(std.shape)}, the least "
                f"std {float(std.min()) if len(std) else 0:g}"
            )
        self.net = BatchedMLP((o, *config.hidden, 2 * a if config.kind == "tanh-gaussian" else a), seeds)
        self.log_std = nn.Parameter(torch.zeros(len(seeds), 1, a)) if config.kind == "gaussian" else None
        low, high = torch.tensor(spec.action.low), torch.tensor(spec.action.high)
        self.register_buffer("mean", mean.float().clone())
        self.register_buffer("std", std.float().clone())
        self.register_buffer("centre", (low + high) / 2, persistent=False)
        self.register_buffer("radius", (high - low) / 2, persistent=False)

    @property
    def members(self) -> int:
        return self.net.members

    def normalise(self, observations: Float[Tensor, "*rows o"]) -> Float[Tensor, "*rows o"]:
        """What the networks are given."""
        return (observations - self.mean) / self.std

    def to_unit(self, actions: Float[Tensor, "*rows a"]) -> Float[Tensor, "*rows a"]:
        """Physical to unit coordinates."""
        return (actions - self.centre) / self.radius

    def to_physical(self, units: Float[Tensor, "*rows a"]) -> Float[Tensor, "*rows a"]:
        """Unit to physical coordinates, clipped to the range."""
        return self.centre + self.radius * units.clamp(-1, 1)

    # --- in unit coordinates, of normalised observations: what agents train ------------------------------------------

    def location(self, seen: Float[Tensor, "e n o"]) -> tuple[Float[Tensor, "e n a"], Tensor | None]:
        """What a distribution is centred at, and its log spread "e #n a" if it has one. Of a tanh-Gaussian both are of z."""
        out = self.net(seen)
        if self.config.kind == "tanh-gaussian":
            out, spread = out.chunk(2, dim=-1)
            return out, spread.clamp(LEAST_LOG_STD, GREATEST_LOG_STD)
        spread = None if self.log_std is None else self.log_std.clamp(LEAST_LOG_STD, GREATEST_LOG_STD)
        return out.tanh(), spread

    def density(
        self, at: tuple[Float[Tensor, "e n a"], Tensor | None], units: Float[Tensor, "e n a"]
    ) -> Float[Tensor, "e n"]:
        """Log-density, in unit coordinates, of actions under what `location` gave.

        Beyond |u| = 1 - 1e-6 a tanh-Gaussian has the density, and the slope, that it has there: finite, and pointing inward where
        the policy is inside.
        """
        centre, spread = at
        if self.config.kind == "tanh-gaussian":
            z = (units.clamp(-INSIDE, INSIDE).detach() + (units - units.detach())).atanh()  # clamped, its slope kept
            # log(1 - tanh(z)^2), which does not cancel
            stretch = 2 * (math.log(2) - z - F.softplus(-2 * z))
            return (_normal(z, centre, spread) - stretch).sum(-1)
        return _normal(units, centre, spread).sum(-1)

    # --- in physical units: what everybody else uses -----------------------------------------------------------------

    @torch.no_grad()
    def act(
        self, observations: Float[Tensor, "e n o"], *, seeds: Int[Tensor, "e n"] | None = None
    ) -> Float[Tensor, "e n a"]:
        """Member j's actions for its own observations, within the range. With seeds policies that have a spread draw from it, each
        row by its own seed; without they act by their mode."""
        self._require_width(observations)
        centre, spread = self.location(self.normalise(observations))
        if seeds is not None and spread is not None:
            noise = row_noise(seeds.flatten(), 0, 0, (centre.shape[-1],)).unflatten(0, tuple(seeds.shape))
            centre = centre + spread.exp() * noise.to(centre)
        return self.to_physical(centre.tanh() if self.config.kind == "tanh-gaussian" else centre)

    def log_prob(self, observations: Float[Tensor, "e n o"], actions: Float[Tensor, "e n a"]) -> Float[Tensor, "e n"]:
        """Log-density of actions (per physical unit to the power a), with gradients."""
        self._require_width(observations)
        at = self.location(self.normalise(observations))
        return self.density(at, self.to_unit(actions)) - self.radius.log().sum()

    def score(self, observations: Float[Tensor, "e n o"], actions: Float[Tensor, "e n a"]) -> Float[Tensor, "e n a"]:
        """Gradient of `log_prob` with respect to the actions, per physical unit."""
        self._require_width(observations)
        with torch.no_grad():
            at = self.location(self.normalise(observations))
            units = self.to_unit(actions)
        with torch.enable_grad():
            units = units.requires_grad_()
            (slope,) = torch.autograd.grad(self.density(at, units).sum(), units)
        return slope / self.radius

    def member(self, index: int) -> "StatePolicy":
        """A copy of one member, by itself."""
        alone = StatePolicies(self.config, self.spec, seeds=(0,), mean=self.mean, std=self.std)
        shared = ("mean", "std")
        whole = {k: v if k in shared else v[index : index + 1] for k, v in self.state_dict().items()}
        alone.load_state_dict(whole)
        return StatePolicy(alone.eval().to(self.mean.device))

    def _require_width(self, observations: Tensor) -> None:
        if observations.shape[-1] != len(self.mean):
            raise SpecMismatch(
                f"this policy of {self.spec.action.embodiment!r} sees {len(self.mean)} numbers ({', '.join(self.spec.pose_names)}), got "
                f"observations of {observations.shape[-1]}. Use a policy trained for this task."
            )


class StatePolicy(nn.Module):
    """One member as a `Policy`, a `StochasticPolicy` and a `ScorePolicy`: a chunk is one action "n 1 a" in physical units."""

    def __init__(self, policies: StatePolicies) -> None:
        super().__init__()
        if policies.members != 1:
            raise PolicyError(f"policies of one member required, got {policies.members}: choose one by `member(index)`")
        self.policies, self.config, self.spec = policies, policies.config, policies.spec

    @property
    def chunk_length(self) -> int:
        """Actions handed out at a time."""
        return 1

    def reset(self, n: int) -> TensorState:
        return TensorState(tensors={}, rows=n)

    def act(
        self, observation: Observation, state: TensorState, *, seeds: Int[Tensor, " n"]
    ) -> tuple[Float[Tensor, "n 1 a"], TensorState]:
        """An action within the range, on the CPU: the mode, or with `sample` a draw by the row's seed."""
        chosen = self.policies.act(self._seen(observation), seeds=seeds[None] if self.config.sample else None)
        return chosen[0, :, None].cpu(), state

    def log_prob(
        self, observation: Observation, state: TensorState, actions: Float[Tensor, "n 1 a"]
    ) -> Float[Tensor, " n"]:
        """`StatePolicies.log_prob` of a chunk."""
        return self.policies.log_prob(self._seen(observation), actions[None, :, 0].to(self.policies.mean.device))[0]

    def score(
        self, observation: Observation, state: TensorState, actions: Float[Tensor, "n 1 a"]
    ) -> Float[Tensor, "n 1 a"]:
        """`StatePolicies.score` of a chunk: the gradient of `log_prob`, for a deterministic policy that of a unit Gaussian around it."""
        return self.policies.score(self._seen(observation), actions[None, :, 0].to(self.policies.mean.device))[0][
            :, None
        ]

    def _seen(self, observation: Observation) -> Tensor:
        return observation.pose[None].to(self.policies.mean)

    def save_pretrained(self, folder: str | Path, *, provenance: Mapping[str, Any] | None = None) -> None:
        """Write a checkpoint of part "policy" and kind "state-deterministic", "state-tanh-gaussian" or "state-gaussian"."""
        checkpoint.save_part(
            folder,
            part="policy",
            kind=KIND + self.config.kind,
            config={"policy": checkpoint.to_json(self.config)},
            spec=self.spec,
            tensors=self.state_dict(),
            provenance=provenance or {},
        )

    @classmethod
    def from_config(cls, config: Any, spec: WorldSpec, source: str) -> "StatePolicy":
        """The policy, untrained, that a checkpoint's config tells of. Raises `CheckpointError` naming `source`."""
        chosen = checkpoint.from_json(StatePolicyConfig, config["policy"], source=source)
        o = len(spec.pose_names)
        return cls(StatePolicies(chosen, spec, seeds=(0,), mean=torch.zeros(o), std=torch.ones(o)))

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> "StatePolicy":
        return checkpoint.load_part(folder, part="policy", build=cls.from_config)


def require_low_dimensional(spec: WorldSpec) -> None:
    """Raise `SpecMismatch` for a task that these policies cannot be for."""
    action = spec.action
    if spec.cameras or spec.control_steps != 1 or not spec.pose_names:
        raise SpecMismatch(
            f"a task without cameras, with one control step a frame and an observation of at least one number is required, got cameras "
            f"{[c.name for c in spec.cameras]}, {spec.control_steps} control steps and {len(spec.pose_names)} numbers. Policies from "
            "pixels are trained by `worldline train policy`."
        )
    for name, low, high in zip(action.names, action.low, action.high):
        if not (math.isfinite(low) and math.isfinite(high) and low < high):
            raise SpecMismatch(f"a finite action range, low below high, is required; {name} has {low:g} .. {high:g}")


def _normal(values: Tensor, mean: Tensor, log_std: Tensor | None) -> Tensor:
    """Log-density of each value; of a standard deviation of 1 without `log_std`."""
    if log_std is None:
        return -0.5 * (values - mean).square() - _HALF_LOG_2PI
    return -0.5 * ((values - mean) * (-log_std).exp()).square() - log_std - _HALF_LOG_2PI
