"""Several worlds in lockstep, in this process or spread over worker processes; the policy stays in the caller's process.

Drawing the pictures is the cost: with two 64x64 Meta-World cameras a frame takes 25-30 ms to simulate and draw, a small
convolutional policy 2-5 ms. So the worlds are what is spread (two processes on two cores were 1.7 times as fast),
pictures of 12 KB come back through pipes, and the policy is asked once for all rows together. It needs no pickling and may
live on a GPU.
"""

import multiprocessing
import os
import signal
import threading
from collections.abc import Mapping, Sequence
from multiprocessing.connection import Connection
from multiprocessing.context import BaseContext
from types import TracebackType
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from worldline.errors import SimulatorError, WorldlineError
from worldline.sim.base import SimFrame, SimStep, SimulatedWorld, make_world
from worldline.types import WorldSpec


def worker_context() -> BaseContext:
    """A way to start processes that is safe after threads and GL contexts exist; torch is imported once for all."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["worldline.sim.workers"])
    return context


def end_with_parent() -> None:
    """End this worker as soon as the process that started it is gone, killed or not.

    Workers of a `ProcessPoolExecutor` would wait forever for the next task, for they hold both ends of its queue, with a simulator of
    hundreds of megabytes each.
    """
    parent = multiprocessing.parent_process()
    assert parent is not None, "only a worker process ends with its parent"

    def follow() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


class WorldPool:
    """`rows` copies of one world. Making them costs about half a second each: keep the pool for several policies.

        with WorldPool("metaworld/drawer-open-v3", rows=8, processes=2) as pool:
            results = {name: rollout_policy(pool, policy, seeds=seeds) for name, policy in policies.items()}

    `processes=0` keeps the worlds in this process. Row r lives in process r mod `processes`.
    """

    def __init__(
        self,
        name: str,
        *,
        rows: int = 8,
        processes: int = 0,
        cameras: Sequence[str] | None = None,
        size: int = 64,
        horizon: int = 160,
        control_steps: int = 4,
    ) -> None:
        if rows < 1 or processes < 0:
            raise SimulatorError(f"rows >= 1 and processes >= 0 required, got {rows} and {processes}.")
        self.name = name
        self.rows = rows
        settings = {"cameras": cameras, "size": size, "horizon": horizon, "control_steps": control_steps}
        first = make_world(name, **settings)  # here even for many processes: mistakes show before any process starts
        self.spec: WorldSpec = first.spec
        self._hosts: list[_Host | _RemoteHost] = []
        if processes == 0:
            self._hosts = [_Host([first, *(make_world(name, **settings) for _ in range(rows - 1))])]
            return
        first.close()
        context = worker_context()
        processes = min(processes, rows)
        for p in range(processes):
            self._hosts.append(_RemoteHost(context, name, settings, count=len(range(p, rows, processes))))

    def reset(self, seeds: Mapping[int, int]) -> dict[int, SimFrame]:
        """Start row r from `seeds[r]`, for the rows named."""
        return self._each("reset", seeds)

    def step(self, blocks: Mapping[int, Float[Tensor, "k a"]]) -> dict[int, SimStep]:
        """Send `blocks[r]` to row r, for the rows named; all processes work at the same time."""
        return self._each("step", blocks)

    def instructions(self, rows: Sequence[int]) -> dict[int, str]:
        """What the episodes of the rows named ask for; in some worlds it changes with the seed."""
        return self._each("instruction", dict.fromkeys(rows))

    def close(self) -> None:
        for host in self._hosts:
            host.close()
        self._hosts = []

    def __enter__(self) -> "WorldPool":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def _each(self, method: str, arguments: Mapping[int, Any]) -> dict[int, Any]:
        hosts = len(self._hosts)
        asked = [{r // hosts: v for r, v in arguments.items() if r % hosts == h} for h in range(hosts)]
        for host, work in zip(self._hosts, asked):
            host.send(method, work)
        answers: dict[int, Any] = {}
        errors: list[WorldlineError] = []
        for h, host in enumerate(self._hosts):  # every answer is fetched, or the next call would get this one's
            try:
                answers |= {local * hosts + h: answer for local, answer in host.receive().items()}
            except WorldlineError as error:
                errors.append(error)
        if errors:
            raise errors[0]
        return {row: answers[row] for row in arguments}


class _Host:
    """Worlds in this process."""

    def __init__(self, worlds: Sequence[SimulatedWorld]) -> None:
        self.worlds = worlds
        self._answer: dict[int, Any] = {}

    def send(self, method: str, work: Mapping[int, Any]) -> None:
        if method == "instruction":
            self._answer = {row: self.worlds[row].instruction for row in work}
        else:
            self._answer = {row: getattr(self.worlds[row], method)(value) for row, value in work.items()}

    def receive(self) -> dict[int, Any]:
        return self._answer

    def close(self) -> None:
        for world in self.worlds:
            world.close()


class _RemoteHost:
    """Worlds in a worker process, reached through a pipe."""

    def __init__(self, context: Any, name: str, settings: Mapping[str, Any], *, count: int) -> None:
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, name, dict(settings), count), daemon=True)
        self._process.start()
        theirs.close()

    def send(self, method: str, work: Mapping[int, Any]) -> None:
        try:
            self._pipe.send((method, {row: _plain(value) for row, value in work.items()}))
        except OSError as error:
            raise self._died() from error

    def receive(self) -> dict[int, Any]:
        try:
            answer = self._pipe.recv()
        except (EOFError, OSError) as error:
            raise self._died() from error
        if isinstance(answer, WorldlineError):
            raise answer
        return {row: _from_plain(value) for row, value in answer.items()}

    def close(self) -> None:
        self._pipe.close()
        self._process.join(timeout=10)
        if self._process.is_alive():
            self._process.terminate()

    def _died(self) -> SimulatorError:
        return SimulatorError(
            f"a simulator process died (exit code {self._process.exitcode}); its own message is above. "
            "Use fewer rows if memory is short, or processes=0 to see the error here."
        )


def _serve(pipe: Connection, name: str, settings: dict[str, Any], count: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    host = _Host([make_world(name, **settings) for _ in range(count)])
    try:
        while True:
            try:
                method, work = pipe.recv()
            except EOFError:  # the pool was closed, or its process is gone
                return
            try:
                host.send(method, {row: _from_plain(value) for row, value in work.items()})
                pipe.send({row: _plain(answer) for row, answer in host.receive().items()})
            except WorldlineError as error:
                pipe.send(error)
    finally:
        host.close()


def _plain(value: Any) -> Any:
    """Tensors as arrays: sent by value, where torch would open a shared-memory file for each."""
    match value:
        case Tensor():
            return value.numpy()
        case SimFrame():
            images = {camera: image.numpy() for camera, image in value.images.items()}
            return ("frame", images, value.pose.numpy(), value.state.numpy())
        case SimStep():
            rest = (value.sent, value.reward, value.success, value.terminated, value.truncated)
            return ("step", _plain(value.frame), value.consumed.numpy(), rest)
        case _:
            return value


def _from_plain(value: Any) -> Any:
    match value:
        case np.ndarray():
            return torch.from_numpy(value)
        case ("frame", images, pose, state):
            return SimFrame(
                images={camera: torch.from_numpy(image) for camera, image in images.items()},
                pose=torch.from_numpy(pose),
                state=torch.from_numpy(state),
            )
        case ("step", frame, consumed, (sent, reward, success, terminated, truncated)):
            return SimStep(
                frame=_from_plain(frame),
                consumed=torch.from_numpy(consumed),
                sent=sent,
                reward=reward,
                success=success,
                terminated=terminated,
                truncated=truncated,
            )
        case _:
            return value
