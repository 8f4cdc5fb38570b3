"""Whether one world model ranks better than another, by the same starts."""

import numpy as np
import pytest

from worldline.errors import WorldlineError
from worldline.eval.ranking_change import ranking_change

NAMES = ("a", "b", "c", "d")


def outcomes(rates, episodes, seed):
    return (np.random.default_rng(seed).random((len(rates), episodes)) < np.asarray(rates)[:, None]).astype(float)


def test_a_model_that_learned_the_order_ranks_better_and_one_that_did_not_change_did_not():
    rates = [0.1, 0.4, 0.6, 0.9]
    real = outcomes(rates, 400, 0)
    before, after = outcomes(rates[::-1], 400, 1), real.copy()
    found = ranking_change(real, before, after, names=NAMES).measures
    assert found["pearson"].before < -0.9 and found["pearson"].after == pytest.approx(1)
    assert found["pearson"].low > 1.5 and found["mmrv"].after == 0 and found["mmrv"].high < -0.3
    assert found["mean_absolute_error"].after == 0 and found["mean_absolute_error"].high < 0
    same = ranking_change(real, before, before, names=NAMES).measures
    assert all(c.low == c.high == 0 and c.before == c.after for c in same.values())


def test_the_interval_of_the_bias_is_that_of_a_paired_difference():
    """Of the mean over policies of after - before, whose standard error is known."""
    real, before, after = (outcomes([0.3, 0.5, 0.5, 0.7], 300, seed) for seed in (0, 1, 2))
    change = (after - before).mean(0)
    error = change.std(ddof=1) / np.sqrt(300)
    found = ranking_change(real, before, after, names=NAMES, resamples=4000).measures["bias"]
    assert found.high - found.low == pytest.approx(2 * 1.96 * error, rel=0.1)
    assert found.after - found.before == pytest.approx(change.mean())


def test_pairing_takes_out_what_starts_have_in_common():
    """Both models fail on the same hard starts: the difference is sure though each rate is not."""
    hard = np.random.default_rng(0).random(200) < 0.5
    real = np.stack([~hard, hard, np.ones(200), np.zeros(200)]).astype(float)
    before, after = real.copy(), real.copy()
    after[2] = 1.0 - (np.arange(200) < 20)
    found = ranking_change(real, before, after, names=NAMES).measures["bias"]
    assert found.low < found.high < 0 and found.high - found.low < 0.03


def test_more_imagined_than_true_starts_and_rates_that_are_all_equal():
    real, before = outcomes([0.2, 0.5, 0.8], 50, 0), outcomes([0.2, 0.5, 0.8], 80, 1)
    after = np.ones_like(before)
    found = ranking_change(real, before, after, names=NAMES[:3])
    assert found.measures["pearson"].after is None and found.measures["pearson"].low is None
    assert found.measures["bias"].low > 0 and found.episodes == 50
    assert found.to_dict()["measures"]["pearson"]["after"] is None


def test_others_than_the_same_policies_are_refused():
    a = np.ones((3, 5))
    for real, before, after in (
        (a[:2], a[:2], a[:2]),
        (a, a, a[:, :4]),
        (np.ones((3, 6)), a, a),
        (np.ones((4, 5)), a, a),
    ):
        with pytest.raises(WorldlineError, match="the same three policies or more"):
            ranking_change(real, before, after, names=())
