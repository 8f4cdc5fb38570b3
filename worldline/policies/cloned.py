"""Policies cloned from demonstrations: Gaussian, discretised, or a small diffusion policy, all from pixels and poses.

They share everything but the head (`heads`) that turns features into a chunk of m actions: encoder, normalisation, storage, and
the `Policy` contract. None looks at more than the current frame, so their state is empty.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn
from torch.distributions import Independent

from worldline import checkpoint
from worldline.data.normalization import RobustNormalizer, normalizers_from_json, normalizers_to_json
from worldline.errors import PolicyError
from worldline.policies.encoder import EncoderConfig, ObservationEncoder
from worldline.policies.heads import DiffusionHead, DiscreteHead, GaussianHead
from worldline.tokenizers.actions import TwoHot
from worldline.types import Observation, TensorState, WorldSpec

SCORE_LEVEL = 0.1  # of a diffusion policy's score: noise of a tenth of the normalised range


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyConfig:
    """`chunk` actions at control rate are decided at a time. `sample`: Gaussian and discretised policies act by a sample, not the
    mean. `bins`: of each action dimension of a discretised one."""

    kind: Literal["bc", "discrete", "diffusion"] = "bc"
    """Set by --kind."""
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    hidden: int = 256
    """Width of the layers behind the eyes."""
    chunk: int = 8
    """Actions, at control rate, decided on at a time."""
    sample: bool = False
    """Gaussian and discrete policies act by a sample, not by the mean."""
    solver_steps: int = 4
    """Denoising steps of a diffusion policy's chunk."""
    bins: int = 21
    """Of each action dimension (discrete)."""

    def __post_init__(self) -> None:
        if self.chunk < 1 or self.solver_steps < 1:
            raise ValueError(f"chunk and solver_steps must be at least 1, got {self.chunk} and {self.solver_steps}")
        if self.encoder.window != 1 or self.hidden < 1:
            raise ValueError(
                f"encoder.window must be 1 (these policies see one frame) and hidden at least 1, got "
                f"{self.encoder.window} and {self.hidden}"
            )


class ClonedPolicy(nn.Module):
    """A `Policy` trained by imitation; a `StochasticPolicy` but with the diffusion head, a `ScorePolicy` but with the discrete one.

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
        size = config.chunk * spec.action.dim
        self.head: GaussianHead | DiscreteHead | DiffusionHead
        if config.kind == "diffusion":
            self.head = DiffusionHead(self.encoder.width, config.hidden, size, steps=config.solver_steps)
        elif config.kind == "discrete":
            self.head = DiscreteHead(
                self.encoder.width, config.hidden, size, code=TwoHot(bins=config.bins), sample=config.sample
            )
        else:
            self.head = GaussianHead(self.encoder.width, config.hidden, size, sample=config.sample)
        self.register_buffer("low", torch.tensor(spec.action.low), persistent=False)
        self.register_buffer("high", torch.tensor(spec.action.high), persistent=False)

    def features(self, observation: Observation) -> Float[Tensor, "n d"]:
        """What the head is given."""
        device = self.low.device
        frames = {camera: observation.images[camera].to(device) for camera in self.encoder.names}
        return self.encoder(frames, self.pose_normalizer.normalize(observation.pose.to(device)))

    def loss(
        self, observation: Observation, actions: Float[Tensor, "n m a"], generator: torch.Generator | None = None
    ) -> Tensor:
        """Imitation loss of demonstrated chunks in physical units."""
        return self.losses(observation, actions, generator).mean()

    def losses(
        self, observation: Observation, actions: Float[Tensor, "n m a"], generator: torch.Generator | None = None
    ) -> Float[Tensor, " n"]:
        """`loss` of each row, for those that count rows unequally."""
        target = self.action_normalizer.normalize(actions.to(self.low.device)).flatten(1)
        return self.head.losses(self.features(observation), target, generator)

    def reset(self, n: int) -> TensorState:
        return TensorState(tensors={}, rows=n)

    @torch.no_grad()
    def act(
        self, observation: Observation, state: TensorState, *, seeds: Int[Tensor, " n"]
    ) -> tuple[Float[Tensor, "n m a"], TensorState]:
        """A chunk clipped to the action range: what is emitted is what an environment consumes."""
        return self.emit(self.head.act(self.features(observation), seeds)), state

    def emit(self, flat: Float[Tensor, "n d"]) -> Float[Tensor, "n m a"]:
        """A normalised flattened chunk as actions, within their range, on the CPU."""
        chunk = self.action_normalizer.denormalize(flat.unflatten(1, (self.config.chunk, self.spec.action.dim)))
        return chunk.clamp(self.low, self.high).cpu()

    @property
    def noise_size(self) -> int:
        """Numbers of noise that a diffusion policy begins with."""
        assert isinstance(self.head, DiffusionHead)
        return self.head.size

    def chunk_of_noise(
        self, observation: Observation, state: TensorState, noise: Float[Tensor, "n d"]
    ) -> tuple[Float[Tensor, "n m a"], TensorState]:
        """As `act`, the actions that a diffusion policy denoises this noise to."""
        assert isinstance(self.head, DiffusionHead)
        return self.emit(self.head.denoise(self.features(observation), noise)), state

    @property
    def chunk_length(self) -> int:
        """Actions handed out at a time."""
        return self.config.chunk

    def distribution(self, observation: Observation) -> Independent:
        """Of the choice that `chunk` makes actions of, a row each; with gradients.

        Raises `PolicyError` for diffusion policies, whose density has no closed form.
        """
        if isinstance(self.head, DiffusionHead):
            raise PolicyError(
                "a policy with a density is required (kind bc or discrete), got a diffusion policy. It can be steered by the noise "
                "that it begins with: SteeredPolicy."
            )
        return self.head.distribution(self.features(observation))

    def chunk(
        self, choice: Shaped[Tensor, "n d"], observation: Observation, state: TensorState
    ) -> tuple[Float[Tensor, "n m a"], TensorState]:
        """As `act`, the actions that a choice stands for."""
        assert not isinstance(self.head, DiffusionHead), "distribution() refused it"
        return self.emit(self.head.meant(choice)), state

    def log_prob(
        self, observation: Observation, state: TensorState, actions: Float[Tensor, "n m a"]
    ) -> Float[Tensor, " n"]:
        """Log-density of a chunk in normalised units, or log-probability of its nearest bins. `PolicyError` for diffusion policies."""
        target = self.action_normalizer.normalize(actions.to(self.low.device)).flatten(1)
        choice = self.head.code.nearest(target) if isinstance(self.head, DiscreteHead) else target
        return self.distribution(observation).log_prob(choice)

    @torch.no_grad()
    def score(
        self, observation: Observation, state: TensorState, actions: Float[Tensor, "n m a"]
    ) -> Float[Tensor, "n m a"]:
        """Gradient of the log-density of a chunk by its actions, per physical unit.

        A diffusion policy's is that of the density which noise of level `SCORE_LEVEL` has smoothed, by its own denoiser (Tweedie's
        formula): with x = (1 - level) chunk, -(1 - level) (x - (1 - level) clean(x)) / level^2. Raises `PolicyError` for discretised
        policies, whose actions have no density.
        """
        if isinstance(self.head, DiscreteHead):
            raise PolicyError(
                "a policy with a smooth density is required (kind bc or diffusion), got a discretised one"
            )
        chunk = self.action_normalizer.normalize(actions.to(self.low.device))
        unit = self.action_normalizer.normalize(torch.ones_like(chunk)) - self.action_normalizer.normalize(
            torch.zeros_like(chunk)
        )
        flat, features = chunk.flatten(1), self.features(observation)
        if isinstance(self.head, DiffusionHead):
            level = torch.full((len(flat),), SCORE_LEVEL, device=flat.device)
            x = (1 - SCORE_LEVEL) * flat
            clean = self.head.predict(features, x, level)
            slope = -(1 - SCORE_LEVEL) * (x - (1 - SCORE_LEVEL) * clean) / SCORE_LEVEL**2
        else:
            base = self.head.distribution(features).base_dist
            slope = (base.mean - flat) / base.variance
        return slope.view_as(chunk) * unit

    def save_pretrained(self, folder: str | Path, *, provenance: Mapping[str, Any] | None = None) -> None:
        checkpoint.save_part(
            folder,
            part="policy",
            kind=self.config.kind,
            config=self.to_config(),
            spec=self.spec,
            tensors=self.state_dict(),
            provenance=provenance or {},
        )

    def to_config(self) -> dict[str, Any]:
        """What a checkpoint says of it beside its weights."""
        return {
            "policy": checkpoint.to_json(self.config),
            **normalizers_to_json(self.action_normalizer, self.pose_normalizer),
        }

    @classmethod
    def from_config(cls, config: Any, spec: WorldSpec, source: str) -> "ClonedPolicy":
        """The policy, untrained, that `to_config` tells of."""
        return cls(
            checkpoint.from_json(PolicyConfig, config["policy"], source=source),
            spec,
            **normalizers_from_json(config, source=source),
        )

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> "ClonedPolicy":
        return checkpoint.load_part(folder, part="policy", build=cls.from_config)
