"""Correcting the bias of imagined success with a few real rollouts, always beside what those rollouts say alone.

`prediction_powered_rate` is PPI++ (Angelopoulos, Duchi, Zrnic 2023, arXiv:2311.01453) for a mean: with n episodes both
real and imagined, and N more imagined only,

    estimate = lambda * mean(imagined, N) + mean(real - lambda * imagined, n)

lambda = cov(real, imagined) / ((1 + n / N) var(imagined)), clipped to [0, 1], trusts imagination as far as it earned it:
0 leaves the real mean. Because success rates sit near 0 or 1 at small n, the interval is Wilson's at the *effective*
number of real episodes, n * var(real mean) / var(estimate); at lambda = 0 it is exactly the real-only Wilson interval.
Two departures keep its coverage at ten real rollouts: half a disagreement either way is added before variances are taken
(`_moments`), and lambda costs a degree of freedom: corrected, rollouts that imagination tells little about may be worth a
little less than alone.

`leave_one_policy_out` needs no rollout of the policy in question: it learns real from imagined rates on the others.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import numpy as np
from jaxtyping import Float
from scipy import optimize, stats

from worldline.checkpoint import to_json
from worldline.errors import WorldlineError
from worldline.eval.intervals import Interval, wilson
from worldline.eval.outcomes import Outcomes, policy_names, read_outcomes, require_pair


@dataclass(frozen=True, slots=True, kw_only=True)
class PredictionPowered:
    """Success rate of one policy from n real and n + N imagined episodes, beside the n real ones alone.

    `power` is lambda; `effective_episodes` how many real episodes the corrected estimate is worth; `imagined_only` the
    uncorrected mean of all imagined episodes, which carries the model's bias.
    """

    estimate: float
    interval: Interval
    real_only: float
    real_only_interval: Interval
    imagined_only: float
    power: float
    effective_episodes: float
    real_episodes: int
    imagined_episodes: int
    note: str = ""

    def to_dict(self) -> dict[str, Any]:
        return to_json(self)


def prediction_powered_rate(
    real: Sequence[float] | Any,
    imagined: Sequence[float] | Any,
    imagined_more: Sequence[float] | Any,
    *,
    level: float = 0.95,
    power: float | None = None,
) -> PredictionPowered:
    """Success rate of one policy, bias-corrected.

    Args:
        real: outcomes "n" of real rollouts, 0/1.
        imagined: outcomes "n" imagined from the same initial states (0/1 or probabilities).
        imagined_more: outcomes "N" imagined from other initial states of the same distribution.
        power: lambda in [0, 1]; default: chosen from the data.

    Raises:
        WorldlineError: fewer than four real rollouts, lengths that differ, values outside [0, 1], nothing more imagined.
    """
    y, f, more = (
        _episodes(values, name)
        for values, name in ((real, "real"), (imagined, "imagined"), (imagined_more, "imagined_more"))
    )
    n, N = len(y), len(more)
    if len(f) != n:
        raise WorldlineError(f"real and imagined must be the same episodes in the same order, got {n} and {len(f)}.")
    if n < 4:
        raise WorldlineError(f"at least 4 real rollouts required for a correction, got {n}; roll the policy out more.")
    if power is not None and not 0 <= power <= 1:
        raise WorldlineError(f"power: a number in [0, 1] required, got {power}.")
    spread = float(np.concatenate([f, more]).var(ddof=1))
    moments, note = _moments(y, f), ""
    if power is None:
        power = float(np.clip(moments[0, 1] / ((1 + n / N) * spread), 0, 1)) if spread > 0 else 0.0
    if y.var() == 0:
        note, power = (
            "all real outcomes agree: nothing to learn a correction from, so the real rollouts stand alone",
            0.0,
        )
    estimate = float(np.clip(power * more.mean() + (y - power * f).mean(), 0, 1))
    effective = _effective(n, moments, power, spread / N)
    return PredictionPowered(
        estimate=estimate,
        interval=_interval(estimate, effective, level),
        real_only=float(y.mean()),
        real_only_interval=wilson(float(y.sum()), n, level=level),
        imagined_only=float(np.concatenate([f, more]).mean()),
        power=power,
        effective_episodes=effective,
        real_episodes=n,
        imagined_episodes=n + N,
        note=note,
    )


def _episodes(values: Any, name: str) -> Float[np.ndarray, " n"]:
    rows = read_outcomes([values], name=name)
    if rows.episodes is None:
        raise WorldlineError(f"{name}: the episode outcomes of one policy (1-D) required, got a number.")
    return rows.episodes[0]


def _moments(y: Float[np.ndarray, " n"], f: Float[np.ndarray, " n"]) -> Float[np.ndarray, "2 2"]:
    """Covariance of real and imagined outcomes, with half a disagreement added either way.

    Ten pairs that all agree do not show that imagination is always right; without this the interval believes so.
    """
    weights = np.concatenate([np.ones(len(y)), [0.5, 0.5]])
    return np.cov(np.concatenate([y, [1.0, 0.0]]), np.concatenate([f, [0.0, 1.0]]), aweights=weights)


def _effective(n: int, moments: Float[np.ndarray, "2 2"], power: float, imagined: float) -> float:
    """Real episodes that would give the real mean the variance of the corrected one; `imagined` = var / N."""
    if power == 0:
        return float(n)
    residual = moments[0, 0] - 2 * power * moments[0, 1] + power**2 * moments[1, 1]
    # One degree of freedom more is spent on lambda than on a plain mean.
    variance = residual * (n - 1) / (n - 2) / n + power**2 * imagined
    return float(moments[0, 0] / variance)


def _interval(estimate: float, effective: float, level: float) -> Interval:
    result = wilson(estimate * effective, effective, level=level)
    return Interval(
        low=result.low, high=result.high, level=level, method=f"PPI++, Wilson at {effective:.1f} effective episodes"
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibratedPolicy:
    """A policy's real rate predicted without its own real rollouts. `interval` is None where it cannot be formed."""

    policy: str
    real: float
    imagined: float
    predicted: float
    residual: float  # predicted - real
    interval: Interval | None
    real_interval: Interval | None


@dataclass(frozen=True, slots=True, kw_only=True)
class LeaveOneOutCalibration:
    """Root mean square errors: of the calibrated prediction, of the raw imagined rate, and of a guess that ignores
    imagination (the mean real rate of the other policies). Calibration earns its place where it beats both."""

    method: str
    policies: tuple[CalibratedPolicy, ...]
    error_calibrated: float
    error_imagined: float
    error_others_mean: float
    covered: int | None  # policies whose real rate lies in their interval
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        return to_json(self)


def leave_one_policy_out(
    real: Outcomes,
    imagined: Outcomes,
    *,
    names: Sequence[str] | None = None,
    real_counts: int | Sequence[int] | None = None,
    method: Literal["linear", "isotonic"] = "linear",
    level: float = 0.95,
) -> LeaveOneOutCalibration:
    """Predict each policy's real rate from its imagined one by a map fitted on the other policies.

    "linear": real = a + b * imagined, clipped to [0, 1], prediction interval of the regression (Student t).
    "isotonic": a rising step map, interpolated; interval from the residuals of the other policies, each left out in turn
    (t times their root mean square). Intervals need five policies.

    Raises:
        WorldlineError: fewer than four policies, or what `read_outcomes` refuses.
    """
    r, m = read_outcomes(real, name="real", counts=real_counts), read_outcomes(imagined, name="imagined")
    require_pair(r, m, at_least=4)
    fit = {"linear": _linear, "isotonic": _isotonic}[method]
    n, notes = len(r), []
    if n < 5:
        notes.append("intervals need five policies")
    rows: list[CalibratedPolicy] = []
    for i, name in enumerate(policy_names(names, n)):
        others = np.arange(n) != i
        predicted, half = fit(m.rates[others], r.rates[others], float(m.rates[i]), level)
        interval = None
        if n >= 5:
            low, high = np.clip([predicted - half, predicted + half], 0, 1)
            interval = Interval(low=float(low), high=float(high), level=level, method=f"{method}, leave one policy out")
        rows.append(
            CalibratedPolicy(
                policy=name,
                real=float(r.rates[i]),
                imagined=float(m.rates[i]),
                predicted=predicted,
                residual=predicted - float(r.rates[i]),
                interval=interval,
                real_interval=None if r.counts is None else wilson(r.rates[i] * r.counts[i], r.counts[i], level=level),
            )
        )
    others_mean = (r.rates.sum() - r.rates) / (n - 1)
    return LeaveOneOutCalibration(
        method=method,
        policies=tuple(rows),
        error_calibrated=_rms(np.array([row.residual for row in rows])),
        error_imagined=_rms(m.rates - r.rates),
        error_others_mean=_rms(others_mean - r.rates),
        covered=sum(row.interval is not None and row.real in row.interval for row in rows) if n >= 5 else None,
        notes=tuple(notes),
    )


def _rms(values: Float[np.ndarray, " n"]) -> float:
    return float(np.sqrt((values**2).mean()))


def _linear(x: Float[np.ndarray, " n"], y: Float[np.ndarray, " n"], at: float, level: float) -> tuple[float, float]:
    """Prediction at `at` and the half width of its interval; a flat line where all imagined rates are equal."""
    n = len(x)
    sxx = float(((x - x.mean()) ** 2).sum())
    slope = float(cast(Any, stats.linregress(x, y)).slope) if sxx > 0 else 0.0
    raw = float(y.mean() + slope * (at - x.mean()))
    residual = y - y.mean() - slope * (x - x.mean())
    freedom = n - 2 if sxx > 0 else n - 1
    leverage = (at - x.mean()) ** 2 / sxx if sxx > 0 else 0.0
    error = np.sqrt((residual**2).sum() / freedom * (1 + 1 / n + leverage))
    return float(np.clip(raw, 0, 1)), float(stats.t.ppf((1 + level) / 2, freedom) * error)


def _isotonic(x: Float[np.ndarray, " n"], y: Float[np.ndarray, " n"], at: float, level: float) -> tuple[float, float]:
    keep = ~np.eye(len(x), dtype=bool)
    residuals = np.array([_rising(x[rest], y[rest], float(x[i])) - y[i] for i, rest in enumerate(keep)])
    return _rising(x, y, at), float(stats.t.ppf((1 + level) / 2, len(x) - 1) * _rms(residuals))


def _rising(x: Float[np.ndarray, " n"], y: Float[np.ndarray, " n"], at: float) -> float:
    values, inverse = np.unique(x, return_inverse=True)
    weights = np.bincount(inverse).astype(float)
    means = np.bincount(inverse, weights=y) / weights  # tied inputs are one point
    return float(np.interp(at, values, optimize.isotonic_regression(means, weights=weights).x))
