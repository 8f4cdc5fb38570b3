"""Stage `inverse`: train an inverse dynamics model on real frames, calibrate it on held-out episodes, audit it.

A model that rewards a world model and one that judges the result must not share what they know: they are trained on two disjoint
halves of the episodes (`--half first`, `--half second`) in two architectures, and `require_disjoint` holds that.
"""

import hashlib
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro
from torch import Tensor

from worldline.checkpoint import best_device, load_config, resolve, to_json
from worldline.data import RobustNormalizer
from worldline.errors import DatasetError, WorldlineError
from worldline.rl_in_imagination.inverse import InverseConfig, InverseModel
from worldline.rl_in_imagination.inverse_agreement import r_squared
from worldline.rl_in_imagination.inverse_audit import AuditThresholds, InverseClip, audit_inverse, calibrate_inverse
from worldline.rl_in_imagination.spoiled import blur
from worldline.tokenizers import Tokenizer, load_tokenizer
from worldline.trainers.inputs import Selection, cameras_of, claim_output, contents, data_provenance, open_datasets
from worldline.trainers.loop import LoopConfig, train
from worldline.trainers.transitions import EDGES, TransitionDraw, Transitions, whole_clips

log = logging.getLogger(__name__)
EVALUATED = 1024  # held-out transitions at an evaluation
AUDITED = 32  # held-out episodes that calibrate and audit


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainInverse:
    """Train an inverse dynamics model: which actions led from frame to frame.

    Example: worldline train inverse --data data/drawer --tokenizer runs/tok --half first --out runs/reward
    """

    data: tuple[Path, ...]
    """Dataset folders."""
    out: Path
    """Folder for the checkpoint. A run that was interrupted goes on there."""
    half: Literal["first", "second", "all"] = "all"
    """Train on one of two disjoint halves of the training episodes (by a hash of the episode's number): a reward on one, a judge on the
    other."""
    tokenizer: Path | None = None
    """Show half of the training frames as this tokenizer reconstructs them: that is what dreams look like. To post-train a world
    model it is that model's tokenizer."""
    cameras: tuple[str, ...] | None = None
    """Cameras to see. Default: those of --tokenizer, or all."""
    fakes: float = 0.1
    """Share of the training windows that are blurred or held still and carry another window's action: from what shows no motion, no
    action shall be told."""
    stride: int = 1
    """Dataset frames per frame seen: that of the world model it will be used with."""
    model: Annotated[InverseConfig, tyro.conf.arg(name="")] = field(
        default_factory=InverseConfig
    )  # --architecture, --head, ...
    audit: AuditThresholds = field(default_factory=AuditThresholds)
    loop: LoopConfig = field(default_factory=lambda: LoopConfig(steps=1500, batch_size=64, lr=1e-3, ema=0.99))

    def __post_init__(self) -> None:
        if not 0 <= self.fakes < 1:
            raise ValueError(f"fakes must be a share, at least 0 and below 1, got {self.fakes}")


PRESETS: dict[str, tuple[str, dict[str, Any]]] = {
    "tiny": ("ten minutes on a 2-core CPU", {}),
    "small": ("minutes on a GPU", {"loop": LoopConfig(steps=20_000, batch_size=256, lr=5e-4)}),
}
IDENTITY = ("data", "cameras", "half", "tokenizer", "fakes", "stride", "model")


class _InverseStage:
    name = "inverse"

    def __init__(
        self,
        model: InverseModel,
        draw: TransitionDraw,
        held_out: Sequence[Selection],
        tokenizer: Tokenizer | None,
        config: TrainInverse,
    ) -> None:
        self.model, self.draw, self.tokenizer, self.config = model, draw, tokenizer, config
        self.held_out = TransitionDraw(held_out, model.config.window)
        self.clips = whole_clips(held_out, at_most=AUDITED)

    def batch(self, seed: int, step: int, size: int) -> Transitions:
        return self.draw.batch(seed, step, size)

    def loss(self, model: Any, batch: Transitions, generator: torch.Generator) -> tuple[Tensor, Mapping[str, Tensor]]:
        frames, blocks = dict(batch.frames), batch.blocks
        if self.config.fakes:
            frames, blocks = with_fakes(frames, blocks, self.config.fakes, generator)
        return model.loss(frames, blocks), {}

    def evaluate(self, model: Any) -> dict[str, float]:
        """On held-out transitions: R2 of each dimension and their mean, the mean error, and that of always guessing the mean."""
        count = min(EVALUATED, len(self.held_out))
        seen = self.held_out.gather(torch.arange(count) * len(self.held_out) // count)
        read = model.read(seen.frames).value.cpu()
        wanted = model.targets(seen.blocks)
        r2 = dict(zip(model.spec.action.names, r_squared(read, wanted).tolist()))
        known = {name: x for name, x in r2.items() if name not in model.constant and x > -torch.inf}
        return {
            "r2": sum(known.values()) / max(1, len(known)),
            "held_out_error": float((read - wanted).norm(dim=-1).mean()),
            "guessing_the_mean": float((wanted - wanted.mean((0, 1))).norm(dim=-1).mean()),
            **{f"r2/{name}": x for name, x in known.items()},
        }

    def save(self, model: Any, folder: Path, provenance: Mapping[str, Any]) -> None:
        model, facts = calibrate_and_audit(model, self.clips, self.tokenizer, self.config.audit)
        model.save_pretrained(folder, provenance={**provenance, **facts})


def with_fakes(
    frames: Mapping[str, Tensor], blocks: Tensor, share: float, generator: torch.Generator
) -> tuple[dict[str, Tensor], Tensor]:
    """About `share` of the windows "n w c h w" blurred, or one of their frames held still, with the block "n k a" of another row."""
    n, window = next(iter(frames.values())).shape[:2]
    fake = torch.rand(n, generator=generator) < share
    still = torch.rand(n, generator=generator) < 0.5
    which = torch.randint(window, (n,), generator=generator)
    other = torch.randint(n, (n,), generator=generator)
    out = {}
    for camera, x in frames.items():
        x = x.clone()
        held, blurred = (fake & still).nonzero().flatten(), (fake & ~still).nonzero().flatten()
        x[held] = x[held, which[held]][:, None].expand_as(x[held])
        if len(blurred):
            x[blurred] = blur(x[blurred].flatten(0, 1)).unflatten(0, (len(blurred), window))
        out[camera] = x
    return out, torch.where(fake[:, None, None], blocks[other], blocks)


def calibrate_and_audit(
    model: InverseModel, clips: Sequence[InverseClip], tokenizer: Tokenizer | None, thresholds: AuditThresholds
) -> tuple[InverseModel, dict[str, Any]]:
    """Calibrated on every other held-out episode and audited on the rest; with fewer than eight, both on all of them."""
    apart = len(clips) >= 8
    model = calibrate_inverse(model, clips[::2] if apart else clips)
    facts: dict[str, Any] = {"calibrated_on": len(clips[::2] if apart else clips), "calibrated_apart": apart}
    audited = clips[1::2] if apart else clips
    if len(audited) < 2:
        return model, {**facts, "audit": None}
    audit = audit_inverse(model, audited, others=clips, tokenizer=tokenizer, thresholds=thresholds)
    if audit.failures:
        log.warning("the audit failed: %s", "; ".join(audit.failures))
    return model, {**facts, "audit": to_json(audit)}


def half_of(episodes: Sequence[int], half: str) -> tuple[int, ...]:
    """The episodes of "first" or "second" half, or "all": by the parity of a hash of the episode's number, so that more recording moves
    none from one half to the other."""
    if half == "all":
        return tuple(episodes)
    return tuple(i for i in episodes if hashlib.sha256(f"inverse:{i}".encode()).digest()[0] % 2 == (half == "second"))


def require_disjoint(reward: Path, judge: Path) -> None:
    """Raise `WorldlineError` if two inverse models share training episodes or their architecture: one would flatter the other.

    Episodes are the same if their numbers are and their datasets have one fingerprint, or are one folder.
    """
    reward, judge = resolve(reward), resolve(judge)
    about = [load_config(folder, part="inverse") for folder in (reward, judge)]
    wrong = []
    if about[0]["kind"] == about[1]["kind"]:
        wrong.append(f"two architectures are required, both are {about[0]['kind']}")
    first, second = (_trained_on(folder, a["provenance"]) for folder, a in zip((reward, judge), about))
    for named, marks, episodes in first:
        for _, other_marks, other in second:
            if marks & other_marks and (shared := sorted(set(episodes) & set(other))):
                wrong.append(
                    f"no common training episode is required, {len(shared)} of {named} are common ({shared[:5]})"
                )
    if wrong:
        raise WorldlineError(
            f"{reward} and {judge}: a reward and a judge that know nothing of each other are required: {'; '.join(wrong)}. Train one "
            "with --half first and the other with --half second and another --architecture."
        )


def _trained_on(folder: Path, provenance: Mapping[str, Any]) -> list[tuple[str, set[str], list[int]]]:
    """Of each dataset its name, what it is known by, and the episodes."""
    return [
        (name, {mark, os.path.realpath(Path(folder, place))}, episodes)
        for name, place, mark, episodes in zip(
            provenance["data"],
            provenance["data_from_here"],
            provenance["dataset_fingerprints"],
            provenance["episodes"],
            strict=True,
        )
    ]


def _choose(selections: Sequence[Selection], half: str) -> list[Selection]:
    chosen = [replace(s, episodes=half_of(s.episodes, half)) for s in selections]
    if empty := [str(s.dataset.root) for s in chosen if not s.episodes]:
        raise DatasetError(
            f"{empty}: training episodes in the {half} half required, got none. Record more, or use --half all."
        )
    return chosen


def run(config: TrainInverse, *, progress: bool = True) -> Path:
    """Train, calibrate, audit and save. Returns the checkpoint folder."""
    settings = config.model
    tokenizer = load_tokenizer(config.tokenizer).to(best_device()) if config.tokenizer else None
    options: dict[str, Any] = {"cameras": cameras_of(config.cameras, tokenizer), "stride": config.stride}
    training = _choose(open_datasets(config.data, "train", **options), config.half)
    held_out = open_datasets(config.data, "held-out", **options)
    draw = TransitionDraw(training, settings.window, edges=EDGES, tokenizer=tokenizer)
    claim_output(config.out, "inverse", config, identity=IDENTITY, made_from=contents(training))
    torch.manual_seed(config.loop.seed)
    blocks = draw.blocks if settings.target == "all" else draw.blocks.mean(1)
    model = InverseModel(settings, draw.spec, RobustNormalizer.fit(blocks))
    if len(model.constant) == draw.spec.action.dim:
        raise DatasetError(f"{list(map(str, config.data))}: actions that change are required, got constant ones alone")
    provenance = {
        **data_provenance(training, config.out),
        "half": config.half,
        "episodes": [list(s.episodes) for s in training],
        "constant": list(model.constant),
        "tokenizer": tokenizer.fingerprint if tokenizer else None,
    }
    stage = _InverseStage(model, draw, held_out, tokenizer, config)
    return train(stage, config.loop, config.out, provenance=provenance, progress=progress)
