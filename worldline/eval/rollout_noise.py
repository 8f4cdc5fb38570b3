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
    if min(*real.counts, *imagined.counts) < 2:
        notes.append("no rollout intervals: they need two episodes a policy")
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
    if paired and (a is None or b is None or a.shape[1] > b.shape[1]):
        raise WorldlineError(
            "paired=True: one number of episodes for every policy required, and imagined ones from all starts of the real ones."
        )
    if a is not None and b is not None and (paired or (paired is None and a.shape == b.shape)):
        x, y = shared_rates(a, b, resamples=resamples, seed=seed)
        return x, y, f"percentile bootstrap over initial states, paired, {resamples} resamples"
    means: Callable[..., np.ndarray] = lambda *samples, axis: np.stack([s.mean(axis) for s in samples])  # noqa: E731
    draws = bootstrap_distribution((*real.episodes, *imagined.episodes), means, resamples=resamples, seed=seed)
    method = f"percentile bootstrap over episodes, unpaired, {resamples} resamples"
    return draws[: len(real)].T, draws[len(real) :].T, method


def shared_rates(real: np.ndarray, *imagined: np.ndarray, resamples: int, seed: int) -> tuple[np.ndarray, ...]:
    """Rates "draws policies" of real episodes "policies r" and of imagined ones "policies n" under other initial states.

    The first r of the n starts are the real ones'. Those are drawn anew as one for all policies, real and imagined, and so are the others
    for all policies: what a start adds to all of them stays in what they differ by.
    """
    r, n = real.shape[1], imagined[0].shape[1]
    rng = np.random.default_rng(seed)
    shared = rng.integers(r, size=(resamples, r))
    alone = r + rng.integers(max(1, n - r), size=(resamples, n - r))
    every = np.concatenate([shared, alone], 1)
    return tuple(x[:, rows].mean(-1).T for x, rows in ((real, shared), *((x, every) for x in imagined)))
