"""Rank statistics: published numbers, hand-computed cases, and what cannot be computed."""

import itertools
import json
import math
from dataclasses import fields
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

import worldline.eval
from worldline.errors import WorldlineError
from worldline.eval import RankStatistics, mean_maximum_rank_violation, rank_statistics
from worldline.eval.ranking import policy_table, summarize_ranking

PUBLISHED = Path(__file__).parents[1] / "fixtures" / "published_rankings.csv"
SIX = [0.1, 0.25, 0.4, 0.55, 0.7, 0.9]


def published(source: str) -> RankStatistics:
    table = pd.read_csv(PUBLISHED, comment="#")
    rows = table[table.source == source]
    return rank_statistics(rows.real.to_numpy(), rows.predicted.to_numpy())


def outcomes(rates: list[float], episodes: int, seed: int) -> np.ndarray:
    return (np.random.default_rng(seed).random((len(rates), episodes)) < np.array(rates)[:, None]).astype(float)


def test_published_dreamdojo() -> None:
    found = published("dreamdojo")
    assert found.pearson == pytest.approx(0.995, abs=5e-4)
    assert found.spearman == pytest.approx(0.943, abs=5e-4)
    assert found.mmrv == pytest.approx(0.010, abs=5e-4)
    assert found.mmrv_sim_gap == pytest.approx(0.003, abs=5e-4), "the printed .003 is weighed by the imagined gap"
    assert found.bias == pytest.approx(-0.25, abs=5e-3)
    assert found.permutation_exact and found.permutation_p == pytest.approx(2 / math.factorial(6))


def test_published_cosmos() -> None:
    found = published("wm-policyeval/Cosmos")
    assert found.pearson == pytest.approx(0.719, abs=5e-4)
    assert found.mmrv == pytest.approx(0.204, abs=5e-4)
    assert not found.permutation_exact and any("random permutations" in note for note in found.notes)


def test_identical_rates_are_perfect() -> None:
    found = rank_statistics(SIX, SIX)
    assert (
        found.pearson == pytest.approx(1) and found.spearman == pytest.approx(1) and found.kendall == pytest.approx(1)
    )
    assert (found.mmrv, found.bias, found.mean_absolute_error, found.top1_regret) == (0, 0, 0, 0)
    assert found.slope == pytest.approx(1) and found.intercept == pytest.approx(0)
    assert found.permutation_p == pytest.approx(found.permutation_floor) == pytest.approx(1 / 720)


def test_reversed_rates_are_worst() -> None:
    found = rank_statistics(SIX, SIX[::-1])
    assert found.spearman == pytest.approx(-1) and found.permutation_p == pytest.approx(1)
    assert found.top1_regret == pytest.approx(0.8)
    # every pair is violated, so each policy pays its distance to the farther end
    assert found.mmrv == pytest.approx(np.mean([max(x - 0.1, 0.9 - x) for x in SIX]))


def test_mmrv_agrees_with_its_definition_under_ties() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        real, imagined = rng.integers(0, 4, 5) / 4, rng.integers(0, 4, 5) / 4
        worst = [
            max(abs(real[i] - real[j]) * ((imagined[i] < imagined[j]) != (real[i] < real[j])) for j in range(5))
            for i in range(5)
        ]
        assert float(mean_maximum_rank_violation(real, imagined)) == pytest.approx(np.mean(worst))


def test_a_tie_in_imagination_is_charged_to_the_worse_policy_once() -> None:
    found = rank_statistics([0.1, 0.5, 0.9], [0.3, 0.3, 0.8])
    assert found.mmrv == pytest.approx(0.4 / 3) and found.mmrv_sim_gap == 0


def test_permutation_p_is_the_share_of_all_pairings() -> None:
    imagined = [0.2, 0.1, 0.5, 0.45, 0.8]
    real = SIX[:5]
    measured = np.corrcoef(real, imagined)[0, 1]
    every = [np.corrcoef(real, order)[0, 1] for order in itertools.permutations(imagined)]
    expected = np.mean(np.array(every) >= measured - 1e-12)
    assert rank_statistics(real, imagined).permutation_p == pytest.approx(expected)


def test_leave_one_out_and_jackknife() -> None:
    real, imagined = [0.1, 0.2, 0.3, 0.25, 0.95], [0.2, 0.1, 0.25, 0.3, 0.9]
    found = rank_statistics(real, imagined)
    without_last = np.corrcoef(real[:4], imagined[:4])[0, 1]
    assert found.leave_one_out[4] == pytest.approx(without_last)
    known = [value for value in found.leave_one_out if value is not None]
    assert (
        len(known) == 5
        and found.leave_one_out_range is not None
        and found.leave_one_out_range[0] == pytest.approx(min(known))
    )
    jackknife, fisher = found.pearson_jackknife, found.pearson_interval_policy
    assert jackknife is not None and found.pearson is not None and found.pearson in jackknife
    assert fisher is not None
    z = np.arctanh(found.pearson)
    assert fisher.low == pytest.approx(np.tanh(z - 1.959964 / np.sqrt(2)), abs=1e-6)


@pytest.mark.parametrize(("real", "imagined"), [([0.5] * 4, SIX[:4]), (SIX[:4], [0.5] * 4)])
def test_equal_rates_leave_correlations_none_with_a_reason(real: list[float], imagined: list[float]) -> None:
    found = rank_statistics(real, imagined)
    assert found.pearson is None and found.spearman is None and found.kendall is None and found.permutation_p is None
    assert found.pearson_interval_policy is None and found.pearson_jackknife is None
    assert any("undefined" in note and "equal 0.5" in note for note in found.notes)
    json.dumps(found.to_dict(), allow_nan=False)


def test_regret_averages_over_policies_tied_at_the_top() -> None:
    assert rank_statistics([0.2, 0.6, 1.0], [0.1, 0.8, 0.8]).top1_regret == pytest.approx(0.2)


def test_lineages_count_once() -> None:
    real, imagined = [0.1, 0.2, 0.5, 0.6, 0.9], [0.1, 0.3, 0.4, 0.7, 0.8]
    found = rank_statistics(real, imagined, lineages=["a", "a", "b", "b", "c"])
    choices = [
        np.corrcoef([real[i], real[j], 0.9], [imagined[i], imagined[j], 0.8])[0, 1] for i in (0, 1) for j in (2, 3)
    ]
    assert found.pearson_independent == pytest.approx(np.mean(choices))
    assert found.pearson_independent_range == pytest.approx((min(choices), max(choices)))
    alone = rank_statistics(real, imagined, lineages=list("abcde"))
    assert alone.pearson_independent == pytest.approx(alone.pearson)
    few = rank_statistics(real, imagined, lineages=["a", "a", "b", "b", "b"])
    assert few.pearson_independent is None and any("three of them" in note for note in few.notes)


def test_rollout_intervals_shrink_with_episodes_and_pair_initial_states() -> None:
    few = rank_statistics(outcomes(SIX, 20, 0), outcomes(SIX, 20, 1))
    many = rank_statistics(outcomes(SIX, 400, 0), outcomes(SIX, 400, 1))
    assert few.pearson_interval_rollouts is not None and many.pearson_interval_rollouts is not None
    assert many.pearson_interval_rollouts.width < 0.5 * few.pearson_interval_rollouts.width
    assert "paired" in few.pearson_interval_rollouts.method
    # imagination that repeats every real outcome has no bias on any initial states; unpaired resampling cannot know
    same = outcomes(SIX, 20, 0)
    paired = rank_statistics(same, same).bias_interval_rollouts
    unpaired = rank_statistics(same, same, paired=False).bias_interval_rollouts
    assert paired is not None and paired.low == paired.high == 0
    assert unpaired is not None and unpaired.width > 0.05


def test_unequal_counts_and_rates_with_counts_have_rollout_intervals() -> None:
    real = outcomes(SIX, 30, 0)
    ragged = [row[: 20 + i] for i, row in enumerate(outcomes(SIX, 30, 1))]
    for found in (
        rank_statistics(real, ragged),
        rank_statistics(SIX, SIX, real_counts=30, imagined_counts=[20, 21, 22, 23, 24, 25]),
    ):
        assert found.pearson_interval_rollouts is not None and found.mmrv_perfect_floor is not None
    assert rank_statistics(SIX, SIX).pearson_interval_rollouts is None


def test_perfect_floor_falls_with_counts_and_holds_a_perfect_model() -> None:
    def floor(count: int) -> float:
        found = rank_statistics(SIX, SIX, real_counts=count, imagined_counts=count).mmrv_perfect_floor
        assert found is not None
        return found.mean

    assert floor(10) > 2 * floor(100) > 0
    inside = 0
    for seed in range(30):  # real and imagined drawn from one truth: MMRV must mostly lie in the band
        found = rank_statistics(outcomes(SIX, 20, 2 * seed), outcomes(SIX, 20, 2 * seed + 1), resamples=300)
        assert found.mmrv_perfect_floor is not None
        inside += found.mmrv <= found.mmrv_perfect_floor.high
    assert inside >= 25


def test_lists_arrays_and_tensors_agree() -> None:
    real, imagined = outcomes(SIX, 10, 0), outcomes(SIX, 10, 1)
    forms = (real.tolist(), imagined.tolist()), (real, imagined), (torch.tensor(real), torch.tensor(imagined))
    results = [rank_statistics(*form) for form in forms]
    assert results[0] == results[1] == results[2]


@pytest.mark.parametrize(
    ("real", "imagined", "words"),
    [
        ([0.1, 0.2, 0.3], [0.1, 0.2], "same policies"),
        ([0.1, 0.2], [0.1, 0.2], "at least 3 policies"),
        ([0.1, 0.2, 50], [0.1, 0.2, 0.3], "0, 1"),
        ([0.1, 0.2, math.nan], [0.1, 0.2, 0.3], "NaN"),
        ([[0, 1], [1, 0], []], [0.1, 0.2, 0.3], "no episodes"),
        ([], [], "got none"),
    ],
)
def test_bad_input_is_named(real: list, imagined: list, words: str) -> None:
    with pytest.raises(WorldlineError, match=words):
        rank_statistics(real, imagined)


def test_paired_needs_imagined_episodes_from_all_real_starts() -> None:
    assert rank_statistics(outcomes(SIX, 10, 0), outcomes(SIX, 12, 1), paired=True).bias_interval_rollouts is not None
    with pytest.raises(WorldlineError, match="paired=True"):
        rank_statistics(outcomes(SIX, 12, 0), outcomes(SIX, 10, 1), paired=True)
    with pytest.raises(WorldlineError, match="paired=True"):
        rank_statistics(SIX, SIX, paired=True)


def test_json_keys_are_the_fields() -> None:
    found = rank_statistics(outcomes(SIX, 10, 0), outcomes(SIX, 10, 1)).to_dict()
    assert list(found) == [field.name for field in fields(RankStatistics)]
    assert set(found["pearson_interval_rollouts"]) == {"low", "high", "level", "method"}
    assert json.loads(json.dumps(found, allow_nan=False)) == found


def test_every_public_name_resolves() -> None:
    assert callable(worldline.eval.rank_statistics)
    assert all(hasattr(worldline.eval, name) for name in worldline.eval.__all__)
    assert sorted(worldline.eval.__all__) == sorted(set(worldline.eval.__all__))


def test_intervals_hold_where_starts_are_shared_and_dreams_are_more() -> None:
    """50 true episodes and 100 dreams of six policies, as `rank` has by default; how hard a start is is the same to all of them."""
    rng, base, held = np.random.default_rng(0), np.linspace(0.3, 0.7, 6), 0
    for _ in range(100):
        real, imagined = rng.random(50) < base[:, None], rng.random(100) < base[:, None]  # the true bias is 0
        found = rank_statistics(real.astype(float), imagined.astype(float), paired=True, resamples=500)
        assert found.bias_interval_rollouts is not None
        held += 0.0 in found.bias_interval_rollouts
    assert held >= 87  # 95 expected; three standard errors are 6.5


def test_one_true_episode_gives_no_intervals_and_says_so() -> None:
    found = rank_statistics(outcomes(SIX, 1, 0), outcomes(SIX, 20, 1), paired=True)
    assert found.bias_interval_rollouts is None and any("two episodes" in note for note in found.notes)


def test_dreaming_from_a_start_ten_times_is_no_more_evidence() -> None:
    """Two policies that differ at two of ten starts: ten dreams of each start, all alike, separate them no better."""
    once = torch.tensor([[0, 1] * 5, [0, 1] * 4 + [0, 0]], dtype=torch.float)
    once[1, 1] = 0
    few, many = (
        summarize_ranking(["a", "b"], ["a", "b"], x[:, :, None].expand(-1, -1, 3), None, threshold=0.5, persist=2, correct_with=0, starts=10)
        for x in (once, once.repeat(1, 10))
    )  # fmt: skip
    assert few.starts == many.starts == 10 and many.imagined.shape[1] == 100
    assert [p.letters for p in many.contrasts.policies] == ["a", "a"]
    one, other = policy_table(few)[0], policy_table(many)[0]
    assert one["imagined"] == other["imagined"] and other["imagined_episodes"] == 100 and other["imagined_starts"] == 10
    assert one["imagined_interval"] == other["imagined_interval"]
