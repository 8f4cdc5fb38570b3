"""How far a success scorer can be believed: discrimination, calibration, and the counts at its threshold.

The area measures and the calibration error come from torchmetrics. A threshold chosen and judged on the same episodes
looks better than it is: `threshold_chosen_here` says when that happened, and reports print it.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from scipy import optimize
from torch import Tensor

from worldline.checkpoint import to_json
from worldline.errors import WorldlineError
from worldline.eval.intervals import Interval, wilson

FINEST = 1e-3  # a scorer's certainty says nothing finer


@dataclass(frozen=True, slots=True, kw_only=True)
class Proportion:
    """successes / episodes with its Wilson interval; both None where there were no episodes."""

    value: float | None
    interval: Interval | None
    episodes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ReliabilityBin:
    """Episodes whose predicted probability lies in [low, high): mean prediction and how often they succeeded."""

    low: float
    high: float
    predicted: float
    observed: Proportion


@dataclass(frozen=True, slots=True, kw_only=True)
class ScorerCalibration:
    """A scorer against the truth. None: undefined, see `notes`. `threshold`: success is predicted at or above it."""

    episodes: int
    successes: int
    auroc: float | None
    average_precision: float | None
    brier: float
    expected_calibration_error: float
    mean_predicted: float
    threshold: float
    threshold_chosen_here: bool
    balanced_accuracy: float | None
    true_positives: int
    false_positives: int
    true_negatives: int
    false_negatives: int
    accuracy: Proportion
    sensitivity: Proportion
    specificity: Proportion
    precision: Proportion
    bins: tuple[ReliabilityBin, ...]
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        return to_json(self)


def scorer_calibration(
    probability: Float[Tensor, " n"],
    truth: Bool[Tensor, " n"],
    *,
    threshold: float | None = None,
    bins: int = 10,
    level: float = 0.95,
) -> ScorerCalibration:
    """Judge success probabilities against true success, one value an episode (or frame).

    Args:
        threshold: fixed on other data. Default: `success_threshold` of these very episodes, and marked so.
        bins: of equal width, for the calibration error and the reliability diagram; empty ones are left out.

    Raises:
        WorldlineError: nothing to judge, or probabilities that are NaN or outside [0, 1].
    """
    from torchmetrics.functional.classification import (  # seconds to import, so only where it is used
        binary_auroc,
        binary_average_precision,
        binary_calibration_error,
    )

    p, y = _checked(probability, truth)
    notes: list[str] = []
    chosen_here = threshold is None
    both = bool(y.any()) and not bool(y.all())
    if not both:
        notes.append(
            f"all episodes {'succeed' if bool(y.all()) else 'fail'}: AUROC and balanced accuracy are undefined"
        )
    if threshold is None and both:
        threshold = success_threshold(p, y)
    elif threshold is None:
        threshold, chosen_here = 0.5, False
        notes.append("one class only, so no threshold could be chosen: 0.5 used")
    if chosen_here:
        notes.append("threshold chosen on the episodes it is judged on: its accuracy here is optimistic")
    predicted = p >= threshold
    tp, fp = int((predicted & y).sum()), int((predicted & ~y).sum())
    tn, fn = int((~predicted & ~y).sum()), int((~predicted & y).sum())
    return ScorerCalibration(
        episodes=len(y),
        successes=int(y.sum()),
        auroc=float(binary_auroc(p, y.long())) if both else None,
        average_precision=float(binary_average_precision(p, y.long())) if bool(y.any()) else None,
        brier=float(((p - y.float()) ** 2).mean()),
        expected_calibration_error=float(binary_calibration_error(p, y.long(), n_bins=bins, norm="l1")),
        mean_predicted=float(p.mean()),
        threshold=float(threshold),
        threshold_chosen_here=chosen_here,
        balanced_accuracy=0.5 * (tp / (tp + fn) + tn / (tn + fp)) if both else None,
        true_positives=tp,
        false_positives=fp,
        true_negatives=tn,
        false_negatives=fn,
        accuracy=_proportion(tp + tn, len(y), level),
        sensitivity=_proportion(tp, tp + fn, level),
        specificity=_proportion(tn, tn + fp, level),
        precision=_proportion(tp, tp + fp, level),
        bins=_reliability(p, y, bins, level),
        notes=tuple(notes),
    )


def platt(logits: Float[Tensor, " n"], truth: Bool[Tensor, " n"], *, balanced: bool = False) -> tuple[float, float]:
    """Slope a > 0 and offset b of P(success) = sigmoid(a logit + b), by maximum likelihood (Platt 1999).

    A small pull of log a towards 0 keeps both finite where the logits separate the classes.

    Args:
        balanced: each class weighs half, however common it is.
    """
    z, y = logits.detach().cpu().double().numpy(), truth.detach().cpu().double().numpy()
    weight = np.full(len(y), 1 / len(y))
    if balanced:
        weight = np.where(y > 0, 0.5 / y.sum(), 0.5 / (len(y) - y.sum()))

    def loss(parameters: np.ndarray) -> float:
        curve = np.exp(parameters[0]) * z + parameters[1]
        return float((weight * (np.logaddexp(0, curve) - y * curve)).sum() + 1e-3 * parameters[0] ** 2)

    slope, offset = optimize.minimize(loss, np.zeros(2), method="Nelder-Mead").x
    return float(np.exp(slope)), float(offset)


def success_threshold(probability: Float[Tensor, " n"], truth: Bool[Tensor, " n"]) -> float:
    """The probability at which an episode is as likely a success as a failure, were both equally common.

    It is where `platt`'s balanced curve crosses one half. Every episode has its say: the cut with the highest balanced
    accuracy hangs on the few episodes beside it, and where no score is near one half two of them move it by a factor of
    a hundred. Probabilities beyond 1/1000 from 0 or 1 count as 1/1000.

    Raises:
        WorldlineError: one class only, NaN, or probabilities outside [0, 1].
    """
    p, y = _checked(probability, truth)
    if bool(y.all()) or not bool(y.any()):
        raise WorldlineError("success_threshold: both successes and failures required, got one kind only.")
    slope, offset = platt(torch.logit(p, eps=FINEST), y, balanced=True)
    return float(torch.sigmoid(torch.tensor(-offset / slope, dtype=torch.float64)))


def threshold_interval(
    probability: Float[Tensor, " n"], truth: Bool[Tensor, " n"], *, level: float = 0.95, resamples: int = 200
) -> Interval:
    """What other episodes could have made of `success_threshold`: a bootstrap within successes and within failures."""
    p, y = _checked(probability, truth)
    kinds = y.nonzero().flatten(), (~y).nonzero().flatten()
    generator = torch.Generator().manual_seed(0)
    found = []
    for _ in range(resamples):
        rows = torch.cat([kind[torch.randint(len(kind), (len(kind),), generator=generator)] for kind in kinds])
        found.append(success_threshold(p[rows], y[rows]))
    low, high = np.quantile(found, [(1 - level) / 2, (1 + level) / 2])
    return Interval(low=float(low), high=float(high), level=level, method="bootstrap within each kind")


def _checked(probability: Tensor, truth: Tensor) -> tuple[Tensor, Tensor]:
    if probability.shape != truth.shape or not len(truth):
        raise WorldlineError(
            f"scorer calibration: one probability per true outcome required, got {len(probability)} and {len(truth)}."
        )
    p = probability.detach().cpu().double()
    if bool(torch.isnan(p).any()) or float(p.min()) < 0 or float(p.max()) > 1:
        raise WorldlineError(
            f"scorer calibration: probabilities in [0, 1] required, got [{float(p.min()):g}, {float(p.max()):g}]. "
            "Apply a sigmoid to logits first."
        )
    return p, truth.detach().cpu().bool()


def _proportion(count: int, episodes: int, level: float) -> Proportion:
    if episodes == 0:
        return Proportion(value=None, interval=None, episodes=0)
    return Proportion(value=count / episodes, interval=wilson(count, episodes, level=level), episodes=episodes)


def _reliability(p: Tensor, y: Tensor, bins: int, level: float) -> tuple[ReliabilityBin, ...]:
    edges = np.linspace(0, 1, bins + 1)
    index = np.clip(np.digitize(p.numpy(), edges) - 1, 0, bins - 1)
    return tuple(
        ReliabilityBin(
            low=float(edges[b]),
            high=float(edges[b + 1]),
            predicted=float(p[torch.from_numpy(index == b)].mean()),
            observed=_proportion(int(y[torch.from_numpy(index == b)].sum()), int((index == b).sum()), level),
        )
        for b in range(bins)
        if (index == b).any()
    )
