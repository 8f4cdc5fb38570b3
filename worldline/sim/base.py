"""What a simulator promises: the same camera frames, poses and action blocks as a dataset, plus ground truth success.

    world = make_world("metaworld/drawer-open-v3")
    frame = world.reset(seed=7)
    step = world.step(torch.zeros(world.spec.control_steps, world.spec.action.dim))

Two choices to know. A step is one *frame* (k control actions), so that success anywhere inside the block is seen
although only its last moment is rendered. Scripted behaviours close their loop at control rate: `drive` lets a function
of the state choose each action of the block, and `step` is `drive` with the actions fixed in advance.
"""

import difflib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float, UInt8
from torch import Tensor

from worldline.errors import SimulatorError
from worldline.types import Observation, WorldSpec

Controller = Callable[[np.ndarray], np.ndarray]
"""State "s" (float64) to action "a", called once a control step. May keep state of its own: one per episode."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SimFrame:
    """What a simulator shows at one frame: images, pose (`spec.pose_names`, physical units) and its low-dim state."""

    images: Mapping[str, UInt8[Tensor, "c _h _w"]]  # empty when the world was made without cameras
    pose: Float[Tensor, " p"]
    state: Float[Tensor, " s"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SimStep:
    """What one block led to.

    `consumed` holds the actions as the environment consumed them, after its own clipping. If the environment ended
    inside the block, the actions left were not sent: `sent` counts those that were, and the remaining rows of
    `consumed` repeat the last one sent.
    """

    frame: SimFrame
    consumed: Float[Tensor, "k a"]
    sent: int
    reward: float  # summed over the block
    success: bool | None  # held at any control step of the block; None: this simulator does not say
    terminated: bool
    truncated: bool


def told_success(said: Sequence[bool | None]) -> list[bool] | None:
    """Success after each block of an episode by what its simulator said: silence beside a word is "not yet" (many speak at the end alone), silence
    throughout is not knowing (None)."""
    return None if all(word is None for word in said) else [bool(word) for word in said]


@runtime_checkable
class SimulatedWorld(Protocol):
    """One simulated scene. `reset(seed)` decides everything: the same seed and actions give the same pixels."""

    @property
    def spec(self) -> WorldSpec: ...

    @property
    def instruction(self) -> str:
        """What the episode asks for: to be read after `reset`, which may change it."""
        ...

    @property
    def horizon(self) -> int:
        """Control steps after which an episode is truncated."""
        ...

    def reset(self, seed: int) -> SimFrame: ...

    def step(self, block: Float[Tensor, "k a"]) -> SimStep:
        """Send a block. Raises `SimulatorError` if it has another shape, is not finite, or the episode has ended."""
        ...

    def drive(self, controller: Controller) -> SimStep:
        """Send a block whose k actions `controller` chooses one at a time from the state at that control step."""
        ...

    def close(self) -> None: ...


def make_world(
    name: str,
    *,
    cameras: Sequence[str] | None = None,
    size: int = 64,
    horizon: int = 160,
    control_steps: int = 4,
) -> SimulatedWorld:
    """The world called `name`: "metaworld/<task>", "arm/reach", "arm/place", "arm/revisit" or "gym/<environment id>".

    Args:
        cameras: views to render, each `size` x `size`; `()` renders nothing and is 10 to 50 times faster. Default: the
            world's own (Meta-World: corner2 and gripperPOV; the arm: top and wrist; Gymnasium: rgb).
        horizon: control steps of an episode, a multiple of `control_steps`.
        control_steps: k, control steps per frame.

    Raises:
        SimulatorError: unknown name, task or camera (close matches are listed), or no headless GL library.
    """
    family, _, task = name.partition("/")
    if family == "metaworld":
        from worldline.sim.metaworld import DEFAULT_CAMERAS, MetaWorld

        views = DEFAULT_CAMERAS if cameras is None else tuple(cameras)
        return MetaWorld(task, cameras=views, size=size, horizon=horizon, control_steps=control_steps)
    if family == "gym":
        from worldline.sim.gym import CAMERA, GymWorld

        views = (CAMERA,) if cameras is None else tuple(cameras)
        return GymWorld(task, cameras=views, size=size, horizon=horizon, control_steps=control_steps)
    if family == "arm":
        from worldline.sim.arm import CAMERAS, ArmWorld

        views = CAMERAS if cameras is None else tuple(cameras)
        return ArmWorld(task, cameras=views, size=size, horizon=horizon, control_steps=control_steps)
    raise SimulatorError(f'world required: "arm/<task>", "metaworld/<task>" or "gym/<environment id>", got {name!r}.')


def observation(frames: Sequence[SimFrame], instruction: Sequence[str]) -> Observation:
    """The frames of n worlds as one `Observation` of n rows."""
    import torch

    return Observation(
        images={camera: torch.stack([f.images[camera] for f in frames]) for camera in frames[0].images},
        pose=torch.stack([f.pose for f in frames]),
        instruction=tuple(instruction),
    )


def unknown(what: str, got: str, known: Iterable[str], *, hint: str = "") -> SimulatorError:
    """The error for a name that is not among `known`: close matches first, all of them if none is close."""
    names = sorted(known)
    close = difflib.get_close_matches(got, names, n=5, cutoff=0.5)
    said = f"did you mean {', '.join(close)}?" if close else f"known: {', '.join(names)}."
    return SimulatorError(f"unknown {what} {got!r}; {said}{hint}")


def check_timing(horizon: int, control_steps: int, size: int) -> None:
    if control_steps < 1 or horizon < control_steps or horizon % control_steps:
        raise SimulatorError(
            f"horizon must be a positive multiple of control_steps, got horizon {horizon} and control_steps {control_steps}."
        )
    if size < 8:
        raise SimulatorError(f"size must be at least 8 pixels, got {size}.")


def check_block(block: Tensor, control_steps: int, dim: int) -> np.ndarray:
    """The block as float64 "k a". Raises `SimulatorError` on another shape or values that are not finite."""
    if tuple(block.shape) != (control_steps, dim):
        raise SimulatorError(
            f"action block of shape ({control_steps}, {dim}) required (k, a), got {tuple(block.shape)}."
        )
    actions = block.detach().cpu().double().numpy()
    if not np.isfinite(actions).all():
        raise SimulatorError(f"finite actions required, got {int((~np.isfinite(actions)).sum())} NaN or infinite.")
    return actions


def replay(actions: np.ndarray) -> Controller:
    """A controller that sends the rows of `actions` in order, whatever the state."""
    rows = iter(actions)
    return lambda _state: next(rows)
