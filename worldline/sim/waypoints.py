"""A behaviour for the point mazes: along the cells to a goal, then to another, as D4RL's maze2d data were made.

    pilot = WaypointPilot(task, seed=0)
    wandering = collect_trajectories(task, pilot, episodes=100, seed=0, provenance={"policy": "waypoints"})

Which goal it is after is not in the observation, so the same state is left in several directions. With `wander=False` it goes to the
task's goal and stays: close to the best return there is.
"""

from collections import deque
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from worldline.errors import SimulatorError
from worldline.sim.control import CONTROL_TASKS, Cell, ControlTask, make_control


class WaypointPilot:
    """Drives the ball along the shortest way of cells to a goal: full force towards the next cell's centre, with damping.

    Keeps a goal for every row: use one pilot for one rollout. What it does in row i depends on (seed, i) and what row i sees.

    Args:
        noise: standard deviation of the Gaussian noise on each action, in units of the full force.
        wander: go to a random cell, then another; or else to the task's goal and stay.

    Raises `SimulatorError` for a task without a maze.
    """

    REACHED = 0.25  # metres from a goal at which the next one is drawn
    PULL, DAMPING = 10.0, 1.0  # force per metre, and per metre a second

    def __init__(self, task: ControlTask, *, seed: int, noise: float = 0.5, wander: bool = True) -> None:
        if task.goal is None:
            mazes = ", ".join(name for name in CONTROL_TASKS if make_control(name).maze)
            raise SimulatorError(f"a task with a maze required ({mazes}), got {task.name}.")
        self._cells = {cell: np.array(centre) for cell, centre in task.maze.items()}
        self._home, self._seed, self._noise, self._wander = task.goal, seed, noise, wander
        self._way = {cell: _ways_to(cell, self._cells) for cell in self._cells}
        self._rows: list[tuple[np.random.Generator, Cell, np.ndarray]] = []

    def __call__(self, observations: Float[Tensor, "n o"]) -> Float[Tensor, "n a"]:
        seen = observations.double().numpy()
        if not self._rows:
            for row, state in enumerate(seen):
                rng = np.random.default_rng([self._seed, row])
                self._rows.append((rng, *self._draw(rng, self._cell(state[:2]))))
        sent = np.stack([self._steer(row, state) for row, state in enumerate(seen)])
        return torch.from_numpy(sent.clip(-1, 1)).to(observations.dtype)

    def _steer(self, row: int, state: np.ndarray) -> np.ndarray:
        rng, cell, point = self._rows[row]
        here = self._cell(state[:2])
        if self._wander and np.linalg.norm(point - state[:2]) < self.REACHED:
            cell, point = self._draw(rng, here)
            self._rows[row] = (rng, cell, point)
        target = point if here == cell else self._cells[self._way[cell][here]]
        force = self.PULL * (target - state[:2]) - self.DAMPING * state[2:]
        return force.clip(-1, 1) + self._noise * rng.standard_normal(2)

    def _draw(self, rng: np.random.Generator, here: Cell) -> tuple[Cell, np.ndarray]:
        """A goal in another cell, somewhere about its centre."""
        if not self._wander:
            return self._home, self._cells[self._home]
        others = [cell for cell in self._cells if cell != here]
        cell = others[rng.integers(len(others))]
        return cell, self._cells[cell] + rng.uniform(-0.25, 0.25, 2)

    def _cell(self, at: np.ndarray) -> Cell:
        return min(self._cells, key=lambda cell: float(np.abs(self._cells[cell] - at).max()))


def _ways_to(goal: Cell, cells: Mapping[Cell, Any]) -> dict[Cell, Cell]:
    """The next cell on a shortest way to `goal`, from every other cell."""
    ways: dict[Cell, Cell] = {}
    front = deque([goal])
    while front:
        i, j = here = front.popleft()
        for cell in ((i - 1, j), (i + 1, j), (i, j - 1), (i, j + 1)):
            if cell in cells and cell not in ways and cell != goal:
                ways[cell] = here
                front.append(cell)
    return ways
