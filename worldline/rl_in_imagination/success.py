"""A success scorer: a small network over the last frames, calibrated, with the rule that turns frames into an episode.

Episode rule, the same for simulator, scorer and dream: success has held for `persist` frames in a row. A single bright
frame is not a success, in either world.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from worldline import checkpoint
from worldline.errors import SpecMismatch, WorldlineError
from worldline.policies.encoder import EncoderConfig, ObservationEncoder, mlp
from worldline.types import Observation, Score, TensorState, WorldSpec
from worldline.worldmodels.language import text_encoder


@dataclass(frozen=True, slots=True, kw_only=True)
class SuccessConfig:
    """`scale` and `offset` calibrate the logit; `threshold` is the probability that counts as done. `text`: the instruction's encoder
    (none, hashed, or a text model of transformers), for data in which the sentence says what success is."""

    encoder: EncoderConfig = field(default_factory=lambda: EncoderConfig(window=2, channels=(16, 32, 32)))
    hidden: int = 128
    """Width of the layers behind the eyes."""
    text: str = "none"
    """The instruction's encoder, for data in which the sentence says what success is: none, hashed, or the name of a text model of transformers."""
    scale: float = 1.0
    """Of the logit; set by calibration."""
    offset: float = 0.0
    """Of the logit; set by calibration."""
    threshold: float = 0.5
    """Probability that counts as done."""
    persist: int = 2
    """Frames in a row that success must hold."""

    def __post_init__(self) -> None:
        if self.persist < 1 or self.hidden < 1:
            raise ValueError(f"persist and hidden must be at least 1, got {self.persist} and {self.hidden}")


class SuccessScorer(nn.Module):
    """A `Scorer` of pixels. Its name carries the fingerprint of its weights, so a label says who gave it."""

    input: Literal["pixels", "latents"] = "pixels"

    def __init__(self, config: SuccessConfig, spec: WorldSpec) -> None:
        super().__init__()
        self.config, self.spec = config, spec
        self.window = config.encoder.window
        self.encoder = ObservationEncoder(config.encoder, spec.cameras, 0)
        self.text = text_encoder(config.text)
        told = 0 if self.text is None else self.text.dim
        self.head = mlp(self.encoder.width + told, config.hidden, 1, 1 if self.text is None else 2)

    @property
    def name(self) -> str:
        return f"success-scorer:{checkpoint.fingerprint(self.state_dict(), checkpoint.to_json(self.config))}"

    def logits(self, frames: Mapping[str, Tensor], instruction: Sequence[str] = ()) -> Float[Tensor, " n"]:
        """Uncalibrated logits of uint8 windows "n (window c) h w", oldest frame first, under an instruction each.

        Raises `SpecMismatch` if a scorer that reads instructions is not given one a row.
        """
        device = next(self.parameters()).device
        frames = {camera: x.to(device) for camera, x in frames.items()}
        n = len(next(iter(frames.values())))
        features = self.encoder(frames, torch.zeros(n, 0, device=device))
        if self.text is not None:
            if len(instruction) != n:
                raise SpecMismatch(
                    f"this scorer reads the instruction: one for each of {n} rows required, got {len(instruction)}"
                )
            features = torch.cat([features, self.text(instruction).to(features)], dim=1)
        return self.head(features)[:, 0]

    def reset(self, n: int) -> TensorState:
        """No frames seen yet: the first frame stands in for the ones before it."""
        past = {
            c.name: torch.zeros(n, 3 * (self.window - 1), c.height, c.width, dtype=torch.uint8)
            for c in self.spec.cameras
        }
        return TensorState(tensors={**past, "/started": torch.zeros(n, dtype=torch.bool)}, rows=n)

    @torch.no_grad()
    def step(
        self, state: TensorState, observation: Observation, action: Float[Tensor, "n k a"] | None
    ) -> tuple[TensorState, Score]:
        started = state.tensors["/started"]
        windows, past = {}, {}
        for camera in self.encoder.names:
            image = observation.images[camera].cpu()
            before = torch.where(
                started[:, None, None, None], state.tensors[camera], image.repeat(1, self.window - 1, 1, 1)
            )
            windows[camera] = torch.cat([before, image], dim=1)
            past[camera] = windows[camera][:, 3:]
        probability = torch.sigmoid(
            self.config.scale * self.logits(windows, observation.instruction).cpu() + self.config.offset
        )
        state = TensorState(tensors={**past, "/started": torch.ones_like(started)}, rows=len(state))
        return state, Score(reward=probability, success=probability)

    def calibrated(self, **changes: float | int) -> "SuccessScorer":
        """The same weights with other calibration (`scale`, `offset`, `threshold`, `persist`)."""
        other = object.__new__(SuccessScorer)
        other.__dict__ = self.__dict__ | {"config": replace(self.config, **changes)}
        return other

    def save_pretrained(self, folder: str | Path, *, provenance: Mapping[str, Any] | None = None) -> None:
        checkpoint.save_part(
            folder,
            part="scorer",
            kind="success",
            config=self.config,
            spec=self.spec,
            tensors=self.state_dict(),
            provenance=provenance or {},
        )

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> "SuccessScorer":
        def build(config: Any, spec: WorldSpec, source: str) -> "SuccessScorer":
            return cls(checkpoint.from_json(SuccessConfig, config, source=source), spec)

        return checkpoint.load_part(folder, part="scorer", build=build)


def episode_success(done: Bool[Tensor, "n t"], *, persist: int) -> Bool[Tensor, " n"]:
    """True where `persist` frames in a row are done."""
    if done.shape[1] < persist:
        return torch.zeros(len(done), dtype=torch.bool)
    return done.unfold(1, persist, 1).all(2).any(1)


def episode_probability(probability: Float[Tensor, "n t"], *, persist: int) -> Float[Tensor, " n"]:
    """The highest level that the success probability kept up for `persist` frames in a row.

    An episode counts as a success at threshold x exactly if this exceeds x (`episode_success` of `probability > x`).
    """
    if probability.shape[1] < persist:
        return torch.zeros(len(probability))
    return probability.unfold(1, persist, 1).amin(2).amax(1)


# what a scorer may be trusted with: at least (or at most) this share of held-out success episodes called a success
AUDIT = {
    "exact": (0.8, 1.0),
    "static": (0.0, 0.1),
    "blurred": (0.0, 0.3),
    "first_quarter": (0.0, 0.3),
    "other_instruction": (0.0, 0.2),  # of scorers that read instructions
}


def audit_failures(provenance: Mapping[str, Any]) -> list[str]:
    """What of a scorer's audit (`trainers.scorer.audit`, stored with it) forbids to train a policy by it. Empty: nothing."""
    audit = provenance.get("audit") or {}
    if not audit.get("episodes"):
        return ["no audit: its held-out episodes held no success to try it on"]
    return [
        f"{name}: a share between {low:g} and {high:g} called a success is required, got {audit[name]:.2f}"
        for name, (low, high) in AUDIT.items()
        if (name in audit or name != "other_instruction") and not low <= audit[name] <= high
    ]


def check_scorer(folder: Path, *, override: bool) -> list[str]:
    """What the scorer's audit found wrong. Raises `WorldlineError` for anything, unless `override`."""
    failures = audit_failures(checkpoint.load_config(checkpoint.resolve(folder), part="scorer")["provenance"])
    if failures and not override:
        raise WorldlineError(
            f"{folder}: a scorer that passed its audit is required, this one did not: {'; '.join(failures)}. Train it on more or "
            "clearer successes, or use it all the same with --override-audit True (the report will say so)."
        )
    return failures
