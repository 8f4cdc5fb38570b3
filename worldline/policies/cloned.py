"""Policies cloned from demonstrations: a Gaussian one and a small diffusion policy, both from pixels and poses.

They share everything but the head that turns features into a chunk of m actions: encoder, normalisation, storage, and the
`Policy` contract. Neither looks at more than the current frame, so their state is empty.
Gaussian: log-likelihood with the standard deviation capped at one normalised unit (World4RL 2509.19080). Diffusion
(Chi et al. 2303.04137): the chunk is denoised along the linear path by a residual network.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from worldline import checkpoint
from worldline.data.normalization import RobustNormalizer
from worldline.diffusion import LevelDistribution, add_noise, linear_path, row_noise, sample_euler, solver_levels
from worldline.policies.encoder import EncoderConfig, ObservationEncoder, mlp
from worldline.types import Observation, TensorState, WorldSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyConfig:
    """`chunk` actions at control rate are decided at a time. `sample`: Gaussian policies act by a sample, not the mean."""

    kind: Literal["bc", "diffusion"] = "bc"
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    hidden: int = 256
    chunk: int = 8
    sample: bool = False
    solver_steps: int = 4

    def __post_init__(self) -> None:
        if self.chunk < 1 or self.solver_steps < 1:
            raise ValueError(f"chunk and solver_steps must be at least 1, got {self.chunk} and {self.solver_steps}")
        if self.encoder.window != 1 or self.hidden < 1:
            raise ValueError(
                f"encoder.window must be 1 (these policies see one frame) and hidden at least 1, got "
                f"{self.encoder.window} and {self.hidden}"
            )


class GaussianHead(nn.Module):
    """Mean and standard deviation of every action of the chunk, in normalised units."""

    def __init__(self, config: PolicyConfig, features: int, size: int) -> None:
        super().__init__()
        self.sample = config.sample
        self.net = mlp(features, config.hidden, size)
        self.log_std = nn.Parameter(torch.full((size,), -1.0))

    def distribution(self, features: Tensor) -> torch.distributions.Normal:
        return torch.distributions.Normal(self.net(features), self.log_std.clamp(-3, 0).exp())

    def loss(self, features: Tensor, chunk: Tensor, generator: torch.Generator | None) -> Tensor:
        return -self.distribution(features).log_prob(chunk).mean()

    def act(self, features: Tensor, seeds: Tensor) -> Tensor:
        normal = self.distribution(features)
        if not self.sample:
            return normal.mean
        return normal.mean + normal.stddev * row_noise(seeds, 0, 0, (normal.mean.shape[1],))


class DiffusionHead(nn.Module):
    """Denoises the chunk given the features; predicts the clean chunk."""

    levels = LevelDistribution(pure=0.2, low=0.02)

    def __init__(self, config: PolicyConfig, features: int, size: int) -> None:
        super().__init__()
        self.size, self.steps = size, config.solver_steps
        self.enter = nn.Linear(features + size + 1, config.hidden)
        self.blocks = nn.ModuleList(mlp(config.hidden + size + 1, config.hidden, config.hidden, 1) for _ in range(3))
        self.leave = nn.Linear(config.hidden, size)

    def predict(self, features: Tensor, x: Tensor, level: Tensor) -> Tensor:
        given = torch.cat([x, 2 * level[:, None] - 1], dim=1)
        h = self.enter(torch.cat([features, given], dim=1))
        for block in self.blocks:
            h = h + block(torch.cat([torch.nn.functional.silu(h), given], dim=1))
        return self.leave(torch.nn.functional.silu(h))

    def loss(self, features: Tensor, chunk: Tensor, generator: torch.Generator | None) -> Tensor:
        level = self.levels.sample((len(chunk),), generator).to(chunk)
        noise = torch.randn(chunk.shape, generator=generator).to(chunk)
        clean = self.predict(features, add_noise(linear_path, chunk, noise, level), level)
        weight = (1 / level**2).clamp(max=10.0)[:, None]
        return (weight * (clean - chunk).square()).mean()

    def act(self, features: Tensor, seeds: Tensor) -> Tensor:
        start = row_noise(seeds, 0, 0, (self.size,)).to(features)
        return sample_euler(
            lambda x, level: self.predict(features, x, level), start, solver_levels(self.steps), linear_path
        )


class ClonedPolicy(nn.Module):
    """A `Policy` (with the Gaussian head a `StochasticPolicy`) trained by imitation.

    Args:
        config: kind and sizes.
        spec: the cameras, poses and actions it requires.
        action_normalizer, pose_normalizer: fitted on the demonstrations.
    """

    low: Tensor
    high: Tensor

    def __init__(
        self,
        config: PolicyConfig,
        spec: WorldSpec,
        *,
        action_normalizer: RobustNormalizer,
        pose_normalizer: RobustNormalizer,
    ) -> None:
        super().__init__()
        self.config, self.spec = config, spec
        self.action_normalizer, self.pose_normalizer = action_normalizer, pose_normalizer
        self.encoder = ObservationEncoder(config.encoder, spec.cameras, len(spec.pose_names))
        head = GaussianHead if config.kind == "bc" else DiffusionHead
        self.head = head(config, self.encoder.width, config.chunk * spec.action.dim)
        self.register_buffer("low", torch.tensor(spec.action.low), persistent=False)
        self.register_buffer("high", torch.tensor(spec.action.high), persistent=False)

    def _features(self, observation: Observation) -> Tensor:
        device = self.low.device
        frames = {camera: observation.images[camera].to(device) for camera in self.encoder.names}
        return self.encoder(frames, self.pose_normalizer.normalize(observation.pose.to(device)))

    def loss(
        self, observation: Observation, actions: Float[Tensor, "n m a"], generator: torch.Generator | None = None
    ) -> Tensor:
        """Imitation loss of demonstrated chunks in physical units."""
        target = self.action_normalizer.normalize(actions.to(self.low.device)).flatten(1)
        return self.head.loss(self._features(observation), target, generator)

    def reset(self, n: int) -> TensorState:
        return TensorState(tensors={}, rows=n)

    @torch.no_grad()
    def act(
        self, observation: Observation, state: TensorState, *, seeds: Int[Tensor, " n"]
    ) -> tuple[Float[Tensor, "n m a"], TensorState]:
        """A chunk clipped to the action range: what is emitted is what an environment consumes."""
        flat = self.head.act(self._features(observation), seeds)
        chunk = self.action_normalizer.denormalize(flat.unflatten(1, (self.config.chunk, self.spec.action.dim)))
        return chunk.clamp(self.low, self.high).cpu(), state

    def log_prob(
        self, observation: Observation, state: TensorState, actions: Float[Tensor, "n m a"]
    ) -> Float[Tensor, " n"]:
        """Log-density of a chunk in normalised units (Gaussian policies only)."""
        assert isinstance(self.head, GaussianHead), "only Gaussian policies have a closed-form density"
        target = self.action_normalizer.normalize(actions.to(self.low.device)).flatten(1)
        return self.head.distribution(self._features(observation)).log_prob(target).sum(1)

    def save_pretrained(self, folder: str | Path, *, provenance: Mapping[str, Any] | None = None) -> None:
        config = {
            "policy": checkpoint.to_json(self.config),
            "action_normalizer": self.action_normalizer.to_dict(),
            "pose_normalizer": self.pose_normalizer.to_dict(),
        }
        checkpoint.save_part(
            folder,
            part="policy",
            kind=self.config.kind,
            config=config,
            spec=self.spec,
            tensors=self.state_dict(),
            provenance=provenance or {},
        )

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> "ClonedPolicy":
        def build(config: Any, spec: WorldSpec, source: str) -> "ClonedPolicy":
            return cls(
                checkpoint.from_json(PolicyConfig, config["policy"], source=source),
                spec,
                action_normalizer=RobustNormalizer.from_dict(config["action_normalizer"]),
                pose_normalizer=RobustNormalizer.from_dict(config["pose_normalizer"]),
            )

        return checkpoint.load_part(folder, part="policy", build=build)
