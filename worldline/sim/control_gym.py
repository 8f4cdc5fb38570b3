"""Any Gymnasium environment of vectors as a task of offline RL: `gym/Pendulum-v1`, judged by its own rewards and ended by its own clock.

Such an environment cannot be set to what an observation says. So each row of a rollout has one of its own, used again once its episode is
over, and nobody says what a single step would have been (`step_from`). Numbers have no names (o0, o1, ...) and no rate (1 Hz), as in Minari
datasets of others.
"""

from typing import Any

import gymnasium
import numpy as np
from gymnasium.spaces import Box
from jaxtyping import Bool, Float
from torch import Tensor

from worldline.data.trajectories import control_spec
from worldline.errors import SimulatorError
from worldline.sim.control import CONTROL_TASKS, After, ControlTask
from worldline.sim.gym import make_gym
from worldline.sim.headless import choose_backend


class GymTask(ControlTask):
    """The environment `env_id`. Raises `SimulatorError` for one that is not of vectors, or has no time limit."""

    def __init__(self, env_id: str) -> None:
        self.name, self.env_id = f"gym/{env_id}", env_id
        env = self.make_env()
        seen, sent = (self._box(env, what) for what in ("observation_space", "action_space"))
        limit = None if env.spec is None else env.spec.max_episode_steps
        if limit is None:
            raise SimulatorError(
                f"{self.name}: an environment with a time limit is required (max_episode_steps, where it is registered), got none."
            )
        self.horizon = limit
        known_as = env_id if env.spec is None else env.spec.id
        self.spec = control_spec(known_as, seen.shape[0], sent.low.tolist(), sent.high.tolist(), rate_hz=1.0)
        self._rows = _Rows(self)
        env.close()

    @property
    def maze(self) -> dict[tuple[int, int], tuple[float, float]]:
        return {}

    @property
    def goal(self) -> None:
        return None

    def make_env(self) -> gymnasium.Env:
        """As Gymnasium makes it, with its own time limit."""
        choose_backend()
        return make_gym(self.env_id)

    def step_from(
        self, observations: Float[Tensor, "n o"], actions: Float[Tensor, "n a"]
    ) -> tuple[Float[Tensor, "n o"], Float[Tensor, " n"], Bool[Tensor, " n"]]:
        raise SimulatorError(
            f"a task that can be set to any state is required for single steps ({', '.join(CONTROL_TASKS)}), got {self.name}."
        )

    def _stepper(self) -> "_Rows":
        return self._rows

    def _box(self, env: gymnasium.Env, what: str) -> Box:
        space = getattr(env, what)
        if not isinstance(space, Box) or len(space.shape) != 1:
            raise SimulatorError(
                f"{self.name}: an {what.replace('_', ' ')} that is a Box of one axis is required (continuous vectors), got {space}. Choose "
                "another environment, or register one with wrappers that make it so."
            )
        return space


class _Rows:
    """Environments that are stepped side by side; the state of a row is its environment."""

    def __init__(self, task: GymTask) -> None:
        self._task = task
        self._idle: list[gymnasium.Env] = []  # whose episodes are over

    def reset(self, seed: int) -> tuple[gymnasium.Env, np.ndarray]:
        """A start that depends on `seed` alone, and its observation."""
        env = self._idle.pop() if self._idle else self._task.make_env()
        seen, _ = env.reset(seed=seed)
        return env, np.asarray(seen)

    def step(self, state: gymnasium.Env, action: np.ndarray) -> After:
        box: Any = state.action_space
        seen, reward, terminated, truncated, _ = state.step(action.astype(box.dtype))
        if terminated or truncated:
            self._idle.append(state)
        return After(
            state=state,
            observation=np.asarray(seen),
            reward=float(reward),
            terminated=bool(terminated),
            truncated=bool(truncated),
        )
