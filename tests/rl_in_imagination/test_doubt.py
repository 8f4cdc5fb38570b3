"""Doubt: two denoisings that disagree. In a world whose noise grows beyond a line, episodes end there and count as failures."""

from dataclasses import replace

import pytest
import torch

from tests.oracles import GOAL, DotScorer, ExactDotWorldModel, dot_tokenizer
from tests.policies.dots import small_policy, starts
from worldline.diffusion import row_noise
from worldline.rl_in_imagination.collect import collect
from worldline.rl_in_imagination.doubt import Doubt, calibrate
from worldline.rl_in_imagination.dream import Dream, rollout
from worldline.rl_in_imagination.episodes import ImaginedEpisodes
from worldline.types import Imagination

KNOWN = 0.6  # to the right of this x the world model knows nothing


class Unsure(ExactDotWorldModel):
    """Exact left of `KNOWN`; right of it the frames are noise that depends on the seed."""

    def imagine(self, state, actions, *, seeds):
        state, made = super().imagine(state, actions, seeds=seeds)
        lost = (made.poses[:, -1, 0] > KNOWN).float()
        latents = {
            c: z + lost.view(-1, *[1] * (z.ndim - 1)) * row_noise(seeds, 0, 0, tuple(z.shape[1:]))
            for c, z in made.latents.items()
        }
        return state, Imagination(latents=latents, poses=made.poses)

    def with_sampling(self, **changes):
        if changes["solver_steps"] > 4:
            raise ValueError("a level that training never shows")
        return self


@pytest.fixture(scope="module")
def dream() -> Dream:
    tokenizer = dot_tokenizer()
    return Dream(Unsure(tokenizer), tokenizer)


def right(n: int, t: int) -> torch.Tensor:
    return torch.tensor([1.0, 0.0]).expand(n, t, 2, 2)


def test_doubt_is_nothing_where_all_is_known_and_large_beyond(dream: Dream) -> None:
    doubt, first = Doubt.of(dream), starts(8)
    doubts, frames = doubt.along(first, right(8, 6), seeds=torch.arange(8))
    places = first.pose[:, :1] + 0.12 * torch.arange(1, 7)
    assert (doubts[places < KNOWN - 1e-4] == 0).all() and (doubts[places > KNOWN + 1e-4] > 0.1).all()
    assert frames["top"].shape[:2] == (8, 6)
    again, _ = doubt.along(first, right(8, 6), seeds=torch.arange(8))
    assert torch.equal(again, doubts)
    with pytest.raises(ValueError, match="training never shows"):
        Doubt.of(dream, solver_steps=9)


def test_the_limit_is_that_of_real_episodes_and_doubt_is_held_against_error(dream: Dream) -> None:
    first, doubt = starts(16), Doubt.of(dream)
    exact = Dream(ExactDotWorldModel(dream.tokenizer), dream.tokenizer)
    _, real = Doubt(dream=exact, sampler=exact.world_model).along(first, right(16, 5), seeds=torch.arange(16))
    found = calibrate(doubt, first, real, right(16, 5), quantile=0.9)
    assert found.limit > 0.1 and found.episodes == 16
    assert found.correlation is not None and found.correlation > 0.8  # noise is what is wrong with these frames
    assert (
        found.correlation_between is not None and found.correlation_between > 0.2
    )  # who began further right is lost earlier


def test_doubt_that_merely_grows_tells_no_dreams_apart(dream: Dream) -> None:
    """Doubt and error grow with time and with nothing else: correlated over all frames, and unrelated between dreams."""
    generator = torch.Generator().manual_seed(0)
    n, t = 64, 12
    clock = torch.arange(1, t + 1).float().expand(n, t)
    doubts, level = (clock * (1 + 0.1 * torch.rand(n, t, generator=generator)) for _ in range(2))

    class Growing(Doubt):
        def along(self, first, actions, *, seeds, progress=None):
            return doubts, {"top": level.view(n, t, 1, 1, 1).expand(-1, -1, 3, 4, 4)}

    growing = Growing(dream=dream, sampler=None)
    found = calibrate(growing, starts(n), {"top": torch.zeros(n, t, 3, 4, 4)}, torch.zeros(n, t, 1, 2), batch=n)
    assert found.correlation is not None and found.correlation > 0.9
    assert found.correlation_between is not None and abs(found.correlation_between) < 0.15


def test_an_episode_that_leaves_the_data_ends_as_a_failure(dream: Dream) -> None:
    policy = small_policy("bc", sample=True)
    with torch.no_grad():
        policy.head.net[-1].bias.add_(torch.tensor([0.9, 0.0] * 2))
    options = {"rows": 16, "horizon": 12}
    trusting, careful = (
        ImaginedEpisodes(dream, DotScorer(), starts(32, seed=2), doubt=doubt, **options)
        for doubt in (None, replace(Doubt.of(dream), limit=0.05))
    )
    one = collect(trusting, policy, None, decisions=8, seed=0, again=False)
    two = collect(careful, policy, None, decisions=8, seed=0, again=False)
    assert not one.left.any() and two.left.any()
    assert not two.terminated.any() and two.reward.max() == 0  # the goal lies beyond what is known
    assert two.outcomes()["left"] > 0.8 > 0 == two.outcomes()["success"]
    ended = two.left & two.live
    assert (two.pose[ended][:, 0] > KNOWN - 0.13).all() and (two.pose[ended][:, 0] < GOAL).all()
    assert (ended <= two.ended).all() and not (two.left & two.truncated).any()


def test_a_check_counts_what_leaves_the_data_as_a_failure_too(dream: Dream) -> None:
    """All reach the goal (x above 0.75) where the world model knows nothing: a check that is told so believes none of them."""
    n = 8
    options = {"frames": 12, "seeds": torch.arange(n), "actions": right(n, 11)}
    exact = Dream(ExactDotWorldModel(dream.tokenizer), dream.tokenizer)
    believed = rollout(exact, None, DotScorer(), starts(n), **options).probability
    doubt = replace(Doubt.of(dream), limit=0.05)
    doubted = rollout(
        exact, None, DotScorer(), starts(n), leaves=lambda s, b: doubt.exceeded(s, b), **options
    ).probability
    assert (believed.amax(1) == 1).all() and (doubted == 0).all()
    assert torch.equal(rollout(exact, None, DotScorer(), starts(n), leaves=lambda s, b: torch.zeros(n, dtype=torch.bool), **options).probability, believed)  # fmt: skip


def test_what_comes_after_an_episode_s_end_does_not_set_the_limit(dream: Dream) -> None:
    first, doubt = starts(8), Doubt.of(dream)
    _, real = doubt.along(first, right(8, 6), seeds=torch.arange(8))
    within = int((KNOWN - float(first.pose[:, 0].max())) / 0.12)  # frames for which all are known
    found = calibrate(doubt, first, real, right(8, 6), ends=(max(1, within),) * 8)
    assert found.limit < 0.05 < calibrate(doubt, first, real, right(8, 6)).limit
