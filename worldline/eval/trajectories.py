"""What made-up trajectories are worth: do their steps obey the simulator, does the policy they were made for act like that?

And the statistics of returns over tasks and seeds: the interquartile mean with a bootstrap stratified by task (Agarwal et al. 2108.13264).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from scipy import stats
from torch import Tensor

from worldline.data.trajectories import Trajectories, low_dimensional
from worldline.errors import WorldlineError
from worldline.eval.intervals import Interval
from worldline.types import StochasticPolicy

Values = Mapping[str, Float[np.ndarray, " s"]]
"""Task -> one number a seed."""


@runtime_checkable
class OneStep(Protocol):
    """A simulator's word on one step from a given observation (`worldline.sim.control.ControlTask`)."""

    def step_from(
        self, observations: Float[Tensor, "n o"], actions: Float[Tensor, "n a"]
    ) -> tuple[Float[Tensor, "n o"], Float[Tensor, " n"], Bool[Tensor, " n"]]: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class StepErrors:
    """How far made-up steps are from the simulator's: n rows, m of them without an end."""

    observation: Float[
        Tensor, " m"
    ]  # root mean square over dimensions, in standard deviations of the recorded observations
    episode: Int[Tensor, " m"]  # of which made-up trajectory each of these is: steps of one are not independent
    reward: Float[Tensor, " n"]  # absolute, in standard deviations of the recorded rewards
    terminated: Bool[Tensor, " n"]  # one of the two ends here, the other does not


def step_errors(
    task: OneStep, made: Trajectories, real: Trajectories, *, most: int = 4096, clipped: float | None = None
) -> StepErrors:
    """Every made-up step, or `most` spread evenly over them, against the simulator's from the same observation and action.

    Args:
        real: recorded data of the task, whose spread is the unit.
        clipped: leave out steps with an observation at least so large, which does not tell the simulator's state (Hopper clips
            velocities to 10). An end's next observation is not compared.
    """
    rows = torch.arange(made.steps)
    if clipped is not None:
        rows = rows[(made.observations.abs() < clipped).all(1)]
    if len(rows) > most:
        rows = rows[torch.linspace(0, len(rows) - 1, most).long()]
    seen, actions = made.observations[rows].double(), made.actions[rows].double()
    true_next, true_reward, true_end = task.step_from(seen, actions)
    unit = real.observations.double().std(0).clamp(min=1e-6)
    off = ((made.next_observations[rows].double() - true_next) / unit).square().mean(1).sqrt()
    ends = made.terminated[rows]
    return StepErrors(
        observation=off[~ends].float(),
        episode=made.episode[rows][~ends],
        reward=(
            (made.rewards[rows].double() - true_reward).abs() / real.rewards.double().std().clamp(min=1e-6)
        ).float(),
        terminated=ends != true_end,
    )


def policy_log_likelihood(policy: StochasticPolicy, made: Trajectories) -> Float[Tensor, " n"]:
    """Log-density of every made-up action under the policy that it was made for."""
    with torch.no_grad():
        found = policy.log_prob(low_dimensional(made.observations), policy.reset(made.steps), made.actions[:, None])
    return found.cpu()  # a policy may be on a GPU


def normalised(returns: Float[np.ndarray, " s"], *, low: float, high: float) -> Float[np.ndarray, " s"]:
    """Returns with `low` (a random policy's) at 0 and `high` (a good one's) at 100, as D4RL has it."""
    if not high > low:
        raise WorldlineError(f"reference returns low < high required, got {low:g} and {high:g}")
    return 100 * (returns - low) / (high - low)


def interquartile_mean(values: Values) -> float:
    """Mean of the middle half of all numbers of all tasks."""
    return float(stats.trim_mean(np.concatenate(list(values.values())), 0.25))


def pooled_interval(
    statistic: Callable[..., float], *groups: Values, level: float = 0.95, resamples: int = 5000, seed: int = 0
) -> Interval:
    """Bootstrap interval of statistic(*groups): seeds are drawn anew within each task, so that every task keeps its part.

    A seed that two groups share is drawn for both: the groups are paired by seed.
    """
    first = groups[0]
    for group in groups[1:]:
        if {k: len(v) for k, v in group.items()} != {k: len(v) for k, v in first.items()}:
            raise WorldlineError(
                f"groups with the same tasks and seeds required, got { ({k: len(v) for k, v in first.items()}) } and "
                f"{ ({k: len(v) for k, v in group.items()}) }"
            )
    generator = np.random.default_rng(seed)
    found = np.empty(resamples)
    for i in range(resamples):
        rows = {task: generator.integers(len(v), size=len(v)) for task, v in first.items()}
        found[i] = statistic(*({task: v[rows[task]] for task, v in group.items()} for group in groups))
    low, high = np.quantile(found, [(1 - level) / 2, (1 + level) / 2])
    return Interval(
        low=float(low),
        high=float(high),
        level=level,
        method=f"bootstrap over seeds within tasks, {resamples} resamples",
    )


def iqm_difference(a: Values, b: Values) -> float:
    """Interquartile mean of a less that of b."""
    return interquartile_mean(a) - interquartile_mean(b)
