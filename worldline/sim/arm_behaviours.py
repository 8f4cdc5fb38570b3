"""Recording policies for the arm: to an object, to a wrong one, from cell to cell, and away from a cell and back.

They read the simulator's state, so they make data and cannot act in a dream. All of them move a point for the hand to follow
and send the joint targets that belong to it; the arm lags behind. Each episode has one recorded *cause*.

    task     cause         what happens
    reach    expert        goes above the target, then down to it
             wrong_object  the same with another object of the scene
             freeze        expert that stops for good after 20-80% of the way
             play          from random cell to random cell at changing speed and height, never at rest
             random        smooth random joint targets
    place    as in reach
    revisit  revisit       looks at the cell it starts above, wanders among the others without ever having it in sight,
                           returns and stays
             play, random  as above

`revisit` keeps to the lines between neighbouring cells with its camera nearly straight: from there the cell it left is out of
the picture, with two centimetres to spare. Everything is a function of (cause, seed, first state): no global randomness.
"""

from collections.abc import Callable, Iterator, Mapping

import numpy as np

from worldline.errors import SimulatorError
from worldline.sim.arm import ACTION, RATE_HZ, check_task
from worldline.sim.arm_kinematics import CELLS, HAND_LOW, HIGH, JOINTS, forward, inverse, nearest_cell
from worldline.sim.arm_scene import TARGET
from worldline.sim.base import Controller, unknown
from worldline.sim.behaviours import drawn_cause, smooth_random

CAUSES: Mapping[str, tuple[str, ...]] = {
    "reach": ("expert", "wrong_object", "freeze", "play", "random"),
    "place": ("expert", "wrong_object", "freeze", "play", "random"),
    "revisit": ("revisit", "play", "random"),
}
# How many episodes of every twenty in a row have which cause.
BLENDS: Mapping[str, Mapping[str, Mapping[str, int]]] = {
    "reach": {"mixed": {"expert": 8, "wrong_object": 4, "freeze": 2, "play": 4, "random": 2}},
    "place": {"mixed": {"expert": 8, "wrong_object": 4, "freeze": 2, "play": 4, "random": 2}},
    "revisit": {"mixed": {"revisit": 10, "play": 10}},
}

AWAY = (34, 50)  # frames: what `revisit` draws from, as far as the horizon allows
EDGE = (20, 32)  # control steps from a cell to its neighbour
APPROACH, HOVER, STAY = 12, (12, 20), 16  # control steps: to the cell's centre, above it, there again at the end
LEVEL = (0.15, HAND_LOW + float(HIGH[2]))  # metres: the hand's height while it looks around
TILT = 0.12  # radians: the hand's yaw meanwhile

_STREAM = {cause: i for i, cause in enumerate(("expert", "wrong_object", "freeze", "play", "random", "revisit"))}
_Leg = tuple[np.ndarray, int]  # hand pose "4" to be at, and control steps to get there


def arm_policies(task: str) -> tuple[str, ...]:
    """Blends, then causes. Raises `SimulatorError` for an unknown task."""
    check_task(task)
    return (*BLENDS[task], *CAUSES[task])


def arm_cause(task: str, policy: str, seed: int, index: int) -> str:
    """The cause of episode `index`, in exact shares as `behaviours.episode_cause`. Raises `SimulatorError` likewise."""
    if policy not in arm_policies(task):
        raise unknown("recording policy", policy, arm_policies(task))
    return policy if policy in CAUSES[task] else drawn_cause(BLENDS[task][policy], seed, index)


def require_horizon(task: str, policy: str, *, horizon: int, control_steps: int, away: int = AWAY[0]) -> None:
    """Raise `SimulatorError` if a policy (or blend) with `revisit` in it has too few control steps to go and return."""
    causes = BLENDS[task].get(policy, (policy,))
    needed = _revisit_steps(away, control_steps)
    if "revisit" in causes and horizon < needed:
        raise SimulatorError(
            f"arm/{task}: policy {policy} requires a horizon of at least {needed} control steps ({away} frames of "
            f"{control_steps} out of sight, and the ways there and back), got {horizon}. Give more, or use another policy."
        )


def arm_behaviour(
    cause: str, task: str, *, seed: int, horizon: int, control_steps: int = 4, away: int | None = None
) -> Controller:
    """A controller that acts out `cause` in one episode of arm/`task`, from any start.

    Args:
        horizon, control_steps: the world's.
        away: frames that `revisit` keeps its cell out of sight at least; default drawn from `AWAY`.

    Raises:
        SimulatorError: unknown task or cause; a horizon too short for `revisit`.
    """
    check_task(task)
    if cause not in CAUSES[task]:
        raise unknown("cause", cause, CAUSES[task])
    require_horizon(task, cause, horizon=horizon, control_steps=control_steps, away=away or AWAY[0])
    rng = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(5, _STREAM[cause])))
    match cause:
        case "random":
            return smooth_random(ACTION, seed, memory=2 * RATE_HZ, spread=0.5)
        case "play":
            return _Path(lambda hand: _play(hand, rng), smooth=False)
        case "revisit":
            longest = min(AWAY[1], (horizon - _revisit_steps(0, control_steps)) // control_steps)
            drawn = int(rng.integers(AWAY[0], longest + 1)) if away is None else away
            return _Path(lambda hand: _revisit(hand, rng, away=drawn * control_steps), smooth=True)
        case _:
            return _Reach(rng, wrong=cause == "wrong_object", stop=rng.uniform(0.2, 0.8) if cause == "freeze" else 1.0)


class _Reach:
    """Above the target first, then down; from the fraction `stop` of the way on it stays where it is."""

    def __init__(self, rng: np.random.Generator, *, wrong: bool, stop: float) -> None:
        self._rng, self._wrong, self._stop = rng, wrong, stop
        self._stride = rng.uniform(0.2, 0.45) / RATE_HZ  # metres a control step
        self._low = rng.uniform(0.065, 0.085)
        self._yaw = rng.uniform(-0.4, 0.4)
        self._point: np.ndarray | None = None
        self._cell, self._way = 0, 0.0

    def __call__(self, state: np.ndarray) -> np.ndarray:
        hand = forward(state[: len(JOINTS)])
        if self._point is None:
            self._point = hand
            self._cell = int(state[TARGET])
            if self._wrong:
                self._cell = int(self._rng.choice([c for c in range(len(CELLS)) if c != self._cell]))
            self._way = self._left(hand)
        if self._stop < 1.0 and self._left(hand) <= (1 - self._stop) * self._way:
            return inverse(self._point)
        above = np.hypot(*(CELLS[self._cell] - hand[:2])) > 0.02
        goal = np.array([*CELLS[self._cell], self._point[2] if above else self._low])
        move = goal - self._point[:3]
        self._point[:3] += move * min(1.0, self._stride / max(float(np.linalg.norm(move)), 1e-9))
        self._point[3] += np.clip(self._yaw - self._point[3], -0.02, 0.02)
        return inverse(self._point)

    def _left(self, hand: np.ndarray) -> float:
        return float(np.hypot(*(CELLS[self._cell] - hand[:2])))


class _Path:
    """Leads the hand along legs that are planned from where it is at the first control step; holds after the last one.

    `smooth` is at rest at the end of each leg and so keeps to the line in spite of the lag; otherwise the speed is constant.
    """

    def __init__(self, plan: Callable[[np.ndarray], Iterator[_Leg]], *, smooth: bool) -> None:
        self._plan, self._smooth = plan, smooth
        self._legs: Iterator[_Leg] | None = None
        self._from = self._to = np.zeros(4)
        self._steps = self._done = 0

    def __call__(self, state: np.ndarray) -> np.ndarray:
        if self._legs is None:
            self._to = forward(state[: len(JOINTS)])
            self._legs = self._plan(self._to)
        if self._done == self._steps:
            self._from, self._done = self._to, 0
            self._to, self._steps = next(self._legs, (self._to, 1))
        self._done += 1
        u = self._done / self._steps
        share = u**3 * (10 - 15 * u + 6 * u**2) if self._smooth else u
        return inverse(self._from + share * (self._to - self._from))


def _play(hand: np.ndarray, rng: np.random.Generator) -> Iterator[_Leg]:
    """From cell to cell without end."""
    while True:
        here = int(nearest_cell(hand))
        cell = int(rng.choice([c for c in range(len(CELLS)) if c != here]))
        point = CELLS[cell] + rng.uniform(-0.03, 0.03, size=2)
        height, yaw, speed = rng.uniform(HAND_LOW, LEVEL[1]), rng.uniform(-0.6, 0.6), rng.uniform(0.15, 0.5)
        steps = max(1, round(float(np.hypot(*(point - hand[:2]))) / speed * RATE_HZ))
        hand = np.array([*point, height, yaw])
        yield hand, steps


def _revisit(hand: np.ndarray, rng: np.random.Generator, *, away: int) -> Iterator[_Leg]:
    """To the nearest cell's centre, out of its sight for `away` control steps, and back."""
    first = int(nearest_cell(hand))

    def pose(cell: int) -> np.ndarray:
        return np.array(
            [*(CELLS[cell] + rng.uniform(-0.005, 0.005, size=2)), rng.uniform(*LEVEL), rng.uniform(-TILT, TILT)]
        )

    at = pose(first)
    yield at, APPROACH
    yield at, int(rng.integers(HOVER[0], HOVER[1] + 1))
    beside = int(rng.choice(_neighbours(first)))
    at = pose(beside)
    yield at, EDGE[1]
    for cell, steps in _wander(beside, first, rng, away):
        at = at if cell is None else pose(cell)
        yield at, steps
    yield pose(first), EDGE[1]


def _wander(cell: int, avoid: int, rng: np.random.Generator, steps: int) -> Iterator[tuple[int | None, int]]:
    """A walk of `steps` control steps from neighbour to neighbour, never over `avoid`, that ends beside it.

    Yields the next cell, or None for a rest, with the control steps it takes.
    """
    home, quickest = _ways_home(avoid), EDGE[0]
    walk: list[int | None] = []
    times: list[int] = []
    before, left = cell, steps
    while home[cell] or left >= 2 * quickest:
        spare = left - home[cell] * quickest
        if spare >= 12 and walk and walk[-1] is not None and rng.random() < 0.2:
            walk.append(None)
            times.append(int(rng.integers(4, 13)))
        else:
            open_to = [c for c in _neighbours(cell) if c != avoid and left >= (home[c] + 1) * quickest]
            before, cell = cell, int(rng.choice([c for c in open_to if c != before] or open_to))
            walk.append(cell)
            times.append(min(int(rng.integers(EDGE[0], EDGE[1] + 1)), left - home[cell] * quickest))
        left -= times[-1]
    if not walk:
        walk, times = [None], [steps]
    ends = np.round(np.cumsum(times) * (steps / sum(times))).astype(int)  # what is left is spread over the walk
    yield from zip(walk, np.diff(ends, prepend=0).tolist())


def _ways_home(avoid: int) -> dict[int, int]:
    """Of each cell but `avoid`: how many edges it is from the nearest neighbour of `avoid`, without crossing that."""
    home = dict.fromkeys(_neighbours(avoid), 0)
    frontier = list(home)
    while frontier:
        cell = frontier.pop(0)
        for other in _neighbours(cell):
            if other != avoid and other not in home:
                home[other] = home[cell] + 1
                frontier.append(other)
    return home


def _neighbours(cell: int) -> list[int]:
    row, column = divmod(cell, 3)
    beside = ((row + 1, column), (row - 1, column), (row, column + 1), (row, column - 1))
    return [3 * r + c for r, c in beside if 0 <= r < 3 and 0 <= c < 3]


def _revisit_steps(away: int, control_steps: int) -> int:
    """Control steps of a whole `revisit` episode that keeps its cell out of sight for `away` frames."""
    return APPROACH + HOVER[1] + 2 * EDGE[1] + STAY + away * control_steps
