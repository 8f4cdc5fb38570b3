"""The figures of the reports: ranking scatter, reliability diagram, curves over the horizon.

Figures are made without pyplot, so nothing global changes and no display is needed; the caller embeds or saves them.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy import stats
from torch import Tensor

from worldline.errors import WorldlineError
from worldline.eval.calibration import ScorerCalibration
from worldline.eval.intervals import Interval
from worldline.eval.outcomes import policy_names
from worldline.eval.ranking_statistics import RankStatistics

COLOURS = ("#2563eb", "#d97706", "#059669", "#db2777", "#7c3aed", "#0891b2", "#65a30d", "#475569")
GREY = "#64748b"


def _figure(width: float, height: float, *, xlabel: str, ylabel: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot()
    axes.set(xlabel=xlabel, ylabel=ylabel)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#e2e8f0", linewidth=0.8)
    axes.set_axisbelow(True)
    return figure, axes


def ranking_scatter(
    statistics: RankStatistics,
    *,
    real_intervals: Sequence[Interval] | None = None,
    imagined_intervals: Sequence[Interval] | None = None,
) -> Figure:
    """Imagined against real success, one named point a policy, with both intervals where given and the diagonal.

    Policies of one lineage share a colour.
    """
    figure, axes = _figure(5.6, 5.2, xlabel="real success rate", ylabel="imagined success rate")
    axes.plot([0, 1], [0, 1], color=GREY, linewidth=1, linestyle="--", zorder=1)
    groups = statistics.lineages or statistics.policies
    palette = {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(dict.fromkeys(groups))}
    for i in range(len(statistics.policies)):
        x, y, colour = statistics.real[i], statistics.imagined[i], palette[groups[i]]
        axes.errorbar(
            x,
            y,
            xerr=_bars(x, real_intervals, i),
            yerr=_bars(y, imagined_intervals, i),
            fmt="o",
            color=colour,
            ecolor=colour + "66",
            markersize=7,
            elinewidth=1.5,
        )
    for crowd in _crowds(statistics.real, statistics.imagined):
        x, y = statistics.real[crowd[0]], statistics.imagined[crowd[0]]
        left, high = x > 0.75, y > 0.5
        axes.annotate(
            "\n".join(statistics.policies[i] for i in crowd),
            (x, y),
            (-8 if left else 8, -6 if high else 6),
            textcoords="offset points",
            ha="right" if left else "left",
            va="top" if high else "bottom",
            fontsize=9,
        )
    axes.set(xlim=(-0.03, 1.03), ylim=(-0.03, 1.03), aspect="equal")
    axes.set_title(_headline(statistics), fontsize=10, loc="left", color="#334155")
    return figure


def _crowds(x: Sequence[float], y: Sequence[float]) -> list[list[int]]:
    """Points too close for a name each, by the first of them: their names are written below one another."""
    crowds: list[list[int]] = []
    for i in range(len(x)):
        near = (c for c in crowds if abs(x[c[0]] - x[i]) < 0.1 and abs(y[c[0]] - y[i]) < 0.07)
        if (crowd := next(near, None)) is None:
            crowds.append([i])
        else:
            crowd.append(i)
    return crowds


def _headline(statistics: RankStatistics) -> str:
    r = "undefined" if statistics.pearson is None else f"{statistics.pearson:.3f}"
    interval = statistics.pearson_interval_policy
    extent = "" if interval is None else f" [{interval.low:.2f}, {interval.high:.2f}]"
    return f"r = {r}{extent}   MMRV = {statistics.mmrv:.3f}   bias = {statistics.bias:+.3f}"


def _bars(value: float, intervals: Sequence[Interval] | None, index: int) -> np.ndarray | None:
    if intervals is None:
        return None
    interval = intervals[index]
    return np.array([[max(0.0, value - interval.low)], [max(0.0, interval.high - value)]])


def reliability_diagram(calibration: ScorerCalibration) -> Figure:
    """Observed success against predicted probability with Wilson intervals, and how many episodes each bin holds."""
    figure, axes = _figure(5.2, 4.6, xlabel="predicted success probability", ylabel="observed success rate")
    axes.plot([0, 1], [0, 1], color=GREY, linewidth=1, linestyle="--")
    total = max(1, calibration.episodes)
    for item in calibration.bins:
        axes.bar(
            item.low,
            item.observed.episodes / total,
            width=item.high - item.low,
            align="edge",
            color="#cbd5e1",
            alpha=0.6,
        )
    x = np.array([item.predicted for item in calibration.bins])
    y = np.array([item.observed.value for item in calibration.bins], dtype=float)
    bars = [_bars(float(v), [i.observed.interval], 0) for v, i in zip(y, calibration.bins) if i.observed.interval]
    axes.errorbar(
        x, y, yerr=np.concatenate([b for b in bars if b is not None], 1), fmt="o-", color=COLOURS[0], capsize=3
    )
    axes.set(xlim=(0, 1), ylim=(-0.02, 1.02))
    auroc = "undefined" if calibration.auroc is None else f"{calibration.auroc:.3f}"
    axes.set_title(
        f"AUROC {auroc}   Brier {calibration.brier:.3f}   ECE {calibration.expected_calibration_error:.3f}"
        f"   n = {calibration.episodes}   (bars: share in bin)",
        fontsize=9,
        loc="left",
        color="#334155",
    )
    return figure


def horizon_curves(
    curves: Mapping[str, Float[Tensor, "_n t"]],
    *,
    ylabel: str,
    masks: Mapping[str, Bool[Tensor, "_n t"]] | None = None,
    level: float = 0.95,
    xlabel: str = "imagined frame",
) -> Figure:
    """Mean over episodes at every horizon with a Student t band; entries False in `masks` are left out.

    A horizon where fewer than two episodes count has no point. Raises `WorldlineError` for NaN that no mask covers.
    """
    figure, axes = _figure(6.4, 3.8, xlabel=xlabel, ylabel=ylabel)
    for i, (name, values) in enumerate(curves.items()):
        data = values.detach().cpu().double().numpy()
        mask = np.ones(data.shape, bool) if masks is None or name not in masks else masks[name].cpu().numpy()
        if not np.isfinite(data[mask]).all():
            raise WorldlineError(f"horizon_curves: {name}: finite values required; pass the mask of the defined ones.")
        shown, mean, half = [], [], []
        for frame in range(data.shape[1]):
            column = data[mask[:, frame], frame]
            if len(column) > 1:
                shown.append(frame + 1)
                mean.append(column.mean())
                half.append(stats.t.ppf((1 + level) / 2, len(column) - 1) * column.std(ddof=1) / len(column) ** 0.5)
        centre, spread, colour = np.array(mean), np.array(half), COLOURS[i % len(COLOURS)]
        axes.plot(
            shown, centre, color=colour, label=name, linewidth=2, marker="o" if len(shown) < 16 else None, markersize=4
        )
        axes.fill_between(shown, centre - spread, centre + spread, color=colour, alpha=0.15, linewidth=0)
    figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    return figure


def curve_bands(
    curves: Mapping[str, Mapping[str, Sequence[Any]]], *, ylabel: str, xlabel: str = "imagined frame"
) -> Figure:
    """Curves as reports hold them: name -> `mean`, `low`, `high` by frame, which `frame` numbers (default 1, 2, ...).

    A frame at which one of the three is None has no point.
    """
    figure, axes = _figure(6.4, 3.8, xlabel=xlabel, ylabel=ylabel)
    for i, (name, curve) in enumerate(curves.items()):
        numbers = curve.get("frame", range(1, len(curve["mean"]) + 1))
        points = [p for p in zip(numbers, curve["mean"], curve["low"], curve["high"], strict=True) if None not in p]
        x, mean, low, high = np.array(points, float).reshape(-1, 4).T
        colour = COLOURS[i % len(COLOURS)]
        axes.plot(x, mean, color=colour, label=name, linewidth=2, marker="o" if len(x) < 16 else None, markersize=4)
        axes.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)
    figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    return figure


def success_bars(
    rates: Mapping[str, Sequence[float]], intervals: Mapping[str, Sequence[Interval]], names: Sequence[str]
) -> Figure:
    """Success of every policy by source ("real", "imagined", ...), side by side, with intervals."""
    labels = policy_names(names, len(names))
    figure, axes = _figure(max(4.5, 0.7 * len(labels) + 1.4), 3.8, xlabel="", ylabel="success rate")
    width = 0.8 / max(1, len(rates))
    for i, (source, values) in enumerate(rates.items()):
        x = np.arange(len(labels)) + (i - (len(rates) - 1) / 2) * width
        bars = [_bars(value, intervals[source], j) for j, value in enumerate(values)] if source in intervals else []
        error = np.concatenate([bar for bar in bars if bar is not None], 1) if bars else None
        axes.bar(x, values, width * 0.92, yerr=error, color=COLOURS[i % len(COLOURS)], label=source, capsize=3)
    axes.set_xticks(np.arange(len(labels)), labels, rotation=20 if max(map(len, labels)) > 10 else 0)
    axes.set_ylim(0, 1.02)
    axes.legend(frameon=False, fontsize=9)
    return figure


def score_bars(scores: Sequence[float], *, xlabel: str) -> Figure:
    """How many trajectories have which score."""
    figure, axes = _figure(6.4, 3.2, xlabel=xlabel, ylabel="trajectories")
    axes.hist(scores, bins=30, color=GREY)
    return figure


def score_histogram(scores: Sequence[float], threshold: float) -> Figure:
    """How many episodes have which score, and where the threshold lies."""
    figure, axes = _figure(6.4, 3.2, xlabel="success probability kept up", ylabel="episodes")
    axes.hist(scores, bins=np.linspace(0, 1, 26).tolist(), color=GREY)
    axes.axvline(threshold, color="black", linewidth=1, linestyle="--")
    return figure


def action_curves(
    truth: Float[np.ndarray, "t a"], found: Float[np.ndarray, "t a"], *, names: Sequence[str], label: str
) -> Figure:
    """Recorded actions and those found, over control steps, one panel a dimension."""
    figure = Figure(figsize=(7.2, 1.4 * len(names) + 0.6), layout="constrained")
    panels = np.atleast_1d(figure.subplots(len(names), 1, sharex=True))
    for i, (axes, name) in enumerate(zip(panels, names)):
        axes.plot(truth[:, i], color=GREY, linewidth=1.2, label="recorded")
        axes.plot(found[:, i], color=COLOURS[0], linewidth=1.2, label=label)
        axes.set_ylabel(name)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].legend(frameon=False, ncols=2, loc="upper right")
    panels[-1].set_xlabel("control step")
    return figure
