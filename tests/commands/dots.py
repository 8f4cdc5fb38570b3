"""The dot world as a Gymnasium environment, and policies for it that the command line can name."""

from typing import Any

import gymnasium
import numpy as np
import torch
from gymnasium.spaces import Box

from tests.oracles import GOAL, move
from worldline.types import Observation

WORLD, SIZE = "gym/DotWorld-v0", 64
STAY = 6  # control steps that an episode goes on after the dot arrived


class DotWorld(gymnasium.Env):
    """A bright dot moved by its actions; success right of the goal, the end `STAY` steps after it."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 20}  # noqa: RUF012
    observation_space = Box(0.0, 1.0, (2,))
    action_space = Box(-1.0, 1.0, (2,))

    def __init__(self, render_mode: str | None = None) -> None:
        self.render_mode = render_mode
        self.position, self.arrived = torch.zeros(1, 2), 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        start = self.np_random.uniform((0.15, 0.2), (0.3, 0.8))
        self.position, self.arrived = torch.tensor(start[None], dtype=torch.float32), 0
        return self.position[0].numpy().copy(), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict]:
        self.position = move(self.position, torch.as_tensor(action)[None, None])
        done = bool(self.position[0, 0] > GOAL)
        self.arrived += done
        return self.position[0].numpy().copy(), float(done), self.arrived > STAY, False, {"success": done}

    def render(self) -> np.ndarray:
        grid = (np.arange(SIZE) + 0.5) / SIZE
        x, y = np.exp(-((grid[None] - self.position[0].numpy()[:, None]) ** 2) / 0.012)
        return np.repeat((y[:, None] * x[None] * 255).round().astype(np.uint8)[:, :, None], 3, axis=2)


gymnasium.register(id="DotWorld-v0", entry_point=DotWorld)


def mixed(observation: Observation) -> torch.Tensor:
    """Right from the upper half, slowly left from the lower: half the episodes arrive."""
    right = torch.where(observation.pose[:, 1] > 0.5, 0.85, -0.4)
    up = torch.where(observation.pose[:, 1] > 0.5, 0.1, -0.1) * torch.sin(20 * observation.pose[:, 0])
    return torch.stack([right, up], 1)[:, None].expand(-1, 4, -1)


def runner(observation: Observation) -> torch.Tensor:
    return torch.tensor([0.9, 0.0]).expand(len(observation), 2, 2)


def idler(observation: Observation) -> torch.Tensor:
    return torch.zeros(len(observation), 2, 2)


def three_dimensional(observation: Observation) -> torch.Tensor:
    return torch.zeros(len(observation), 2, 3)
