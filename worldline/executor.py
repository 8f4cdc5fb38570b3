"""One executor for every policy, the same in simulator and dream: queues a policy's chunks and hands out action blocks.

    policy chunk (m actions)   | a0 a1 a2 a3 a4 a5 a6 a7 |            m = 8, execute = 8, k = 4
    blocks handed out          |--block 0--|--block 1--|  replan     one block a frame

A policy is asked again when a row's queue holds fewer than k actions; rows are asked independently of each other.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from worldline.errors import PolicyError
from worldline.types import Observation, Policy


@dataclass(frozen=True, slots=True, kw_only=True)
class ExecutorState:
    """`queue` holds the actions still to be sent, left-aligned; `queued` how many; `asked` how often a row replanned."""

    policy: Any
    queue: Float[Tensor, "n q a"]
    queued: Int[Tensor, " n"]
    asked: Int[Tensor, " n"]

    def __len__(self) -> int:
        return len(self.queued)

    def index(self, rows: Int[Tensor, " r"]) -> "ExecutorState":
        return ExecutorState(
            policy=self.policy.index(rows), queue=self.queue[rows], queued=self.queued[rows], asked=self.asked[rows]
        )

    def where(self, mask: Bool[Tensor, " n"], other: "ExecutorState") -> "ExecutorState":
        width = max(self.queue.shape[1], other.queue.shape[1])
        return ExecutorState(
            policy=self.policy.where(mask, other.policy),
            queue=torch.where(mask[:, None, None], _widen(other.queue, width), _widen(self.queue, width)),
            queued=torch.where(mask, other.queued, self.queued),
            asked=torch.where(mask, other.asked, self.asked),
        )


class ChunkExecutor:
    """Turns a `Policy` into action blocks of k = `policy.spec.control_steps`.

    `execute`: how many actions of a chunk are sent before the policy is asked again (default: all of them, rounded
    down to whole blocks). A chunk shorter than k raises `PolicyError`.
    """

    def __init__(self, policy: Policy, *, execute: int | None = None) -> None:
        self.policy = policy
        self.execute = execute
        self.k = policy.spec.control_steps
        if execute is not None and (execute < self.k or execute % self.k):
            raise PolicyError(f"execute must be a multiple of the block of {self.k} actions, got {execute}")

    def reset(self, n: int) -> ExecutorState:
        return self.resumed(self.policy.reset(n))

    def resumed(self, policy: Any) -> ExecutorState:
        """From a policy's own state, with nothing left to send."""
        n = len(policy)
        zeros = torch.zeros(n, dtype=torch.long)
        return ExecutorState(
            policy=policy,
            queue=torch.zeros(n, self.k, self.policy.spec.action.dim),
            queued=zeros,
            asked=zeros.clone(),
        )

    def block(
        self, observation: Observation, state: ExecutorState, *, seeds: Int[Tensor, " n"]
    ) -> tuple[Float[Tensor, "n k a"], ExecutorState]:
        """The next action block of every row. `seeds` name the row's episode; how often it was asked is mixed in."""
        empty = (state.queued < self.k).nonzero().flatten()
        if len(empty):
            state = self._replan(observation, state, empty, seeds)
        block, rest = state.queue[:, : self.k], state.queue[:, self.k :]
        queue = torch.cat([rest, torch.zeros_like(block)], dim=1)
        return block.clone(), replace(state, queue=queue, queued=state.queued - self.k)

    def _replan(
        self, observation: Observation, state: ExecutorState, rows: Int[Tensor, " r"], seeds: Int[Tensor, " n"]
    ) -> ExecutorState:
        every_row = len(rows) == len(state)
        seen = observation if every_row else index_observation(observation, rows)
        held = state.policy if every_row else state.policy.index(rows)
        call_seeds = (seeds[rows] * 1_000_003 + state.asked[rows]) & 0x7FFF_FFFF_FFFF_FFFF
        chunk, held = self.policy.act(seen, held, seeds=call_seeds)
        m = self.execute or chunk.shape[1] // self.k * self.k
        if chunk.shape[1] < max(m, self.k):
            raise PolicyError(
                f"a chunk of at least {max(m, self.k)} actions is required (k = {self.k}), the policy returned {chunk.shape[1]}"
            )
        if chunk.shape[2] != self.policy.spec.action.dim:
            raise PolicyError(
                f"actions of {self.policy.spec.action.dim} dimensions required, the policy returned {chunk.shape[2]}"
            )
        if not torch.isfinite(chunk).all():
            raise PolicyError(
                f"the policy returned NaN or infinite actions in {int((~torch.isfinite(chunk)).sum())} places"
            )
        width = max(m, state.queue.shape[1])
        queue = torch.zeros(len(state), width, chunk.shape[2])
        queue[:, : state.queue.shape[1]] = state.queue
        queue[rows] = torch.nn.functional.pad(chunk[:, :m].to(queue), (0, 0, 0, width - m))
        queued, asked = state.queued.clone(), state.asked.clone()
        queued[rows], asked[rows] = m, asked[rows] + 1
        if every_row:
            return ExecutorState(policy=held, queue=queue, queued=queued, asked=asked)
        mask = torch.zeros(len(state), dtype=torch.bool)
        mask[rows] = True
        position = torch.zeros(len(state), dtype=torch.long)
        position[rows] = torch.arange(len(rows))
        merged = state.policy.where(mask, held.index(position))
        return ExecutorState(policy=merged, queue=queue, queued=queued, asked=asked)


def _widen(queue: Tensor, width: int) -> Tensor:
    """Room for `width` actions: queues differ in length between a fresh state and one that holds a chunk."""
    return torch.nn.functional.pad(queue, (0, 0, 0, width - queue.shape[1]))


def index_observation(observation: Observation, rows: Int[Tensor, " r"]) -> Observation:
    """The rows named, in that order."""
    return Observation(
        images={camera: image[rows] for camera, image in observation.images.items()},
        pose=observation.pose[rows],
        instruction=tuple(observation.instruction[int(i)] for i in rows),
    )
