"""An inverse dynamics model: which actions led from frame to frame, read off the pictures alone.

A reward for a world model (RLIR 2509.23958): what was commanded should be seen to happen in the dream. It looks at a short window of
frames around each transition,

    frames   ...  i-1   i   i+1   i+2  ...        window 4: the transition from i to i+1 and one frame on either side,
                      └─┬─┘                       because an arm lags behind its commands
                   actions[:, i]

where a clip begins or ends its edge frame is repeated, in training as in use (`window_rows`). Its networks are two different ones
(`inverse_networks`), and so are its heads: a Gaussian a dimension, or a distribution over bins. What its word is worth is measured
(`inverse_agreement`, `inverse_audit`) before it is believed.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, UInt8
from torch import Tensor, nn

from worldline import checkpoint
from worldline.data.normalization import CONSTANT, RobustNormalizer
from worldline.errors import SpecMismatch, WorldlineError
from worldline.policies.encoder import EncoderConfig, random_shift
from worldline.rl_in_imagination.inverse_agreement import Calibration, Reading
from worldline.rl_in_imagination.inverse_networks import DifferenceReader, FrameReader, TokenConfig
from worldline.tokenizers.actions import TwoHot
from worldline.types import WorldSpec

BATCH = 256  # windows at a time


@dataclass(frozen=True, slots=True, kw_only=True)
class InverseConfig:
    """`encoder` is of architecture conv, `tokens` of architecture transformer."""

    architecture: Literal["conv", "transformer"] = "conv"
    """conv: every frame seen alone, compared at the end. transformer: attention over patches of frame differences."""
    head: Literal["continuous", "binned"] = "continuous"
    """continuous: a Gaussian an action dimension. binned: a distribution over bins."""
    window: int = 4
    """Frames seen: those of the transition, and as many on either side (an odd one after it)."""
    target: Literal["mean", "all"] = "mean"
    """mean: the mean action of a block. all: each of its k actions."""
    bins: int = 21
    """Of the binned head, from the 1st to the 99th percentile of each action dimension."""
    shift: int = 2
    """Pixels of random shift in training, all frames of a window alike."""
    hidden: int = 256
    """Width of the layers behind the eyes."""
    encoder: EncoderConfig = field(default_factory=lambda: EncoderConfig(shift=0))
    tokens: TokenConfig = field(default_factory=TokenConfig)

    def __post_init__(self) -> None:
        if not 2 <= self.window <= 8:
            raise ValueError(f"window: 2 to 8 frames required, got {self.window}")
        if self.bins < 3 or self.hidden < 1 or self.shift < 0:
            raise ValueError(f"bins >= 3, hidden >= 1 and shift >= 0 required, got {self}")
        if self.encoder.window != 1 or self.encoder.shift != 0:
            raise ValueError(
                f"encoder.window 1 and encoder.shift 0 required (frames are encoded one by one and shifted together, by shift), got "
                f"{self.encoder.window} and {self.encoder.shift}"
            )

    @property
    def before(self) -> int:
        """Frames seen before those of the transition."""
        return (self.window - 2) // 2

    @property
    def ahead(self) -> int:
        """Frames seen behind those of the transition."""
        return self.window - 2 - self.before


def window_rows(frames: int, window: int) -> Int[Tensor, "{frames-1} {window}"]:
    """The frames seen for each transition of a clip, its edge frames repeated."""
    offsets = torch.arange(window) - (window - 2) // 2
    return (torch.arange(frames - 1)[:, None] + offsets).clamp(0, frames - 1)


class InverseModel(nn.Module):
    """Reads actions off uint8 frames. Its name carries the fingerprint of its weights."""

    def __init__(
        self,
        config: InverseConfig,
        spec: WorldSpec,
        normalizer: RobustNormalizer,
        calibration: Calibration | None = None,
    ) -> None:
        super().__init__()
        self.config, self.spec, self.normalizer, self.calibration = config, spec, normalizer, calibration
        self.parts = spec.control_steps if config.target == "all" else 1
        self.codes = TwoHot(bins=config.bins)
        numbers = 2 if config.head == "continuous" else config.bins
        options = {"window": config.window, "hidden": config.hidden, "outputs": self.parts * spec.action.dim * numbers}
        if config.architecture == "conv":
            self.network: FrameReader | DifferenceReader = FrameReader(config.encoder, spec.cameras, **options)
        else:
            self.network = DifferenceReader(config.tokens, spec.cameras, **options)

    @property
    def name(self) -> str:
        about = checkpoint.to_json(self.config)
        return f"inverse-{self.config.architecture}:{checkpoint.fingerprint(self.state_dict(), about)}"

    @property
    def constant(self) -> tuple[str, ...]:
        """Action dimensions that never changed in training: not learned, and left out of every agreement."""
        return tuple(name for name, moves in zip(self.spec.action.names, self._moving().tolist()) if not moves)

    def _moving(self) -> Tensor:
        low, high = torch.tensor(self.normalizer.low), torch.tensor(self.normalizer.high)
        return (high - low) / 2 > CONSTANT * ((high + low) / 2).abs().clamp(min=1)

    # --- learning -----------------------------------------------------------------------------------------------------

    def targets(self, blocks: Float[Tensor, "*n k a"]) -> Float[Tensor, "*n q a"]:
        """What is to be read of action blocks: their mean (q = 1), or all of them (q = k)."""
        return blocks if self.config.target == "all" else blocks.mean(-2, keepdim=True)

    def loss(
        self, frames: Mapping[str, UInt8[Tensor, "n w c _h _w"]], blocks: Float[Tensor, "n k a"]
    ) -> Float[Tensor, ""]:
        """Negative log-likelihood of the blocks in normalised units, the mean over the dimensions that move.

        The Gaussian one is weighted by the stated standard deviation (beta-NLL, 2203.09168, beta 1/2), so that what is hard to read is
        learned as well.
        """
        frames = self._checked(frames, self.config.window)
        if self.training and self.config.shift:
            frames = {camera: _shifted(x, self.config.shift) for camera, x in frames.items()}
        out = self._numbers(self.network(frames).float())
        wanted = self.normalizer.normalize(self.targets(blocks.to(out.device)))
        if self.config.head == "binned":
            each = -(self.codes.encode(wanted) * F.log_softmax(out, -1)).sum(-1)
        else:
            mean, variance = _gaussian(out)
            each = ((wanted - mean).square() / variance + variance.log()) / 2 * variance.detach().sqrt()
        return each[..., self._moving().to(out.device)].mean()

    # --- reading ------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def read(self, frames: Mapping[str, UInt8[Tensor, "n w c _h _w"]]) -> Reading:
        """Readings "n q a" of n windows of `config.window` frames. Raises `SpecMismatch` for other cameras, sizes or lengths."""
        frames = self._checked(frames, self.config.window)
        n = len(next(iter(frames.values())))
        parts = [self.network({c: x[i : i + BATCH] for c, x in frames.items()}) for i in range(0, n, BATCH)]
        return self._reading(torch.cat(parts))

    @torch.no_grad()
    def read_along(self, frames: Mapping[str, UInt8[Tensor, "n t c _h _w"]]) -> Reading:
        """Readings "n t-1 q a" of every transition of n clips of t >= 2 frames."""
        frames = self._checked(frames, None)
        n, t = next(iter(frames.values())).shape[:2]
        rows = window_rows(t, self.config.window)
        step = max(1, BATCH // t)
        parts = [self.network.along({c: x[i : i + step] for c, x in frames.items()}, rows) for i in range(0, n, step)]
        return self._reading(torch.cat(parts))

    def predict(self, frames: Mapping[str, UInt8[Tensor, "n w c _h _w"]]) -> Float[Tensor, "n a"]:
        """The mean action of each window's block, in physical units."""
        return self.read(frames).value.mean(-2)

    def along(self, frames: Mapping[str, UInt8[Tensor, "n t c _h _w"]]) -> Float[Tensor, "n t-1 a"]:
        """The mean action of every block of whole clips, in physical units."""
        return self.read_along(frames).value.mean(-2)

    def blocks(self, frames: Mapping[str, UInt8[Tensor, "n t c _h _w"]]) -> Float[Tensor, "n t-1 k a"]:
        """Every block of whole clips; a model of means repeats its mean k times. Not clipped to any range."""
        value = self.read_along(frames).value
        return value.expand(*value.shape[:2], self.spec.control_steps, value.shape[-1])

    def agreement(
        self, frames: Mapping[str, UInt8[Tensor, "n t c _h _w"]], actions: Float[Tensor, "n blocks k a"]
    ) -> Float[Tensor, "n t-1"]:
        """How well the commanded blocks can be read off clips, in [0, 1] (`inverse_agreement`): a reward is its mean over frames.

        Raises `WorldlineError` for a model that was never calibrated, `SpecMismatch` for frames or actions of other shapes.
        """
        reading, commanded = self._compared(frames, actions)
        return self.calibrated_by().agreement(reading, commanded)

    def agreement_by_dimension(
        self, frames: Mapping[str, UInt8[Tensor, "n t c _h _w"]], actions: Float[Tensor, "n blocks k a"]
    ) -> Float[Tensor, "n t-1 a"]:
        """`agreement` of every action dimension, those that do not count included."""
        reading, commanded = self._compared(frames, actions)
        return self.calibrated_by().by_dimension(reading, commanded)

    def calibrated_by(self) -> Calibration:
        """The calibration. Raises `WorldlineError` if there is none."""
        if self.calibration is None:
            raise WorldlineError(
                "an inverse model calibrated on held-out clips is required, this one is not. Train it."
            )
        return self.calibration

    def _compared(self, frames: Mapping[str, Tensor], actions: Tensor) -> tuple[Reading, Tensor]:
        reading = self.read_along(frames)
        wanted = (*reading.value.shape[:2], self.spec.control_steps, self.spec.action.dim)
        if tuple(actions.shape) != wanted:
            raise SpecMismatch(
                f"action blocks {wanted} (n t-1 k a) required for these frames, got {tuple(actions.shape)}"
            )
        return reading, self.targets(actions.to(reading.value))

    def _checked(self, frames: Mapping[str, Tensor], length: int | None) -> dict[str, Tensor]:
        """The model's cameras on its device."""
        device, shapes = next(self.parameters()).device, set()
        for camera in self.spec.cameras:
            got = tuple(frames[camera.name].shape[1:]) if camera.name in frames else None
            if got is None or got[1:] != (3, camera.height, camera.width) or not _fits(got[0], length):
                wanted = (length or "at least 2", 3, camera.height, camera.width)
                raise SpecMismatch(f"frames of camera {camera.name}: shape (n, {wanted}) required, got {got or 'none'}")
            shapes.add(tuple(frames[camera.name].shape[:2]))
        if len(shapes) > 1:
            raise SpecMismatch(f"cameras of one number of clips and frames required, got {sorted(shapes)}")
        return {camera.name: frames[camera.name].to(device) for camera in self.spec.cameras}

    def _numbers(self, out: Tensor) -> Tensor:
        """The network's outputs as "... q a numbers"."""
        return out.unflatten(-1, (self.parts, self.spec.action.dim, -1))

    def _reading(self, out: Tensor) -> Reading:
        out = self._numbers(out.float())
        moving, levels, probability = self._moving().to(out.device), None, None
        if self.config.head == "continuous":
            mean, variance = _gaussian(out)
        else:
            at = self.codes.values.to(out)
            probability = out.softmax(-1)
            mean = self.codes.decode(probability)
            variance = ((at - mean[..., None]).square() * probability).sum(-1)
            levels = self.normalizer.denormalize(at[:, None].expand(-1, len(moving))).T
        middle = self.normalizer.denormalize(torch.zeros_like(mean))
        value = self.normalizer.denormalize(mean * moving)  # one that never changed in training is what it was there
        std = (self.normalizer.denormalize(variance.sqrt()) - middle) * moving
        return Reading(value=value, std=std, levels=levels, probability=probability)

    # --- storage ------------------------------------------------------------------------------------------------------

    def calibrated(self, calibration: Calibration) -> "InverseModel":
        """The same weights with this calibration."""
        other = object.__new__(InverseModel)
        other.__dict__ = self.__dict__ | {"calibration": calibration}
        return other

    def save_pretrained(self, folder: str | Path, *, provenance: Mapping[str, Any] | None = None) -> None:
        checkpoint.save_part(
            folder,
            part="inverse",
            kind=self.config.architecture,
            config={
                "inverse": checkpoint.to_json(self.config),
                "normalizer": self.normalizer.to_dict(),
                "calibration": None if self.calibration is None else checkpoint.to_json(self.calibration),
            },
            spec=self.spec,
            tensors=self.state_dict(),
            provenance=provenance or {},
        )

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> "InverseModel":
        """Raises `CheckpointError` if the folder holds no inverse model."""

        def build(config: Any, spec: WorldSpec, source: str) -> "InverseModel":
            known = config["calibration"]
            return cls(
                checkpoint.from_json(InverseConfig, config["inverse"], source=source),
                spec,
                RobustNormalizer.from_dict(config["normalizer"], source=source),
                None if known is None else checkpoint.from_json(Calibration, known, source=source),
            )

        return checkpoint.load_part(folder, part="inverse", build=build)


def _fits(got: int, length: int | None) -> bool:
    return got >= 2 if length is None else got == length


def _gaussian(out: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance of "... 2", the standard deviation within e^-4 and e^2 of the actions' half range."""
    return out[..., 0], out[..., 1].clamp(-8.0, 4.0).exp()


def _shifted(frames: Tensor, pixels: int) -> Tensor:
    """uint8 windows "n w c h w", each moved by up to `pixels`, all its frames alike."""
    moved = random_shift(frames.flatten(1, 2).float(), pixels)
    return moved.to(torch.uint8).unflatten(1, frames.shape[1:3])
