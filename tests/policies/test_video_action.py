"""A unified model as a policy: what it knows when it is asked at every frame and less often, plans that go on, rows by themselves."""

from dataclasses import replace

import pytest
import torch

from tests.oracles import SPEC, dot_tokenizer
from tests.policies.dots import observe, starts
from tests.worldmodels.test_video_action import F, H, build, scrambled
from worldline.errors import PolicyError
from worldline.executor import ChunkExecutor
from worldline.policies import VideoActionPolicy
from worldline.types import Observation, Policy


@pytest.fixture(scope="module", params=["uwm", "uva"])
def policy(request) -> VideoActionPolicy:
    return VideoActionPolicy(scrambled(build(request.param, action_steps=2)), dot_tokenizer())


def later(observation: Observation, dx: float) -> Observation:
    return observe(observation.pose + torch.tensor([dx, 0.0]))


def test_it_is_a_policy_that_hands_out_whole_blocks(policy):
    assert isinstance(policy, Policy) and policy.spec.control_steps == SPEC.control_steps
    first = starts(3)
    chunk, state = policy.act(first, policy.reset(3), seeds=torch.arange(3))
    assert chunk.shape == (3, F * 2, 2) and chunk.abs().max() <= 1 and len(state) == 3
    again, _ = policy.act(first, policy.reset(3), seeds=torch.arange(3))
    assert torch.equal(chunk, again)
    short, _ = policy.with_options(execute=1).act(first, policy.reset(3), seeds=torch.arange(3))
    assert torch.equal(short, chunk[:, :2])
    block, _ = ChunkExecutor(policy).block(first, ChunkExecutor(policy).reset(3), seeds=torch.arange(3))
    assert block.shape == (3, 2, 2)


def test_asked_at_every_frame_it_knows_those_before_and_asked_less_often_the_one_that_is_now(policy):
    first, seeds = starts(2), torch.arange(2)
    second = later(first, 0.1)
    for execute, remembers in ((1, True), (2, False)):
        acting = policy.with_options(execute=execute)
        _, state = acting.act(first, acting.reset(2), seeds=seeds)
        _, other = acting.act(later(first, -0.05), acting.reset(2), seeds=seeds)
        a, after = acting.act(second, state, seeds=seeds)
        b, _ = acting.act(second, other, seeds=seeds)
        assert torch.allclose(a, b, atol=1e-6) is not remembers
        assert after.tensors["count"].tolist() == [min(2, H) if remembers else 1] * 2


def test_a_plan_is_gone_on_from_and_a_row_that_begins_has_none(policy):
    warm = policy.with_options(warm=0.5, execute=1)
    first, seeds = starts(2), torch.arange(2)
    _, state = warm.act(first, warm.reset(2), seeds=seeds)
    second = later(first, 0.1)
    gone_on, _ = warm.act(second, state, seeds=seeds)
    other = replace(state, tensors={**state.tensors, "plan": state.tensors["plan"] + 1})
    assert not torch.allclose(warm.act(second, other, seeds=seeds)[0], gone_on)
    cold = policy.with_options(execute=1)
    assert torch.allclose(cold.act(second, other, seeds=seeds)[0], cold.act(second, state, seeds=seeds)[0])
    reset = state.where(torch.tensor([False, True]), warm.reset(2))
    mixed, _ = warm.act(second, reset, seeds=seeds)
    afresh, _ = warm.act(second, warm.reset(2), seeds=seeds)
    assert torch.allclose(mixed[0], gone_on[0], atol=1e-5) and torch.allclose(mixed[1], afresh[1], atol=1e-5)


def test_rows_act_by_themselves(policy):
    first, seeds = starts(4), torch.tensor([5, 6, 7, 8])
    together, _ = policy.act(first, policy.reset(4), seeds=seeds)
    one = Observation(
        images={c: x[2:3] for c, x in first.images.items()}, pose=first.pose[2:3], instruction=first.instruction[2:3]
    )
    apart, _ = policy.act(one, policy.reset(1), seeds=seeds[2:3])
    assert torch.allclose(together[2:3], apart, atol=1e-4)


def test_what_it_cannot_do_is_refused(policy):
    with pytest.raises(PolicyError, match="that learned to act is required"):
        VideoActionPolicy(build("uva", shares={"video": 1.0}), dot_tokenizer())
    with pytest.raises(PolicyError, match=r"execute: from 0 to 3 blocks \(the horizon\) required, got 9"):
        policy.with_options(execute=9)
