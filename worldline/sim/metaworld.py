"""Meta-World (50 Sawyer tasks) as a `SimulatedWorld`.

Notable choices, each the answer to something that spoils experiments silently:

- Starts: Meta-World draws object positions from a frozen vector by default, so seeds change nothing. Here the vector is
  drawn anew from the seed at every reset; tests hold that N seeds give N different object states. The first state
  and picture are taken after the physics has caught up; Meta-World's own reset shows the objects of another start.
- Actions are clipped to [-1, 1] first and the clipped values are what is reported as consumed: scripted experts exceed
  the range in most steps. One unit is a 1 cm move of the hand's target a control step; gripper -1 opens, +1 closes.
- Success means that the task's rule held at any control step; the episode goes on to the horizon all the same.
- The goal marker is hidden where the scene already shows the goal, and kept (enlarged to 25 mm) where the task draws the
  goal apart from the objects (reach, push, pick-place, ...): there a policy could not know it otherwise.
- Rendering: no shadows, reflections or multisampling (ten times faster); pictures are drawn at three times their size,
  which costs nothing because meshes dominate, and averaged down.
"""

import importlib
import warnings
import weakref
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from worldline.errors import SimulatorError
from worldline.sim.base import Controller, SimFrame, SimStep, check_block, check_timing, replay, unknown
from worldline.sim.cameras import MOVED, UPSIDE_DOWN, look_at, project, shrink
from worldline.sim.headless import choose_backend, require_backend
from worldline.types import ActionSpec, CameraSpec, WorldSpec

RATE_HZ = 80.0
DEFAULT_CAMERAS = ("corner2", "gripperPOV")
SUPERSAMPLE = 3
GOAL_RADIUS = 0.025  # metres; success is within 0.05
POSE_NAMES = ("hand_x", "hand_y", "hand_z", "gripper_opening")  # metres; opening 0 (closed) to 1
ACTION = ActionSpec(
    names=("dx", "dy", "dz", "gripper"),
    low=(-1.0,) * 4,
    high=(1.0,) * 4,
    kind="delta",
    space="cartesian",
    rate_hz=RATE_HZ,
    source="commanded",
    embodiment="metaworld-sawyer",
)

_VERBS = frozenset(
    {"open", "close", "press", "pull", "push", "turn", "lock", "unlock"}
    | {"insert", "pick", "place", "slide", "unplug", "sweep", "reach"}
)
_VERB_OF = {"insertion": "insert", "picking": "pick"}
_AFTER = {"topdown": "from above", "wall": "past the wall", "side": "sideways"}


def instruction_for(task: str) -> str:
    """ "drawer-open-v3" -> "open the drawer": verb first, its noun, then what is left of the name."""
    words = [_VERB_OF.get(word, word) for word in task.removesuffix("-v3").split("-")]
    at = next((i for i, word in enumerate(words) if word in _VERBS), None)
    if at is None:
        return f"do the {' '.join(words)} task"
    verb, noun, rest = words[at], words[:at], words[at + 1 :]
    if rest[:1] == ["place"]:
        verb, rest = "pick and place", rest[1:]
    what = " ".join(noun) or ("goal" if verb == "reach" else "object")
    return " ".join([verb, "the", what, *(_AFTER.get(word, word) for word in rest)])


def tasks() -> tuple[str, ...]:
    """Every task that has a scripted expert."""
    return tuple(sorted(_library()[1]))


def expert(task: str) -> Controller:
    """The task's scripted expert: reads the 39-D state, so it can act in the simulator only."""
    policies = _library()[1]
    if task not in policies:
        raise unknown("Meta-World task", task, policies)
    policy = policies[task]()

    def act(state: np.ndarray) -> np.ndarray:
        with warnings.catch_warnings():  # experts warn on nearly every step that they exceed [-1, 1]
            warnings.simplefilter("ignore")
            return np.asarray(policy.get_action(state), dtype=np.float64)

    return act


class MetaWorld:
    """One Meta-World task. Rendering starts at the first rendered reset and keeps one renderer for all cameras."""

    def __init__(
        self,
        task: str,
        *,
        cameras: Sequence[str] = DEFAULT_CAMERAS,
        size: int = 64,
        horizon: int = 160,
        control_steps: int = 4,
    ) -> None:
        check_timing(horizon, control_steps, size)
        classes, experts = _library()
        if task not in experts:
            raise unknown("Meta-World task", task, experts)
        self.horizon = horizon
        self._task = task
        self._env = _make_env(classes[task], horizon)
        known = [self._env.model.cam(i).name for i in range(self._env.model.ncam)]
        for camera in cameras:
            if camera not in known:
                raise SimulatorError(f"unknown camera {camera!r} in metaworld/{task}; cameras: {', '.join(known)}.")
        self._spec = WorldSpec(
            cameras=tuple(CameraSpec(name=camera, height=size, width=size) for camera in cameras),
            fps=RATE_HZ / control_steps,
            control_steps=control_steps,
            action=ACTION,
            pose_names=POSE_NAMES,
        )
        self._size = size
        self._state: np.ndarray | None = None
        self._sent = 0
        self._free_renderer: weakref.finalize | None = None
        if cameras:
            require_backend()
        _place_cameras(self._env)
        _mark_goal(self._env)

    @property
    def spec(self) -> WorldSpec:
        return self._spec

    @property
    def instruction(self) -> str:
        return instruction_for(self._task)

    @property
    def task(self) -> str:
        return self._task

    def reset(self, seed: int) -> SimFrame:
        """A fresh start that depends on `seed` (>= 0) alone, whatever happened before."""
        self._env.seed(seed)
        self._env.reset()
        self._state = _settled_state(self._env)
        self._sent = 0
        return self._frame()

    def step(self, block: Float[Tensor, "k a"]) -> SimStep:
        return self.drive(replay(check_block(block, self._spec.control_steps, ACTION.dim)))

    def drive(self, controller: Controller) -> SimStep:
        if self._state is None or self._sent >= self.horizon:
            raise SimulatorError(f"metaworld/{self._task}: reset(seed) is required before this step.")
        consumed, reward, success = [], 0.0, False
        state = self._state
        for _ in range(self._spec.control_steps):
            action = np.clip(controller(state), -1.0, 1.0).astype(np.float32)
            state, gained, _, _, info = self._env.step(action)
            self._sent += 1
            consumed.append(action)
            reward += float(gained)
            success = success or bool(info["success"])
        self._state = state
        return SimStep(
            frame=self._frame(),
            consumed=torch.from_numpy(np.stack(consumed)),
            sent=len(consumed),
            reward=reward,
            success=success,
            terminated=False,
            truncated=self._sent >= self.horizon,
        )

    def close(self) -> None:
        if self._free_renderer is not None:
            self._free_renderer()
        self._env.close()

    def _frame(self) -> SimFrame:
        assert self._state is not None
        if not np.isfinite(self._state).all():
            raise SimulatorError(
                f"metaworld/{self._task}: the physics became unstable after {self._sent} control steps."
            )
        state = torch.from_numpy(self._state.astype(np.float32))
        images = {camera.name: self._render(camera.name) for camera in self._spec.cameras}
        return SimFrame(images=images, pose=state[: len(POSE_NAMES)].clone(), state=state)

    def _render(self, camera: str) -> Tensor:
        for site, position in self._env._target_site_config:  # moved sites are lost at each forward pass of the physics
            self._env._set_pos_site(site, np.asarray(position))
        self._renderer.update_scene(self._env.data, camera=camera)
        image = shrink(self._renderer.render(), self._renderer.height // self._size)
        if camera in UPSIDE_DOWN:
            image = np.ascontiguousarray(image[::-1, ::-1])
        return torch.from_numpy(image).permute(2, 0, 1).contiguous()

    @cached_property
    def _renderer(self) -> Any:
        renderer = _make_renderer(self._env.model, self._size)
        self._free_renderer = weakref.finalize(self, renderer.close)  # at exit the GL library may be gone before it
        return renderer


def _library() -> tuple[Any, Any]:
    """Meta-World's (environment classes, expert classes), with the GL backend chosen before MuJoCo is imported."""
    choose_backend()
    try:
        from metaworld.env_dict import ALL_V3_ENVIRONMENTS
        from metaworld.policies import ENV_POLICY_MAP
    except ImportError as error:
        raise SimulatorError(
            f'Meta-World could not be imported ({error}): pip install "worldline[metaworld]" brings metaworld, mujoco '
            "and packaging in versions that work together."
        ) from error
    return ALL_V3_ENVIRONMENTS, ENV_POLICY_MAP


def _mujoco() -> Any:
    """Imported late, after the GL backend is chosen; untyped because its names are compiled."""
    return importlib.import_module("mujoco")


def _make_env(cls: Any, horizon: int) -> Any:
    env = cls()
    env._freeze_rand_vec, env.seeded_rand_vec, env._set_task_called = False, True, True
    env._partially_observable = False  # the state includes the goal, which experts need
    env.__dict__.pop("sawyer_observation_space", None)  # cached with the goal's range set to zero
    env.max_path_length = max(horizon, env.max_path_length)
    return env


def _settled_state(env: Any) -> np.ndarray:
    """The 39-D state of the scene as it now stands.

    Meta-World moves the objects at the very end of its reset and then reads where they were before: the state it returns,
    and a picture taken then, show the objects of another start.
    """
    mujoco = _mujoco()
    mujoco.mj_forward(env.model, env.data)
    now = env._get_curr_obs_combined_no_goal()
    env._prev_obs = now
    return np.concatenate([now, now, env._get_pos_goal()]).astype(np.float64)


def _place_cameras(env: Any) -> None:
    mujoco = _mujoco()
    for name, view in MOVED.items():
        camera = env.model.cam(name)
        quaternion = np.zeros(4)
        mujoco.mju_mat2Quat(quaternion, look_at(view).ravel())
        camera.pos[:], camera.quat[:], camera.fovy[:] = view.position, quaternion, view.fovy


def _mark_goal(env: Any) -> None:
    """Show the goal only where it is drawn apart from the objects: such tasks draw six numbers at a reset, not three."""
    env.seed(0)
    env.reset()  # targets are not known before
    targets = {name for name, position in env._target_site_config if np.allclose(position, env._target_pos)} or {"goal"}
    shown = targets if env._random_reset_space.low.size > 3 else set()
    for i in range(env.model.nsite):
        site = env.model.site(i)
        if "goal" in site.name:
            site.rgba[:] = (0.0, 1.0, 0.0, 1.0 if site.name in shown else 0.0)
            site.size[0] = GOAL_RADIUS


def _make_renderer(model: Any, size: int) -> Any:
    mujoco = _mujoco()
    model.vis.quality.offsamples = 0  # must be set before the renderer is made
    factor = max(1, min(SUPERSAMPLE, min(model.vis.global_.offwidth, model.vis.global_.offheight) // size))
    model.vis.global_.offwidth = max(model.vis.global_.offwidth, size)
    model.vis.global_.offheight = max(model.vis.global_.offheight, size)
    renderer = mujoco.Renderer(model, size * factor, size * factor)
    renderer.scene.flags[mujoco.mjtRndFlag.mjRND_SHADOW] = False
    renderer.scene.flags[mujoco.mjtRndFlag.mjRND_REFLECTION] = False
    return renderer


def object_pixels(states: Float[Tensor, "t s"], camera: CameraSpec) -> Float[Tensor, "t 2"]:
    """Where the manipulated object is in a camera's picture: (row, column) in pixels, from the recorded 39-D states.

    Raises `SimulatorError` for cameras that are not placed by worldline (their pose is not fixed, or not known here).
    """
    if camera.name not in MOVED:
        raise SimulatorError(f"a camera of {sorted(MOVED)} is required to tell pixels, got {camera.name!r}")
    if states.shape[1] < 7:
        raise SimulatorError(f"Meta-World states of 39 columns are required, got {states.shape[1]}")
    points = states[:, 4:7].double().numpy()
    return torch.tensor([project(MOVED[camera.name], point, camera.height) for point in points], dtype=torch.float32)
