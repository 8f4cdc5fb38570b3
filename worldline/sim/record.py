"""Records episodes in a simulator, in several processes, into a LeRobot dataset that can be resumed after a kill.

Episode `index` depends on (world, policy, seed, index) alone: not on how many processes there are, nor on which of them
recorded it. Each worker process makes its world once. Recorded actions are those the environment consumed.
"""

import logging
import signal
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from worldline.checkpoint import read_json, write_json
from worldline.data.lerobot_read import UNKNOWN
from worldline.data.lerobot_write import DatasetWriter
from worldline.errors import DatasetError, SimulatorError, WorldlineError
from worldline.executor import ChunkExecutor
from worldline.sim.base import SimFrame, SimStep, SimulatedWorld, make_world, observation, told_success
from worldline.sim.scripted import ScriptedPolicy, scripted_policy
from worldline.sim.workers import end_with_parent, worker_context
from worldline.types import Policy, WorldSpec, require_match

log = logging.getLogger(__name__)

PolicyFactory = Callable[[], Policy]


def episode_seed(seed: int, index: int) -> int:
    """The start and randomness of episode `index` of the recording `seed`: a 48-bit number.

    Numbers of different (seed, index) are unrelated draws, so recordings with different seeds share no start (the chance
    that two of a million do is below one in five hundred); `disjoint_starts` proves it on the object states themselves.
    """
    state = np.random.SeedSequence(seed, spawn_key=(0, index)).generate_state(1, np.uint64)
    return int(state[0]) >> 16


@dataclass(frozen=True, slots=True, kw_only=True)
class _Job:
    """Everything a worker process needs."""

    world: str
    out: str
    policy: str | PolicyFactory
    label: str
    cameras: tuple[str, ...] | None
    size: int
    seed: int
    horizon: int
    control_steps: int
    execute: int | None
    crf: int
    provenance: Mapping[str, str] = field(default_factory=dict)

    def make(self, *, rendered: bool = True) -> SimulatedWorld:
        return make_world(
            self.world,
            cameras=self.cameras if rendered else (),
            size=self.size,
            horizon=self.horizon,
            control_steps=self.control_steps,
        )


def record(
    world: str,
    out: str | Path,
    *,
    episodes: int,
    policy: str | PolicyFactory = "mixed",
    label: str | None = None,
    cameras: Sequence[str] | None = None,
    size: int = 64,
    seed: int = 0,
    horizon: int = 160,
    control_steps: int = 4,
    processes: int = 1,
    execute: int | None = None,
    resume: bool = False,
    crf: int = 18,
    provenance: Mapping[str, str] | None = None,
    progress: bool = True,
) -> Path:
    """Record `episodes` episodes of `world` and return the dataset's folder.

    Args:
        policy: a name that the world offers (`worldline.sim.scripted.policy_names`: "mixed", "expert", ...; Gymnasium:
            "random"), or a picklable function that makes a `Policy`, called once a process.
        label: what provenance["policy"] says; default the name of the behaviour or of the function.
        cameras, size, horizon, control_steps: as `make_world`.
        seed: which recording this is; see `episode_seed`.
        processes: worker processes; 1 records in this one. Two on two cores are twice as fast.
        execute: actions of a policy's chunk that are sent before it is asked again (default all).
        resume: go on with the interrupted recording in `out`; staged episodes are skipped.
        provenance: more entries for every episode.

    Raises:
        SimulatorError: unknown world, policy, camera; a horizon too short for the policy; a worker process died.
        DatasetError: `out` holds something else, or a recording with other settings.
        WorldlineError, or whatever a policy raises: with the episode named. Staged episodes stay, and `resume=True`
            goes on; so it does after Ctrl-C.
    """
    if episodes < 1 or processes < 1:
        raise SimulatorError(f"episodes and processes must be at least 1, got {episodes} and {processes}.")
    name = label or (policy if isinstance(policy, str) else getattr(policy, "__name__", type(policy).__name__))
    job = _Job(
        world=world,
        out=str(out),
        policy=policy,
        label=name,
        cameras=None if cameras is None else tuple(cameras),
        size=size,
        seed=seed,
        horizon=horizon,
        control_steps=control_steps,
        execute=execute,
        crf=crf,
        provenance=dict(provenance or {}),
    )
    worker = _Worker(job)  # made here even for many processes: mistakes show before any process starts
    try:
        writer = DatasetWriter(out, worker.world.spec, crf=crf, resume=resume)
        _claim(job, writer.staging / "recording.json")
        staged = writer.staged()
        missing = [index for index in range(episodes) if index not in staged]
        with tqdm(total=episodes, initial=episodes - len(missing), unit="episode", disable=not progress) as bar:
            if processes == 1:
                for index in missing:
                    worker.record(index, writer)
                    bar.update()
            else:
                worker.close()
                _record_parallel(job, worker.world.spec, missing, processes, bar)
        return writer.finish()
    finally:
        worker.close()


def _record_parallel(job: _Job, spec: WorldSpec, missing: Sequence[int], processes: int, bar: tqdm) -> None:
    context = worker_context()
    queue = list(reversed(missing))
    running: set[Future] = set()
    with ProcessPoolExecutor(processes, mp_context=context, initializer=_start, initargs=(job, spec)) as pool:
        try:
            while queue or running:
                while queue and len(running) < 2 * processes:
                    running.add(pool.submit(_record_one, queue.pop()))
                done, running = wait(running, return_when=FIRST_COMPLETED)
                for future in done:
                    future.result()
                    bar.update()
        except BrokenProcessPool as error:
            raise SimulatorError(
                "a recording process died (out of memory, or killed; in a script of yours, also without "
                '`if __name__ == "__main__":` around what it does). Recorded episodes are kept: run the same command again '
                "to resume, with fewer processes if memory is short."
            ) from error
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _claim(job: _Job, path: Path) -> None:
    """Note what is being recorded beside the staged episodes, or check that it is still the same."""
    identity = {name: getattr(job, name) for name in ("world", "label", "seed", "horizon", "execute", "provenance")}
    if not path.exists():
        write_json(path, identity)
        return
    noted = read_json(path)
    if different := [name for name in identity if name in noted and identity[name] != noted[name]]:
        raise DatasetError(
            f"{job.out}: the interrupted recording has another "
            + ", ".join(f"{name} ({noted.get(name)!r}, now {identity[name]!r})" for name in different)
            + ". Resume with the same settings, or choose another output folder."
        )


class _Worker:
    """One process's world, its rehearsal world and its policy."""

    def __init__(self, job: _Job) -> None:
        self.job = job
        self.world = job.make()
        self._rehearsal: SimulatedWorld | None = None
        self._executor: ChunkExecutor | None = None
        self._scripted: ScriptedPolicy | None = None
        if isinstance(job.policy, str):
            self._scripted = scripted_policy(
                job.policy, job.world, seed=job.seed, made=self.world, rehearsal=self._rehearsal_world
            )
        else:
            made = job.policy()
            require_match(self.world.spec, made.spec, between=f"simulator {job.world} and policy {job.label}")
            self._executor = ChunkExecutor(made, execute=job.execute)

    def record(self, index: int, writer: DatasetWriter) -> None:
        seed = episode_seed(self.job.seed, index)
        try:
            cause, frames, steps = self._play(index, seed)
        except WorldlineError as error:
            raise type(error)(f"episode {index} (start {seed}): {error}") from error
        except Exception as error:
            error.add_note(f"while recording episode {index} (start {seed}) with policy {self.job.label}")
            raise
        success = told_success([step.success for step in steps])
        writer.stage(
            index,
            frames={c.name: torch.stack([f.images[c.name] for f in frames]) for c in self.world.spec.cameras},
            actions=self._told(torch.stack([step.consumed for step in steps])),
            poses=torch.stack([f.pose for f in frames]),
            states=torch.stack([f.state for f in frames]),
            rewards=torch.tensor([step.reward for step in steps]),
            frame_success=None if success is None else torch.tensor([False, *success]),
            success=None if success is None else any(success),
            terminated=steps[-1].terminated,
            truncated=steps[-1].truncated,
            instruction=self.world.instruction,
            provenance={
                "simulator": self.job.world,
                "policy": self.job.label,
                "cause": cause,
                "seed": str(seed),
                **({"scorer": "simulator"} if success is not None else {}),
                **self.job.provenance,
            },
        )

    def _told(self, actions: Tensor) -> Tensor:
        """Zeros where the recording is to be video alone."""
        return torch.zeros_like(actions) if self.job.provenance.get("actions") == UNKNOWN else actions

    def close(self) -> None:
        self.world.close()
        if self._rehearsal is not None:
            self._rehearsal.close()

    def _play(self, index: int, seed: int) -> tuple[str, list[SimFrame], list[SimStep]]:
        if self._executor is not None:
            return f"policy:{self.job.label}", *self._play_policy(self._executor, seed)
        assert self._scripted is not None
        cause, controller = self._scripted(index, seed)
        frames, steps = [self.world.reset(seed)], []
        while not steps or not (steps[-1].terminated or steps[-1].truncated):
            steps.append(self.world.drive(controller))
            frames.append(steps[-1].frame)
        return cause, frames, steps

    def _play_policy(self, executor: ChunkExecutor, seed: int) -> tuple[list[SimFrame], list[SimStep]]:
        frames, steps = [self.world.reset(seed)], []
        state, seeds = executor.reset(1), torch.tensor([seed])
        while not steps or not (steps[-1].terminated or steps[-1].truncated):
            with torch.no_grad():
                block, state = executor.block(observation(frames[-1:], [self.world.instruction]), state, seeds=seeds)
            steps.append(self.world.step(block[0]))
            frames.append(steps[-1].frame)
        return frames, steps

    def _rehearsal_world(self) -> SimulatedWorld:
        if self._rehearsal is None:
            self._rehearsal = self.job.make(rendered=False)
        return self._rehearsal


_worker: _Worker | None = None
_writer: DatasetWriter | None = None


def _start(job: _Job, spec: WorldSpec) -> None:
    """Once in each worker process. Ctrl-C is left to the parent, which lets running episodes finish."""
    global _worker, _writer
    end_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    _worker, _writer = _Worker(job), DatasetWriter(job.out, spec, crf=job.crf, resume=True)


def _record_one(index: int) -> None:
    assert _worker is not None and _writer is not None
    _worker.record(index, _writer)
