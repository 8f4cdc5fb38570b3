"""Stage `scorer`: train a success scorer on labelled frames, calibrate it on held-out episodes, audit it.

The audit asks what a reward must survive: right on real clips, and not fooled by clips that hold no success (a success
episode's first frame held still, its frames blurred away). Its result is stored with the scorer.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Shaped
from torch import Tensor

from worldline.checkpoint import best_device
from worldline.errors import DatasetError
from worldline.eval.calibration import platt, success_threshold
from worldline.eval.replays import strided_success
from worldline.rl_in_imagination.spoiled import blur
from worldline.rl_in_imagination.success import SuccessConfig, SuccessScorer, episode_probability, episode_success
from worldline.tokenizers import Tokenizer, load_tokenizer
from worldline.trainers.inputs import Selection, cameras_of, claim_output, contents, data_provenance, open_datasets
from worldline.trainers.loop import LoopConfig, train
from worldline.trainers.samples import SampleDraw, Samples
from worldline.types import Episode

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainScorer:
    """Train a success scorer on episodes whose success the recorder labelled.

    Example: worldline train scorer --data data/drawer --tokenizer runs/tok --out runs/success
    """

    data: tuple[Path, ...]
    """Dataset folders with success labels."""
    out: Path
    """Folder for the checkpoint. A run that was interrupted goes on there."""
    tokenizer: Path | None = None
    """Show half of the training frames as this tokenizer reconstructs them: that is what dreams look like."""
    cameras: tuple[str, ...] | None = None
    """Cameras to see. Default: those of --tokenizer, or all."""
    fakes: float = 0.15
    """Share of the training samples that are blurred beyond recognition and count as no success: a scorer that calls mush a success
    would reward a dream for falling apart."""
    stride: int = 1
    """Dataset frames per frame seen: that of the world model it will be used with."""
    scorer: SuccessConfig = field(default_factory=SuccessConfig)
    loop: LoopConfig = field(default_factory=lambda: LoopConfig(steps=800, batch_size=64, lr=1e-3, ema=0.99))

    def __post_init__(self) -> None:
        if not 0 <= self.fakes < 1:
            raise ValueError(f"fakes must be a share, at least 0 and below 1, got {self.fakes}")


PRESETS: dict[str, tuple[str, dict[str, Any]]] = {
    "tiny": ("two minutes on a 2-core CPU", {}),
    "small": ("minutes on a GPU", {"loop": LoopConfig(steps=10_000, batch_size=256, lr=5e-4)}),
}


class _ScorerStage:
    name = "scorer"

    def __init__(
        self,
        model: SuccessScorer,
        draw: SampleDraw,
        held_out: Sequence[Selection],
        tokenizer: Tokenizer | None,
        fakes: float,
    ) -> None:
        self.model, self.draw, self.held_out, self.tokenizer, self.fakes = model, draw, held_out, tokenizer, fakes

    def batch(self, seed: int, step: int, size: int) -> Samples:
        return self.draw.batch(seed, step, size)

    def loss(self, model: Any, batch: Samples, generator: torch.Generator) -> tuple[Tensor, Mapping[str, Tensor]]:
        frames = batch.observation.images
        if self.tokenizer is not None:
            frames = half_reconstructed(self.tokenizer, frames, generator)
        target = batch.target.float()
        if self.fakes:
            fake = torch.rand(len(target), generator=generator) < self.fakes
            blurred = {c: blur(x) for c, x in frames.items()}
            frames = {c: torch.where(fake[:, None, None, None], blurred[c], x) for c, x in frames.items()}
            target = torch.where(fake, 0.0, target)
        told = batch.observation.instruction
        if model.text is not None:
            told, meant = told_another(told, generator)
            target = torch.where(meant, target, 0.0)
        logits = model.logits(frames, told)
        target = target.to(logits.device)
        loss = F.binary_cross_entropy_with_logits(logits, target)
        return loss, {"accuracy": ((logits > 0) == (target > 0.5)).float().mean().detach()}

    def evaluate(self, model: Any) -> dict[str, float]:
        logits, done, _ = read_episodes(model, self.held_out, self.tokenizer)
        right = [((z > 0) == d).float().mean() for z, d in zip(logits, done)]
        return {"frame_accuracy": float(torch.stack(right).mean())}

    def save(self, model: Any, folder: Path, provenance: Mapping[str, Any]) -> None:
        calibrated, facts = calibrate(model, self.held_out, self.tokenizer)
        calibrated.save_pretrained(
            folder, provenance={**provenance, **facts, "audit": audit(calibrated, self.held_out)}
        )


def told_another(
    instruction: tuple[str, ...], generator: torch.Generator
) -> tuple[tuple[str, ...], Bool[Tensor, " n"]]:
    """Three rows in ten under the instruction of a row drawn, and which rows are under their own (or the same) one."""
    n = len(instruction)
    swapped = torch.rand(n, generator=generator) < 0.3
    drawn = torch.randint(n, (n,), generator=generator).tolist()
    told = tuple(instruction[j] if swap else instruction[i] for i, (j, swap) in enumerate(zip(drawn, swapped.tolist())))
    return told, torch.tensor([a == b for a, b in zip(told, instruction)])


def half_reconstructed(
    tokenizer: Tokenizer, frames: Mapping[str, Tensor], generator: torch.Generator
) -> dict[str, Tensor]:
    """Every other sample as the tokenizer reconstructs it. Stacked windows are unstacked for the tokenizer."""
    rows = (torch.rand(len(next(iter(frames.values()))), generator=generator) < 0.5).nonzero().flatten()
    if not len(rows):
        return dict(frames)
    device = next(iter(tokenizer.parameters()), torch.zeros(())).device
    out = {}
    for camera, stacked in frames.items():
        video = stacked[rows].unflatten(1, (-1, 3)).to(device)
        decoded = tokenizer.decode(tokenizer.encode({camera: video}))[camera].flatten(1, 2).cpu()
        out[camera] = stacked.index_copy(0, rows, decoded)
    return out


def frame_labels(stride: int):
    """Target function of success: every frame, labelled by the recorder; a success if any of the last `stride` was one."""

    def target(episode: Episode) -> tuple[Tensor, Tensor]:
        if episode.frame_success is None:
            return torch.zeros(0, dtype=torch.long), torch.zeros(0)
        before = F.pad(episode.frame_success.float(), (stride - 1, 0))
        return torch.arange(len(episode)), before.unfold(0, stride, 1).amax(-1)

    return target


@torch.no_grad()
def score_video(scorer: SuccessScorer, video: Mapping[str, Tensor], instruction: str) -> Tensor:
    """Uncalibrated logits "t" of every frame of one uint8 video "t c h w" a camera, as `step` would see them."""
    window = scorer.window
    rows = (torch.arange(window)[None] + torch.arange(len(next(iter(video.values()))))[:, None] - window + 1).clamp(
        min=0
    )
    windows = {camera: video[camera][rows].flatten(1, 2) for camera in scorer.encoder.names}
    return scorer.logits(windows, (instruction,) * len(rows)).cpu()


def read_episodes(
    scorer: SuccessScorer, selections: Sequence[Selection], tokenizer: Tokenizer | None
) -> tuple[list[Tensor], list[Tensor], list[bool]]:
    """Logits and labels of the labelled episodes, and whether each ended where it does (terminated)."""
    logits, done, ended = [], [], []
    for s in selections:
        for number in s.episodes:
            episode = s.dataset.episode(number)
            if episode.frame_success is None:
                continue
            video = {c: s.store.frames(number, c)[:: s.stride] for c in scorer.encoder.names}
            if tokenizer is not None:
                device = next(iter(tokenizer.parameters()), torch.zeros(())).device
                batched = {c: x[None].to(device) for c, x in video.items()}
                video = {c: x[0].cpu() for c, x in tokenizer.decode(tokenizer.encode(batched)).items()}
            logits.append(score_video(scorer, video, episode.instruction))
            done.append(strided_success(episode, s.stride, ended=episode.terminated))
            ended.append(episode.terminated)
    if not logits:
        raise DatasetError("held-out episodes with success labels are required to calibrate a scorer, got none")
    return logits, done, ended


def held_on(values: Shaped[Tensor, " t"], ended: bool, persist: int) -> Shaped[Tensor, " t2"]:
    """The frames of an episode; what it ended with stands on, so that success at its very end has held for `persist` frames."""
    return torch.cat([values, values[-1:].expand(persist - 1)]) if ended else values


def calibrate(
    scorer: SuccessScorer, held_out: Sequence[Selection], tokenizer: Tokenizer | None
) -> tuple[SuccessScorer, dict[str, Any]]:
    """Platt scaling on held-out frames, then the threshold that held-out episodes give."""
    logits, done, ended = read_episodes(scorer, held_out, tokenizer)
    scale, offset = platt(torch.cat(logits), torch.cat(done))
    scaled = scorer.calibrated(scale=scale, offset=offset)
    persist = scorer.config.persist
    truth = torch.stack(
        [episode_success(held_on(d, end, persist)[None], persist=persist)[0] for d, end in zip(done, ended)]
    )
    scores = [torch.sigmoid(scaled.config.scale * z + scaled.config.offset) for z in logits]
    probability = torch.cat(
        [episode_probability(held_on(p, end, persist)[None], persist=persist) for p, end in zip(scores, ended)]
    )
    both = bool(truth.any()) and not bool(truth.all())
    threshold = success_threshold(probability, truth) if both else 0.5
    said = probability > threshold
    facts = {
        "held_out_episodes": len(truth),
        "held_out_successes": int(truth.sum()),
        "episode_accuracy": float((said == truth).float().mean()),
    }
    return scaled.calibrated(threshold=threshold), facts


def audit(scorer: SuccessScorer, held_out: Sequence[Selection]) -> dict[str, float]:
    """Share of held-out success episodes called a success: as they are, held still at the first frame, blurred, cut after a quarter,
    and (by a scorer that reads instructions, where there are several) under the instruction of another episode."""
    episodes = [(s, n) for s in held_out for n in s.episodes if s.dataset.episode(n).success]
    persist, config = scorer.config.persist, scorer.config

    own = [s.dataset.episode(n).instruction for s, n in episodes]
    sentences = sorted({s.dataset.episode(n).instruction for s in held_out for n in s.episodes})

    def share(change: Any, told: Sequence[str] = own) -> float:
        said = []
        for (s, number), sentence in zip(episodes, told):
            video = {c: change(s.store.frames(number, c)[:: s.stride]) for c in scorer.encoder.names}
            p = torch.sigmoid(config.scale * score_video(scorer, video, sentence) + config.offset)
            whole = len(p) == len(s.store.frames(number, scorer.encoder.names[0])[:: s.stride])
            p = held_on(p, whole and s.dataset.terminated(number), persist)
            said.append(episode_probability(p[None], persist=persist)[0] > config.threshold)
        return float(torch.stack(said).float().mean()) if said else float("nan")

    if not episodes:
        return {"episodes": 0.0}
    found = {
        "episodes": float(len(episodes)),
        "exact": share(lambda x: x),
        "static": share(lambda x: x[:1].expand_as(x)),
        "blurred": share(blur),
        "first_quarter": share(lambda x: x[: max(2, len(x) // 4)]),
    }
    if scorer.text is not None and len(sentences) > 1:
        after = dict(zip(sentences, sentences[1:] + sentences[:1]))
        found["other_instruction"] = share(lambda x: x, [after[sentence] for sentence in own])
    return found


def run(config: TrainScorer, *, progress: bool = True) -> Path:
    """Train, calibrate, audit and save. Returns the checkpoint folder."""
    tokenizer = load_tokenizer(config.tokenizer).to(best_device()) if config.tokenizer else None
    options: dict[str, Any] = {"cameras": cameras_of(config.cameras, tokenizer), "stride": config.stride}
    training, held_out = (open_datasets(config.data, split, **options) for split in ("train", "held-out"))
    draw = SampleDraw(training, frame_labels(config.stride), window=config.scorer.encoder.window, balance=True)
    identity = ("data", "cameras", "tokenizer", "fakes", "stride", "scorer")
    claim_output(config.out, "scorer", config, identity=identity, made_from=contents(training))
    torch.manual_seed(config.loop.seed)
    model = SuccessScorer(config.scorer, draw.spec)
    provenance = {
        **data_provenance(training, config.out),
        "tokenizer": tokenizer.fingerprint if tokenizer else None,
    }
    stage = _ScorerStage(model, draw, held_out, tokenizer, config.fakes)
    return train(stage, config.loop, config.out, provenance=provenance, progress=progress)
