"""Scorer calibration against counts done by hand."""

import json
import math

import pytest
import torch

from worldline.errors import WorldlineError
from worldline.eval import (
    platt,
    reliability_diagram,
    scorer_calibration,
    success_threshold,
    threshold_interval,
)

P = torch.tensor([0.1, 0.2, 0.3, 0.6, 0.7, 0.9])
Y = torch.tensor([False, False, True, False, True, True])


def test_counts_and_areas() -> None:
    found = scorer_calibration(P, Y, threshold=0.5)
    counts = found.true_positives, found.false_positives, found.true_negatives, found.false_negatives
    assert counts == (2, 1, 2, 1) and not found.threshold_chosen_here
    assert found.auroc == pytest.approx(8 / 9)  # of nine pairs one is the wrong way round
    assert found.average_precision == pytest.approx((1 + 1 + 3 / 4) / 3)
    assert found.brier == pytest.approx((0.01 + 0.04 + 0.49 + 0.36 + 0.09 + 0.01) / 6)
    assert found.balanced_accuracy == pytest.approx(2 / 3) and found.accuracy.value == pytest.approx(4 / 6)
    assert found.sensitivity.interval is not None and 2 / 3 in found.sensitivity.interval
    json.dumps(found.to_dict(), allow_nan=False)


def test_perfect_separation() -> None:
    p = torch.tensor([0.05, 0.1, 0.8, 0.95])
    y = torch.tensor([False, False, True, True])
    found = scorer_calibration(p, y)
    assert found.auroc == 1 and found.balanced_accuracy == 1
    assert 0.1 < found.threshold < 0.8 and found.threshold_chosen_here
    assert any("optimistic" in note for note in found.notes)


def logit(p: float) -> float:
    return math.log(p / (1 - p))


def test_threshold_lies_midway_in_log_odds_and_moves_with_the_scores() -> None:
    z = torch.tensor([-4.0, -2.5, -1.0, 1.0, 2.5, 4.0], dtype=torch.float64)
    y = z > 0
    assert success_threshold(torch.sigmoid(z), y) == pytest.approx(0.5, abs=1e-3)
    for shift in (-1.5, 2.0):  # a scorer that is too sure either way
        assert logit(success_threshold(torch.sigmoid(z + shift), y)) == pytest.approx(shift, abs=0.01)
    with pytest.raises(WorldlineError, match="both"):
        success_threshold(P, torch.ones(6, dtype=torch.bool))


def test_threshold_does_not_depend_on_how_common_success_is() -> None:
    rare_p = torch.cat([P, P[~Y].repeat(9)])
    rare_y = torch.cat([Y, Y[~Y].repeat(9)])
    assert success_threshold(rare_p, rare_y) == pytest.approx(success_threshold(P, Y), abs=1e-3)


def test_no_single_episode_moves_the_threshold_far() -> None:
    """Scores in two heaps with nothing between them, as scorers give: a best cut would jump across the gap."""
    generator = torch.Generator().manual_seed(0)
    low, high = torch.rand(40, generator=generator) * 0.02, 1 - torch.rand(40, generator=generator) * 0.02
    p, y = torch.cat([low, high]), torch.arange(80) >= 40
    y = y ^ (torch.arange(80) % 13 == 0)  # some of either kind in the wrong heap
    whole = logit(success_threshold(p, y))
    without = [logit(success_threshold(p[torch.arange(80) != i], y[torch.arange(80) != i])) for i in range(80)]
    assert max(abs(z - whole) for z in without) < 0.5


def test_threshold_interval_narrows_with_more_episodes() -> None:
    generator = torch.Generator().manual_seed(1)
    y = torch.rand(800, generator=generator) < 0.5
    p = torch.sigmoid(torch.randn(800, generator=generator) * 2 + torch.where(y, 2.0, -2.0))
    few, many = threshold_interval(p[:50], y[:50]), threshold_interval(p, y)
    assert few.width > 2 * many.width  # 16 times the episodes: a quarter of the width
    assert 0.5 in few and 0.5 in many and success_threshold(p, y) in many


def test_platt_recovers_the_curve_that_made_the_outcomes() -> None:
    generator = torch.Generator().manual_seed(2)
    z = torch.randn(20_000, generator=generator) * 3
    y = torch.rand(20_000, generator=generator) < torch.sigmoid(0.5 * z - 1)
    slope, offset = platt(z, y)
    assert slope == pytest.approx(0.5, abs=0.03) and offset == pytest.approx(-1, abs=0.06)


def test_calibrated_scorer_has_little_calibration_error() -> None:
    generator = torch.Generator().manual_seed(0)
    p = torch.rand(4000, generator=generator)
    y = torch.rand(4000, generator=generator) < p
    right, overconfident = scorer_calibration(p, y), scorer_calibration((p > 0.5).float() * 0.98 + 0.01, y)
    assert right.expected_calibration_error < 0.03 < 0.2 < overconfident.expected_calibration_error
    assert sum(item.observed.episodes for item in right.bins) == 4000
    assert all(item.low <= item.predicted <= item.high for item in right.bins)


def test_one_class_only_is_none_with_a_reason() -> None:
    found = scorer_calibration(P, torch.zeros(6, dtype=torch.bool))
    assert found.auroc is None and found.average_precision is None and found.sensitivity.value is None
    assert found.threshold == 0.5 and any("all episodes fail" in note for note in found.notes)
    json.dumps(found.to_dict(), allow_nan=False)
    assert reliability_diagram(found).axes


def test_logits_are_refused() -> None:
    with pytest.raises(WorldlineError, match="sigmoid"):
        scorer_calibration(torch.tensor([-1.0, 2.0]), torch.tensor([True, False]))
