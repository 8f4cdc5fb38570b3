"""The score of cloned policies: of a Gaussian its exact slope, of a diffusion policy what its denoiser implies."""

import pytest
import torch

from tests.policies.dots import clone, small_policy, starts
from worldline.errors import PolicyError
from worldline.types import ScorePolicy


def test_a_gaussian_policys_score_is_the_slope_of_its_log_density():
    policy, seen = small_policy("bc"), starts(5)
    actions = (torch.rand(5, 2, 2) * 2 - 1).requires_grad_()
    (slope,) = torch.autograd.grad(policy.log_prob(seen, policy.reset(5), actions).sum(), actions)
    assert isinstance(policy, ScorePolicy)
    assert torch.allclose(policy.score(seen, policy.reset(5), actions.detach()), slope, rtol=1e-4, atol=1e-4)


def test_a_diffusion_policys_score_is_the_slope_of_its_smoothed_density():
    """With an exact denoiser of chunks N(m, s^2) the smoothed density of x = (1 - l) a is N((1 - l) m, (1 - l)^2 s^2 + l^2)."""
    policy, seen, mean, std, level = small_policy("diffusion"), starts(4), 0.2, 0.3, 0.1

    def exact(features, x, told):
        assert torch.allclose(told, torch.tensor(level))
        gain = (1 - level) * std**2 / ((1 - level) ** 2 * std**2 + level**2)
        return mean + gain * (x - (1 - level) * mean)

    policy.head.predict = exact
    actions = (torch.rand(4, 2, 2) * 2 - 1).requires_grad_()
    z = policy.action_normalizer.normalize(actions)
    smoothed = torch.distributions.Normal((1 - level) * mean, ((1 - level) ** 2 * std**2 + level**2) ** 0.5)
    (slope,) = torch.autograd.grad(smoothed.log_prob((1 - level) * z).sum(), actions)
    assert torch.allclose(policy.score(seen, policy.reset(4), actions.detach()), slope, rtol=1e-4, atol=1e-4)


def test_a_trained_diffusion_policys_score_points_to_what_it_does():
    policy, seen = clone("diffusion"), starts(16)
    own, _ = policy.act(seen, policy.reset(16), seeds=torch.arange(16))
    away = (own + 0.4 * torch.randn(own.shape, generator=torch.Generator().manual_seed(0))).clamp(-1, 1)
    slope = policy.score(seen, policy.reset(16), away)
    agree = torch.nn.functional.cosine_similarity(slope.flatten(1), (own - away).flatten(1))
    assert agree.mean() > 0.7


def test_bins_have_no_score():
    policy = small_policy("discrete")
    with pytest.raises(PolicyError, match="smooth density"):
        policy.score(starts(2), policy.reset(2), torch.zeros(2, 2, 2))
