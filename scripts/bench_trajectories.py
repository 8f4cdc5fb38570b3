"""How fast trajectories are made, and how true their steps are, by how often the network is asked.

    python scripts/bench_trajectories.py --trajectory-model runs/umaze-trajectories --data data/pointmaze-umaze-wander --task pointmaze/umaze

For every number of evaluations: trajectories a second (batches of --batch, the median of three), and the error of generated steps against
the simulator's one step, in standard deviations of the recorded observations, with a bootstrap interval over trajectories. Euler and Heun
at equal evaluations, and the paper's 128 steps of Heun with churn. Prints Markdown.
"""

import json
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro
from result_tables import row, table

from worldline.errors import WorldlineError
from worldline.eval.intervals import bootstrap_distribution
from worldline.eval.trajectories import step_errors
from worldline.sim.control import make_control
from worldline.trainers.trajectory import open_trajectories
from worldline.worldmodels.trajectories import TrajectoryDiffusion, TrajectorySolver


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchTrajectories:
    """Sample, time, compare with the simulator."""

    trajectory_model: Path
    data: str
    """The Minari dataset that it learned from, whose spread is the unit of errors."""
    task: str
    """The simulator: pointmaze/umaze, pointmaze/medium, hopper or halfcheetah."""
    evaluations: tuple[int, ...] = (8, 16, 32, 128)
    batch: int = 256
    clipped: float | None = None
    """Leave out steps with an observation so large (hopper: 10)."""
    threads: int = 2
    reference: bool = True
    """Also 128 steps of Heun, without and with churn 80."""
    out: Path | None = None
    """A JSON file for the numbers."""


def solvers(config: BenchTrajectories) -> list[TrajectorySolver]:
    found = [TrajectorySolver(steps=n) for n in config.evaluations]
    found += [TrajectorySolver(steps=(n + 1) // 2, heun=True) for n in config.evaluations if n > 2]
    if config.reference:
        found += [TrajectorySolver(steps=128, heun=True), TrajectorySolver(steps=128, heun=True, churn=80.0)]
    return found


def squares_interval(errors: np.ndarray, episode: np.ndarray, *, resamples: int = 500) -> tuple[float, float]:
    """95% bootstrap interval of the root mean square of steps' errors. Whole trajectories are drawn, since the steps of one go wrong together:
    intervals over single steps are too narrow."""
    _, place = np.unique(episode, return_inverse=True)
    squares, steps = np.bincount(place, np.square(errors)), np.bincount(place)

    def statistic(squares: np.ndarray, steps: np.ndarray, axis: int) -> np.ndarray:
        return np.sqrt(squares.sum(axis) / steps.sum(axis))

    draws = bootstrap_distribution((squares, steps), statistic, resamples=resamples, seed=0, paired=True)
    low, high = np.quantile(draws, [0.025, 0.975])
    return float(low), float(high)


def main(config: BenchTrajectories) -> None:
    torch.set_num_threads(config.threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = TrajectoryDiffusion.from_pretrained(config.trajectory_model).to(device)
    real, task = open_trajectories((config.data,)), make_control(config.task)
    rows, numbers = [], []
    for solver in solvers(config):
        own, seeds, took = model.with_solver(solver), torch.arange(config.batch), []
        kind = ("Heun" if solver.heun else "Euler") + (f", churn {solver.churn:g}" if solver.churn else "")
        try:
            for i in range(3):
                start = time.perf_counter()
                made = own.generate(seeds + i * config.batch, batch=config.batch)
                took.append(time.perf_counter() - start)
        except WorldlineError as error:  # samples far from the data
            print(f"{kind}, {solver.steps} steps: {error}", flush=True)
            rows.append(row(kind, solver.steps, solver.evaluations, "–", "diverges", "–"))
            numbers.append({"solver": kind, "steps": solver.steps, "evaluations": solver.evaluations, "diverges": str(error)})  # fmt: skip
            continue
        errors = step_errors(task, made, real, most=10**9, clipped=config.clipped)
        each = errors.observation.numpy()
        squares = np.sqrt(np.square(each).mean())
        low, high = squares_interval(each, errors.episode.numpy())
        speed = config.batch / statistics.median(took)
        rows.append(
            row(
                kind,
                solver.steps,
                solver.evaluations,
                f"{speed:.0f}",
                f"{np.median(each):.4f}",
                f"{squares:.4f} [{low:.4f}, {high:.4f}]",
            )
        )
        numbers.append({"solver": kind, "steps": solver.steps, "evaluations": solver.evaluations, "per_second": speed, "median": float(np.median(each)), "rms": float(squares), "interval": [low, high]})  # fmt: skip
        print(rows[-1], flush=True)
    weights = sum(p.numel() for p in model.parameters())
    name = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"\n{name}, {weights / 1e6:.2f}M weights, length {model.config.length}, batch {config.batch}\n")
    head = "| solver | steps | evaluations | trajectories/s | median error of a step, stds | root mean square [95%] |"
    print(table(head, rows))
    if config.out is not None:
        config.out.write_text(json.dumps(numbers, indent=1))


if __name__ == "__main__":
    main(tyro.cli(BenchTrajectories, description=__doc__))
