"""Stage `video-action`: train a unified video-action model (UWM or UVA) on cached latents, with and without actions."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from worldline.data.clips import strided
from worldline.errors import DatasetError, SpecMismatch
from worldline.tokenizers import Tokenizer
from worldline.trainers.inputs import (
    LatentBatches,
    Selection,
    claim_output,
    contents,
    data_provenance,
    fit_normalizers,
    frame_weights,
    load_finished_tokenizer,
    open_datasets,
    share,
    strided_numbers,
)
from worldline.trainers.loop import LoopConfig, train
from worldline.trainers.world_model import WHOLE, imagined_errors
from worldline.types import Clip, WorldSpec, require_match
from worldline.worldmodels.video_action import INVERSE, POLICY, TrunkConfig, VideoActionConfig, VideoActionModel
from worldline.worldmodels.video_action.config import VIDEO_ONLY


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainVideoAction:
    """Train one network that is a policy, a world model, an inverse model and a video generator.

    Example: worldline train video-action --data data/drawer --tokenizer runs/tok --preset tiny --out runs/va

    UVA in two stages: the same with --model.design uva --stage video --out runs/video, then with --init-from runs/video.
    """

    data: tuple[Path, ...]
    """Dataset folders; several are mixed by their number of frames, but for episodes that are video alone (`record --without-actions`):
    of those there are --video-share."""
    tokenizer: Path
    """Folder of a trained tokenizer. A copy is saved beside the model."""
    out: Path
    """Folder for the checkpoint. A run that was interrupted goes on there."""
    video: tuple[Path, ...] = ()
    """More dataset folders, whose actions are not looked at even if there are some."""
    video_share: float = 0.2
    """Share of a batch's clips that are video alone, however much of it there is: what it takes, acting loses. Not in stage video, where all are."""
    stride: int = 1
    """Dataset frames per frame of the model; action blocks grow with it."""
    starts: float = 0.2
    """Share of clips that begin where their episode does."""
    stage: Literal["joint", "video"] = "joint"
    """video: nothing is asked for but video, and no action is looked at (UVA's first stage)."""
    demonstrations: Literal["success", "all"] = "all"
    """success: of episodes that failed is learned what their actions lead to, and not to act as they did."""
    model: VideoActionConfig = field(default_factory=VideoActionConfig)
    init_from: Path | None = None
    """Start from the weights of another model of the same spec and sizes; its normalisation is kept."""
    max_episodes: int | None = None
    """Use only the first so many training episodes of each dataset."""
    loop: LoopConfig = field(default_factory=LoopConfig)

    def __post_init__(self) -> None:
        if not 0 <= self.starts <= 1:
            raise ValueError(f"starts must be a share from 0 to 1, got {self.starts}")
        if not 0 < self.video_share < 1:
            raise ValueError(f"video_share must be between 0 and 1, got {self.video_share}")
        if self.max_episodes is not None and self.max_episodes < 1:
            raise ValueError(f"max_episodes must be at least 1, got {self.max_episodes}")


def _model(width: int, depth: int, heads: int, **more: Any) -> VideoActionConfig:
    return VideoActionConfig(trunk=TrunkConfig(width=width, depth=depth, heads=heads), **more)


PRESETS: dict[str, tuple[str, dict[str, Any]]] = {
    "tiny": (
        "1.5M weights, 2.3M with --model.design uva; half an hour on a 2-core CPU",
        {
            "model": _model(128, 4, 4, head_width=128, head_depth=2, head_draws=2),
            "loop": LoopConfig(
                steps=4000, batch_size=16, lr=1e-3, optimizer="muon", muon_lr=2e-3, ema=0.995, cooldown=0.4
            ),
        },
    ),
    "small": (
        "40M weights; a night on one consumer GPU",
        {"model": _model(512, 8, 8), "loop": LoopConfig(steps=60_000, batch_size=64, lr=4e-4, ema=0.9995)},
    ),
    "base": (
        "310M weights, 440M with --model.design uva; three views of 192x320; days on one data-centre GPU",
        {
            "model": _model(1024, 16, 16, head_width=1024, head_depth=6),
            "loop": LoopConfig(steps=200_000, batch_size=64, lr=2e-4, ema=0.9999),
        },
    ),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class _Part:
    """Episodes, and what is learned of them beside video: `acted` what their actions lead to, `imitated` to act as they do."""

    selection: Selection
    acted: bool
    imitated: bool


class _Batches:
    """Clips, of which rows the actions are known, and which of those are to be imitated."""

    def __init__(self, parts: Sequence[_Part], tokenizer: Tokenizer, *, video_share: float, **options: Any) -> None:
        selections = [p.selection for p in parts]
        weights = frame_weights(selections, apart=[not p.acted for p in parts], part=video_share)
        self.batches = LatentBatches(selections, tokenizer, weights=weights, **options)
        self.acted, self.imitated = torch.tensor([p.acted for p in parts]), torch.tensor([p.imitated for p in parts])
        self.spec = self.batches.spec

    def batch(self, seed: int, step: int, size: int) -> tuple[Clip, Tensor, Tensor]:
        clip = self.batches.batch(seed, step, size)
        counts = torch.tensor(share(self.batches.weights, seed, step, size))
        return clip, self.acted.repeat_interleave(counts), self.imitated.repeat_interleave(counts)


class _VideoActionStage:
    name = "video-action"

    def __init__(self, model: VideoActionModel, batches: _Batches, held_out: _Batches, tokenizer: Tokenizer) -> None:
        self.model, self.batches, self.held_out, self.tokenizer = model, batches, held_out, tokenizer

    def batch(self, seed: int, step: int, size: int) -> tuple[Clip, Tensor, Tensor]:
        return self.batches.batch(seed, step, size)

    def loss(
        self, model: Any, batch: tuple[Clip, Tensor, Tensor], generator: torch.Generator
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        clip, acted, imitated = batch
        return model.loss(clip, generator, acted=acted, imitated=imitated)

    @torch.no_grad()
    def evaluate(self, model: Any) -> dict[str, float]:
        """On held-out clips with actions: error of imagined frames against copying, of shuffled actions against true ones, and of the
        blocks that policy and inverse query find against the mean block (1: knows nothing); the policy's where it is to imitate. Of
        queries that are learned."""
        clip, acted, imitated = self.held_out.batch(0, 0, 16)
        rows = acted.nonzero().flatten()
        if not len(rows):
            return {}
        clip, imitated = _rows(clip, rows), imitated[rows]
        h = model.config.history
        seen = replace(
            clip,
            frames={c: z[:, :h] for c, z in clip.frames.items()},
            poses=clip.poses[:, :h],
            actions=clip.actions[:, : h - 1],
        )
        truth, seeds = clip.actions[:, h - 1 :], torch.arange(len(rows))
        learned = {*(name for name, part in model.config.shares.items() if part), *model.also_learned}
        errors = imagined_errors(model.with_sampling(chunk=1), clip) if "forward" in learned else {}

        def missed(found: Tensor, wanted: Tensor) -> float:
            spread = (wanted - wanted.mean((0, 1, 2))).square().mean().clamp(min=1e-9)
            return float((found - wanted[:, : found.shape[1]]).square().mean() / spread)

        if "inverse" in learned:
            coming = {c: z[:, h : h + 1] for c, z in clip.frames.items()}
            asked = INVERSE.first(1, model.config.horizon)
            errors["inverse_error"] = missed(model.sample(seen, asked, seeds=seeds, frames=coming).actions.cpu(), truth)
        if "policy" in learned and bool(imitated.any()):
            decided = model.sample(seen, POLICY, seeds=seeds).actions.cpu()
            errors["policy_error"] = missed(decided[imitated], truth[imitated])
        return errors

    def save(self, model: Any, folder: Path, provenance: Mapping[str, Any]) -> None:
        model.save_pretrained(folder, provenance=provenance)
        if not (folder / "tokenizer" / "config.json").is_file():
            self.tokenizer.save_pretrained(folder / "tokenizer")


def _rows(clip: Clip, rows: Tensor) -> Clip:
    return Clip(
        frames={c: z[rows] for c, z in clip.frames.items()},
        poses=clip.poses[rows],
        actions=clip.actions[rows],
        instruction=tuple(clip.instruction[int(i)] for i in rows) if clip.instruction else (),
    )


def _parts(config: TrainVideoAction, split: str, cameras: list[str]) -> list[_Part]:
    """The episodes of a split."""
    options: dict[str, Any] = {"cameras": cameras, "max_episodes": config.max_episodes if split == "train" else None}
    parts = []
    for i, s in enumerate(open_datasets((*config.data, *config.video), split, **options)):
        acted = [n for n in s.episodes if config.stage == "joint" and i < len(config.data) and s.dataset.acts(n)]
        imitated = [n for n in acted if config.demonstrations == "all" or s.dataset.episode(n).success]
        kinds = (
            (imitated, {"acted": True, "imitated": True}),
            ([n for n in acted if n not in imitated], {"acted": True, "imitated": False}),
            ([n for n in s.episodes if n not in acted], {"acted": False, "imitated": False}),
        )
        for episodes, known in kinds:
            if episodes:
                parts.append(_Part(selection=replace(s, episodes=tuple(episodes)), **known))
    return parts


def _datasets(selections: Sequence[Selection]) -> list[Selection]:
    """One selection a dataset: those of one dataset may be several."""
    return list({s.dataset.root: s for s in selections}.values())


def _acting(selections: Sequence[Selection]) -> list[Selection]:
    """What is known of actions: these datasets without the episodes that are video alone."""
    kept = [replace(s, episodes=tuple(i for i in s.episodes if s.dataset.acts(i))) for s in selections]
    return [s for s in kept if s.episodes]


def run(config: TrainVideoAction, *, progress: bool = True) -> Path:
    """Train and save. Returns the checkpoint folder. Raises `DatasetError` if no episode has actions."""
    tokenizer = load_finished_tokenizer(config.tokenizer)
    cameras = [c.name for c in tokenizer.cameras]
    parts, held_out = _parts(config, "train", cameras), _parts(config, "held-out", cameras)
    training = [p.selection for p in parts]
    settings = replace(config.model, shares=VIDEO_ONLY) if config.stage == "video" else config.model
    asked = [query for query in ("policy", "joint") if settings.shares.get(query)]
    if asked and any(p.acted for p in parts) and not any(p.imitated for p in parts):
        raise DatasetError(
            f"{', '.join(map(str, config.data))}: episodes to imitate ({config.demonstrations}) required, got none: what to do could not be "
            f"learned. Give --demonstrations all, or ask for nothing of the kind (--model.shares without {' and '.join(asked)})."
        )
    model = None if config.init_from is None else _trained(config, settings, tokenizer, training[0].dataset.spec)
    claim_output(
        config.out,
        "video-action",
        config,
        identity=(
            *("data", "video", "video_share", "tokenizer", "stride", "starts", "stage", "demonstrations"),
            *("model", "init_from", "max_episodes"),
        ),
        made_from={"tokenizer's weights": tokenizer.fingerprint, **contents(training)},
    )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    options: dict[str, Any] = {
        "video_share": config.video_share,
        "frames": settings.history + settings.horizon,
        "stride": config.stride,
        "device": device,
        "progress": progress,
    }
    # the poses and commands that came before tell how the arm moves
    lead = WHOLE if settings.guess_width and config.stage == "joint" else 0
    batches = _Batches(parts, tokenizer, starts=config.starts, lead=lead, **options)
    if model is None:
        acting = _acting([p.selection for p in parts if p.acted or config.stage == "video"])
        if not acting:
            raise DatasetError(
                f"{', '.join(map(str, config.data))}: some episodes with actions required, got video alone. Give it after --video, and "
                "data with actions after --data: actions are normalised by them."
            )
        torch.manual_seed(config.loop.seed)
        actions, poses = fit_normalizers(acting)
        model = VideoActionModel(settings, batches.spec, action_normalizer=actions, pose_normalizer=poses)
        model.fit_aims(strided_numbers(acting, config.stride))
    model.also_learned = _also_learned(parts, settings)
    stage = _VideoActionStage(model, batches, _Batches(held_out, tokenizer, **options), tokenizer)
    provenance = {
        **data_provenance(_datasets(training), config.out, init_from=config.init_from),
        "tokenizer": tokenizer.fingerprint,
        "init_from": str(config.init_from) if config.init_from else None,
        "weights": sum(p.numel() for p in model.parameters()),
    }
    return train(stage, config.loop, config.out, provenance=provenance, progress=progress)


def _also_learned(parts: Sequence[_Part], settings: VideoActionConfig) -> tuple[str, ...]:
    """Queries that these episodes ask for whatever the shares: video of those without actions; what actions lead to, of those that are
    not to be imitated."""
    decides = settings.shares.get("policy") or settings.shares.get("joint")
    found = {
        "forward": bool(decides) and any(p.acted and not p.imitated for p in parts),
        "video": not all(p.acted for p in parts),
    }
    return tuple(name for name, asked in found.items() if asked)


def _trained(
    config: TrainVideoAction, settings: VideoActionConfig, tokenizer: Tokenizer, data: WorldSpec
) -> VideoActionModel:
    """The model to go on from, with the settings of `config` for all but its sizes. Raises `SpecMismatch` if they differ, or if it was
    trained with another tokenizer or on data of another kind."""
    folder = config.init_from
    assert folder is not None
    model = VideoActionModel.from_pretrained(folder)
    if model.latent_spec != tokenizer.latent_spec:
        raise SpecMismatch(
            f"--init-from {folder}: the tokenizer it was trained with is required ({model.latent_spec.fingerprint}), got "
            f"{tokenizer.fingerprint} in {config.tokenizer}. Its folder keeps its own in tokenizer/: use --tokenizer {folder}/tokenizer."
        )
    fields = ("cameras", "fps", "control_steps", "action", "pose_names")
    require_match(
        strided(data, config.stride), model.spec, between=f"{config.data[0]} and --init-from {folder}", only=fields
    )
    sizes = ("design", "trunk", "history", "horizon", "text", "head_width", "head_depth", "guess_width", "aim")
    if different := [
        f"  model.{name}: {getattr(model.config, name)!r} required, got {getattr(settings, name)!r}"
        for name in sizes
        if getattr(model.config, name) != getattr(settings, name)
    ]:
        raise SpecMismatch(f"--init-from {folder}: a model of the same sizes is required:\n" + "\n".join(different))
    other = VideoActionModel(
        settings, model.spec, action_normalizer=model.action_normalizer, pose_normalizer=model.pose_normalizer
    )
    other.load_state_dict(model.state_dict())
    return other
