"""Best of N in the exact dot world: a policy that knows nothing arrives once its chunks are tried first."""

from dataclasses import dataclass

import pytest
import torch

from tests.oracles import SPEC, DotScorer, ExactDotWorldModel, dot_tokenizer
from tests.policies.dots import starts
from worldline.diffusion import row_noise
from worldline.errors import PolicyError
from worldline.executor import ChunkExecutor
from worldline.rl_in_imagination.dream import Dream, rollout
from worldline.rl_in_imagination.planning import BestOfN
from worldline.types import Policy, Score, TensorState


class Drunk:
    """Moves anywhere, by the seed alone."""

    spec = SPEC

    def reset(self, n):
        return TensorState(tensors={}, rows=n)

    def act(self, observation, state, *, seeds):
        way = row_noise(seeds, 0, 0, (2,)).clamp(-1, 1)
        return way[:, None].expand(-1, 4, -1).clone(), state


@dataclass(frozen=True)
class Distance(DotScorer):
    """Likes what is far to the right, at once."""

    def step(self, state, observation, action):
        return state, Score(reward=observation.pose[:, 0], success=observation.pose[:, 0])


@pytest.fixture(scope="module")
def dream() -> Dream:
    tokenizer = dot_tokenizer()
    return Dream(ExactDotWorldModel(tokenizer), tokenizer)


def reached(policy: Policy, dream: Dream) -> torch.Tensor:
    made = rollout(dream, policy, None, starts(48), frames=13, seeds=torch.arange(48))
    return made.poses[:, -1, 0]


def test_it_is_a_policy_and_the_first_candidate_is_the_policy_alone(dream):
    alone, planned = Drunk(), BestOfN(Drunk(), dream, Distance(), candidates=1)
    assert isinstance(planned, Policy)
    first, seeds = starts(6), torch.arange(6) + 40
    a, _ = alone.act(first, alone.reset(6), seeds=seeds)
    b, _ = planned.act(first, planned.reset(6), seeds=seeds)
    assert torch.equal(a, b)


def test_a_scorer_that_cannot_tell_changes_nothing(dream):
    class Blind(Distance):
        def step(self, state, observation, action):
            same = torch.full((len(observation),), 0.3)
            return state, Score(reward=same, success=same)

    alone, planned = Drunk(), BestOfN(Drunk(), dream, Blind(), candidates=8)
    first, seeds = starts(6), torch.arange(6)
    a, b = alone.act(first, alone.reset(6), seeds=seeds)[0], planned.act(first, planned.reset(6), seeds=seeds)[0]
    assert torch.equal(a, b)


def test_trying_chunks_first_brings_a_drunk_to_the_goal(dream):
    ends = {n: reached(BestOfN(Drunk(), dream, Distance(), candidates=n), dream).mean() for n in (1, 2, 16)}
    assert ends[16] > ends[2] + 0.05 > ends[1] + 0.1


def test_a_row_is_planned_for_by_itself(dream):
    planned, first, seeds = BestOfN(Drunk(), dream, Distance(), candidates=4), starts(6), torch.arange(6)
    together, _ = planned.act(first, planned.reset(6), seeds=seeds)
    from worldline.executor import index_observation

    rows = torch.tensor([4, 1])
    apart, _ = planned.act(index_observation(first, rows), planned.reset(2), seeds=seeds[rows])
    assert torch.equal(together[rows], apart)


def test_looking_beyond_the_chunk_follows_the_policy(dream):
    seen = []

    class Watched(Drunk):
        def act(self, observation, state, *, seeds):
            seen.append(len(observation))
            return super().act(observation, state, seeds=seeds)

    planned = BestOfN(Watched(), dream, Distance(), candidates=3, beyond=4)
    planned.act(starts(5), planned.reset(5), seeds=torch.arange(5))
    assert seen == [15, 15, 15]  # the candidates, then a chunk of two blocks twice
    assert ChunkExecutor(planned).k == 2


def test_spread_makes_candidates_of_a_policy_that_never_draws(dream):
    class Still(Drunk):
        def act(self, observation, state, *, seeds):
            return torch.zeros(len(observation), 4, 2), state

    assert float(reached(BestOfN(Still(), dream, Distance(), candidates=8, spread=0.5), dream).mean()) > 0.6
    with pytest.raises(PolicyError, match="candidates of at least 1"):
        BestOfN(Still(), dream, Distance(), candidates=0)
