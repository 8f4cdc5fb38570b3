"""A joint-space arm above a table, drawn from primitive shapes, as a `SimulatedWorld`: "arm/reach", "arm/place" and "arm/revisit".

It is the second action space beside Meta-World's hand deltas (absolute joint targets, followed with a lag), and a test bench
for memory: nine cells hold tiles and objects that are drawn anew from the seed at every reset.

    reach    "reach the red box": the hand low above the object that the sentence names; both cameras see the objects
    place    "reach the far left tile": the same, above the tile that the sentence names by where it is
    revisit  "look around and return": only the wrist camera sees tiles and objects, so what it saw must be remembered

- Actions are clipped to the joints' ranges first, and the clipped values are what is reported as consumed.
- A seed gives the same scene in all tasks. The target of `reach` and `place` is drawn from it too; `choose_target` asks for another
  of the same scene, which changes the instruction, the `target` column of the state and what counts as success.
- Success in `reach` and `place`: at any control step the hand within 3 cm of the object horizontally, and below 10 cm; the reward counts
  such steps. In `revisit` success is unknown (None) and the reward 0.
- No shadows, no multisampling; pictures are drawn at three times their size and averaged down.
"""

import importlib
import weakref
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from worldline.errors import SimulatorError
from worldline.sim.arm_kinematics import CELLS, HIGH, JOINTS, LOW, PLACES, centred_cell, forward, tiles_in_sight
from worldline.sim.arm_scene import (
    ARM,
    SCENERY,
    STATE_NAMES,
    STEPS_PER_SECOND,
    TABLE,
    Scene,
    draw_scene,
    mjcf,
    paint,
    state_of,
)
from worldline.sim.base import Controller, SimFrame, SimStep, check_block, check_timing, replay, unknown
from worldline.sim.cameras import shrink
from worldline.sim.headless import choose_backend, require_backend
from worldline.types import ActionSpec, CameraSpec, WorldSpec

TASKS = ("reach", "place", "revisit")
AIMED = ("reach", "place")  # tasks with a target
RATE_HZ = 40.0
CAMERAS = ("top", "wrist")
SUPERSAMPLE = 3
POSE_NAMES = ("hand_x", "hand_y", "hand_z", "wrist_yaw")  # metres, from the base on the table; radians
REACH_RADIUS, REACH_HEIGHT = 0.03, 0.10  # metres
ACTION = ActionSpec(
    names=JOINTS,  # radians; metres for the lift
    low=tuple(LOW.tolist()),
    high=tuple(HIGH.tolist()),
    kind="absolute",
    space="joint",
    rate_hz=RATE_HZ,
    source="commanded",
    embodiment="worldline-arm",
)


class ArmWorld:
    """One task of the arm. The columns of its state are `arm_scene.STATE_NAMES`."""

    def __init__(
        self,
        task: str,
        *,
        cameras: Sequence[str] = CAMERAS,
        size: int = 64,
        horizon: int = 160,
        control_steps: int = 4,
    ) -> None:
        check_timing(horizon, control_steps, size)
        check_task(task)
        for camera in cameras:
            if camera not in CAMERAS:
                raise unknown("camera", camera, CAMERAS, hint=f" Cameras of arm/{task}: {', '.join(CAMERAS)}.")
        self.horizon = horizon
        self._task = task
        self._mujoco = _mujoco()
        if cameras:
            require_backend()
        self._model = self._mujoco.MjModel.from_xml_string(mjcf(size * SUPERSAMPLE))
        self._data = self._mujoco.MjData(self._model)
        self._spec = WorldSpec(
            cameras=tuple(CameraSpec(name=camera, height=size, width=size) for camera in cameras),
            fps=RATE_HZ / control_steps,
            control_steps=control_steps,
            action=ACTION,
            pose_names=POSE_NAMES,
        )
        self._scene: Scene | None = None
        self._target = -1
        self._sent = 0
        self._free_renderer: weakref.finalize | None = None

    @property
    def spec(self) -> WorldSpec:
        return self._spec

    @property
    def task(self) -> str:
        return self._task

    @property
    def instruction(self) -> str:
        """What the episode asks for. A target belongs to the scene: none is named before the first reset."""
        if self._task == "revisit":
            return "look around and return"
        if self._task == "place":
            return "reach a tile" if self._scene is None else f"reach the {PLACES[self._target]} tile"
        return "reach an object" if self._scene is None else f"reach the {self._scene.named(self._target)}"

    @property
    def targets(self) -> tuple[int, ...]:
        """The cells (0 to 8) that `choose_target` takes: in `reach` those whose object is the only one of its colour and shape."""
        scene = self._required_scene()
        return tuple(range(len(CELLS))) if self._task == "place" else scene.unique()

    def reset(self, seed: int) -> SimFrame:
        """A fresh scene and start that depend on `seed` (>= 0) alone, whatever happened before."""
        if seed < 0:
            raise SimulatorError(f"arm/{self._task}: a seed of at least 0 is required, got {seed}.")
        self._scene = draw_scene(seed)
        self._target = self._scene.target if self._task in AIMED else -1
        self._sent = 0
        paint(self._model, self._scene)
        self._mujoco.mj_resetData(self._model, self._data)
        self._data.qpos[:] = self._data.ctrl[:] = self._scene.joints
        self._mujoco.mj_forward(self._model, self._data)
        return self._frame()

    def choose_target(self, cell: int) -> SimFrame:
        """Ask for another target of the scene until the next reset, and return the frame as it now is.

        Two episodes that differ by this alone differ by their instruction alone: pictures and poses stay. Raises
        `SimulatorError` if the task has no target, nothing was reset, or `cell` is not among `targets`.
        """
        possible = self.targets
        if self._task not in AIMED:
            raise SimulatorError(f"arm/{self._task} has no target to choose: use arm/reach or arm/place.")
        if cell not in possible:
            why = ", whose objects are each the only one of their colour and shape" if self._task == "reach" else ""
            raise SimulatorError(
                f"arm/{self._task}: a target among cells {list(possible)} is required{why}, got {cell}."
            )
        self._target = cell
        return self._frame()

    def step(self, block: Float[Tensor, "k a"]) -> SimStep:
        return self.drive(replay(check_block(block, self._spec.control_steps, ACTION.dim)))

    def drive(self, controller: Controller) -> SimStep:
        self._required_scene()
        if self._sent >= self.horizon:
            raise SimulatorError(f"arm/{self._task}: the episode has ended, reset(seed) is required before this step.")
        consumed, reached = [], []
        for _ in range(self._spec.control_steps):
            action = np.clip(controller(self._state()), LOW, HIGH).astype(np.float32)
            self._data.ctrl[:] = action
            self._mujoco.mj_step(self._model, self._data, nstep=int(STEPS_PER_SECOND / RATE_HZ))
            self._sent += 1
            consumed.append(action)
            reached.append(self._reached())
        return SimStep(
            frame=self._frame(),
            consumed=torch.from_numpy(np.stack(consumed)),
            sent=len(consumed),
            reward=float(sum(reached)),
            success=any(reached) if self._task in AIMED else None,
            terminated=False,
            truncated=self._sent >= self.horizon,
        )

    def close(self) -> None:
        if self._free_renderer is not None:
            self._free_renderer()

    def _required_scene(self) -> Scene:
        if self._scene is None:
            raise SimulatorError(f"arm/{self._task}: reset(seed) is required first.")
        return self._scene

    def _reached(self) -> bool:
        x, y, z, _ = forward(self._data.qpos)
        near = self._target >= 0 and np.hypot(*(CELLS[self._target] - (x, y))) < REACH_RADIUS
        return bool(near and z < REACH_HEIGHT)

    def _state(self) -> np.ndarray:
        return state_of(self._data.qpos, self._data.qvel, self._target, self._required_scene())

    def _frame(self) -> SimFrame:
        return SimFrame(
            images={camera.name: self._render(camera.name) for camera in self._spec.cameras},
            pose=torch.from_numpy(forward(self._data.qpos).astype(np.float32)),
            state=torch.from_numpy(self._state().astype(np.float32)),
        )

    def _render(self, camera: str) -> Tensor:
        seen = (
            {TABLE, SCENERY}
            if camera == "wrist"
            else {TABLE, ARM}
            if self._task == "revisit"
            else {TABLE, SCENERY, ARM}
        )
        option = self._mujoco.MjvOption()
        option.geomgroup[:] = [group in seen for group in range(len(option.geomgroup))]
        self._mujoco.mj_camlight(self._model, self._data)
        self._renderer.update_scene(self._data, camera=camera, scene_option=option)
        return torch.from_numpy(shrink(self._renderer.render(), SUPERSAMPLE)).permute(2, 0, 1).contiguous()

    @cached_property
    def _renderer(self) -> Any:
        pixels = self._spec.cameras[0].height * SUPERSAMPLE
        renderer = self._mujoco.Renderer(self._model, pixels, pixels)
        renderer.scene.flags[self._mujoco.mjtRndFlag.mjRND_SHADOW] = False
        renderer.scene.flags[self._mujoco.mjtRndFlag.mjRND_REFLECTION] = False
        self._free_renderer = weakref.finalize(self, renderer.close)  # at exit the GL library may be gone before it
        return renderer


def check_task(task: str) -> None:
    if task not in TASKS:
        raise unknown("task of the arm", task, TASKS)


def cell_in_view(states: Float[Tensor, "t s"]) -> Int[Tensor, " t"]:
    """The cell (0 to 8) whose tile is at the centre of the wrist camera's picture, -1 where that shows bare table.

    `states` are those of an `arm/...` world or dataset. Raises `SimulatorError` for other states.
    """
    return torch.from_numpy(centred_cell(_joints(states)))


def cells_in_sight(states: Float[Tensor, "t s"]) -> Bool[Tensor, "t 9"]:
    """Which cells' tiles are at least in part within the wrist camera's picture. Raises `SimulatorError` for other states."""
    return torch.from_numpy(tiles_in_sight(_joints(states)))


def _joints(states: Tensor) -> np.ndarray:
    if states.shape[1] != len(STATE_NAMES):
        raise SimulatorError(
            f"states of an arm world, {len(STATE_NAMES)} columns, are required, got {states.shape[1]} columns."
        )
    return states[:, : len(JOINTS)].detach().cpu().double().numpy()


def _mujoco() -> Any:
    """Imported late, after the GL backend is chosen; untyped because its names are compiled."""
    choose_backend()
    try:
        return importlib.import_module("mujoco")
    except ImportError as error:
        raise SimulatorError(
            f'MuJoCo could not be imported ({error}): pip install "worldline[metaworld]" brings it.'
        ) from error
