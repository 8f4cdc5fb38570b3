"""The executor sends a policy's actions in the policy's order, a block a frame, and asks each row again in its own time."""

import pytest
import torch
from torch import Tensor

from tests.oracles import SPEC, K, draw
from worldline.errors import PolicyError
from worldline.executor import ChunkExecutor
from worldline.types import Observation, TensorState


class Script:
    """Row with instruction '7' emits 700, 701, ... ; remembers which rows were asked, and with which seeds."""

    def __init__(self, m: int, spec=SPEC) -> None:
        self.m, self.spec = m, spec
        self.asked: list[tuple[tuple[str, ...], list[int]]] = []

    def reset(self, n: int) -> TensorState:
        return TensorState(tensors={"next": torch.zeros(n)}, rows=n)

    def act(self, observation: Observation, state: TensorState, *, seeds: Tensor) -> tuple[Tensor, TensorState]:
        self.asked.append((observation.instruction, seeds.tolist()))
        first = torch.tensor([100.0 * int(i) for i in observation.instruction]) + state.tensors["next"]
        numbers = first[:, None] + torch.arange(self.m)
        chunk = torch.stack([numbers, -numbers], -1)
        return chunk, TensorState(tensors={"next": state.tensors["next"] + self.m}, rows=len(state))


def seen(*names: str) -> Observation:
    position = torch.full((len(names), 2), 0.5)
    return Observation(images={"top": draw(position)}, pose=position, instruction=names)


def run(executor: ChunkExecutor, state, observation: Observation, blocks: int):
    out = []
    for _ in range(blocks):
        block, state = executor.block(observation, state, seeds=torch.arange(len(observation)))
        assert block.shape == (len(observation), K, 2)
        out.append(block)
    return torch.cat(out, 1)[..., 0].long(), state


@pytest.mark.parametrize("m", [2, 4, 8])
def test_actions_go_out_in_exactly_the_chunks_order(m: int) -> None:
    numbers, state = run(ChunkExecutor(Script(m)), ChunkExecutor(Script(m)).reset(2), seen("1", "2"), 9)
    assert numbers.tolist() == [list(range(100, 118)), list(range(200, 218))]
    assert state.asked.tolist() == [-(-18 // m)] * 2


def test_the_end_of_a_chunk_that_fills_no_block_is_not_sent() -> None:
    numbers, _ = run(ChunkExecutor(Script(5)), ChunkExecutor(Script(5)).reset(1), seen("1"), 4)
    assert numbers.tolist() == [[100, 101, 102, 103, 105, 106, 107, 108]]


def test_execute_sends_only_the_beginning_of_each_chunk() -> None:
    executor = ChunkExecutor(Script(8), execute=4)
    numbers, state = run(executor, executor.reset(1), seen("1"), 4)
    assert numbers.tolist() == [[100, 101, 102, 103, 108, 109, 110, 111]]
    assert state.asked.tolist() == [2]


def test_rows_are_asked_again_each_in_its_own_time() -> None:
    """Row 1 starts over after one block: from then on the two rows are asked at different frames."""
    policy = Script(4)
    executor = ChunkExecutor(policy)
    observation, seeds = seen("1", "2"), torch.tensor([5, 6])
    first, state = executor.block(observation, executor.reset(2), seeds=seeds)
    fresh = executor.block(observation, executor.reset(2), seeds=seeds)[1]
    state = state.where(torch.tensor([False, True]), fresh)
    blocks = [first]
    state = state.index(torch.tensor([0, 1]))
    # drop row 1's queue: it must be asked, row 0 must not
    state = type(state)(
        policy=state.policy, queue=state.queue, queued=torch.tensor([int(state.queued[0]), 0]), asked=state.asked
    )
    policy.asked.clear()
    for _ in range(3):
        block, state = executor.block(observation, state, seeds=seeds)
        blocks.append(block)
    assert [names for names, _ in policy.asked] == [("2",), ("1",), ("2",)]
    numbers = torch.cat(blocks, 1)[..., 0].long()
    assert numbers[0].tolist() == list(range(100, 108))
    assert numbers[1].tolist() == [200, 201, 204, 205, 206, 207, 208, 209]


def test_a_row_can_be_reset_to_a_new_episode() -> None:
    executor = ChunkExecutor(Script(6))
    observation = seen("1", "2")
    _, state = run(executor, executor.reset(2), observation, 1)
    state = state.where(torch.tensor([False, True]), executor.reset(2))
    numbers, _ = run(executor, state, observation, 3)
    assert numbers.tolist() == [[102, 103, 104, 105, 106, 107], [200, 201, 202, 203, 204, 205]]


def test_a_forked_row_goes_on_by_itself() -> None:
    executor = ChunkExecutor(Script(4))
    _, state = run(executor, executor.reset(2), seen("1", "2"), 1)
    numbers, _ = run(executor, state.index(torch.tensor([1, 1, 0])), seen("2", "2", "1"), 2)
    assert numbers.tolist() == [[202, 203, 204, 205], [202, 203, 204, 205], [102, 103, 104, 105]]


def test_seeds_differ_by_row_and_by_call_and_not_by_neighbour() -> None:
    policy = Script(2)
    executor = ChunkExecutor(policy)
    run(executor, executor.reset(3), seen("1", "2", "3"), 4)
    seeds = [s for _, call in policy.asked for s in call]
    assert len(set(seeds)) == 12
    alone = Script(2)
    executor = ChunkExecutor(alone)
    state = executor.reset(1)
    for _ in range(4):
        _, state = executor.block(seen("3"), state, seeds=torch.tensor([2]))
    assert [call[0] for _, call in alone.asked] == [call[2] for _, call in policy.asked]


def test_a_chunk_shorter_than_a_block_is_refused() -> None:
    executor = ChunkExecutor(Script(1))
    with pytest.raises(PolicyError, match=r"at least 2 actions is required \(k = 2\), the policy returned 1"):
        executor.block(seen("1"), executor.reset(1), seeds=torch.arange(1))
    executor = ChunkExecutor(Script(4), execute=8)
    with pytest.raises(PolicyError, match="at least 8 actions is required"):
        executor.block(seen("1"), executor.reset(1), seeds=torch.arange(1))


@pytest.mark.parametrize("execute", [1, 3, 0, -2])
def test_execute_must_be_whole_blocks(execute: int) -> None:
    with pytest.raises(PolicyError, match="multiple of the block of 2"):
        ChunkExecutor(Script(8), execute=execute)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_actions_that_are_not_finite_are_refused(value: float) -> None:
    class Broken(Script):
        def act(self, observation, state, *, seeds):
            chunk, state = super().act(observation, state, seeds=seeds)
            chunk[0, 1, 0] = value
            return chunk, state

    executor = ChunkExecutor(Broken(4))
    with pytest.raises(PolicyError, match="NaN or infinite actions in 1 places"):
        executor.block(seen("1"), executor.reset(1), seeds=torch.arange(1))
