"""One ranking beside an earlier one of the same policies from the same starts, by another world model."""

from pathlib import Path
from typing import Any

import numpy as np

from worldline.commands.outputs import report_results
from worldline.errors import WorldlineError
from worldline.eval.ranking import Ranked
from worldline.eval.ranking_change import ranking_change


def outcomes_of(ranked: Ranked) -> dict[str, Any]:
    """Success of every episode, 0 or 1, as a report keeps it."""
    truth = None if ranked.truth is None else ranked.truth.int().tolist()
    return {"policies": list(ranked.names), "imagined": ranked.imagined.int().tolist(), "true": truth}


def earlier_outcomes(report: Path | None, policies: list[str]) -> dict[str, Any] | None:
    """Those in the folder of a report; None for no report. Raises `WorldlineError` unless it ranked the same policies."""
    if report is None:
        return None
    found = report_results(report).get("outcomes") or {}
    if found.get("policies") != policies:
        raise WorldlineError(
            f"--against {report}: a ranking of the same policies is required, got {found.get('policies')} there and {policies} here"
        )
    return found


def change_since(
    report: Path | None, earlier: dict[str, Any] | None, ranked: Ranked, *, seed: int
) -> dict[str, Any] | None:
    """How this ranking differs from the earlier one. Raises `WorldlineError` unless both were told the same truth."""
    if earlier is None:
        return None
    mine = outcomes_of(ranked)
    if earlier["true"] != mine["true"]:
        raise WorldlineError(
            f"--against {report}: a ranking by the same true rollouts is required (--truth, --episodes, --horizon, --seed), there they came "
            "out otherwise"
        )
    before, after, true = (np.asarray(x, dtype=float) for x in (earlier["imagined"], mine["imagined"], mine["true"]))
    return ranking_change(true, before, after, names=ranked.names, seed=seed).to_dict()
