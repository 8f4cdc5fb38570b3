"""Recording policies for Meta-World: experts, experts that go wrong in a known way, random motion and play.

They read the simulator's 39-D state, so they make data and cannot act in a dream. Each episode has one *cause*, which is
recorded. Experts shrug off moderate noise, so the failing causes are drastic. Several are timed by a rehearsal: the same
start is first played by the expert without rendering, and the episode then goes wrong at a stated fraction of the steps
the expert needed (`near_miss`: in the last steps before success).

    cause       what happens
    expert      the scripted expert
    jitter      expert, action noise 0.3-0.8: mostly succeeds
    noise       expert, action noise 2-3: wanders around the task
    offset      expert that sees its hand 5-12 cm from where it is
    freeze      expert that stops for good after 15-90% of its time
    near_miss   expert that stops or withdraws in the last steps before success
    reverse     expert until 30-90% of its time, then every motion reversed
    gripper     expert with the gripper command inverted
    delay       waits, then acts with too little time left (most often)
    slow        expert at 10-25% of its speed
    random      smooth random actions
    play        random targets, many at or behind the object, gripper opening and closing
    off_centre  expert that sees its hand 1-6 cm from where it is: touches the object where experts do not
    clumsy      expert that sees its hand somewhere else, 1-5 cm off and wandering, slower and with noise: misses and retries
    shaky       expert, action noise 0.6-1.6
    mistaken    expert that takes the object to be where it is in another start, as policies do that hardly look at it

Off_centre, clumsy and shaky are about as likely to succeed as to fail. The blend `contact` holds nothing but such episodes: a world
model learns from them what a touch must be like to work, which clean successes and drastic failures do not show.

Everything is a function of (task, cause, seed): no global randomness.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from worldline.errors import SimulatorError
from worldline.sim.base import Controller, SimulatedWorld, unknown
from worldline.sim.metaworld import ACTION, expert
from worldline.types import ActionSpec

CAUSES = (
    *("expert", "jitter", "noise", "offset", "freeze", "near_miss"),
    *("reverse", "gripper", "delay", "slow", "random", "play"),
    *("off_centre", "clumsy", "shaky", "mistaken"),  # at the end: a cause's place is part of its random stream
)
REHEARSED = frozenset({"freeze", "near_miss", "reverse", "delay"})

# How many episodes of every twenty in a row have which cause.
BLENDS: Mapping[str, Mapping[str, int]] = {
    "mixed": {
        **{"expert": 5, "jitter": 1, "noise": 1, "offset": 2, "freeze": 2, "near_miss": 2},
        **{"reverse": 1, "gripper": 1, "delay": 1, "slow": 1, "random": 1, "play": 2},
    },
    "perturbed": {
        **{"jitter": 3, "noise": 2, "offset": 3, "freeze": 3, "near_miss": 3},
        **{"reverse": 2, "gripper": 1, "delay": 1, "slow": 2},
    },
    "contact": {"clumsy": 11, "off_centre": 4, "shaky": 4, "jitter": 1},
}
POLICIES = (*BLENDS, *CAUSES)


def episode_cause(policy: str, seed: int, index: int) -> str:
    """The cause of episode `index`. Every twenty consecutive episodes from a multiple of twenty hold a blend's exact
    shares, in an order drawn from `seed`. Raises `SimulatorError` for an unknown policy.
    """
    if policy not in POLICIES:
        raise unknown("recording policy", policy, POLICIES)
    if policy in CAUSES:
        return policy
    return drawn_cause(BLENDS[policy], seed, index)


def drawn_cause(shares: Mapping[str, int], seed: int, index: int) -> str:
    """The cause of episode `index` in a blend: runs of as many episodes as `shares` sums to hold exactly them."""
    block = [cause for cause, count in shares.items() for _ in range(count)]
    turn, place = divmod(index, len(block))
    order = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(1, turn))).permutation(len(block))
    return block[order[place]]


def rehearse(world: SimulatedWorld, task: str, seed: int) -> int | None:
    """Control steps the expert needs from the start `seed`, to the end of the block; None if it fails."""
    world.reset(seed)
    act = expert(task)
    for block in range(1, world.horizon // world.spec.control_steps + 1):
        if world.drive(act).success:
            return block * world.spec.control_steps
    return None


def behaviour(cause: str, task: str, *, seed: int, horizon: int, rehearsal: SimulatedWorld) -> Controller:
    """A controller that acts out `cause` in the episode of `task` ("drawer-open-v3") that starts from `reset(seed)`.

    `rehearsal` is another, unrendered world of the same task; it is reset and played for the causes that need timing.
    """
    if cause not in CAUSES:
        raise unknown("cause", cause, CAUSES)
    rng = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(2, CAUSES.index(cause))))
    if cause == "random":
        return smooth_random(ACTION, seed)
    if cause == "play":
        return _Play(rng)
    if cause == "expert":
        return expert(task)
    needed = None
    if cause in REHEARSED:
        needed = rehearse(rehearsal, task, seed)
    if cause == "mistaken":
        here, there = (rehearsal.reset(s).state[4:7] for s in (seed, int(rng.integers(2**48))))
        x, y, z = (there - here).tolist()
        return _Perturbed(act=expert(task), rng=rng, fault=_Fault(mistake=(x, y, z)))
    return _Perturbed(act=expert(task), rng=rng, fault=_fault(cause, rng, needed, horizon))


def smooth_random(action: ActionSpec, seed: int, *, memory: float = 10.0, spread: float = 0.9) -> Controller:
    """Smooth random actions for any world whose actions have a finite range, around the middle of it.

    They remember `memory` control steps; their standard deviation is `spread` times half the range. Raises `SimulatorError`
    if the range is not finite.
    """
    low, high = np.array(action.low), np.array(action.high)
    if not np.isfinite([low, high]).all():
        raise SimulatorError(
            f"random actions need a finite range, got low {action.low} and high {action.high}: rescale the environment's "
            "actions (gymnasium.wrappers.RescaleAction), or record a policy."
        )
    rng = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(3,)))
    return _Random(rng, middle=(high + low) / 2, scale=spread * ((high - low) / 2), memory=memory)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Fault:
    """How an expert goes wrong: in what it sees, in what it sends, and from when on (control steps)."""

    shift: tuple[float, float, float] = (0.0, 0.0, 0.0)  # metres, added to where it sees its hand
    mistake: tuple[float, float, float] = (0.0, 0.0, 0.0)  # metres, added to where it sees the object
    wander: float = 0.0  # metres, standard deviation of a slow random walk added to that shift
    memory: float = 30.0  # control steps that walk remembers
    sigma: float = 0.0
    hold: int = 1  # control steps a noise sample lasts
    wait: int = 0
    after: int | None = None  # from this control step on, motion is multiplied by `factor`
    factor: float = 1.0
    gripper: float = 1.0


def _fault(cause: str, rng: np.random.Generator, needed: int | None, horizon: int) -> _Fault:
    expected = min(needed or horizon // 2, horizon)
    match cause:
        case "jitter":
            return _Fault(sigma=rng.uniform(0.3, 0.8))
        case "noise":
            return _Fault(sigma=rng.uniform(2.0, 3.0), hold=int(rng.integers(1, 5)))
        case "offset":
            return _Fault(shift=_shift(rng, 0.05, 0.12))
        case "freeze":
            return _Fault(after=int(expected * rng.uniform(0.15, 0.9)), factor=0.0)
        case "near_miss":
            early = int(rng.integers(6, 19))
            return _Fault(after=max(expected - early, 4), factor=float(rng.choice([0.0, -0.5])))
        case "reverse":
            return _Fault(after=int(expected * rng.uniform(0.3, 0.9)), factor=-1.0)
        case "delay":
            return _Fault(wait=int(max(horizon - expected * rng.uniform(0.3, 1.2), 0)))
        case "slow":
            return _Fault(after=0, factor=rng.uniform(0.10, 0.25))
        case "off_centre":
            return _Fault(shift=_shift(rng, 0.01, 0.06))
        case "clumsy":
            return _Fault(
                wander=rng.uniform(0.01, 0.05),
                memory=rng.uniform(15.0, 60.0),
                sigma=rng.uniform(0.0, 0.8),
                after=0,
                factor=rng.uniform(0.4, 1.0),
                gripper=rng.uniform(0.2, 1.0),
            )
        case "shaky":
            return _Fault(sigma=rng.uniform(0.6, 1.6), hold=int(rng.integers(1, 4)))
        case _:
            return _Fault(gripper=-1.0)


def _shift(rng: np.random.Generator, low: float, high: float) -> tuple[float, float, float]:
    """A random direction, `low` to `high` metres long."""
    direction = rng.normal(size=3)
    x, y, z = direction / np.linalg.norm(direction) * rng.uniform(low, high)
    return float(x), float(y), float(z)


class _Perturbed:
    """An expert with a fault. One object an episode: it counts control steps."""

    def __init__(self, *, act: Controller, rng: np.random.Generator, fault: _Fault) -> None:
        self._act, self._rng, self._fault = act, rng, fault
        self._step = -1
        self._noise = np.zeros(4)
        self._drift = rng.normal(size=3) * fault.wander if fault.wander else np.zeros(3)

    def __call__(self, state: np.ndarray) -> np.ndarray:
        fault = self._fault
        self._step += 1
        if self._step < fault.wait:
            return np.zeros(4)
        if fault.wander:
            kept = 1 - 1 / fault.memory
            self._drift = kept * self._drift + np.sqrt(1 - kept**2) * fault.wander * self._rng.normal(size=3)
        seen = state.copy()
        seen[:3] += fault.shift + self._drift
        seen[4:7] += fault.mistake
        # Clipped before it is slowed or disturbed: experts ask for up to fifty times the range.
        action = np.clip(self._act(seen), -1.0, 1.0)
        if fault.after is not None and self._step >= fault.after:
            action[:3] *= fault.factor
        action[3] *= fault.gripper
        if self._step % fault.hold == 0:
            self._noise = self._rng.normal(size=4) * fault.sigma
        return action + self._noise


class _Random:
    """White noise, filtered."""

    def __init__(self, rng: np.random.Generator, *, middle: np.ndarray, scale: np.ndarray, memory: float) -> None:
        self._rng, self._kept = rng, 1 - 1 / memory
        self._middle, self._scale = middle, scale
        self._noise = rng.normal(size=middle.size)

    def __call__(self, state: np.ndarray) -> np.ndarray:
        self._noise = self._kept * self._noise + np.sqrt(1 - self._kept**2) * self._rng.normal(size=self._noise.size)
        return self._middle + self._scale * self._noise


class _Play:
    """Goes from target to target at changing speed; most targets are at, around or behind the first object."""

    LOW, HIGH = np.array([-0.35, 0.42, 0.05]), np.array([0.35, 0.92, 0.35])  # metres, where the hand can go

    def __init__(self, rng: np.random.Generator) -> None:
        self._rng = rng
        self._left = 0
        self._target, self._gain, self._gripper = np.zeros(3), 10.0, -1.0

    def __call__(self, state: np.ndarray) -> np.ndarray:
        if self._left == 0 or np.linalg.norm(self._target - state[:3]) < 0.015:
            self._choose(hand=state[:3], thing=state[4:7])
        self._left -= 1
        move = np.clip(self._gain * (self._target - state[:3]), -1.0, 1.0) + self._rng.normal(size=3) * 0.1
        return np.array([*move, self._gripper])

    def _choose(self, *, hand: np.ndarray, thing: np.ndarray) -> None:
        rng = self._rng
        kind = rng.choice(["anywhere", "near", "through"], p=[0.25, 0.4, 0.35])
        if kind == "anywhere":
            target = rng.uniform(self.LOW, self.HIGH)
        elif kind == "near":
            target = thing + rng.normal(size=3) * (0.05, 0.05, 0.03)
        else:  # push: to a point behind the object, seen from the hand
            way = thing - hand
            target = thing + way / max(float(np.linalg.norm(way)), 1e-3) * rng.uniform(0.05, 0.15)
        self._target = np.clip(target, self.LOW, self.HIGH)
        self._gain = rng.uniform(4.0, 15.0)
        self._left = int(rng.integers(10, 40))
        if rng.random() < 0.5:
            self._gripper = float(rng.choice([-1.0, 1.0]))
