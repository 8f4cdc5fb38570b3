"""Rollout noise: what the same policies would have scored on other initial states, and what a perfect model would.

Resampling adds rollout noise to rates that already hold some, so the interval of r shows what a repeat of the same size
would give; it sits a little low, and for very high r it can lie below the measured value. A note says so when it does.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from worldline.errors import WorldlineError
from worldline.eval.correlation import pearson, pearson_draws
from worldline.eval.intervals import Interval, bootstrap_distribution
from worldline.eval.outcomes import PolicyOutcomes
from worldline.eval.rank_violation import mean_maximum_rank_violation, perfect_model_draws, summarise


def rollout_level(
    real: PolicyOutcomes,
    imagined: PolicyOutcomes,
    *,
    paired: bool | None,
    level: float,
    resamples: int,
    seed: int,
    notes: list[str],
) -> dict[str, Any]:
    """The fields of `RankStatistics` that depend on episode counts; empty, with a note, where those are unknown."""
    if real.counts is None or imagined.counts is None:
        if paired:
            raise WorldlineError("paired=True: episode outcomes 'policies episodes' required, got rates.")
        notes.append("no rollout intervals: pass episode outcomes, or rates with real_counts and imagined_counts")
        return {}
    x, y, method = _resampled_rates(real, imagined, paired, resamples, seed)
    perfect = perfect_model_draws(real.rates, real.counts, imagined.counts, draws=resamples, seed=seed)
    real_draws = np.broadcast_to(real.rates, perfect.shape)

    def interval(values: np.ndarray, what: str) -> Interval | None:
        known = values[np.isfinite(values)]
        if len(known) < len(values):
            notes.append(f"{what}: undefined in {len(values) - len(known)} of {len(values)} resamples (tied rates)")
        if len(known) < 0.5 * len(values):
            return None
        low, high = np.quantile(known, [(1 - level) / 2, (1 + level) / 2])
        return Interval(low=float(low), high=float(high), level=level, method=method)

    r, measured = interval(pearson_draws(x, y), "r over rollouts"), pearson(real.rates, imagined.rates)
    if r is not None and measured is not None and measured not in r:
        notes.append(
            f"measured r {measured:.3f} lies outside its rollout interval: resampling adds noise, which lowers r; "
            "more episodes a policy close the gap"
        )
    ceiling = pearson_draws(real_draws, perfect)
    ceiling = ceiling[np.isfinite(ceiling)]
    return {
        "pearson_interval_rollouts": r,
        "mmrv_interval_rollouts": interval(mean_maximum_rank_violation(x, y), "MMRV over rollouts"),
        "bias_interval_rollouts": interval((y - x).mean(-1), "bias over rollouts"),
        "mmrv_perfect_floor": summarise(mean_maximum_rank_violation(real_draws, perfect), level=level),
        "pearson_perfect_ceiling": summarise(ceiling, level=level) if len(ceiling) else None,
    }


def _resampled_rates(
    real: PolicyOutcomes, imagined: PolicyOutcomes, paired: bool | None, resamples: int, seed: int
) -> tuple[np.ndarray, np.ndarray, str]:
    """Rates "draws policies" under other initial states, and the name of the method."""
    if real.episodes is None or imagined.episodes is None:
        rng = np.random.default_rng(seed)
        draws = [
            rng.binomial(counts, side.rates, size=(resamples, len(side))) / counts
            for side in (real, imagined)
            for counts in (np.asarray(side.counts),)
        ]
        return draws[0], draws[1], f"binomial resampling of the rates, {resamples} draws"
    a, b = real.rectangular, imagined.rectangular
    same = a is not None and b is not None and a.shape == b.shape
    if paired and not same:
        raise WorldlineError("paired=True: the same number of episodes for every policy, real and imagined, required.")
    if a is not None and b is not None and same and paired is not False:
        index = np.arange(a.shape[1])
        means: Callable[..., np.ndarray] = lambda e, axis: np.concatenate([a[:, e], b[:, e]]).mean(-1)  # noqa: E731
        draws = bootstrap_distribution((index,), means, resamples=resamples, seed=seed)
        method = f"percentile bootstrap over initial states, paired, {resamples} resamples"
    else:
        means = lambda *samples, axis: np.stack([sample.mean(axis) for sample in samples])  # noqa: E731
        draws = bootstrap_distribution((*real.episodes, *imagined.episodes), means, resamples=resamples, seed=seed)
        method = f"percentile bootstrap over episodes, unpaired, {resamples} resamples"
    return draws[: len(real)].T, draws[len(real) :].T, method
