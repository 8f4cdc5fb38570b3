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

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from worldline import checkpoint
from worldline.data.normalization import RobustNormalizer, normalizers_from_json, normalizers_to_json
from worldline.errors import CheckpointError, SpecMismatch
from worldline.tokenizers.whitening import unwhiten, whiten
from worldline.types import Clip, Imagination, LatentSpec, Trace, WorldSpec
from worldline.worldmodels import traced
from worldline.worldmodels.config import AutoregressiveConfig
from worldline.worldmodels.doubled_pass import NetworkClip, doubled_batch, first_frames
from worldline.worldmodels.experts import Routing
from worldline.worldmodels.language import text_encoder
from worldline.worldmodels.ports import ONLY, Body, Port
from worldline.worldmodels.state import StreamState
from worldline.worldmodels.streaming import Frame, Streaming
from worldline.worldmodels.traces import TracedSampling
from worldline.worldmodels.training import Training
from worldline.worldmodels.transformer import SpaceTimeTransformer

KIND = "autoregressive"
SAMPLING = ("solver_steps", "history_level", "guidance", "cache_write")  # what verbs may change after training


class AutoregressiveWorldModel(TracedSampling, nn.Module):
    """A `WorldModel`. Build it from a spec with latents, or load it with `from_pretrained`.

    Args:
        config: sizes and levels.
        spec: what it models; `spec.latent` is required.
        action_normalizer, pose_normalizer: fitted on the training episodes.
        network, body: a network that several robots share, and which of its ports is this one's (`embodiments`); without them
            it gets a network of its own.
    """

    tracing = traced

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
    def training_pass(self) -> Training:
        return Training(network=self.network, body=self.body, config=self.config)

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

    def fit_aims(self, episodes: Iterable[tuple[Tensor, Tensor]]) -> None:
        """Before training: how far commands lead, from episodes of this robot, as poses "t p" and blocks "t-1 k a" in physical units."""
        guess = self.port.guess_pose
        if guess is not None:
            guess.fit_gain(
                (self.pose_normalizer.normalize(p), self.action_normalizer.normalize(a).flatten(1)) for p, a in episodes
            )

    # --- training -----------------------------------------------------------------------------------------------------

    def loss(self, clip: Clip, generator: torch.Generator | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """Flow-matching loss of a clip of raw latents with t >= 2 frames, and detached metrics (`training`).

        Levels and noise are drawn on the CPU from `generator`, so that they do not depend on the device.
        """
        return self.training_pass.loss(clip, self.network_units(clip), generator)

    @torch.no_grad()
    def routing(self, clip: Clip) -> Routing:
        """How the t - 1 blocks of a clip are routed to experts. Raises `SpecMismatch` where there are none."""
        if self.network.experts is None:
            raise SpecMismatch("routing requires a world model with experts (network.experts), got one without")
        units = self.network_units(clip)
        clean = torch.zeros(len(units.poses), units.poses.shape[1] - 1, device=self.device)
        batch = doubled_batch(units, units, history_level=clean, target_level=clean, told=None, seen={}, generator=None)
        targets = batch.keep(slice(clean.shape[1], None))
        return self.network.route(self.body, targets, self.port.guesses(targets), self.config.router)[1]

    def _check_router(self) -> None:
        if self.network.experts is not None:
            self.network.experts.check_router(self.config.router)

    def network_units(self, clip: Clip) -> NetworkClip:
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
        poses, actions = self.pose_normalizer.normalize(clip.poses.to(self.device)), self._flat_actions(clip.actions)
        guess = self.port.guess_pose
        return NetworkClip(
            frames=whiten(there, self.latent_spec),
            poses=poses,
            actions=actions,
            text=text,
            aims=guess.aims(poses, actions, first_frames(clip).to(self.device))
            if guess is not None and guess.gain is not None
            else None,
        )

    def _flat_actions(self, actions: Tensor) -> Tensor:
        return self.action_normalizer.normalize(actions.to(self.device)).flatten(2)

    def retold(self, trace: Trace, actions: Float[Tensor, "n f k a"]) -> Trace:
        """The path of `sample_traced` as one that was dreamt under other actions: its means and log-probability are of those."""
        return traced.retold(self, trace, actions)

    # --- imagination --------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def observe(self, clip: Clip) -> StreamState:
        """Stream real frames (raw latents "n t c h w", t >= 1) into a fresh state.

        Raises `SpecMismatch` if a camera is missing (`clip.present`) from a model that was never trained without one.
        """
        *_, state = self.observed(clip)
        return state

    @torch.no_grad()
    def observed(self, clip: Clip) -> Iterator[StreamState]:
        """The state after each frame of a clip, as `observe` makes it. They share one cache: only the last may go on."""
        missing = sorted(camera for camera, there in clip.present.items() if not there.all())
        if missing and not self.config.camera_dropout:
            raise SpecMismatch(
                f"cameras {missing} are missing from what is observed, and this world model was never trained without one "
                "(camera_dropout=0). Give all of them, or train with --model.camera-dropout 0.2."
            )
        units = self.network_units(clip)
        n, t = units.poses.shape[:2]
        state = self.streaming.start(units)
        seeds = torch.zeros(n, dtype=torch.long, device=self.device)
        always = torch.ones(n, dtype=torch.bool, device=self.device)
        seen = {camera: clip.present.get(camera, always).to(self.device) for camera in units.frames}
        for i in range(t):
            latents = {c: z[:, i] * seen[c][:, None, None, None] for c, z in units.frames.items()}
            frame = Frame(latents=latents, pose=units.poses[:, i], seen=seen)
            state = self.streaming.append(state, frame, units.actions[:, i - 1] if i else None, seeds)
            yield state

    @torch.no_grad()
    def imagine(
        self, state: StreamState, actions: Float[Tensor, "n f k a"] | None, *, seeds: Int[Tensor, " n"]
    ) -> tuple[StreamState, Imagination]:
        """The f frames that follow. Actions in physical units; latents come back raw, poses in physical units.

        Without actions it is one frame, whatever may follow: by the instruction, if the model is told one. Raises `SpecMismatch`
        if it never learned from clips without actions.
        """
        if actions is None and not self.config.actionless:
            raise SpecMismatch(
                "this world model requires actions: it never learned what follows when none is known (actionless=0). Give a policy "
                "or actions, or train with --model.actionless 0.5."
            )
        seeds = seeds.to(self.device)
        blocks = [None] if actions is None else self._flat_actions(actions).unbind(1)
        state = replace(state, cache=state.cache.clone())  # the rest of this call writes into its own copy
        latents: dict[str, list[Tensor]] = {camera: [] for camera in self.port.keys}
        poses = []
        for block in blocks:
            state, frame = self.streaming.next(state, block, seeds)
            for camera, z in frame.latents.items():
                latents[camera].append(z)
            poses.append(frame.pose)
        stacked = unwhiten({camera: torch.stack(z, 1) for camera, z in latents.items()}, self.latent_spec)
        return state, Imagination(latents=stacked, poses=self.pose_normalizer.denormalize(torch.stack(poses, 1)))

    # --- storage ------------------------------------------------------------------------------------------------------

    @property
    def sampling(self) -> dict[str, Any]:
        """The settings of sampling that verbs tell of and may change (`with_sampling`)."""
        return {name: getattr(self.config, name) for name in SAMPLING}

    @property
    def reads_instructions(self) -> bool:
        return self.config.text != "none"

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
                **normalizers_to_json(self.action_normalizer, self.pose_normalizer),
            },
            spec=self.spec,
            tensors=self.state_dict(),
            provenance=provenance or {},
        )

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> "AutoregressiveWorldModel":
        def build(config: Any, spec: WorldSpec, source: str) -> "AutoregressiveWorldModel":
            if "network" not in config.get("model", {}):
                raise CheckpointError(
                    f"{source}: a world model of kind {KIND} with weights of its own is required here, this is a member of one of "
                    "several robots or of another kind: `load_world_model` reads them all."
                )
            return cls(
                read_config(config["model"], source),
                spec,
                **normalizers_from_json(config, source=source),
            )

        return checkpoint.load_part(folder, part="world-model", build=build, renew=_with_ports)


def read_config(model: Mapping[str, Any], source: str) -> AutoregressiveConfig:
    """Settings from a checkpoint. One from before there were guesses or aims does not say that it has none."""
    network = {"guess_width": 0, "aim": False} | model["network"]
    return checkpoint.from_json(AutoregressiveConfig, {**model, "network": network}, source=source)


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
    return Body(
        shapes=spec.latent.shapes,
        pose_dim=len(spec.pose_names),
        action_dim=width,
        adds_up=spec.action.kind != "absolute",
    )


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
