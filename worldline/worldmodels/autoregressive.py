"""The autoregressive-denoising world model: denoises one frame at a time from clean (or slightly noised) history.

- Training is a doubled pass (`doubled_pass`): every frame stands once in a history stream (clean, or at a small level that the
  network is told) and once in a target stream at a level of its own. A target sees exactly what streaming will show it. So
  one pass supervises every frame, at one-frame contexts and full windows alike.
- Levels carry atoms at exactly 0 (history) and exactly 1 (targets): the levels at which sampling asks.
- The network predicts clean latents and poses together; the linear path makes one solver step the conditional mean and
  more steps a sample. The loss is the flow-matching loss, its weight 1/level^2 capped.
- A frame's memories (`memory`) are looked up and encoded once, whatever the number of solver steps.
- Everything physical stays outside the network: actions and poses are normalised by the statistics saved here.

Sources: Astra 2512.08931 and Ctrl-World 2510.10125 (per-frame action conditioning, noise-augmented history, memory by pose,
action-free guidance), Diffusion Forcing 2407.01392 (a level per frame).
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from worldline import checkpoint
from worldline.data.normalization import RobustNormalizer
from worldline.errors import CheckpointError, SpecMismatch
from worldline.tokenizers.whitening import unwhiten, whiten
from worldline.types import Clip, Imagination, LatentSpec, WorldSpec
from worldline.worldmodels.config import AutoregressiveConfig
from worldline.worldmodels.doubled_pass import NetworkClip, doubled_batch
from worldline.worldmodels.experts import Routing
from worldline.worldmodels.guesses import STEP
from worldline.worldmodels.language import text_encoder
from worldline.worldmodels.memory import Memories, recall_in_training
from worldline.worldmodels.ports import ONLY, Body, FrameBatch, Port
from worldline.worldmodels.state import StreamState
from worldline.worldmodels.streaming import Frame, Streaming
from worldline.worldmodels.transformer import SpaceTimeTransformer, teacher_forcing_mask

KIND = "autoregressive"


class AutoregressiveWorldModel(nn.Module):
    """A `WorldModel`. Build it from a spec with latents, or load it with `from_pretrained`.

    Args:
        config: sizes and levels.
        spec: what it models; `spec.latent` is required.
        action_normalizer, pose_normalizer: fitted on the training episodes.
        network, body: a network that several robots share, and which of its ports is this one's (`embodiments`); without them
            it gets a network of its own.
    """

    def __init__(
        self,
        config: AutoregressiveConfig,
        spec: WorldSpec,
        *,
        action_normalizer: RobustNormalizer,
        pose_normalizer: RobustNormalizer,
        network: SpaceTimeTransformer | None = None,
        body: str = ONLY,
    ) -> None:
        super().__init__()
        self.config, self.spec, self.body = config, spec, body
        self.action_normalizer, self.pose_normalizer = action_normalizer, pose_normalizer
        self.network = make_network(config, {body: body_of(spec)}) if network is None else network
        self._check_router()

    @property
    def port(self) -> Port:
        return self.network.port(self.body)

    @property
    def streaming(self) -> Streaming:
        return Streaming(network=self.network, body=self.body, config=self.config)

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
        whole = self._network_units(clip)
        own = whole.after(clip.lead)
        frames, poses = own.frames, own.poses
        b, t = poses.shape[:2]
        history_level = self.config.history.sample((b, t - 1), generator).to(self.device)
        target_level = self.config.target.sample((b, t - 1), generator).to(self.device)
        told = None
        if self.config.action_dropout:
            told = (torch.rand(b, t - 1, generator=generator) >= self.config.action_dropout).to(self.device)
        seen = self._seen_in_training(clip, t - 1, generator)
        batch = doubled_batch(
            own,
            history_level=history_level,
            target_level=target_level,
            told=told,
            seen=seen,
            generator=generator,
        )
        mask = teacher_forcing_mask(t - 1, self.config.network.window, self.device)
        targets = slice(t - 1, None)
        memories = self._memories_in_training(clip, whole, batch.keep(targets), seen)
        made = self.network(self.body, batch, mask, targets, memories, router=self.config.router)
        predicted, predicted_pose, guessed = made.latents, made.pose, made.guesses

        weight = (1 / target_level.clamp(min=1e-3) ** 2).clamp(max=self.config.max_weight)
        there = {c: clip.present[c].to(self.device)[:, None] if c in clip.present else None for c in frames}

        def error(made: Tensor, camera: str) -> Tensor:
            """ "b t-1": zero where the data has no such camera."""
            missed = (made - frames[camera][:, 1:]).square().mean((2, 3, 4))
            mask = there[camera]
            return missed if mask is None else missed * mask

        per_camera = {c: error(predicted[c], c) for c in frames}
        pose_error = (predicted_pose - poses[:, 1:]).square().mean(2) if poses.shape[2] else torch.zeros_like(weight)
        loss = sum(((weight * e).mean() for e in per_camera.values()), torch.zeros((), device=self.device))
        loss = loss / len(per_camera) + self.config.pose_weight * (weight * pose_error).mean()
        guess_error = {c: error(z, c).mean() for c, z in guessed.views.items()}
        loss = loss + sum(guess_error.values(), torch.zeros((), device=self.device)) / max(1, len(guess_error))
        if guessed.pose is not None:
            # contacts move an arm as it cannot foresee: they must not rule what it learns
            miss = F.smooth_l1_loss(guessed.pose / STEP, poses[:, 1:] / STEP, beta=0.2, reduction="none").mean(2)
            miss = miss.mean() if told is None else (miss * told).sum() / told.sum().clamp(min=1)
            loss = loss + miss
            guess_error["pose"] = miss
        pure = target_level == 1
        metrics = self._routing_metrics(made.routing)
        if "balance" in metrics:
            loss = loss + self.config.balance_weight * metrics["balance"]
            metrics["balance"] = metrics["balance"].detach()
        metrics |= {f"guess_error/{c}": e.detach() for c, e in guess_error.items()}
        metrics |= {f"one_step_error/{c}": _mean_where(e, pure) for c, e in per_camera.items()}
        return loss, metrics | {"one_step_error/pose": _mean_where(pose_error, pure)}

    def _routing_metrics(self, routing: Routing | None) -> dict[str, Tensor]:
        """`balance`, the loss that keeps experts in use, where a router is learned; `routing_entropy` in nats."""
        if routing is None:
            return {}
        assert self.network.experts is not None
        metrics = {"routing_entropy": routing.entropy().detach()}
        if self.config.router not in ("uniform", "fixed"):
            metrics["balance"] = self.network.experts.balance(routing, self.body)
        return metrics

    @torch.no_grad()
    def routing(self, clip: Clip) -> Routing:
        """How the t - 1 blocks of a clip are routed to experts. Raises `SpecMismatch` where there are none."""
        if self.network.experts is None:
            raise SpecMismatch("routing requires a world model with experts (network.experts), got one without")
        units = self._network_units(clip)
        clean = torch.zeros(len(units.poses), units.poses.shape[1] - 1, device=self.device)
        batch = doubled_batch(units, history_level=clean, target_level=clean, told=None, seen={}, generator=None)
        targets = batch.keep(slice(clean.shape[1], None))
        return self.network.route(self.body, targets, self.port.guesses(targets), self.config.router)[1]

    def _check_router(self) -> None:
        if self.network.experts is not None:
            self.network.experts.check_router(self.config.router)

    def _seen_in_training(self, clip: Clip, frames: int, generator: torch.Generator | None) -> dict[str, Tensor]:
        """camera -> "b frames", which history frames hold it. Empty if nothing is ever missing."""
        if not (self.config.camera_dropout or clip.present):
            return {}
        seen: dict[str, Tensor] = {}
        for camera in self.port.keys:
            since = torch.zeros(len(clip.poses), dtype=torch.long)
            if self.config.camera_dropout:
                missing = torch.rand(len(since), generator=generator) < self.config.camera_dropout
                since = torch.where(missing, torch.randint(1, frames + 1, since.shape, generator=generator), since)
            there = torch.arange(frames) >= since[:, None]
            if camera in clip.present:
                there = there & clip.present[camera].cpu()[:, None]
            seen[camera] = there.to(self.device)
        return seen

    def _memories_in_training(
        self, clip: Clip, whole: NetworkClip, targets: FrameBatch, seen: Mapping[str, Tensor]
    ) -> Memories | None:
        """What each target is shown of the frames before it; `seen` as of the history, for the clip's own frames."""
        config = self.config.network
        if not config.memory.size:
            return None
        b, e = whole.poses.shape[:2]
        length = torch.full((b,), e - clip.lead)
        led = length if clip.led is None else length + clip.led.cpu()
        always = torch.ones(b, dtype=torch.bool, device=self.device)
        there = {}
        for camera in whole.frames:
            before = clip.present.get(camera, always).to(self.device)[:, None].expand(b, clip.lead)
            own = seen.get(camera, always[:, None].expand(b, e - clip.lead - 1))
            there[camera] = torch.cat([before, own, always[:, None]], dim=1)
        # sampling looks up by the action, also for the frame that guidance imagines without it
        query = self.port.foretell(replace(targets, has_action=torch.ones_like(targets.has_action)))
        return recall_in_training(
            whole.frames, there, whole.poses, led.to(self.device), query, config.memory, config.window
        )

    def _network_units(self, clip: Clip) -> NetworkClip:
        """Whitened latents, normalised poses, normalised flattened action blocks, on this model's device."""
        there = {c: clip.frames[c].to(self.device, torch.float32) for c in self.port.keys}
        encoder, text = text_encoder(self.config.text), None
        if encoder is not None:
            if len(clip.instruction) != len(clip.poses):
                raise SpecMismatch(
                    f"this world model is told the instruction: one for each of {len(clip.poses)} rows required, "
                    f"got {len(clip.instruction)}"
                )
            text = encoder(clip.instruction).to(self.device)
        return NetworkClip(
            frames=whiten(there, self.latent_spec),
            poses=self.pose_normalizer.normalize(clip.poses.to(self.device)),
            actions=self._flat_actions(clip.actions),
            text=text,
        )

    def _flat_actions(self, actions: Tensor) -> Tensor:
        return self.action_normalizer.normalize(actions.to(self.device)).flatten(2)

    # --- imagination --------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def observe(self, clip: Clip) -> StreamState:
        """Stream real frames (raw latents "n t c h w", t >= 1) into a fresh state."""
        units = self._network_units(clip)
        n, t = units.poses.shape[:2]
        state = self.streaming.start(units)
        seeds = torch.zeros(n, dtype=torch.long, device=self.device)
        always = torch.ones(n, dtype=torch.bool, device=self.device)
        seen = {camera: clip.present.get(camera, always).to(self.device) for camera in units.frames}
        nothing = torch.zeros(n, self.port.body.action_dim, device=self.device)
        for i in range(t):
            latents = {c: z[:, i] * seen[c][:, None, None, None] for c, z in units.frames.items()}
            frame = Frame(latents=latents, pose=units.poses[:, i], seen=seen)
            state = self.streaming.append(state, frame, units.actions[:, i - 1] if i else nothing, seeds)
        return state

    @torch.no_grad()
    def imagine(
        self, state: StreamState, actions: Float[Tensor, "n f k a"], *, seeds: Int[Tensor, " n"]
    ) -> tuple[StreamState, Imagination]:
        """The f frames that follow. Actions in physical units; latents come back raw, poses in physical units."""
        flat, seeds = self._flat_actions(actions), seeds.to(self.device)
        state = replace(state, cache=state.cache.clone())  # the rest of this call writes into its own copy
        latents: dict[str, list[Tensor]] = {camera: [] for camera in self.port.keys}
        poses = []
        for i in range(flat.shape[1]):
            state, frame = self.streaming.next(state, flat[:, i], seeds)
            for camera, z in frame.latents.items():
                latents[camera].append(z)
            poses.append(frame.pose)
        stacked = unwhiten({camera: torch.stack(z, 1) for camera, z in latents.items()}, self.latent_spec)
        return state, Imagination(latents=stacked, poses=self.pose_normalizer.denormalize(torch.stack(poses, 1)))

    # --- storage ------------------------------------------------------------------------------------------------------

    def with_sampling(self, **changes: Any) -> "AutoregressiveWorldModel":
        """The same weights with other sampling settings (`solver_steps`, `history_level`, `router`), checked against training."""
        other = object.__new__(AutoregressiveWorldModel)
        other.__dict__ = self.__dict__ | {"config": replace(self.config, **changes)}
        other._check_router()
        return other

    def save_pretrained(self, folder: str | Path, *, provenance: Mapping[str, Any] | None = None) -> None:
        """Write it. Raises `CheckpointError` for a model that shares its network: the whole of them is saved."""
        if len(self.network.ports) > 1:
            raise CheckpointError(
                f"{self.body!r} shares its weights with {len(self.network.ports) - 1} others: save the MultiWorldModel it is of"
            )
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
            if "model" not in config:
                raise CheckpointError(
                    f"{source}: a world model with weights of its own is required here, this is a member of one of several "
                    "robots, which `load_world_model` reads."
                )
            # checkpoints from before there were guesses do not say that they have none
            model = config["model"] | {"network": {"guess_width": 0} | config["model"]["network"]}
            return cls(
                checkpoint.from_json(AutoregressiveConfig, model, source=source),
                spec,
                action_normalizer=RobustNormalizer.from_dict(config["action_normalizer"]),
                pose_normalizer=RobustNormalizer.from_dict(config["pose_normalizer"]),
            )

        return checkpoint.load_part(folder, part="world-model", build=build, renew=_with_ports)


def make_network(config: AutoregressiveConfig, bodies: Mapping[str, Body]) -> SpaceTimeTransformer:
    """The untrained network of these robots."""
    encoder = text_encoder(config.text)
    return SpaceTimeTransformer(config.network, bodies, text_dim=0 if encoder is None else encoder.dim)


def body_of(spec: WorldSpec) -> Body:
    """The sizes of a spec's data. Raises `SpecMismatch` if its latents are missing or pack several frames."""
    if spec.latent is None:
        raise SpecMismatch("a world model requires a spec with latents (spec.latent), got none: choose a tokenizer")
    if spec.latent.frames_per_latent != 1:
        raise SpecMismatch(
            f"this world model takes one latent a frame, the tokenizer packs {spec.latent.frames_per_latent}"
        )
    width = spec.control_steps * spec.action.dim
    return Body(shapes=spec.latent.shapes, pose_dim=len(spec.pose_names), action_dim=width)


def _with_ports(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of checkpoints from before a network had ports (one robot, no camera could be missing), by their present names."""
    if any(name.startswith("network.ports.") for name in tensors):
        return tensors
    trunk = ("network.blocks.", "network.embed_level.", "network.final_modulation.")
    renewed = {}
    for name, value in tensors.items():
        renewed[name if name.startswith(trunk) else name.replace("network.", f"network.ports.{ONLY}.", 1)] = value
        if name.startswith("network.place."):
            renewed[f"network.ports.{ONLY}.unseen.{name.removeprefix('network.place.')}"] = value.new_zeros(
                2, value.shape[1]
            )
    return renewed


def _mean_where(values: Tensor, mask: Tensor) -> Tensor:
    """Mean over the mask, NaN where it is empty: a small batch may hold no such target. The training log leaves it out."""
    return ((values * mask).sum() / mask.sum()).detach()
