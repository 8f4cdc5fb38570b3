"""Low-dimensional tasks of offline RL, with the simulator's own word on returns and on single steps.

    task = make_control("pointmaze/umaze")
    returns, lengths = evaluate_returns(task, policy, episodes=50, seed=1000)
    truth, rewards, terminated = task.step_from(imagined.observations, imagined.actions)

Three choices to know. The mazes have one goal, not in the observation, and pay 1 for every step within its radius, until the
clock runs out (D4RL's maze2d). All rows of a rollout share one simulator, which holds a row's positions and velocities while it
steps that row: these are its whole state, so nothing else carries over. And nothing is clipped silently but actions, to the range
that the environment would clip them to.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol, cast, runtime_checkable

import gymnasium
import numpy as np
import torch
from gymnasium.spaces import Box
from gymnasium.wrappers import TimeLimit
from jaxtyping import Bool, Float, Int
from torch import Tensor

from worldline.data.trajectories import Trajectories, control_spec
from worldline.errors import SimulatorError
from worldline.sim.base import unknown
from worldline.sim.headless import choose_backend
from worldline.types import WorldSpec

Act = Callable[[Float[Tensor, "n o"]], Float[Tensor, "n a"]]
"""Observations to actions, all n rows at once, in physical units. Rows whose episode is over are asked too, and ignored."""

Cell = tuple[int, int]  # row and column of a maze


@dataclass(frozen=True, slots=True, kw_only=True)
class _Layout:
    """What a task is, known without a simulator."""

    env_id: str
    observations: tuple[str, ...]
    actions: int  # each in [-1, 1]
    rate_hz: float
    horizon: int
    maze: tuple[str, ...] = ()  # '#' wall, '.' free, 'G' the goal; a cell is 1 m


def _names(joints: str, hidden: int) -> tuple[str, ...]:
    """Positions, but for the first `hidden`, then velocities."""
    names = joints.split()
    return (*names[hidden:], *(f"{name}_velocity" for name in names))


_BALL = _names("x y", 0)
_LAYOUTS = {
    "pointmaze/umaze": _Layout(
        env_id="PointMaze_UMaze-v3",
        observations=_BALL,
        actions=2,
        rate_hz=100.0,
        horizon=300,
        maze=("#####", "#...#", "###.#", "#G..#", "#####"),
    ),
    "pointmaze/medium": _Layout(
        env_id="PointMaze_Medium-v3",
        observations=_BALL,
        actions=2,
        rate_hz=100.0,
        horizon=600,
        maze=("########", "#..##..#", "#..#...#", "##...###", "#..#...#", "#.#..#.#", "#...#.G#", "########"),
    ),
    "hopper": _Layout(
        env_id="Hopper-v5",
        observations=_names("x z torso thigh leg foot", 1),
        actions=3,
        rate_hz=125.0,
        horizon=1000,
    ),
    "halfcheetah": _Layout(
        env_id="HalfCheetah-v5",
        observations=_names("x z torso back_thigh back_shin back_foot front_thigh front_shin front_foot", 1),
        actions=6,
        rate_hz=20.0,
        horizon=1000,
    ),
}
CONTROL_TASKS = tuple(_LAYOUTS)


def make_control(name: str) -> "ControlTask":
    """The task called `name`: "pointmaze/umaze", "pointmaze/medium", "hopper", "halfcheetah", or "gym/ID" of any Gymnasium environment whose
    observations and actions are vectors.

    Of the house's own nothing is imported before a simulator is needed. Raises `SimulatorError` for another name.
    """
    if name.startswith("gym/"):
        from worldline.sim.control_gym import GymTask

        return GymTask(name.removeprefix("gym/"))
    if name not in _LAYOUTS:
        raise unknown("control task", name, _LAYOUTS, hint=" gym/ID names any Gymnasium environment of vectors.")
    return ControlTask(name)


class ControlTask:
    """One task. `spec` names what is seen and sent; metres, radians and seconds throughout.

    Attributes:
        name: as in `make_control`, and the spec's environment.
        env_id: the Gymnasium environment behind it.
        horizon: steps after which an episode is truncated.
    """

    def __init__(self, name: str) -> None:
        self.name, self._layout = name, _LAYOUTS[name]
        self.env_id, self.horizon = self._layout.env_id, self._layout.horizon
        side = (1.0,) * self._layout.actions
        low, high = tuple(-x for x in side), side
        self.spec: WorldSpec = control_spec(name, self._layout.observations, low, high, rate_hz=self._layout.rate_hz)

    def __repr__(self) -> str:
        return f"ControlTask({self.name!r})"

    @property
    def maze(self) -> Mapping[Cell, tuple[float, float]]:
        """Free cells and their centres (x, y) in metres; empty where there is no maze."""
        rows = self._layout.maze
        return {
            (i, j): (j + 0.5 - len(row) / 2, len(rows) / 2 - i - 0.5)
            for i, row in enumerate(rows)
            for j, mark in enumerate(row)
            if mark != "#"
        }

    @property
    def goal(self) -> Cell | None:
        """The cell in whose centre the goal is."""
        found = [(i, row.index("G")) for i, row in enumerate(self._layout.maze) if "G" in row]
        return found[0] if found else None

    def make_env(self) -> gymnasium.Env:
        """A Gymnasium environment of the task, flat observations "o" (float64), truncated after `horizon` steps.

        Raises `SimulatorError` if MuJoCo or gymnasium-robotics is missing.
        """
        return TimeLimit(self._unlimited(), self.horizon)

    def step_from(
        self, observations: Float[Tensor, "n o"], actions: Float[Tensor, "n a"]
    ) -> tuple[Float[Tensor, "n o"], Float[Tensor, " n"], Bool[Tensor, " n"]]:
        """The true simulator's one step from states given as observations: next observations, rewards, terminated.

        The state is set to what the observation says and stepped; what the observation leaves out is the root's x, which no
        force depends on and which is set to 0. So a recorded step is reproduced to rounding (float32: 1e-6, a few 1e-4 at
        HalfCheetah's hardest contacts), with two limits: Hopper's observation clips velocities to +-10, and a clipped one does not say how
        fast it was; and of a state that cannot be (a ball inside a wall) you get what the simulator makes of it.

        Raises `SimulatorError` for other shapes, numbers that are not finite, and states at which the simulator gives up.
        """
        n, o = len(observations), len(self.spec.pose_names)
        states = _checked(observations, (n, o), "observations")
        sent = _checked(actions, (n, self.spec.action.dim), "actions")
        found = [
            self._simulator.step(self._simulator.state_of(state), action)
            for state, action in zip(states, self._clip(sent))
        ]
        seen = np.stack([after.observation for after in found]) if found else np.zeros((0, o))
        return (
            torch.from_numpy(seen).to(observations.dtype),
            torch.tensor([after.reward for after in found], dtype=observations.dtype),
            torch.tensor([after.terminated for after in found], dtype=torch.bool),
        )

    def _stepper(self) -> "_Stepper":
        """What rollouts are made with."""
        return self._simulator

    def _clip(self, actions: np.ndarray) -> np.ndarray:
        return np.clip(actions, self.spec.action.low, self.spec.action.high)

    @cached_property
    def _simulator(self) -> "_Simulator":
        return _Simulator(self._unlimited(), self.name)

    def _unlimited(self) -> gymnasium.Env:
        options: dict[str, Any] = {}
        if self._layout.maze:
            marks = {"#": 1, ".": 0, "G": "g"}
            maze_map = [[marks[mark] for mark in row] for row in self._layout.maze]
            options = {"maze_map": maze_map, "continuing_task": True, "reset_target": False}
        choose_backend()
        try:
            if self._layout.maze:
                import gymnasium_robotics

                gymnasium.register_envs(gymnasium_robotics)
            env = gymnasium.make(self.env_id, max_episode_steps=-1, disable_env_checker=True, **options)
        except (ImportError, gymnasium.error.DependencyNotInstalled) as error:
            raise SimulatorError(
                f"{self.name}: MuJoCo and gymnasium-robotics are required and could not be imported ({error}): "
                'pip install "worldline[offline]" brings them.'
            ) from error
        if not self._layout.maze:
            return env
        assert self.goal is not None
        return _FixedGoal(env, self.maze[self.goal])


class _FixedGoal(gymnasium.Wrapper):
    """A point maze whose goal is always at one point and never in the observation: x, y and their velocities."""

    def __init__(self, env: gymnasium.Env, goal: tuple[float, float]) -> None:
        super().__init__(env)
        self.observation_space = Box(-np.inf, np.inf, (4,), np.float64)
        self._goal = np.array(goal)
        inner: Any = env.unwrapped
        Path(inner.tmp_xml_file_path).unlink(missing_ok=True)  # the environment leaves its maze in the temporary folder

    def reset(self, **options: Any) -> tuple[np.ndarray, dict[str, Any]]:
        seen, info = self.env.reset(**options)
        inner: Any = self.env.unwrapped
        inner.goal = self._goal.copy()
        inner.update_target_site_pos()
        return seen["observation"], info

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        seen, reward, terminated, truncated, info = self.env.step(action)
        return seen["observation"], float(reward), terminated, truncated, info


@dataclass(frozen=True, slots=True)
class _State:
    """Everything that the next step depends on."""

    position: np.ndarray
    velocity: np.ndarray


@dataclass(frozen=True, slots=True, kw_only=True)
class After:
    """What a step led to."""

    state: Any  # the simulator's affair
    observation: np.ndarray
    reward: float
    terminated: bool
    truncated: bool = False  # by a clock of the environment's own


@runtime_checkable
class _Stepper(Protocol):
    """Rows of a rollout, each with a state."""

    def reset(self, seed: int) -> tuple[Any, np.ndarray]: ...

    def step(self, state: Any, action: np.ndarray) -> After: ...


class _Simulator:
    """An environment stepped from any state. What the solver remembers is cleared, so that a step depends on its arguments alone, bit for bit."""

    def __init__(self, env: gymnasium.Env, name: str) -> None:
        import mujoco

        self._env, self._name = env, name
        inner: Any = env.unwrapped
        self._mujoco = getattr(inner, "point_env", inner)
        kinds: Any = mujoco.mjtWarning  # pyright: ignore[reportAttributeAccessIssue]
        self._broken = (kinds.mjWARN_BADQPOS, kinds.mjWARN_BADQVEL, kinds.mjWARN_BADQACC)
        env.reset(seed=0)

    def reset(self, seed: int) -> tuple[_State, np.ndarray]:
        """A start that depends on `seed` alone, and its observation."""
        seen, _ = self._env.reset(seed=seed)
        return self._read(), np.asarray(seen)

    def state_of(self, observation: np.ndarray) -> _State:
        positions = self._mujoco.model.nq
        hidden = positions + self._mujoco.model.nv - len(observation)
        whole = np.concatenate([np.zeros(hidden), observation])
        return _State(whole[:positions], whole[positions:])

    def step(self, state: _State, action: np.ndarray) -> After:
        data = self._mujoco.data
        data.ctrl[:], data.qacc_warmstart[:] = 0, 0
        self._mujoco.set_state(state.position, state.velocity)
        seen, reward, terminated, _, _ = self._env.step(action)
        if any(data.warning[kind].number for kind in self._broken):
            self._env.reset(seed=0)  # also clears the warnings
            raise SimulatorError(
                f"{self._name}: a state that the simulator can step is required, it gave up at positions "
                f"{state.position.round(3).tolist()}, velocities {state.velocity.round(3).tolist()}. Leave such states out."
            )
        return After(
            state=self._read(),
            observation=np.asarray(seen),
            reward=float(cast(Any, reward)),
            terminated=bool(terminated),
        )

    def _read(self) -> _State:
        return _State(self._mujoco.data.qpos.copy(), self._mujoco.data.qvel.copy())


# --- Rollouts ---------------------------------------------------------------------------------------------------------


def collect_trajectories(
    task: ControlTask,
    act: Act,
    *,
    episodes: int,
    seed: int | Sequence[int],
    provenance: Mapping[str, str] | None = None,
) -> Trajectories:
    """Whole episodes, in step: `act` sees all of them at once (float32). Episode i starts from seed + i (or seed[i]), whoever acts.

    The actions kept are those the environment consumed, after clipping to the spec's range. Raises `SimulatorError` for actions of
    another shape or that are not finite.
    """
    simulator, dim = task._stepper(), task.spec.action.dim
    seeds = [seed + i for i in range(episodes)] if isinstance(seed, int) else list(seed)
    starts = [simulator.reset(s) for s in seeds]
    states = [state for state, _ in starts]
    seen = np.stack([observation for _, observation in starts]).astype(np.float32)
    running, steps = np.ones(episodes, bool), []
    for _ in range(task.horizon):
        if not running.any():
            break
        actions = _checked(act(torch.from_numpy(seen)), (episodes, dim), "actions of the policy")
        actions, before = task._clip(actions).astype(np.float32), seen.copy()
        rows = np.flatnonzero(running)
        rewards, ended, over = np.zeros(len(rows), np.float32), np.zeros(len(rows), bool), np.zeros(len(rows), bool)
        for k, row in enumerate(rows):
            after = simulator.step(states[row], actions[row])
            states[row], seen[row], rewards[k] = after.state, after.observation, after.reward
            ended[k], over[k] = after.terminated, after.terminated or after.truncated
        steps.append((rows, before[rows], actions[rows], rewards, seen[rows], ended))
        running[rows[over]] = False
    order = np.argsort(np.concatenate([rows for rows, *_ in steps]), kind="stable")  # by episode, then by time
    row, *columns = (torch.from_numpy(np.concatenate(column)[order]) for column in zip(*steps))
    observations, actions, rewards, next_observations, terminated = columns
    about = {"simulator": task.name, **(provenance or {})}
    return Trajectories(
        spec=task.spec,
        observations=observations,
        actions=actions,
        rewards=rewards,
        next_observations=next_observations,
        terminated=terminated,
        lengths=torch.bincount(row, minlength=episodes),
        provenance=tuple({**about, "seed": str(s)} for s in seeds),
    )


def evaluate_returns(
    task: ControlTask, act: Act, *, episodes: int, seed: int
) -> tuple[Float[Tensor, " n"], Int[Tensor, " n"]]:
    """Undiscounted return and length (steps) of each of `episodes` episodes. The same seed gives the same starts, whoever acts."""
    found = collect_trajectories(task, act, episodes=episodes, seed=seed)
    return found.returns, found.lengths


def _checked(values: Tensor, shape: tuple[int, ...], what: str) -> np.ndarray:
    """As float64. Raises `SimulatorError` for another shape or numbers that are not finite."""
    if tuple(values.shape) != shape:
        raise SimulatorError(f"{what}: shape {shape} required, got {tuple(values.shape)}.")
    found = values.detach().cpu().double().numpy()
    if not np.isfinite(found).all():
        bad = int((~np.isfinite(found)).any(1).sum())
        raise SimulatorError(f"{what}: finite numbers required, got NaN or infinity in {bad} of {shape[0]} rows.")
    return found
