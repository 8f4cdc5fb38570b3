"""Dreams with known log-probability: the density of what was sampled, by the network that sampled it; and its gradient."""

import math
from dataclasses import replace

import pytest
import torch

from tests.oracles import dot_clip, dot_tokenizer, encoded, gaussian_denoiser
from tests.worldmodels.test_autoregressive import scrambled, small_model
from worldline.diffusion import LevelDistribution, linear_path, solver_levels
from worldline.diffusion.stochastic import gaussian_log_prob, renoised_std, sample_renoised
from worldline.errors import SpecMismatch
from worldline.worldmodels.memory import MemoryConfig
from worldline.worldmodels.traced import log_prob, sample_traced, step_log_probs, trace_means

# --- the sampler ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("eta", [0.3, 1.0])
def test_steps_have_the_gaussian_density_and_samples_the_spread_of_the_data(eta):
    """Data N(0.4, 0.5^2), its exact denoiser: every state has the path's marginal, and each step the density that is said."""
    generator = torch.Generator().manual_seed(0)
    predict, levels, n = gaussian_denoiser(linear_path, 0.4, 0.5), solver_levels(160).tolist(), 20_000
    made = sample_renoised(
        predict, torch.randn(n, 1, generator=generator), levels, linear_path, eta=eta,
        noise=lambda step: torch.randn(n, 1, generator=generator),
    )  # fmt: skip
    assert len(made.x) == 160 and len(made.mean) == 159
    for x, level in zip(made.x[1:], levels[1:]):
        marginal = math.sqrt((1 - level) ** 2 * 0.25 + level**2)
        assert float(x.mean()) == pytest.approx(0.4 * (1 - level), abs=0.03)
        assert float(x.std()) == pytest.approx(marginal, rel=0.05)
    x, mean, std = made.x[3], made.mean[2], renoised_std(levels[2], levels[3], linear_path, eta=eta)
    assert torch.allclose(
        gaussian_log_prob(x, mean, std), torch.distributions.Normal(mean, std).log_prob(x).sum(-1), atol=1e-5
    )
    assert float(((x - mean) / std).std()) == pytest.approx(1, rel=0.02)


# --- the world model --------------------------------------------------------------------------------------------------


def traced_model(**options):
    target = LevelDistribution(pure=0.5, low=0.02)
    return scrambled(small_model(target=target, **options))


def begin(n: int, given: int, frames: int, seed: int = 3):
    clip = encoded(dot_clip(n, given + frames, seed), dot_tokenizer())
    seen = replace(
        clip, frames={c: z[:, :given] for c, z in clip.frames.items()}, poses=clip.poses[:, :given],
        actions=clip.actions[:, : given - 1],
    )  # fmt: skip
    return seen, clip.actions[:, given - 1 :]


@pytest.mark.parametrize("given", [1, 3])
@pytest.mark.parametrize("eta", [0.5, 1.0])
@pytest.mark.parametrize("history_level", [0.0, 0.1])
def test_one_pass_says_of_a_streamed_dream_what_streaming_did(given, eta, history_level):
    """Beyond the window too: each step's mean, and so the log-probability, is that of sampling."""
    model = traced_model(history_level=history_level)
    seen, actions = begin(3, given, 7)
    trace = sample_traced(model, seen, actions, seeds=torch.arange(3), steps=4, eta=eta)
    assert trace.x.shape[:3] == (4, 3, 7) and trace.mean.shape[:3] == (3, 3, 7)
    means = trace_means(model, trace)
    assert torch.allclose(means, trace.mean, atol=2e-4), float((means - trace.mean).abs().max())
    expected = torch.stack(
        [torch.distributions.Normal(trace.mean[j], trace.std[j]).log_prob(trace.x[j + 1]).sum((1, 2)) for j in range(3)]
    ).sum(0)
    assert torch.allclose(log_prob(model, trace), expected, rtol=1e-3, atol=0.5)
    assert torch.allclose(step_log_probs(means, trace).sum((0, 2)), log_prob(model, trace))


def test_a_row_is_of_its_seed_alone_and_its_frames_are_what_is_decoded():
    model = traced_model()
    seen, actions = begin(4, 2, 3)
    seeds = torch.tensor([5, 6, 7, 8])
    whole = sample_traced(model, seen, actions, seeds=seeds, steps=4)
    some = torch.tensor([2])
    part = replace(
        seen, frames={c: z[some] for c, z in seen.frames.items()}, poses=seen.poses[some], actions=seen.actions[some]
    )
    alone = sample_traced(model, part, actions[some], seeds=seeds[some], steps=4)
    assert torch.allclose(alone.x[:, 0], whole.x[:, 2], atol=1e-4)
    made = whole.context.imagination
    assert made.poses.shape == (4, 3, 2) and next(iter(made.latents.values())).shape[:2] == (4, 3)
    assert not torch.allclose(whole.x[1, 0], whole.x[1, 1])


def test_the_gradient_raises_the_probability_of_what_was_sampled():
    model = traced_model()
    seen, actions = begin(2, 1, 3)
    trace = sample_traced(model, seen, actions, seeds=torch.arange(2), steps=4)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-9)
    before = log_prob(model, trace).sum()
    (-before).backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in model.network.blocks.parameters())
    optimizer.step()
    assert log_prob(model, trace).sum() > before


def test_log_prob_is_differentiated_through_history_too():
    """Along its gradient, by the weights that make history's keys and values, it rises as fast as the gradient is long."""
    model = traced_model()
    seen, actions = begin(1, 2, 3)
    trace = sample_traced(model, seen, actions, seeds=torch.arange(1), steps=4)
    weight = model.network.blocks[0].time.qkv.weight
    log_prob(model, trace).sum().backward()
    length, small = float(weight.grad.norm()), 1e-3
    with torch.no_grad():
        step = small * weight.grad / length
        weight += step
        up = float(log_prob(model, trace))
        weight -= 2 * step
        down = float(log_prob(model, trace))
    assert (up - down) / (2 * small) == pytest.approx(length, rel=0.05)


@pytest.mark.parametrize(
    ("options", "steps", "expected"),
    [
        ({}, 1, "a sampler with stochastic steps is required: at least 2 solver steps"),
        ({"network": {"memory": MemoryConfig(recent=1, nearest=1)}}, 4, "without memory"),
        ({"action_dropout": 0.1, "guidance": 2.0}, 4, "guidance 1, got 2"),
    ],
)
def test_ways_of_sampling_without_a_known_density_are_refused(options, steps, expected):
    network = options.pop("network", {})
    model = traced_model(**options)
    if network:
        model.config = replace(model.config, network=replace(model.config.network, **network))
    seen, actions = begin(1, 1, 2)
    with pytest.raises(SpecMismatch, match=expected):
        sample_traced(model, seen, actions, seeds=torch.arange(1), steps=steps)


def test_other_etas_are_refused():
    seen, actions = begin(1, 1, 2)
    with pytest.raises(ValueError, match="eta above 0"):
        sample_traced(traced_model(), seen, actions, seeds=torch.arange(1), eta=0.0)
