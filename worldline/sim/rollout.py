"""Ground truth: policies rolled out in the simulator, and the proof that two sets of starts have nothing in common.

Each result keeps the first frames and pose exactly as the simulator gave them, so that a dream of the same episode can
start from the very same pixels. The executor, horizon and success rule are those of recording.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, UInt8
from torch import Tensor
from tqdm import tqdm

from worldline.errors import SimulatorError
from worldline.executor import ChunkExecutor
from worldline.sim.base import SimFrame, SimStep, make_world, observation, told_success
from worldline.sim.workers import WorldPool
from worldline.types import Observation, Policy, require_match


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutResult:
    """One episode of a policy in the simulator."""

    seed: int
    success: bool | None  # at any time; None: this simulator does not say
    frame_success: Bool[Tensor, " t"] | None
    first_images: Mapping[str, UInt8[Tensor, "c _h _w"]]
    poses: Float[Tensor, "t p"]
    states: Float[Tensor, "t s"]
    actions: Float[Tensor, "t-1 k a"]  # as consumed
    rewards: Float[Tensor, " t-1"]
    terminated: bool
    truncated: bool
    instruction: str
    frames: Mapping[str, UInt8[Tensor, "t c _h _w"]] | None  # every frame, if they were kept

    @property
    def first(self) -> Observation:
        """The first frame as an `Observation` of one row: where a dream of this episode starts."""
        return Observation(
            images={camera: image[None] for camera, image in self.first_images.items()},
            pose=self.poses[:1],
            instruction=(self.instruction,),
        )


def rollout_policy(
    world: str | WorldPool,
    policy: Policy,
    *,
    seeds: Sequence[int],
    execute: int | None = None,
    keep_frames: bool = False,
    rows: int = 8,
    processes: int = 0,
    cameras: Sequence[str] | None = None,
    size: int = 64,
    horizon: int = 160,
    control_steps: int = 4,
    progress: str | None = None,
) -> list[RolloutResult]:
    """Roll `policy` out once from each start in `seeds`; results in that order.

    Args:
        world: a world's name, or a `WorldPool` to reuse its worlds for several policies (then `rows` to
            `control_steps` are the pool's and those given here are not used).
        execute: actions of a chunk that are sent before the policy is asked again (default all).
        keep_frames: keep every frame and not only the first.
        rows, processes: worlds in lockstep (the policy is asked for all of them at once), and the processes they are
            spread over; see `worldline.sim.workers`.
        progress: label of a progress bar; None shows none.

    Raises:
        SimulatorError: unknown world or camera, no seeds.
        SpecMismatch: the policy wants cameras, poses, actions or a block length that the world does not have.
        PolicyError: the policy returned something that is not a finite chunk.
    """
    if not seeds:
        raise SimulatorError("at least one seed is required, got none.")
    if isinstance(world, WorldPool):
        return _rollout(world, policy, seeds, execute=execute, keep_frames=keep_frames, progress=progress)
    with WorldPool(
        world,
        rows=min(rows, len(seeds)),
        processes=processes,
        cameras=cameras,
        size=size,
        horizon=horizon,
        control_steps=control_steps,
    ) as pool:
        return _rollout(pool, policy, seeds, execute=execute, keep_frames=keep_frames, progress=progress)


def rollout_actions(
    pool: WorldPool, actions: Float[Tensor, "n t k a"], *, seeds: Sequence[int], progress: str | None = None
) -> list[RolloutResult]:
    """Send given action blocks to each start whatever comes of them: for example those a policy sent in a dream.

    After the last block the robot is left where it is until the episode ends: absolute targets are repeated, of moves and
    velocities the middle of the range is sent. Raises `SimulatorError` if there is
    not one row of actions a seed.
    """
    if len(actions) != len(seeds) or not seeds:
        raise SimulatorError(f"actions for each of {len(seeds)} starts are required, got {len(actions)} rows.")
    low, high = torch.tensor(pool.spec.action.low), torch.tensor(pool.spec.action.high)
    still = actions[:, -1:, -1:] if pool.spec.action.kind == "absolute" else (low + high) / 2
    rest = still.expand(len(actions), 1, *actions.shape[2:])
    blocks, results = torch.cat([actions, rest], dim=1), []
    with tqdm(total=len(seeds), desc=progress, unit="episode", disable=progress is None, leave=False) as bar:
        for start in range(0, len(seeds), pool.rows):
            wave = seeds[start : start + pool.rows]
            results += _wave(pool, _Given(blocks[start : start + len(wave)]), wave, keep_frames=False)
            bar.update(len(wave))
    return results


class _Given:
    """An executor of blocks that stand beforehand; its state is the number of the next one."""

    def __init__(self, blocks: Float[Tensor, "n t k a"]) -> None:
        self.blocks = blocks

    def reset(self, n: int) -> int:
        return 0

    def block(self, observation: Observation, state: int, *, seeds: Tensor) -> tuple[Tensor, int]:
        return self.blocks[:, min(state, self.blocks.shape[1] - 1)], state + 1


def _rollout(
    pool: WorldPool,
    policy: Policy,
    seeds: Sequence[int],
    *,
    execute: int | None,
    keep_frames: bool,
    progress: str | None,
) -> list[RolloutResult]:
    require_match(pool.spec, policy.spec, between=f"simulator {pool.name} and policy {type(policy).__name__}")
    executor = ChunkExecutor(policy, execute=execute)
    results: list[RolloutResult] = []
    with tqdm(total=len(seeds), desc=progress, unit="episode", disable=progress is None, leave=False) as bar:
        for start in range(0, len(seeds), pool.rows):
            wave = seeds[start : start + pool.rows]
            results += _wave(pool, executor, wave, keep_frames=keep_frames)
            bar.update(len(wave))
    return results


def _wave(
    pool: WorldPool, executor: ChunkExecutor | _Given, seeds: Sequence[int], *, keep_frames: bool
) -> list[RolloutResult]:
    """Up to `pool.rows` episodes at once, until the last has ended."""
    n = len(seeds)
    now = pool.reset(dict(enumerate(seeds)))
    told = pool.instructions(range(n))
    episodes = [_Record(seed, now[row], told[row], keep_frames) for row, seed in enumerate(seeds)]
    state: Any = executor.reset(n)
    row_seeds = torch.tensor(list(seeds))
    while running := [row for row in range(n) if not episodes[row].over]:
        seen = observation([episodes[row].last for row in range(n)], [told[row] for row in range(n)])
        with torch.no_grad():
            blocks, state = executor.block(seen, state, seeds=row_seeds)
        for row, step in pool.step({row: blocks[row] for row in running}).items():
            episodes[row].add(step)
    return [episode.result() for episode in episodes]


class _Record:
    """Collects one episode; of the pictures only the first and the last are held unless all are to be kept."""

    def __init__(self, seed: int, first: SimFrame, instruction: str, keep_frames: bool) -> None:
        self._seed, self._first, self._instruction, self._keep = seed, first, instruction, keep_frames
        self.last = first
        self._images = [first.images] if keep_frames else []
        self._poses, self._states = [first.pose], [first.state]
        self._actions: list[Tensor] = []
        self._rewards: list[float] = []
        self._success: list[bool | None] = []
        self._ended = (False, False)

    @property
    def over(self) -> bool:
        return any(self._ended)

    def add(self, step: SimStep) -> None:
        self.last = step.frame
        if self._keep:
            self._images.append(step.frame.images)
        self._poses.append(step.frame.pose)
        self._states.append(step.frame.state)
        self._actions.append(step.consumed)
        self._rewards.append(step.reward)
        self._success.append(step.success)
        self._ended = (step.terminated, step.truncated)

    def result(self) -> RolloutResult:
        success = told_success(self._success)
        kept = None
        if self._keep:
            kept = {c: torch.stack([images[c] for images in self._images]) for c in self._first.images}
        return RolloutResult(
            seed=self._seed,
            success=None if success is None else any(success),
            frame_success=None if success is None else torch.tensor([False, *success]),
            first_images=self._first.images,
            poses=torch.stack(self._poses),
            states=torch.stack(self._states),
            actions=torch.stack(self._actions),
            rewards=torch.tensor(self._rewards),
            terminated=self._ended[0],
            truncated=self._ended[1],
            instruction=self._instruction,
            frames=kept,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class StartCheck:
    """Whether two lists of starts have a state in common. `nearest`: the smallest largest-coordinate difference."""

    disjoint: bool
    nearest: float
    same: tuple[tuple[int, int], ...]  # (seed of the first list, seed of the second) that start alike


def disjoint_starts(
    world: str, seeds_a: Sequence[int], seeds_b: Sequence[int], *, tolerance: float = 1e-6
) -> StartCheck:
    """Compare the start states (objects, goal, hand) of two lists of seeds, in the simulator itself.

    Two starts are the same if no coordinate of their states differs by more than `tolerance` (metres, or units of the
    state). Raises `SimulatorError` if the world has no state to compare.
    """
    a, b = start_states(world, seeds_a), start_states(world, seeds_b)
    if not a.shape[1]:
        raise SimulatorError(f"{world} shows no state, so its starts cannot be compared. Compare recorded episodes.")
    distance = np.stack([np.abs(row - b).max(axis=1) for row in a])
    same = tuple((int(seeds_a[i]), int(seeds_b[j])) for i, j in np.argwhere(distance <= tolerance))
    return StartCheck(disjoint=not same, nearest=float(distance.min()), same=same)


def start_states(world: str, seeds: Sequence[int]) -> np.ndarray:
    """The state (float32) of `world` at the start of each seed, "n s"; nothing is rendered. Needs one seed at least."""
    if not seeds:
        raise SimulatorError("at least one seed is required, got none.")
    made = make_world(world, cameras=())
    try:
        return np.stack([made.reset(seed).state.numpy() for seed in seeds])
    finally:
        made.close()
