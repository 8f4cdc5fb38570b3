"""Any Gymnasium environment with Box actions and `render_mode="rgb_array"` as a `SimulatedWorld`.

What Gymnasium does not say is stated here and can be overridden: the control rate is `metadata["render_fps"]`, actions are
declared absolute in a mixed space, and the embodiment is the environment's id. The flattened observation is both pose and
state, unless it is an image. Success is `info["is_success"]` or `info["success"]`, "not yet" while neither is there before it is told; never told it is unknown (None).
"""

from collections.abc import Sequence
from typing import Any, Literal

import gymnasium
import numpy as np
import torch
from gymnasium.spaces import Box, utils
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from worldline.errors import SimulatorError
from worldline.sim.base import Controller, SimFrame, SimStep, check_block, check_timing, replay, unknown
from worldline.types import ActionSpec, CameraSpec, WorldSpec

CAMERA = "rgb"
Kind = Literal["absolute", "delta", "velocity"]
Space = Literal["joint", "cartesian", "mixed"]


class GymWorld:
    """One Gymnasium environment. Its own time limit truncates too if it is shorter than `horizon`."""

    def __init__(
        self,
        env_id: str,
        *,
        cameras: Sequence[str] = (CAMERA,),
        size: int = 64,
        horizon: int = 160,
        control_steps: int = 4,
        rate_hz: float | None = None,
        kind: Kind = "absolute",
        space: Space = "mixed",
        instruction: str | None = None,
    ) -> None:
        check_timing(horizon, control_steps, size)
        if set(cameras) - {CAMERA}:
            raise SimulatorError(f"unknown camera in {list(cameras)} of gym/{env_id}; cameras: {CAMERA}.")
        self.horizon = horizon
        self.instruction = env_id if instruction is None else instruction
        self._name = f"gym/{env_id}"
        self._env = make_gym(env_id, render=bool(cameras))
        self._flat = _is_vector(self._env.observation_space)
        action, rate = self._env.action_space, rate_hz or self._env.metadata.get("render_fps")
        if not isinstance(action, Box):
            raise SimulatorError(
                f"{self._name}: Box actions required (continuous vectors), got {action}. Choose another environment."
            )
        if not rate:
            raise SimulatorError(
                f'{self._name}: a control rate is required: metadata["render_fps"] of the environment, or rate_hz=.'
            )
        self._box = action
        low, high = action.low.ravel(), action.high.ravel()
        self._spec = WorldSpec(
            cameras=tuple(CameraSpec(name=camera, height=size, width=size) for camera in cameras),
            fps=rate / control_steps,
            control_steps=control_steps,
            action=ActionSpec(
                names=tuple(f"action_{i}" for i in range(len(low))),
                low=tuple(float(x) for x in low),
                high=tuple(float(x) for x in high),
                kind=kind,
                space=space,
                rate_hz=float(rate),
                source="commanded",
                embodiment=env_id,
            ),
            pose_names=tuple(f"observation_{i}" for i in range(self._dim())),
        )
        self._size = size
        self._observed: np.ndarray | None = None
        self._sent, self._over = 0, True

    @property
    def spec(self) -> WorldSpec:
        return self._spec

    def reset(self, seed: int) -> SimFrame:
        observed, _ = self._env.reset(seed=seed)
        self._observed = self._vector(observed)
        self._sent, self._over = 0, False
        return self._frame()

    def step(self, block: Float[Tensor, "k a"]) -> SimStep:
        return self.drive(replay(check_block(block, self._spec.control_steps, self._spec.action.dim)))

    def drive(self, controller: Controller) -> SimStep:
        if self._over or self._observed is None:
            raise SimulatorError(f"{self._name}: reset(seed) is required before this step.")
        low, high = self._spec.action.low, self._spec.action.high
        consumed: list[np.ndarray] = []
        reward, success, terminated, truncated = 0.0, None, False, False
        while len(consumed) < self._spec.control_steps and not (terminated or truncated):
            action = np.clip(controller(self._observed), low, high).astype(self._box.dtype)
            observed, gained, terminated, truncated, info = self._env.step(action.reshape(self._box.shape))
            self._observed = self._vector(observed)
            self._sent += 1
            consumed.append(action.astype(np.float32))
            reward += float(gained)
            truncated = truncated or self._sent >= self.horizon
            held = info.get("is_success", info.get("success"))
            if held is not None:
                success = bool(success) or bool(held)
        self._over = bool(terminated or truncated)
        sent = len(consumed)
        consumed += consumed[-1:] * (self._spec.control_steps - sent)
        return SimStep(
            frame=self._frame(),
            consumed=torch.from_numpy(np.stack(consumed)),
            sent=sent,
            reward=reward,
            success=success,
            terminated=bool(terminated),
            truncated=bool(truncated),
        )

    def close(self) -> None:
        self._env.close()

    def _frame(self) -> SimFrame:
        assert self._observed is not None
        state = torch.from_numpy(self._observed.astype(np.float32))
        images = {camera.name: self._render() for camera in self._spec.cameras}
        return SimFrame(images=images, pose=state.clone(), state=state)

    def _render(self) -> Tensor:
        try:
            picture = self._env.render()
        except gymnasium.error.DependencyNotInstalled as error:  # environments import their drawing library late
            raise SimulatorError(f"{self._name} cannot be rendered: {error}") from error
        if not isinstance(picture, np.ndarray) or picture.ndim != 3 or picture.shape[2] != 3:
            raise SimulatorError(f"{self._name}: render() must return an RGB array (h, w, 3), got {type(picture)}.")
        small = Image.fromarray(picture).resize((self._size, self._size), Image.Resampling.BOX)
        return torch.from_numpy(np.array(small)).permute(2, 0, 1).contiguous()

    def _vector(self, observed: Any) -> np.ndarray:
        if not self._flat:
            return np.zeros(0)
        return np.asarray(utils.flatten(self._env.observation_space, observed), dtype=np.float64)

    def _dim(self) -> int:
        return utils.flatdim(self._env.observation_space) if self._flat else 0


def make_gym(env_id: str, *, render: bool = False) -> gymnasium.Env:
    """The environment `env_id`, as Gymnasium makes it. Raises `SimulatorError` if there is none, or it cannot be made."""
    options: dict[str, Any] = {"render_mode": "rgb_array"} if render else {}  # not every environment takes a mode
    try:
        return gymnasium.make(env_id, **options)
    except gymnasium.error.NameNotFound as error:
        raise unknown("Gymnasium environment", env_id, gymnasium.registry) from error
    except (gymnasium.error.Error, ImportError) as error:
        raise SimulatorError(f"gym/{env_id} could not be made: {error}") from error


def _is_vector(space: gymnasium.Space) -> bool:
    """Whether the observation is numbers to flatten (vectors, dictionaries of vectors) and not a picture."""
    if isinstance(space, gymnasium.spaces.Dict):
        return all(_is_vector(part) for part in space.spaces.values())
    return isinstance(space, Box) and not (space.dtype == np.uint8 and len(space.shape) >= 2)
