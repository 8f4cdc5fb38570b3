"""Scorer calibration against counts done by hand."""

import json

import pytest
import torch

from worldline.errors import WorldlineError
from worldline.eval import best_threshold, reliability_diagram, scorer_calibration

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
    assert found.threshold == pytest.approx(0.45) and found.threshold_chosen_here
    assert any("optimistic" in note for note in found.notes)


def test_best_threshold_follows_its_criterion() -> None:
    # Youden: >= 0.25 gives 3/3 - 1/3, >= 0.65 gives 2/3 - 0; equal, so the lower of the two middle ones
    assert best_threshold(P, Y) == pytest.approx(0.25)
    rare = torch.tensor([False] * 5 + [True])
    assert best_threshold(P, rare, criterion="f1") == pytest.approx(0.8)
    with pytest.raises(WorldlineError, match="both"):
        best_threshold(P, torch.ones(6, dtype=torch.bool))


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
