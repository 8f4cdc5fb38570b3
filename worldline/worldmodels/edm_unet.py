"""World4RL's transition model (2509.19080): an EDM-preconditioned U-Net that denoises the next frame from the last four.

- The network is `diffusers.UNet2DModel` on whitened latents. The cameras' latents are stacked on channels, the history's frames beside the
  noisy one, as in DIAMOND (2405.12399): the cameras must have latents of one height and width.
- The action blocks of the history and the coming one enter as a vector, through `class_embed_type="identity"`: what is passed there is
  added to the embedding of the noise level, and with it scales and shifts every normalisation (`scale_shift`, DIAMOND's adaptive
  group norm). As channels they would be constant pictures, of which the first group norm removes most.
- Blocks are normalised, and two-hot coded (World4RL, section III-B) or plain. Beside each stands whether it is there at all.
- Poses are not in the paper, but policies read them: a dense network foretells the next one from the last poses and the blocks. What it
  foretells is told to the U-Net, so that the picture shows the arm there.
- `target="frame"` denoises the next frame (the paper). `target="change"` denoises its difference from the last one, scaled by the
  standard deviation measured on training clips (`fit_change`): most of a picture stands still, and a small network need not learn
  to copy it through group norms. An untrained one then repeats the last frame.
- Before there are four frames, the first is repeated. In training every frame of a clip but the first is a target, with the frames
  before it *in the clip* as history: so starts with one, two or three frames are trained on, as a dream begins.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.unets.unet_2d import UNet2DModel
from jaxtyping import Float, Int
from torch import Tensor, nn

from worldline import checkpoint
from worldline.data.normalization import RobustNormalizer, normalizers_from_json, normalizers_to_json
from worldline.diffusion import add_noise, expand, loss_weight, precondition, row_noise, sample_edm
from worldline.errors import SpecMismatch
from worldline.tokenizers.actions import TwoHot
from worldline.tokenizers.whitening import unwhiten, whiten
from worldline.types import Clip, Imagination, LatentSpec, TensorState, WorldSpec
from worldline.worldmodels.edm_config import EDMConfig
from worldline.worldmodels.guesses import STEP, dense

KIND = "edm-unet"
SAMPLING = ("solver_steps", "churn", "sigma_max", "sigma_min")  # what may be changed after training


@dataclass(frozen=True, slots=True, kw_only=True)
class _History:
    """What is known of n rows before a frame is made, h frames, in the network's units. Frames that are not there repeat the first."""

    frames: Tensor  # "n h c h w", the cameras stacked
    poses: Tensor  # "n h p"
    blocks: Tensor  # "n h k*a": those that led from a frame of the history to the next, and, the last, the coming one
    count: Tensor  # "n": how many frames there were in all


class EDMWorldModel(nn.Module):
    """A `WorldModel`. Build it from a spec with latents, or load it with `from_pretrained`.

    Args:
        config: sizes and noise.
        spec: what it models; `spec.latent` is required.
        action_normalizer, pose_normalizer: fitted on the training episodes.

    Raises `SpecMismatch` if the latents are missing, pack several frames, or differ in height or width between cameras.
    """

    change_scale: Tensor

    def __init__(
        self,
        config: EDMConfig,
        spec: WorldSpec,
        *,
        action_normalizer: RobustNormalizer,
        pose_normalizer: RobustNormalizer,
    ) -> None:
        super().__init__()
        self.config, self.spec = config, spec
        self.action_normalizer, self.pose_normalizer = action_normalizer, pose_normalizer
        if spec.latent is None:
            raise SpecMismatch("a world model requires a spec with latents (spec.latent), got none: choose a tokenizer")
        self.shapes = stackable_shapes(spec.latent)
        channels, poses = sum(shape[0] for shape in self.shapes.values()), len(spec.pose_names)
        told = config.history * (poses + _code_width(config, spec))
        self.unet = _unet(config, channels)
        embedding = 4 * config.block_out_channels[0]
        self.embed = nn.Sequential(
            nn.Linear(told + poses, embedding), nn.SiLU(), nn.Linear(embedding, embedding)
        )  # of what is told to the U-Net
        self.foretell = dense(told, config.pose_width, poses) if poses else None
        self.register_buffer("change_scale", torch.ones(channels))
        nn.init.zeros_(self.unet.conv_out.weight)
        nn.init.zeros_(self.unet.conv_out.bias)  # pyright: ignore[reportArgumentType]
        if self.foretell is not None:
            last = self.foretell[-1]
            assert isinstance(last, nn.Linear)
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)

    @property
    def latent_spec(self) -> LatentSpec:
        assert self.spec.latent is not None
        return self.spec.latent

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    # --- training -----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def fit_change(self, clip: Clip) -> None:
        """Before training with `target="change"`: how much latents change from frame to frame, by channel, from a clip of raw latents."""
        if self.config.target == "change":
            frames, *_ = self._units(clip)
            self.change_scale.copy_(frames.diff(dim=1).square().mean((0, 1, 3, 4)).sqrt().clamp(min=1e-3))

    def loss(self, clip: Clip, generator: torch.Generator | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """EDM's loss over every frame but the first of a clip of raw latents (t >= 2), and detached metrics.

        Sigmas and noise are drawn on the CPU from `generator`, so that they do not depend on the device.
        """
        frames, poses, blocks = self._units(clip)
        b, t = poses.shape[:2]
        known = _before_each(frames, poses, blocks, self.config.history)
        truth, pose = frames[:, 1:].flatten(0, 1), poses[:, 1:].flatten(0, 1)
        shown = known
        if self.config.history_noise:
            std = self.config.history_noise * torch.rand(b, generator=generator)
            noise = torch.randn(frames.shape, generator=generator) * std[:, None, None, None, None]
            shown = _before_each(frames + noise.to(frames), poses, blocks, self.config.history)
        base, scale = self._base(shown)
        sigma = self.config.sigmas.sample((b * (t - 1),), generator).to(frames)
        level = self.config.path.level(sigma)
        target = (truth - base) / scale
        x = add_noise(self.config.path, target, torch.randn(target.shape, generator=generator).to(target), level)
        foretold = self._foretold(known)
        error = (self._denoise(x, level, shown, foretold.detach()) - target).square().mean((1, 2, 3))
        weighted = loss_weight(sigma, self.config.sigma_data) * error
        missed = (foretold - pose).square()
        pose_error = missed.mean() if pose.shape[1] else missed.sum()
        metrics = {"weighted_error": weighted.mean().detach(), "pose_error": pose_error.detach()}
        return weighted.mean() + self.config.pose_weight * pose_error, metrics

    def _units(self, clip: Clip) -> tuple[Tensor, Tensor, Tensor]:
        """Whitened latents of all cameras "n t c h w", poses "n t p" and flattened blocks "n t-1 k*a", after the clip's lead."""
        missing = sorted(camera for camera, there in clip.present.items() if not there.all())
        if missing:
            raise SpecMismatch(
                f"cameras {missing} are missing, and this world model ({KIND}) requires all of {sorted(self.shapes)}. Give them, or train "
                "a model that can do without: `worldline train world-model --model.camera-dropout 0.2`."
            )
        latents = {c: clip.frames[c][:, clip.lead :].to(self.device, torch.float32) for c in self.shapes}
        poses, actions = clip.poses[:, clip.lead :].to(self.device), clip.actions[:, clip.lead :]
        frames = torch.cat(list(whiten(latents, self.latent_spec).values()), dim=2)
        return frames, self.pose_normalizer.normalize(poses), self._blocks(actions)

    def _blocks(self, actions: Tensor) -> Tensor:
        """Normalised blocks "n t k*a"."""
        return self.action_normalizer.normalize(actions.to(self.device)).flatten(2)

    # --- the denoiser -------------------------------------------------------------------------------------------------

    def _told(self, known: _History) -> Tensor:
        """What is known of poses and actions as one vector "n told": the last pose, its steps before, the blocks' codes."""
        codes = known.blocks
        if self.config.action_encoding == "two-hot":
            codes = TwoHot(bins=self.config.bins).encode(known.blocks).flatten(2)
        # a block is there if the frame that it left is
        age = torch.arange(self.config.history - 1, -1, -1, device=codes.device)
        there = (age < known.count[:, None])[..., None]
        codes = torch.cat([codes * there, there.to(codes)], dim=2)
        steps = known.poses.diff(dim=1) / STEP
        return torch.cat([known.poses[:, -1], steps.flatten(1), codes.flatten(1)], dim=1)

    def _foretold(self, known: _History) -> Tensor:
        """The next pose "n p"."""
        last = known.poses[:, -1]
        return last if self.foretell is None else last + STEP * self.foretell(self._told(known))

    def _base(self, known: _History) -> tuple[Tensor, Tensor]:
        """What is added to the diffused values after they are scaled, "n c h w", and their scale, "c 1 1"."""
        last, scale = known.frames[:, -1], self.change_scale[:, None, None]
        return (last, scale) if self.config.target == "change" else (torch.zeros_like(last), torch.ones_like(scale))

    def _denoise(self, x: Tensor, level: Tensor, known: _History, foretold: Tensor) -> Tensor:
        """The clean estimate of the diffused values "n c h w" at `level` "n"."""
        sigma = self.config.path(level).sigma
        c = precondition(expand(sigma, x), self.config.sigma_data)
        seen = torch.cat([c.into * x, known.frames.flatten(1, 2) / self.config.sigma_data], dim=1)
        condition = self.embed(torch.cat([self._told(known), (foretold - known.poses[:, -1]) / STEP], dim=1))
        height, width = seen.shape[2:]
        halvings = 2 ** (len(self.config.block_out_channels) - 1)
        seen = F.pad(seen, (0, -width % halvings, 0, -height % halvings), mode="replicate")
        # diffusers' sinusoids are made for time steps in the hundreds
        answer = self.unet(seen, 1000 * c.noise.flatten(), class_labels=condition).sample[..., :height, :width]
        return c.skip * x + c.out * answer

    # --- imagination --------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def observe(self, clip: Clip) -> TensorState:
        """The last frames of real ones (raw latents "n t c h w", t >= 1), as a state. Raises `SpecMismatch` for a missing camera."""
        frames, poses, blocks = self._units(clip)
        n, t = poses.shape[:2]
        last = _take(frames, poses, blocks, t - 1, self.config.history)
        tensors = {"frames": last.frames, "poses": last.poses, "blocks": last.blocks[:, :-1], "count": last.count}
        return TensorState(tensors={name: x.clone() for name, x in tensors.items()}, rows=n)

    @torch.no_grad()
    def imagine(
        self, state: TensorState, actions: Float[Tensor, "n f k a"] | None, *, seeds: Int[Tensor, " n"]
    ) -> tuple[TensorState, Imagination]:
        """The f frames that follow. Actions in physical units; latents come back raw, poses in physical units.

        Raises `SpecMismatch` without actions.
        """
        if actions is None:
            raise SpecMismatch(
                f"this world model ({KIND}) requires actions: it never learned what follows when none is known. Give a policy or actions, "
                "or train a model that can do without: `worldline train world-model --model.actionless 0.5`."
            )
        seeds, made, poses = seeds.to(self.device), [], []
        for block in self._blocks(actions).unbind(1):
            known = self._known(state, block)
            frame, pose = self._next(known, seeds)
            made.append(frame)
            poses.append(pose)
            tensors = {
                "frames": torch.cat([known.frames[:, 1:], frame[:, None]], 1),
                "poses": torch.cat([known.poses[:, 1:], pose[:, None]], 1),
                "blocks": known.blocks[:, 1:],
                "count": known.count + 1,
            }
            state = TensorState(tensors=tensors, rows=len(state))
        sizes = [shape[0] for shape in self.shapes.values()]
        latents = dict(zip(self.shapes, torch.stack(made, 1).split(sizes, dim=2)))
        physical = self.pose_normalizer.denormalize(torch.stack(poses, 1))
        return state, Imagination(latents=unwhiten(latents, self.latent_spec), poses=physical)

    def _known(self, state: TensorState, block: Tensor) -> _History:
        """The state's history, `block` "n k*a" the coming one."""
        held = state.tensors
        blocks = torch.cat([held["blocks"], block[:, None]], 1)
        return _History(frames=held["frames"], poses=held["poses"], blocks=blocks, count=held["count"])

    def _next(self, known: _History, seeds: Tensor) -> tuple[Tensor, Tensor]:
        """The next frame "n c h w" and pose "n p"."""
        config, shape = self.config, tuple(known.frames.shape[2:])
        foretold = self._foretold(known)
        base, scale = self._base(known)

        def noise(step: int) -> Tensor:
            return row_noise(seeds, known.count, step, shape)

        made = sample_edm(
            lambda x, level: self._denoise(x, level, known, foretold),
            config.sigma_max * noise(0),
            config.levels,
            config.path,
            churn=config.churn,
            noise=noise,
        )
        return base + scale * made, foretold

    # --- storage ------------------------------------------------------------------------------------------------------

    @property
    def sampling(self) -> dict[str, Any]:
        """The settings of sampling, by name, as `with_sampling` takes them."""
        return {name: getattr(self.config, name) for name in SAMPLING}

    @property
    def reads_instructions(self) -> bool:
        return False

    def with_sampling(self, **changes: Any) -> "EDMWorldModel":
        """The same weights with other sampling settings, checked against training.

        Raises `ValueError` for a setting that this model does not have, or one that asks for noise that training never showed.
        """
        if unknown := sorted(set(changes) - set(SAMPLING)):
            raise ValueError(
                f"sampling of an {KIND} world model: some of {', '.join(SAMPLING)} required, got {unknown}"
            )
        other = object.__new__(EDMWorldModel)
        other.__dict__ = self.__dict__ | {"config": replace(self.config, **changes)}
        return other

    def save_pretrained(self, folder: str | Path, *, provenance: Mapping[str, Any] | None = None) -> None:
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
    def from_pretrained(cls, folder: str | Path) -> "EDMWorldModel":
        def build(config: Any, spec: WorldSpec, source: str) -> "EDMWorldModel":
            return cls(
                checkpoint.from_json(EDMConfig, config["model"], source=source),
                spec,
                **normalizers_from_json(config, source=source),
            )

        return checkpoint.load_part(folder, part="world-model", kind=KIND, build=build)


def _unet(config: EDMConfig, channels: int) -> UNet2DModel:
    levels = len(config.block_out_channels)
    attends = [i >= levels - config.attended for i in range(levels)]
    return UNet2DModel(
        in_channels=(1 + config.history) * channels,
        out_channels=channels,
        block_out_channels=config.block_out_channels,
        layers_per_block=config.layers_per_block,
        down_block_types=tuple("AttnDownBlock2D" if a else "DownBlock2D" for a in attends),
        up_block_types=tuple("AttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attends)),
        norm_num_groups=config.norm_groups,
        attn_norm_num_groups=config.norm_groups,  # with scale_shift diffusers would leave this norm out
        attention_head_dim=config.head_width,
        resnet_time_scale_shift="scale_shift",
        class_embed_type="identity",
    )


def _code_width(config: EDMConfig, spec: WorldSpec) -> int:
    """Numbers that tell of one block: its code, and whether it is there."""
    return spec.control_steps * spec.action.dim * (config.bins if config.action_encoding == "two-hot" else 1) + 1


def stackable_shapes(latent: LatentSpec) -> Mapping[str, tuple[int, int, int]]:
    """The latents' shapes by camera. Raises `SpecMismatch` if they pack several frames or cannot be stacked on channels."""
    if latent.frames_per_latent != 1:
        raise SpecMismatch(f"this world model takes one latent a frame, the tokenizer packs {latent.frames_per_latent}")
    if len({shape[1:] for shape in latent.shapes.values()}) != 1:
        sizes = ", ".join(f"{camera} {h}x{w}" for camera, (_, h, w) in latent.shapes.items())
        raise SpecMismatch(
            f"an {KIND} world model stacks the cameras' latents on channels: latents of one height and width required, got {sizes}. "
            "Record cameras of one size, train the tokenizer on one camera, or use `worldline train world-model`."
        )
    return latent.shapes


def _take(frames: Tensor, poses: Tensor, blocks: Tensor, last: int, history: int) -> _History:
    """What is known once frame `last` of a clip has been seen, its own block (zeros if the clip does not hold it) the coming one."""
    places = torch.arange(last - history + 1, last + 1).clamp(min=0)
    padded = torch.cat([blocks, blocks.new_zeros(len(blocks), 1, blocks.shape[2])], dim=1)
    return _History(
        frames=frames[:, places],
        poses=poses[:, places],
        blocks=padded[:, places],
        count=torch.full((len(poses),), last + 1, device=poses.device),
    )


def _before_each(frames: Tensor, poses: Tensor, blocks: Tensor, history: int) -> _History:
    """What is known before each frame of a clip but the first, "(b t-1) ..."."""
    each = [_take(frames, poses, blocks, last, history) for last in range(poses.shape[1] - 1)]

    def joined(name: str) -> Tensor:
        return torch.stack([getattr(known, name) for known in each], dim=1).flatten(0, 1)

    return _History(frames=joined("frames"), poses=joined("poses"), blocks=joined("blocks"), count=joined("count"))
