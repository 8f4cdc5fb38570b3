"""Intervals of proportions and pairwise contrasts."""

import json

import numpy as np
import pytest

from worldline.errors import WorldlineError
from worldline.eval import (
    clopper_pearson,
    letter_display,
    newcombe_independent,
    newcombe_paired,
    paired_interval,
    policy_contrasts,
    wilson,
)


def pair(both: int, only_a: int, only_b: int, neither: int) -> tuple[np.ndarray, np.ndarray]:
    a = np.array([1.0] * (both + only_a) + [0.0] * (only_b + neither))
    b = np.array([1.0] * both + [0.0] * only_a + [1.0] * only_b + [0.0] * neither)
    return a, b


def test_newcombe_paired_reproduces_the_papers_table() -> None:
    # Newcombe 1998 (Statistics in Medicine 17, 2635), method 10, the pairs 36, 12, 2, 0.
    found = newcombe_paired(*pair(36, 12, 2, 0))
    assert (found.low, found.high) == pytest.approx((0.0569, 0.3404), abs=5e-4)


def test_newcombe_paired_keeps_a_width_when_all_agree() -> None:
    found = newcombe_paired(*pair(0, 0, 0, 10))
    assert found.low < 0 < found.high


def test_newcombe_paired_covers() -> None:
    rng, covered = np.random.default_rng(0), 0
    for _ in range(400):
        u = rng.random(30)  # a succeeds wherever b does, and more
        a, b = (u < 0.7).astype(float), (np.where(rng.random(30) < 0.7, u, rng.random(30)) < 0.5).astype(float)
        covered += 0.2 in newcombe_paired(a, b)
    assert 0.92 < covered / 400 <= 1


def test_proportion_intervals() -> None:
    assert (wilson(5, 10).low, wilson(5, 10).high) == pytest.approx((0.2366, 0.7634), abs=1e-4)
    assert clopper_pearson(0, 10).high == pytest.approx(1 - 0.025 ** (1 / 10))  # the closed form at no success
    independent = newcombe_independent(*pair(0, 8, 3, 0))
    assert independent.low < 8 / 11 - 3 / 11 < independent.high


def test_clear_winner_and_twins() -> None:
    rng = np.random.default_rng(0)
    good, twin, bad = (rng.random(60) < 0.9) * 1.0, (rng.random(60) < 0.5) * 1.0, (rng.random(60) < 0.5) * 1.0
    found = policy_contrasts([twin, good, bad], names=["twin", "good", "bad"])
    assert found.policies[0].policy == "good" and found.policies[0].letters == "a"
    assert {row.letters for row in found.policies[1:]} == {"b"}
    assert [row.separable for row in found.contrasts] == [True, True, False]
    assert all(row.p_holm >= row.p for row in found.contrasts)
    assert all(row.difference in row.interval for row in found.contrasts)
    json.dumps(found.to_dict(), allow_nan=False)


def test_mcnemar_counts_discordant_pairs_only() -> None:
    found = policy_contrasts(np.stack(pair(20, 8, 1, 11)))
    assert found.contrasts[0].p == pytest.approx(2 * (1 + 9) / 2**9)  # binomial(9, 1/2): P(0) + P(1), twice
    concordant = policy_contrasts(np.stack(pair(10, 0, 0, 5)))
    assert concordant.contrasts[0].p == 1 and concordant.neighbours[0].total is None


def test_pairing_sharpens_correlated_outcomes() -> None:
    a, b = pair(20, 7, 0, 13)
    paired, independent = policy_contrasts([a, b]), policy_contrasts([a, b], paired=False)
    assert paired.contrasts[0].p < 0.05 < independent.contrasts[0].p
    assert paired.contrasts[0].interval.width < independent.contrasts[0].interval.width
    assert paired.contrasts[0].test == "McNemar exact" and independent.contrasts[0].test == "Fisher exact"


@pytest.mark.parametrize("paired", [True, False])
def test_rollouts_needed_reach_the_stated_power(paired: bool) -> None:
    a, b = pair(8, 6, 2, 4)  # rates 0.7 and 0.5
    needed = policy_contrasts([a, b], paired=paired).neighbours[0]
    assert needed.total is not None and needed.more == needed.total - 20
    if paired:  # Connor: (1.96 sqrt(0.4) + 0.8416 sqrt(0.4 - 0.2^2))^2 / 0.2^2 = 76.1
        assert needed.total == 77
    rng, hits = np.random.default_rng(0), 0
    for _ in range(300):
        cells = rng.choice(4, size=needed.total, p=[0.4, 0.3, 0.1, 0.2])
        x = np.isin(cells, (0, 1)) * 1.0
        y = np.isin(cells, (0, 2)) * 1.0
        if not paired:
            y = rng.permutation(y)
        z = (x - y).mean() / np.sqrt(((x - y).var() if paired else x.var() + y.var()) / needed.total)
        hits += abs(z) > 1.96
    assert 0.72 < hits / 300 < 0.9


def test_probabilities_are_compared_by_permutation() -> None:
    rng = np.random.default_rng(0)
    low, high = rng.uniform(0.1, 0.4, 25), rng.uniform(0.5, 0.9, 25)
    for paired in (True, False):
        found = policy_contrasts([high, low], paired=paired)
        assert found.contrasts[0].separable and found.contrasts[0].test.startswith("permutation")
        assert found.policies[0].clopper_pearson is None and found.neighbours[0].more == 0


def test_letters_share_exactly_where_not_separable() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        pairs = [(i, j) for i in range(6) for j in range(i + 1, 6) if rng.random() < 0.5]
        letters = letter_display(6, pairs)
        for i in range(6):
            for j in range(i + 1, 6):
                assert bool(set(letters[i]) & set(letters[j])) == ((i, j) not in pairs)


def test_contrasts_need_episodes() -> None:
    with pytest.raises(WorldlineError, match="policies episodes"):
        policy_contrasts([0.1, 0.2])
    with pytest.raises(WorldlineError, match="same number of episodes"):
        policy_contrasts([[0, 1], [1, 1, 0]], paired=True)
    with pytest.raises(WorldlineError, match="differ"):
        policy_contrasts([[0, 1], [1, 1]], names=["a", "a"])


def test_paired_interval_leaves_masked_episodes_out() -> None:
    a, b = np.array([1.0, 2.0, 3.0, np.nan]), np.array([0.5, 1.5, 2.6, 0.0])
    found = paired_interval(a, b, mask=np.array([True, True, True, False]))
    assert found.mean == pytest.approx((0.5 + 0.5 + 0.4) / 3) and found.episodes == 3
    assert found.interval is not None and 0 < found.interval.low < 1.4 / 3 < found.interval.high
    with pytest.raises(WorldlineError, match="mask"):
        paired_interval(a, b)
    assert paired_interval(a, b, mask=np.array([True, False, False, False])).interval is None
