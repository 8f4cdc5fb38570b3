"""The audit of an inverse model on held-out episodes: does it read motion, or something that goes along with it?

    exact            real clips, the actions that were commanded                             must agree
    tokenizer        the same through the tokenizer, as dreams are seen: the ceiling         must agree
    static           the first frame throughout                                              must not
    single_frame     each transition judged on the frame it begins at, held still            must not
    blurred          what is there cannot be told                                            must not
    shuffled         frames in another order                                                 must not
    reversed         backwards                                                               must not
    ends             the first frame, then the last: right at both ends of the clip          must not
    wrong_action     real clips, the actions of the episode that acted least alike           must not

`single_frame` finds the reader that is hardest to see through: where a policy's action follows from what it sees, a model can know the
action from one frame and never look at the motion. A dream that shows the right places in the wrong motion would please it.

What is required is told as skill (`inverse_agreement`): 0 is what the best constant guess gets, 1 is perfect. The published probe asks for
an agreement of at least 0.7 on real clips and at most 0.4 on bad ones; where guessing gets 0.4, those are skills of 0.5 and 0. Bad
clips may have 0.2 here, because still and blurred clips of a robot that rests are right to agree.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from scipy import stats
from torch import Tensor

from worldline import checkpoint
from worldline.errors import WorldlineError
from worldline.rl_in_imagination.inverse import InverseModel
from worldline.rl_in_imagination.inverse_agreement import (
    Calibration,
    Reading,
    agreement_of,
    best_guess,
    calibrate,
    guess_agreement,
    joined,
    skill,
)
from worldline.rl_in_imagination.spoiled import SPOILED
from worldline.tokenizers import Tokenizer

GOOD = ("exact", "tokenizer")
RESAMPLES = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditThresholds:
    """What is required: skill from 0 (guessing) to 1 (perfect). A model that passes by laxer thresholds than the defaults is used by
    --override-audit alone."""

    exact: float = 0.5
    """At least this on real clips, and on real clips through the tokenizer."""
    bad: float = 0.2
    """At most this on every other kind of clip."""

    def __post_init__(self) -> None:
        if not -1 < self.bad < self.exact < 1:
            raise ValueError(f"-1 < audit.bad < audit.exact < 1 required, got {self.bad} and {self.exact}")


@dataclass(frozen=True, slots=True, kw_only=True)
class InverseClip:
    """One held-out episode: uint8 frames "t c h w" a camera, and the blocks "t-1 k a" between them."""

    frames: Mapping[str, UInt8[Tensor, "t c _h _w"]]
    actions: Float[Tensor, "t-1 k a"]


@dataclass(frozen=True, slots=True, kw_only=True)
class KindScore:
    """Mean agreement of one kind of clip with its 95% interval (bootstrap over episodes), and the same as skill."""

    kind: str
    agreement: float
    agreement_low: float
    agreement_high: float
    skill: float
    skill_low: float
    skill_high: float


@dataclass(frozen=True, slots=True, kw_only=True)
class InverseAudit:
    """`chance` is the agreement of the best constant guess on these episodes. `likeness` is the skill that a perfect reader would have on
    the wrong actions: how alike the episodes act. `tokenizer` is a fingerprint. No `failures`: to be trusted."""

    episodes: int
    transitions: int
    chance: float
    likeness: float
    scores: tuple[KindScore, ...]
    thresholds: AuditThresholds
    tokenizer: str | None
    failures: tuple[str, ...]

    def __getitem__(self, kind: str) -> KindScore:
        return next(score for score in self.scores if score.kind == kind)


def calibrate_inverse(model: InverseModel, clips: Sequence[InverseClip]) -> InverseModel:
    """The model with the calibration that these held-out clips give it."""
    whole = joined([_read(model, clip.frames) for clip in clips])
    commanded = torch.cat([model.targets(clip.actions) for clip in clips]).to(whole.value)
    return model.calibrated(calibrate(whole, commanded, model.spec.action.names, constant=model.constant))


def audit_inverse(
    model: InverseModel,
    clips: Sequence[InverseClip],
    *,
    others: Sequence[InverseClip] | None = None,
    tokenizer: Tokenizer | None = None,
    thresholds: AuditThresholds | None = None,
) -> InverseAudit:
    """Try a calibrated model on held-out episodes and on what can be made of them.

    Args:
        others: the episodes that wrong actions are taken from; `clips` by default.

    Raises `WorldlineError` if it is not calibrated or there are fewer than two episodes.
    """
    calibration, thresholds = model.calibrated_by(), thresholds or AuditThresholds()
    if len(clips) < 2:
        raise WorldlineError(f"at least 2 held-out episodes required to audit an inverse model, got {len(clips)}")
    found: dict[str, list[float]] = {
        kind: [] for kind in ("exact", "tokenizer", *SPOILED, "single_frame", "wrong_action")
    }
    likeness, guessing = [], _guessing(model, clips)
    for clip in clips:
        commanded = model.targets(clip.actions)
        seen = {"exact": _read(model, clip.frames), "single_frame": _read_single(model, clip.frames)}
        for kind, spoil in SPOILED.items():
            seen[kind] = _read(model, {camera: spoil(x) for camera, x in clip.frames.items()})
        if tokenizer is not None:
            seen["tokenizer"] = _read(model, reconstruct(tokenizer, clip.frames))
        for kind, reading in seen.items():
            found[kind].append(float(calibration.agreement(reading, commanded.to(reading.value)).mean()))
        pool = [model.targets(other.actions) for other in others or clips if other is not clip]
        wrong, alike = _least_alike(commanded, pool, calibration)
        reading = seen["exact"].at(slice(len(wrong)))
        found["wrong_action"].append(float(calibration.agreement(reading, wrong.to(reading.value)).mean()))
        likeness.append(alike)
    scores = tuple(_scored(kind, values, guessing) for kind, values in found.items() if values)
    chance = float(np.mean(guessing))
    act_alike = float(skill(float(np.mean(likeness)), chance))
    return InverseAudit(
        episodes=len(clips),
        transitions=sum(len(clip.actions) for clip in clips),
        chance=chance,
        likeness=act_alike,
        scores=scores,
        thresholds=thresholds,
        tokenizer=None if tokenizer is None else tokenizer.fingerprint,
        failures=tuple(_failures(scores, calibration, thresholds, act_alike, chance)),
    )


def stored_audit(folder: Path) -> InverseAudit | None:
    """The audit that an inverse model was saved with."""
    folder = checkpoint.resolve(folder)
    stored = checkpoint.load_config(folder, part="inverse")["provenance"].get("audit")
    return None if stored is None else checkpoint.from_json(InverseAudit, stored, source=f"{folder}/config.json")


def check_inverse(folder: Path, *, tokenizer: str | None = None, override: bool = False) -> list[str]:
    """What is wrong with the audit stored with an inverse model: what it found, thresholds laxer than `AuditThresholds`' own, and another
    tokenizer than the one through which the model is going to see. Raises `WorldlineError` for anything, unless `override`.

    Args:
        tokenizer: its fingerprint; None: the model will see real video.
    """
    audit = stored_audit(folder)
    failures = ["no audit: it takes two held-out episodes"] if audit is None else _doubts(audit, tokenizer)
    if failures and not override:
        raise WorldlineError(
            f"{folder}: an inverse model that passed its audit is required, this one did not: {'; '.join(failures)}. Train it longer or "
            "on more varied episodes, or use it all the same with --override-audit True (the result will say so)."
        )
    return failures


def _doubts(audit: InverseAudit, tokenizer: str | None) -> list[str]:
    """What an audit found, and what it cannot vouch for."""
    least, used, sentences = AuditThresholds(), audit.thresholds, list(audit.failures)
    if used.exact < least.exact or used.bad > least.bad:
        sentences.append(
            f"thresholds: a skill of at least {least.exact:g} (audit.exact) and at most {least.bad:g} (audit.bad) or stricter is required, it was "
            f"audited by {used.exact:g} and {used.bad:g}"
        )
    if tokenizer is not None and audit.tokenizer != tokenizer:
        sentences.append(
            f"tokenizer: an audit through the world model's tokenizer {tokenizer} is required, it was through {audit.tokenizer or 'none'} "
            "(train inverse --tokenizer)"
        )
    return sentences


def _failures(
    scores: Sequence[KindScore], calibration: Calibration, thresholds: AuditThresholds, likeness: float, chance: float
) -> list[str]:
    if not sum(calibration.weight):
        return [f"no action dimension can be read ({'; '.join(calibration.left_out)})"]
    sentences = []
    for score in scores:
        good = score.kind in GOOD
        limit = thresholds.exact if good else thresholds.bad
        if score.kind == "wrong_action" and likeness > limit:
            sentences.append(
                f"wrong_action: held-out episodes that act otherwise are required, got ones so alike that even a perfect reader would "
                f"have a skill of {likeness:.2f}"
            )
            continue
        if (score.skill < limit) if good else (score.skill > limit):
            sentences.append(
                f"{score.kind}: a skill of at {'least' if good else 'most'} {limit:g} is required, got {score.skill:.2f} (agreement "
                f"{score.agreement:.2f}, guessing {chance:.2f})"
            )
    return sentences


def _guessing(model: InverseModel, clips: Sequence[InverseClip]) -> list[float]:
    """Agreement of the best constant guess, by episode."""
    calibration = model.calibrated_by()
    commanded = [model.targets(clip.actions) for clip in clips]
    tolerance, kind = torch.tensor(calibration.tolerance), _read(model, clips[0].frames)
    kind = kind if kind.levels is None else replace(kind, levels=kind.levels.cpu())
    guess, _ = best_guess(kind, torch.cat(commanded), tolerance)
    each = [guess_agreement(kind, guess, actions, tolerance).mean(-2) for actions in commanded]
    return [float(calibration.weighted(agreement).mean()) for agreement in each]


def _scored(kind: str, agreement: Sequence[float], guessing: Sequence[float]) -> KindScore:
    """Means over episodes, with intervals that resample episodes, each together with what guessing gets there."""

    def skills(values: np.ndarray, guesses: np.ndarray, axis: int = -1) -> Any:
        return skill(values.mean(axis), guesses.mean(axis))

    options: dict[str, Any] = {"n_resamples": RESAMPLES, "method": "percentile", "rng": np.random.default_rng(0)}
    values, guesses = np.array(agreement), np.array(guessing)
    plain = stats.bootstrap((values,), np.mean, **options).confidence_interval
    scaled = stats.bootstrap((values, guesses), skills, paired=True, vectorized=True, **options).confidence_interval
    return KindScore(
        kind=kind,
        agreement=float(values.mean()),
        agreement_low=float(plain.low),
        agreement_high=float(plain.high),
        skill=float(skills(values, guesses)),
        skill_low=float(scaled.low),
        skill_high=float(scaled.high),
    )


def _read(model: InverseModel, frames: Mapping[str, Tensor]) -> Reading:
    """Readings "t-1 q a" of one clip."""
    return model.read_along({camera: x[None] for camera, x in frames.items()}).at(0)


def _read_single(model: InverseModel, frames: Mapping[str, Tensor]) -> Reading:
    """Each transition as a clip of its own: its first frame, twice."""
    pairs = {camera: x[:-1, None].expand(-1, 2, -1, -1, -1) for camera, x in frames.items()}
    return model.read_along(pairs).at((slice(None), 0))


def reconstruct(
    tokenizer: Tokenizer, frames: Mapping[str, UInt8[Tensor, "t c _h _w"]]
) -> dict[str, UInt8[Tensor, "t c _h _w"]]:
    """Frames of one clip as a tokenizer leaves them."""
    device = next(iter(tokenizer.parameters()), torch.zeros(())).device
    decoded = tokenizer.decode(tokenizer.encode({camera: x[None].to(device) for camera, x in frames.items()}))
    return {camera: x[0].cpu() for camera, x in decoded.items()}


def _least_alike(own: Tensor, pool: Sequence[Tensor], calibration: Calibration) -> tuple[Tensor, float]:
    """Of the targets "t q a" in `pool` those that agree least with `own`, cut to its length, and how much they do for a perfect reader.

    Episodes of one task can act alike, and a reader is right to agree with those.
    """
    tolerance, weight = torch.tensor(calibration.tolerance), torch.tensor(calibration.weight)

    def alike(other: Tensor) -> float:
        perfect = Reading(value=own[: len(other)], std=torch.zeros_like(own[: len(other)]))
        return float((agreement_of(perfect, other, tolerance).mean((0, 1)) * weight).sum())

    return min(((other, alike(other)) for other in (x[: len(own)] for x in pool)), key=lambda pair: pair[1])
