"""A unified video-action model as a policy: the policy query, a chunk at a time.

- A chunk is `horizon` blocks, of which `execute` are handed out. Asked at every frame (`execute` 1), it knows the last `history` frames;
  asked less often it has not seen those between, and knows the one that is now, as training also shows it.
- With `warm_level` below 1 denoising begins from what is left of the last chunk at that level, not from pure noise (the plan moved on by what
  was handed out, its last block repeated).
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from worldline.data.normalization import RobustNormalizer
from worldline.errors import PolicyError
from worldline.tokenizers import Tokenizer, load_tokenizer
from worldline.types import Clip, Observation, TensorState, WorldSpec
from worldline.worldmodels.video_action import POLICY, VideoActionModel
from worldline.worldmodels.video_action.tokens import Draw, Known


class VideoActionPolicy(nn.Module):
    """A `Policy`. Raises `PolicyError` for a model that never learned to act (trained on video alone)."""

    def __init__(self, model: VideoActionModel, tokenizer: Tokenizer) -> None:
        super().__init__()
        if not model.config.shares.get("policy"):
            raise PolicyError(
                "a video-action model that learned to act is required (a share of `policy` in model.shares), this one learned "
                f"{dict(model.config.shares)}. Go on from it with --stage joint --init-from."
            )
        self.model, self.tokenizer = model, tokenizer
        self.spec: WorldSpec = replace(model.spec, chunk=1, latent=None)
        self.eval()

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> "VideoActionPolicy":
        folder = Path(folder)
        return cls(VideoActionModel.from_pretrained(folder), load_tokenizer(folder / "tokenizer"))

    def with_options(self, **options: float | int) -> "VideoActionPolicy":
        """With other `steps`, `execute` or `warm`. Raises `PolicyError` for what the model's training does not allow."""
        names = {"steps": "action_steps", "execute": "execute", "warm": "warm_level"}
        changes = {names[k]: v if k == "warm" else int(v) for k, v in options.items()}
        try:
            return VideoActionPolicy(self.model.with_sampling(**changes), self.tokenizer)
        except ValueError as error:
            raise PolicyError(str(error)) from error

    @property
    def execute(self) -> int:
        """Blocks handed out at a time."""
        return self.model.config.execute or self.model.config.horizon

    @property
    def chunk_length(self) -> int:
        """Actions handed out at a time."""
        return self.execute * self.spec.control_steps

    @property
    def noise_size(self) -> int:
        """Numbers of noise that a chunk begins with."""
        return self.model.config.horizon * self.spec.control_steps * self.spec.action.dim

    @property
    def pose_normalizer(self) -> RobustNormalizer:
        return self.model.pose_normalizer

    def to_config(self) -> dict[str, Any]:
        """What a checkpoint says of it beside its weights and its tokenizer."""
        return self.model.to_config()

    def chunk_of_noise(
        self, observation: Observation, state: TensorState, noise: Float[Tensor, "n d"]
    ) -> tuple[Float[Tensor, "n m a"], TensorState]:
        """As `act`, the actions that this noise is denoised to, instead of the seeds' own."""
        zeros, blocks = torch.zeros(len(noise), dtype=torch.long), noise.unflatten(1, (self.model.config.horizon, -1))
        return self._decide(observation, state, seeds=zeros, noise=blocks.to(self.model.device))

    def reset(self, n: int) -> TensorState:
        model, h = self.model, self.model.config.history
        tensors = {f"frames/{c}": torch.zeros(n, h, *shape) for c, shape in model.latent_spec.shapes.items()}
        tensors["poses"] = torch.zeros(n, h, len(self.spec.pose_names))
        tensors["count"] = torch.zeros(n, dtype=torch.long)
        width = self.spec.control_steps * self.spec.action.dim
        tensors["plan"] = torch.zeros(n, model.config.horizon, width)
        return TensorState(tensors=tensors, rows=n)

    def act(
        self, observation: Observation, state: TensorState, *, seeds: Int[Tensor, " n"]
    ) -> tuple[Float[Tensor, "n m a"], TensorState]:
        """Actions within their range."""
        return self._decide(observation, state, seeds=seeds)

    @torch.no_grad()
    def _decide(
        self, observation: Observation, state: TensorState, *, seeds: Tensor, noise: Tensor | None = None
    ) -> tuple[Tensor, TensorState]:
        model, n, held = self.model, len(observation), state.tensors
        known = self._known(observation, state)
        query = POLICY.at(model.config.horizon)
        given = model.given(query, n)

        def decide(plan: Tensor | None) -> Tensor:
            frame = torch.zeros(n, dtype=torch.long)
            draw = Draw(seeds=seeds, frame=frame, steps=model.config.action_steps, plan=plan, noise=noise)
            return model.answer(known, given, query.rows(n), draw).actions

        begins = (held["count"] == 0).to(model.device)  # rows without a plan from before
        warm = model.config.warm_level < 1 and not bool(begins.all())
        made = decide(held["plan"].to(model.device) if warm else None)
        if warm and bool(begins.any()):
            made = torch.where(begins[:, None, None], decide(None), made)
        left, last = made[:, self.execute :], made[:, -1:].expand(-1, self.execute, -1)
        tensors = {f"frames/{c}": x for c, x in known.frames.items()}
        tensors |= {"poses": known.poses, "count": known.count, "plan": torch.cat([left, last], 1)}
        return self._emit(made), TensorState(tensors={name: x.cpu() for name, x in tensors.items()}, rows=n)

    def _emit(self, blocks: Tensor) -> Tensor:
        """The first normalised blocks "n f k*a" as actions, within their range."""
        action = self.spec.action
        chunk = self.model.physical(blocks[:, : self.execute]).flatten(1, 2).cpu()
        return chunk.clamp(torch.tensor(action.low), torch.tensor(action.high))

    def _now(self, observation: Observation) -> Known:
        """The frame that is now, and nothing before it."""
        latents = self.tokenizer.encode({c.name: observation.images[c.name][:, None] for c in self.spec.cameras})
        empty = torch.zeros(len(observation), 0, self.spec.control_steps, self.spec.action.dim)
        return self.model.known(
            Clip(frames=latents, poses=observation.pose[:, None], actions=empty, instruction=observation.instruction)
        )

    def _known(self, observation: Observation, state: TensorState) -> Known:
        """The frame that is now, behind those that were seen before if none was missed in between."""
        now, held = self._now(observation), state.tensors
        if self.execute > 1:
            return now
        count = (held["count"] + 1).clamp(max=self.model.config.history).to(self.model.device)
        frames = {c: torch.cat([held[f"frames/{c}"].to(x)[:, 1:], x[:, -1:]], 1) for c, x in now.frames.items()}
        poses = torch.cat([held["poses"].to(now.poses)[:, 1:], now.poses[:, -1:]], 1)
        return replace(now, frames=frames, poses=poses, count=count)
