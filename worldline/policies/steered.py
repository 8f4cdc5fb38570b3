"""A policy that denoises its actions, and stays as it is, steered by the noise it begins with: how reinforcement learning moves it.

The solver adds no noise of its own, so a chunk is a function of the observation and the noise at the start. A small Gaussian
policy chooses that noise (DSRL 2506.15799); whatever it chooses, the actions stay among those the frozen policy can denoise to.
Untrained it draws standard normal noise, and acts as the policy it steers. It steers cloned diffusion policies and unified video-action
models.
"""

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.distributions import Independent, Normal

from worldline import checkpoint
from worldline.errors import PolicyError
from worldline.policies.cloned import ClonedPolicy, PolicyConfig
from worldline.policies.encoder import EncoderConfig, ObservationEncoder, mlp
from worldline.policies.heads import LEAST_LOG_STD, DiffusionHead, draw
from worldline.policies.video_action import VideoActionPolicy
from worldline.tokenizers import load_tokenizer
from worldline.types import Observation, TensorState, WorldSpec
from worldline.worldmodels.video_action import VideoActionModel

KIND = "steered"


class SteeredPolicy(nn.Module):
    """A `Policy`: `base`, frozen, and who chooses its noise. Raises `PolicyError` unless `base` is a diffusion policy or a unified
    video-action model."""

    def __init__(self, base: ClonedPolicy | VideoActionPolicy) -> None:
        super().__init__()
        if isinstance(base, ClonedPolicy) and not isinstance(base.head, DiffusionHead):
            raise PolicyError(
                f"a diffusion policy is required to steer by its noise, got one of kind {base.config.kind!r}. That has a density "
                "of its own, and is refined as it is."
            )
        self.base = base.requires_grad_(False)
        self.spec, self.size = base.spec, base.noise_size
        if isinstance(base, ClonedPolicy):
            self.encoder = copy.deepcopy(base.encoder).requires_grad_(True)
            hidden = base.config.hidden
        else:
            self.encoder = ObservationEncoder(EncoderConfig(), base.spec.cameras, len(base.spec.pose_names))
            hidden = PolicyConfig().hidden
        self.net = mlp(self.encoder.width, hidden, self.size)
        self.log_std = nn.Parameter(torch.zeros(self.size))
        last = self.net[-1]
        assert isinstance(last, nn.Linear)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)

    def train(self, mode: bool = True) -> "SteeredPolicy":
        super().train(mode)
        self.base.eval()
        return self

    def distribution(self, observation: Observation) -> Independent:
        """Of the noise, a row each; with gradients."""
        device = self.log_std.device
        frames = {camera: observation.images[camera].to(device) for camera in self.encoder.names}
        features = self.encoder(frames, self.base.pose_normalizer.normalize(observation.pose.to(device)))
        return Independent(Normal(self.net(features), self.log_std.clamp(LEAST_LOG_STD, 0).exp()), 1)

    @torch.no_grad()
    def chunk(
        self, choice: Float[Tensor, "n d"], observation: Observation, state: TensorState
    ) -> tuple[Float[Tensor, "n m a"], TensorState]:
        """As `act`, the actions that noise leads to."""
        return self.base.chunk_of_noise(observation, state, choice)

    def reset(self, n: int) -> TensorState:
        return self.base.reset(n)

    @torch.no_grad()
    def act(
        self, observation: Observation, state: TensorState, *, seeds: Int[Tensor, " n"]
    ) -> tuple[Float[Tensor, "n m a"], TensorState]:
        return self.chunk(draw(self.distribution(observation), seeds), observation, state)

    def save_pretrained(self, folder: str | Path, *, provenance: Mapping[str, Any] | None = None) -> None:
        base = self.base
        unified = base if isinstance(base, VideoActionPolicy) else None
        checkpoint.save_part(
            folder,
            part="policy",
            kind=KIND,
            config={**base.to_config(), "steers": "diffusion" if unified is None else "video-action"},
            spec=self.spec if unified is None else unified.model.spec,
            tensors=self.state_dict(),
            provenance=provenance or {},
        )
        if unified is not None:
            unified.tokenizer.save_pretrained(Path(folder) / "tokenizer")

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> "SteeredPolicy":
        def build(config: Any, spec: WorldSpec, source: str) -> "SteeredPolicy":
            if config.get("steers", "diffusion") == "diffusion":
                return cls(ClonedPolicy.from_config(config, spec, source))
            model = VideoActionModel.from_config(config, spec, source)
            return cls(VideoActionPolicy(model, load_tokenizer(checkpoint.resolve(folder) / "tokenizer")))

        return checkpoint.load_part(folder, part="policy", build=build)
