"""The autoregressive-denoising world model: denoises one frame at a time from clean (or slightly noised) history.

- Training is a doubled pass: every frame stands once in a history stream (clean, or at a small level that the network is
  told) and once in a target stream at a level of its own. A target sees exactly what streaming will show it: the history
  before it within the window. So one pass supervises every frame, at one-frame contexts and full windows alike.
- Levels carry atoms at exactly 0 (history) and exactly 1 (targets): the levels at which sampling asks.
- The network predicts clean latents and poses together; the linear path makes one solver step the conditional mean and
  more steps a sample. The loss is the flow-matching loss, its weight 1/level^2 capped.
- Everything physical stays outside the network: actions and poses are normalised by the statistics saved here.

Sources: Astra 2512.08931 and Ctrl-World 2510.10125 (per-frame action conditioning, noise-augmented history), Diffusion
Forcing 2407.01392 (a level per frame).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from worldline import checkpoint
from worldline.data.normalization import RobustNormalizer
from worldline.diffusion import LevelDistribution, add_noise, linear_path, row_noise, sample_euler, solver_levels
from worldline.errors import SpecMismatch
from worldline.tokenizers.whitening import unwhiten, whiten
from worldline.types import Clip, Imagination, LatentSpec, WorldSpec
from worldline.worldmodels.guesses import STEP, motion_of
from worldline.worldmodels.state import StreamState
from worldline.worldmodels.transformer import FrameBatch, SpaceTimeTransformer, TransformerConfig, teacher_forcing_mask

KIND = "autoregressive"
_HISTORY_DRAW = 1_000  # noise of the history level must differ from that of every solver step


@dataclass(frozen=True, slots=True, kw_only=True)
class AutoregressiveConfig:
    """Sizes, levels shown in training, and how sampling is done."""

    network: TransformerConfig = field(default_factory=TransformerConfig)
    history: LevelDistribution = field(default_factory=lambda: LevelDistribution(clean=0.5, high=0.3))
    target: LevelDistribution = field(default_factory=lambda: LevelDistribution(pure=0.5, low=0.02))
    max_weight: float = 4.0  # cap of the loss weight 1/level^2
    pose_weight: float = 30.0  # a frame changes a normalised pose by about 0.1: squared, little beside the latents
    solver_steps: int = 1
    history_level: float = 0.0  # level given to finished frames when they become history in sampling

    def __post_init__(self) -> None:
        if not self.history.contains(self.history_level):
            raise ValueError(
                f"history_level must be a level that training shows to history ({self.history}), got {self.history_level}"
            )
        for level in solver_levels(self.solver_steps)[:-1].tolist():
            if not self.target.contains(level):
                raise ValueError(
                    f"solver_steps={self.solver_steps} asks for level {level:g}, which training never shows ({self.target})"
                )


class AutoregressiveWorldModel(nn.Module):
    """A `WorldModel`. Build it from a spec with latents, or load it with `from_pretrained`.

    Args:
        config: sizes and levels.
        spec: what it models; `spec.latent` is required.
        action_normalizer, pose_normalizer: fitted on the training episodes.
    """

    def __init__(
        self,
        config: AutoregressiveConfig,
        spec: WorldSpec,
        *,
        action_normalizer: RobustNormalizer,
        pose_normalizer: RobustNormalizer,
    ) -> None:
        super().__init__()
        if spec.latent is None:
            raise SpecMismatch("a world model requires a spec with latents (spec.latent), got none: choose a tokenizer")
        if spec.latent.frames_per_latent != 1:
            raise SpecMismatch(
                f"this world model takes one latent a frame, the tokenizer packs {spec.latent.frames_per_latent}"
            )
        self.config, self.spec = config, spec
        self.action_normalizer, self.pose_normalizer = action_normalizer, pose_normalizer
        self.network = SpaceTimeTransformer(
            config.network,
            spec.latent.shapes,
            pose_dim=len(spec.pose_names),
            action_dim=spec.control_steps * spec.action.dim,
        )

    @property
    def latent_spec(self) -> LatentSpec:
        assert self.spec.latent is not None
        return self.spec.latent

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def hidden_matrices(self) -> list[nn.Parameter]:
        """The matrices inside the blocks: what Muon may train.

        The guessing network's would learn faster by it too, but on a CPU each step then takes 1.4 times as long.
        """
        named = self.network.blocks.named_parameters()
        return [p for name, p in named if p.ndim == 2 and min(p.shape) > 2 and "modulation" not in name]

    # --- training -----------------------------------------------------------------------------------------------------

    def loss(self, clip: Clip, generator: torch.Generator | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """Flow-matching loss of a clip of raw latents with t >= 2 frames, and detached metrics.

        Levels and noise are drawn on the CPU from `generator`, so that they do not depend on the device.
        """
        frames, poses, actions = self._network_units(clip)
        b, t = poses.shape[:2]
        history_level = self.config.history.sample((b, t - 1), generator).to(self.device)
        target_level = self.config.target.sample((b, t - 1), generator).to(self.device)

        def noised(clean: Tensor, level: Tensor) -> Tensor:
            noise = torch.randn(clean.shape, generator=generator).to(clean)
            return add_noise(linear_path, clean, noise, level)

        history = {camera: noised(z[:, :-1], history_level) for camera, z in frames.items()}
        target = {camera: noised(z[:, 1:], target_level) for camera, z in frames.items()}
        pose_history, pose_target = noised(poses[:, :-1], history_level), noised(poses[:, 1:], target_level)
        before = torch.cat([poses[:, :1], poses[:, :-2]], 1)
        motion = motion_of(poses[:, :-1], before, _shift(actions))  # of the frame before each target
        has_action = torch.ones(b, 2 * t - 2, dtype=torch.bool, device=self.device)
        has_action[:, 0] = False
        time = torch.arange(t, device=self.device)
        batch = FrameBatch(
            latents={camera: torch.cat([history[camera], target[camera]], 1) for camera in frames},
            previous={camera: torch.cat([_shift(history[camera]), history[camera]], 1) for camera in frames},
            pose=torch.cat([pose_history, pose_target], 1),
            previous_pose=torch.cat([_shift(pose_history), pose_history], 1),
            motion=torch.cat([_shift(motion), motion], 1),
            level=torch.cat([history_level, target_level], 1),
            action=torch.cat([_shift(actions), actions], 1),
            has_action=has_action,
            time=torch.cat([time[:-1], time[1:]]),
        )
        mask = teacher_forcing_mask(t - 1, self.config.network.window, self.device)
        predicted, predicted_pose, guessed = self.network(batch, mask, slice(t - 1, None))

        weight = (1 / target_level.clamp(min=1e-3) ** 2).clamp(max=self.config.max_weight)
        per_camera = {c: (predicted[c] - frames[c][:, 1:]).square().mean((2, 3, 4)) for c in frames}
        pose_error = (predicted_pose - poses[:, 1:]).square().mean(2) if poses.shape[2] else torch.zeros_like(weight)
        loss = sum(((weight * e).mean() for e in per_camera.values()), torch.zeros((), device=self.device))
        loss = loss / len(per_camera) + self.config.pose_weight * (weight * pose_error).mean()
        guess_error = {c: (z - frames[c][:, 1:]).square().mean() for c, z in guessed.views.items()}
        loss = loss + sum(guess_error.values(), torch.zeros((), device=self.device)) / max(1, len(guess_error))
        if guessed.pose is not None:
            # contacts move an arm as it cannot foresee: they must not rule what it learns
            miss = F.smooth_l1_loss(guessed.pose / STEP, poses[:, 1:] / STEP, beta=0.2)
            loss = loss + miss
            guess_error["pose"] = miss
        pure = target_level == 1
        metrics = {f"guess_error/{c}": e.detach() for c, e in guess_error.items()}
        metrics |= {f"one_step_error/{c}": _mean_where(e, pure) for c, e in per_camera.items()}
        return loss, metrics | {"one_step_error/pose": _mean_where(pose_error, pure)}

    def _network_units(self, clip: Clip) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        """Whitened latents, normalised poses, normalised flattened action blocks, on this model's device."""
        frames = whiten({c: clip.frames[c].to(self.device, torch.float32) for c in self.network.keys}, self.latent_spec)
        poses = self.pose_normalizer.normalize(clip.poses.to(self.device))
        return frames, poses, self._flat_actions(clip.actions)

    def _flat_actions(self, actions: Tensor) -> Tensor:
        return self.action_normalizer.normalize(actions.to(self.device)).flatten(2)

    # --- imagination --------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def observe(self, clip: Clip) -> StreamState:
        """Stream real frames (raw latents "n t c h w", t >= 1) into a fresh state."""
        frames, poses, actions = self._network_units(clip)
        n, t = poses.shape[:2]
        config = self.config.network
        heads = self.network.tokens_per_frame * config.heads
        head_width = config.width // config.heads
        state = StreamState(
            cache=torch.zeros(n, config.depth, 2, heads, config.window, head_width, device=self.device),
            frames=torch.zeros(n, dtype=torch.long, device=self.device),
            latents={camera: torch.zeros_like(z[:, 0]) for camera, z in frames.items()},
            pose=torch.zeros_like(poses[:, 0]),
            motion=torch.zeros(n, 2 * poses.shape[2] + self._action_width, device=self.device),
        )
        seeds = torch.zeros(n, dtype=torch.long, device=self.device)
        for i in range(t):
            action = actions[:, i - 1] if i else torch.zeros(n, self._action_width, device=self.device)
            state = self._append(state, {c: z[:, i] for c, z in frames.items()}, poses[:, i], action, seeds)
        return state

    @torch.no_grad()
    def imagine(
        self, state: StreamState, actions: Float[Tensor, "n f k a"], *, seeds: Int[Tensor, " n"]
    ) -> tuple[StreamState, Imagination]:
        """The f frames that follow. Actions in physical units; latents come back raw, poses in physical units."""
        flat, seeds = self._flat_actions(actions), seeds.to(self.device)
        state = replace(state, cache=state.cache.clone())  # the rest of this call writes into its own copy
        latents: dict[str, list[Tensor]] = {camera: [] for camera in self.network.keys}
        poses = []
        for i in range(flat.shape[1]):
            frame, pose = self._denoise(state, flat[:, i], seeds)
            state = self._append(state, frame, pose, flat[:, i], seeds)
            for camera, z in frame.items():
                latents[camera].append(z)
            poses.append(pose)
        stacked = unwhiten({camera: torch.stack(z, 1) for camera, z in latents.items()}, self.latent_spec)
        return state, Imagination(latents=stacked, poses=self.pose_normalizer.denormalize(torch.stack(poses, 1)))

    def _denoise(self, state: StreamState, action: Tensor, seeds: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        shapes = {camera: z.shape[1:] for camera, z in state.latents.items()} | {"": state.pose.shape[1:]}
        noise = [row_noise(seeds, state.frames, 0, tuple(s), stream=i) for i, s in enumerate(shapes.values())]
        sizes = [z[0].numel() for z in noise]

        def unpack(x: Tensor) -> tuple[dict[str, Tensor], Tensor]:
            parts = [part.reshape(len(x), *s) for part, s in zip(x.split(sizes, 1), shapes.values())]
            return dict(zip(state.latents, parts)), parts[-1]

        def predict(x: Tensor, level: Tensor) -> Tensor:
            frame, pose = unpack(x)
            clean, clean_pose = self._network_step(state, frame, pose, level, action)
            return torch.cat([*(z.flatten(1) for z in clean.values()), clean_pose], dim=1)

        start = torch.cat([z.flatten(1) for z in noise], dim=1)
        return unpack(sample_euler(predict, start, solver_levels(self.config.solver_steps), linear_path))

    def _append(
        self, state: StreamState, frame: Mapping[str, Tensor], pose: Tensor, action: Tensor, seeds: Tensor
    ) -> StreamState:
        """Make a finished frame history: write its keys and values, at the history level."""
        before = torch.where(state.frames[:, None] > 0, state.motion[:, : pose.shape[1]], pose)
        motion = motion_of(pose, before, action)
        level = torch.full((len(state),), self.config.history_level, device=self.device)
        if self.config.history_level:

            def noised(clean: Tensor, stream: int) -> Tensor:
                noise = row_noise(seeds, state.frames, _HISTORY_DRAW, tuple(clean.shape[1:]), stream=stream)
                return add_noise(linear_path, clean, noise, level)

            frame = {camera: noised(z, i) for i, (camera, z) in enumerate(frame.items())}
            pose = noised(pose, len(frame))
        self._network_step(state, frame, pose, level, action)
        return replace(state, frames=state.frames + 1, latents=dict(frame), pose=pose, motion=motion)

    def _network_step(
        self, state: StreamState, frame: Mapping[str, Tensor], pose: Tensor, level: Tensor, action: Tensor
    ) -> tuple[dict[str, Tensor], Tensor]:
        """One frame through the network, its keys and values written to the state's cache in place."""
        slot, visible = state.visible()
        batch = FrameBatch(
            latents={camera: z[:, None] for camera, z in frame.items()},
            previous={camera: z[:, None] for camera, z in state.latents.items()},
            pose=pose[:, None],
            previous_pose=state.pose[:, None],
            motion=state.motion[:, None],
            level=level[:, None],
            action=action[:, None],
            has_action=(state.frames > 0)[:, None],
            time=state.frames[:, None],
        )
        clean, clean_pose = self.network.stream(batch, state.cache, slot, visible)
        return {camera: z[:, 0] for camera, z in clean.items()}, clean_pose[:, 0]

    @property
    def _action_width(self) -> int:
        return self.spec.control_steps * self.spec.action.dim

    # --- storage ------------------------------------------------------------------------------------------------------

    def with_sampling(self, **changes: Any) -> "AutoregressiveWorldModel":
        """The same weights with other sampling settings (`solver_steps`, `history_level`), checked against training."""
        other = object.__new__(AutoregressiveWorldModel)
        other.__dict__ = self.__dict__ | {"config": replace(self.config, **changes)}
        return other

    def save_pretrained(self, folder: str | Path, *, provenance: Mapping[str, Any] | None = None) -> None:
        checkpoint.save_part(
            folder,
            part="world-model",
            kind=KIND,
            config={
                "model": checkpoint.to_json(self.config),
                "action_normalizer": self.action_normalizer.to_dict(),
                "pose_normalizer": self.pose_normalizer.to_dict(),
            },
            spec=self.spec,
            tensors=self.state_dict(),
            provenance=provenance or {},
        )

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> "AutoregressiveWorldModel":
        def build(config: Any, spec: WorldSpec, source: str) -> "AutoregressiveWorldModel":
            # checkpoints from before there were guesses do not say that they have none
            model = config["model"] | {"network": {"guess_width": 0} | config["model"]["network"]}
            return cls(
                checkpoint.from_json(AutoregressiveConfig, model, source=source),
                spec,
                action_normalizer=RobustNormalizer.from_dict(config["action_normalizer"]),
                pose_normalizer=RobustNormalizer.from_dict(config["pose_normalizer"]),
            )

        return checkpoint.load_part(folder, part="world-model", build=build)


def _shift(x: Tensor) -> Tensor:
    """Frame i gets what stood at frame i-1, the first frame zeros."""
    return torch.cat([torch.zeros_like(x[:, :1]), x[:, :-1]], dim=1)


def _mean_where(values: Tensor, mask: Tensor) -> Tensor:
    """Mean over the mask, NaN where it is empty: a small batch may hold no such target. The training log leaves it out."""
    return ((values * mask).sum() / mask.sum()).detach()
