"""Cloned policies: they learn, they say what they do, they are stored exactly, and rows do not see each other."""

import pytest
import torch

from tests.oracles import GOAL, SPEC, DotScorer, ExactDotWorldModel, dot_tokenizer
from tests.policies.dots import clone, observe, small_policy, starts
from worldline.errors import CheckpointError
from worldline.policies import ClonedPolicy, load_policy
from worldline.rl_in_imagination.dream import Dream, rollout
from worldline.rl_in_imagination.success import episode_success
from worldline.types import Observation, Policy, StochasticPolicy

KINDS = ["bc", "discrete", "diffusion"]


@pytest.mark.parametrize("kind", KINDS)
def test_clone_learns_the_dot_world_and_reaches_the_goal_in_the_dream(kind: str) -> None:
    """The expert's rule depends on the dot's height, so a policy blind to its pixels ends elsewhere."""
    tokenizer = dot_tokenizer()
    dream = Dream(ExactDotWorldModel(tokenizer), tokenizer)
    begin = starts(24, seed=5)
    seeds = torch.arange(24)
    made = rollout(
        dream, clone(kind, steps=500 if kind == "discrete" else 250), DotScorer(), begin, frames=14, seeds=seeds
    )
    assert episode_success(made.probability > 0.5, persist=2).float().mean() >= 0.95
    assert (made.poses[:, -1, 0] > GOAL).float().mean() >= 0.95
    assert (made.poses[:, -1, 1] - 0.5).abs().max() < 0.1
    untrained = rollout(dream, small_policy(kind), DotScorer(), begin, frames=14, seeds=seeds)
    assert episode_success(untrained.probability > 0.5, persist=2).float().mean() < 0.5


def test_log_prob_is_the_gaussian_density_of_the_chunk() -> None:
    policy = small_policy("bc", sample=True)
    observation = starts(5)
    actions = torch.rand(5, 2, 2) * 2 - 1
    with torch.no_grad():
        features = policy.features(observation)
        mean, std = policy.head.net(features), policy.head.log_std.clamp(-3, 0).exp()
        expected = torch.distributions.MultivariateNormal(mean, torch.diag(std**2)).log_prob(actions.flatten(1))
        assert torch.allclose(policy.log_prob(observation, policy.reset(5), actions), expected, atol=1e-4)


def test_log_prob_of_samples_has_the_entropy_the_distribution_promises() -> None:
    """E[-log p(sample)] is the entropy: `act` and `log_prob` must speak of one distribution."""
    policy = small_policy("bc", sample=True)
    with torch.no_grad():
        policy.head.log_std.fill_(-2.5)  # narrow: the range cuts nothing off
        policy.head.net[-1].weight.zero_()
    n = 4000
    observation = observe(torch.full((n, 2), 0.5))
    actions, _ = policy.act(observation, policy.reset(n), seeds=torch.arange(n))
    with torch.no_grad():
        entropy = -policy.log_prob(observation, policy.reset(n), actions).mean()
        expected = policy.head.distribution(policy.features(starts(1))).entropy()[0]
    # four independent dimensions: the standard error of the mean is sqrt(4 * 0.5 / n) = 0.022
    assert abs(float(entropy - expected)) < 5 * 0.023


@pytest.mark.parametrize("kind", KINDS)
def test_saved_and_loaded_policy_acts_bit_for_bit_alike(kind: str, tmp_path) -> None:
    policy = small_policy(kind, sample=True)
    policy.save_pretrained(tmp_path / "p", provenance={"demonstrations": 3})
    again = load_policy(str(tmp_path / "p"), spec=SPEC)
    observation, seeds = starts(6), torch.arange(6)
    first, _ = policy.act(observation, policy.reset(6), seeds=seeds)
    second, _ = again.act(observation, again.reset(6), seeds=seeds)
    assert torch.equal(first, second) and again.spec == SPEC
    assert again.config == policy.config


def test_a_folder_that_is_no_policy_is_refused(tmp_path) -> None:
    with pytest.raises(CheckpointError, match="policy"):
        ClonedPolicy.from_pretrained(tmp_path / "nothing")
    tokenizer = dot_tokenizer()
    tokenizer.save_pretrained(tmp_path / "t")
    with pytest.raises(CheckpointError, match="policy is required here, this is a tokenizer"):
        ClonedPolicy.from_pretrained(tmp_path / "t")


@pytest.mark.parametrize("kind", ["bc", "diffusion"])
def test_chunk_is_clipped_to_the_action_range(kind: str) -> None:
    policy = small_policy(kind)
    with torch.no_grad():
        last = policy.head.net[-1] if kind == "bc" else policy.head.leave
        last.bias.copy_(torch.tensor([50.0, -50.0, 50.0, -50.0]))
    chunk, _ = policy.act(starts(3), policy.reset(3), seeds=torch.arange(3))
    assert torch.equal(chunk, torch.tensor([1.0, -1.0]).expand(3, 2, 2))


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_depends_on_itself_alone(kind: str) -> None:
    policy = small_policy(kind, sample=True)
    observation, seeds = starts(6), torch.arange(6) * 17 + 3
    whole, _ = policy.act(observation, policy.reset(6), seeds=seeds)
    order = torch.tensor([4, 0, 5, 2])
    some = Observation(
        images={"top": observation.images["top"][order]}, pose=observation.pose[order], instruction=("go right",) * 4
    )
    part, _ = policy.act(some, policy.reset(4), seeds=seeds[order])
    assert torch.allclose(part, whole[order], atol=1e-5)
    other, _ = policy.act(some, policy.reset(4), seeds=seeds[order] + 1)
    assert (other - part).abs().max() > 1e-3, "a sampling policy must depend on the seed"


def test_the_mean_policy_ignores_seeds() -> None:
    policy = small_policy("bc")
    a, _ = policy.act(starts(3), policy.reset(3), seeds=torch.arange(3))
    b, _ = policy.act(starts(3), policy.reset(3), seeds=torch.arange(3) + 9)
    assert torch.equal(a, b)


def test_cloned_policies_keep_the_contracts() -> None:
    assert isinstance(small_policy("bc"), StochasticPolicy)
    assert isinstance(small_policy("diffusion"), Policy)
