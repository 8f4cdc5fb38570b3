"""Bias correction: coverage, what a perfect and a useless imagination give, calibration across policies."""

import json
from typing import Literal

import numpy as np
import pytest

from worldline.errors import WorldlineError
from worldline.eval import PredictionPowered, leave_one_policy_out, prediction_powered_rate


def simulate(n: int, more: int, rate: float, kind: str, seed: int) -> PredictionPowered:
    rng = np.random.default_rng(seed)
    y = (rng.random(n + more) < rate) * 1.0
    f = {
        "perfect": y,
        "useless": (rng.random(n + more) < 0.5) * 1.0,
        "good": np.where(rng.random(n + more) < 0.85, y, 1 - y),
        "biased": y * (rng.random(n + more) < 0.5),
    }[kind]
    return prediction_powered_rate(y[:n], f[:n], f[n:])


@pytest.mark.parametrize("kind", ["perfect", "useless", "good", "biased"])
@pytest.mark.parametrize("n", [10, 40])
def test_coverage_and_no_harm(kind: str, n: int) -> None:
    runs = [simulate(n, 200, 0.4, kind, seed) for seed in range(250)]
    assert np.mean([0.4 in run.interval for run in runs]) > 0.91
    assert np.mean([run.interval.width for run in runs]) < 1.05 * np.mean(
        [run.real_only_interval.width for run in runs]
    )
    errors = np.mean([(run.estimate - 0.4) ** 2 for run in runs]), np.mean([(run.real_only - 0.4) ** 2 for run in runs])
    assert errors[0] < 1.12 * errors[1]
    # lambda's degree of freedom is all that can be lost
    assert all(run.effective_episodes > n * (n - 2) / (n - 1) - 1e-6 for run in runs)


def test_bias_is_removed() -> None:
    runs = [simulate(40, 200, 0.6, "biased", seed) for seed in range(200)]
    assert np.mean([run.imagined_only for run in runs]) == pytest.approx(0.3, abs=0.02)
    assert np.mean([run.estimate for run in runs]) == pytest.approx(0.6, abs=0.02)


def test_perfect_imagination_is_worth_all_episodes() -> None:
    run = simulate(400, 400, 0.5, "perfect", 0)
    assert run.power == pytest.approx(0.5, abs=0.02)  # N / (n + N)
    assert run.effective_episodes == pytest.approx(800, rel=0.05)
    assert run.interval.width == pytest.approx(run.real_only_interval.width / np.sqrt(2), rel=0.05)


def test_useless_imagination_is_left_out() -> None:
    runs = [simulate(200, 400, 0.5, "useless", seed) for seed in range(20)]
    assert np.mean([run.power for run in runs]) < 0.08
    zero = prediction_powered_rate([1, 0, 1, 1, 0], [0, 1, 1, 0, 0], [1, 0], power=0.0)
    assert zero.estimate == zero.real_only
    assert (zero.interval.low, zero.interval.high) == (zero.real_only_interval.low, zero.real_only_interval.high)


def test_agreeing_real_outcomes_stand_alone_and_say_so() -> None:
    run = prediction_powered_rate([1.0] * 5, [1.0, 0.0, 1.0, 1.0, 1.0], [0.0] * 50)
    assert run.estimate == 1 and run.power == 0 and "agree" in run.note
    assert run.interval.low == pytest.approx(run.real_only_interval.low)
    json.dumps(run.to_dict(), allow_nan=False)


def test_what_is_refused() -> None:
    with pytest.raises(WorldlineError, match="same episodes"):
        prediction_powered_rate([1, 0, 1, 0], [1, 0, 1], [1, 0])
    with pytest.raises(WorldlineError, match="at least 4"):
        prediction_powered_rate([1, 0, 1], [1, 0, 1], [1, 0])
    with pytest.raises(WorldlineError, match="imagined_more"):
        prediction_powered_rate([1, 0, 1, 0], [1, 0, 1, 0], [])


@pytest.mark.parametrize("method", ["linear", "isotonic"])
def test_calibration_removes_a_systematic_error(method: Literal["linear", "isotonic"]) -> None:
    real = np.linspace(0.05, 0.95, 10)
    found = leave_one_policy_out(real, 0.1 + 0.4 * real, method=method, real_counts=20)
    assert found.error_calibrated < 0.5 * found.error_imagined
    assert found.error_calibrated < 0.5 * found.error_others_mean
    assert found.policies[0].real_interval is not None
    json.dumps(found.to_dict(), allow_nan=False)


def test_linear_calibration_predicts_without_the_policy() -> None:
    real, imagined = [0.1, 0.3, 0.5, 0.9, 0.6], [0.2, 0.3, 0.4, 0.6, 0.9]  # the first four on one line
    found = leave_one_policy_out(real, imagined)
    last = found.policies[4]
    assert last.predicted == 1.0  # 0.1 + 2 * (0.9 - 0.2), clipped
    assert last.residual == pytest.approx(0.4) and last.interval is not None and last.real not in last.interval


def test_calibration_intervals_cover() -> None:
    rng, covered, total = np.random.default_rng(0), 0, 0
    for _ in range(60):
        imagined = rng.uniform(0.2, 0.7, 8)
        found = leave_one_policy_out(np.clip(0.1 + imagined + rng.normal(0, 0.05, 8), 0, 1), imagined)
        assert found.covered is not None
        covered, total = covered + found.covered, total + 8
    assert 0.91 < covered / total < 0.985


def test_useless_imagination_does_not_look_calibrated() -> None:
    rng = np.random.default_rng(0)
    found = leave_one_policy_out(rng.random(12), rng.random(12))
    assert found.error_calibrated > 0.8 * found.error_others_mean
    few = leave_one_policy_out([0.1, 0.4, 0.6, 0.8], [0.5] * 4)
    assert few.covered is None and few.notes and few.policies[0].predicted == pytest.approx(0.6)
