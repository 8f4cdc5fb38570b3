"""Toy environments and policies that worker processes can import too."""

from typing import Any

import gymnasium
import numpy as np
import torch
from gymnasium.spaces import Box

from worldline.sim.base import make_world
from worldline.types import Observation, TensorState, WorldSpec

POINT = "WorldlinePoint-v0"


class PointEnv(gymnasium.Env):
    """A point on a line, moved by its action; done (and successful) at 1. Its picture's red is its position."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 10}  # noqa: RUF012
    observation_space = Box(-2.0, 2.0, (1,))
    action_space = Box(-0.5, 0.5, (1,))

    def __init__(self, render_mode: str | None = None) -> None:
        self.render_mode = render_mode
        self.x = 0.0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        self.x = float(self.np_random.uniform(-0.2, 0.2))
        return np.array([self.x], dtype=np.float32), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict]:
        assert self.action_space.contains(action)
        self.x += float(action[0])
        done = self.x >= 1.0
        return np.array([self.x], dtype=np.float32), 1.0, done, False, {"is_success": done}

    def render(self) -> np.ndarray:
        picture = np.zeros((32, 48, 3), dtype=np.uint8)
        picture[..., 0] = int(np.clip(100 * (self.x + 1), 0, 255))
        return picture


if POINT not in gymnasium.registry:
    gymnasium.register(id=POINT, entry_point=PointEnv)


class Push:
    """A policy that sends one constant action, plus noise that depends on the seeds alone."""

    def __init__(self, spec: WorldSpec, value: float, *, broken: bool = False) -> None:
        self._spec, self.value, self.broken = spec, value, broken
        self.rows_asked: list[int] = []

    @property
    def spec(self) -> WorldSpec:
        return self._spec

    def reset(self, n: int) -> TensorState:
        return TensorState(tensors={}, rows=n)

    def act(self, observation: Observation, state: Any, *, seeds: torch.Tensor) -> tuple[torch.Tensor, TensorState]:
        self.rows_asked.append(len(observation))
        if self.broken:
            raise ZeroDivisionError("broken policy")
        noise = (seeds % 1000).float() / 10_000
        chunk = torch.full((len(observation), self._spec.control_steps, self._spec.action.dim), self.value)
        return chunk + noise[:, None, None], state


def push_reach() -> Push:
    return Push(make_world("metaworld/reach-v3", cameras=(), horizon=8).spec, 0.3)


def push_broken() -> Push:
    return Push(make_world("metaworld/reach-v3", cameras=(), horizon=8).spec, 0.3, broken=True)
