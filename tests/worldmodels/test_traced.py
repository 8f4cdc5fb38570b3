"""Dreams with known log-probability: the density of what was sampled, by the network that sampled it; and its gradient."""

import math
from dataclasses import replace

import pytest
import torch

from tests.oracles import dot_clip, dot_tokenizer, encoded, gaussian_denoiser
from tests.worldmodels.test_autoregressive import scrambled, small_model
from tests.worldmodels.test_video_action import build
from tests.worldmodels.test_video_action import scrambled as scrambled_unified
from worldline.diffusion import LevelDistribution, linear_path, solver_levels
from worldline.diffusion.stochastic import gaussian_log_prob, renoised_std, sample_renoised
from worldline.errors import SpecMismatch
from worldline.rl_in_imagination.denoiser_grpo import dreamt_from, repeat, rows_of
from worldline.worldmodels.memory import MemoryConfig
from worldline.worldmodels.traces import step_log_probs

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
    trace = model.sample_traced(seen, actions, seeds=torch.arange(3), steps=4, eta=eta)
    assert trace.x.shape[:3] == (4, 3, 7) and trace.mean.shape[:3] == (3, 3, 7)
    means = model.trace_means(trace)
    assert torch.allclose(means, trace.mean, atol=2e-4), float((means - trace.mean).abs().max())
    expected = torch.stack(
        [torch.distributions.Normal(trace.mean[j], trace.std[j]).log_prob(trace.x[j + 1]).sum((1, 2)) for j in range(3)]
    ).sum(0)
    assert torch.allclose(model.log_prob(trace), expected, rtol=1e-3, atol=0.5)
    assert torch.allclose(step_log_probs(means, trace).sum((0, 2)), model.log_prob(trace))


def test_a_row_is_of_its_seed_alone_and_its_frames_are_what_is_decoded():
    model = traced_model()
    seen, actions = begin(4, 2, 3)
    seeds = torch.tensor([5, 6, 7, 8])
    whole = model.sample_traced(seen, actions, seeds=seeds, steps=4)
    some = torch.tensor([2])
    part = replace(
        seen, frames={c: z[some] for c, z in seen.frames.items()}, poses=seen.poses[some], actions=seen.actions[some]
    )
    alone = model.sample_traced(part, actions[some], seeds=seeds[some], steps=4)
    assert torch.allclose(alone.x[:, 0], whole.x[:, 2], atol=1e-4)
    made = whole.context.imagination
    assert made.poses.shape == (4, 3, 2) and next(iter(made.latents.values())).shape[:2] == (4, 3)
    assert not torch.allclose(whole.x[1, 0], whole.x[1, 1])


def test_the_gradient_raises_the_probability_of_what_was_sampled():
    model = traced_model()
    seen, actions = begin(2, 1, 3)
    trace = model.sample_traced(seen, actions, seeds=torch.arange(2), steps=4)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-9)
    before = model.log_prob(trace).sum()
    (-before).backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in model.network.blocks.parameters())
    optimizer.step()
    assert model.log_prob(trace).sum() > before


def test_log_prob_is_differentiated_through_history_too():
    """Along its gradient, by the weights that make history's keys and values, it rises as fast as the gradient is long."""
    model = traced_model()
    seen, actions = begin(1, 2, 3)
    trace = model.sample_traced(seen, actions, seeds=torch.arange(1), steps=4)
    require_true_gradient(model, trace, model.network.blocks[0].time.qkv.weight)


def require_true_gradient(model, trace, weight) -> None:
    """A small step along the gradient of a dream's log-probability raises it by the gradient's length."""
    model.log_prob(trace).sum().backward()
    length, small = float(weight.grad.norm()), 1e-3
    with torch.no_grad():
        step = small * weight.grad / length
        weight += step
        up = float(model.log_prob(trace))
        weight -= 2 * step
        down = float(model.log_prob(trace))
    assert (up - down) / (2 * small) == pytest.approx(length, rel=0.05)


def test_a_camera_that_is_missing_in_a_row_is_refused():
    """A model that was trained without one dreams on, but what its dream was shown is not what one pass would show."""
    model = traced_model(camera_dropout=0.2)
    seen, actions = begin(3, 1, 2)
    begun = {"seeds": torch.arange(3), "steps": 4}
    some = replace(seen, present={"top": torch.tensor([True, False, True])})
    model.observe(some)  # deployed sampling may
    with pytest.raises(SpecMismatch, match=r"requires every camera in every row .* missing are top in 1 of 3 rows"):
        model.sample_traced(some, actions, **begun)
    every = replace(seen, present={"top": torch.ones(3, dtype=torch.bool)})
    whole, told = model.sample_traced(seen, actions, **begun), model.sample_traced(every, actions, **begun)
    assert torch.equal(whole.x, told.x)


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
        model.sample_traced(seen, actions, seeds=torch.arange(1), steps=steps)


def test_other_etas_are_refused():
    seen, actions = begin(1, 1, 2)
    with pytest.raises(ValueError, match="eta above 0"):
        traced_model().sample_traced(seen, actions, seeds=torch.arange(1), eta=0.0)


@pytest.mark.parametrize(
    "build_model", [lambda: traced_model(solver_steps=4), lambda: unified(chunk=2, solver_steps=4)]
)
def test_behind_a_dreamt_prefix_a_trace_goes_on_as_the_deployed_dream_does(build_model):
    """With almost no fresh noise: by the same seeds, the frames that one long dream has there. And its density is that of sampling."""
    model, seeds = build_model(), torch.arange(3)
    first, actions = begin(3, 1, 10)
    _, whole = model.imagine(model.observe(first), actions, seeds=seeds)
    seen = dreamt_from(model, first, actions[:, :6], seeds=seeds)
    assert seen.poses.shape[1] == 7 and torch.equal(seen.frames["top"][:, 1:], whole.latents["top"][:, :6])
    assert dreamt_from(model, first, actions[:, :0], seeds=seeds) is first
    traced = model.dreamt(model.sample_traced(seen, actions[:, 6:], seeds=seeds, steps=4, eta=1e-4))
    for camera, z in whole.latents.items():
        assert torch.allclose(traced.latents[camera], z[:, 6:], atol=5e-3)
    assert torch.allclose(traced.poses, whole.poses[:, 6:], atol=5e-3)
    trace = model.sample_traced(seen, actions[:, 6:], seeds=seeds, steps=4)
    assert torch.allclose(model.trace_means(trace), trace.mean, atol=2e-4)


# --- the unified model, which makes a chunk of frames together ----------------------------------------------------------


def unified(design: str = "uwm", **options):
    return scrambled_unified(build(design, frame_levels=LevelDistribution(pure=0.5, low=0.02), **options))


@pytest.mark.parametrize(("chunk", "given"), [(1, 1), (1, 4), (2, 1), (3, 3)])
@pytest.mark.parametrize("eta", [0.5, 1.0])
def test_the_unified_models_steps_are_those_that_it_sampled(chunk, given, eta):
    model = unified(chunk=chunk, text="hashed")
    seen, actions = begin(3, given, 6)
    trace = model.sample_traced(seen, actions, seeds=torch.arange(3), steps=4, eta=eta)
    assert trace.x.shape[:3] == (4, 3, 6) and trace.mean.shape[:3] == (3, 3, 6)
    means = model.trace_means(trace)
    assert torch.allclose(means, trace.mean, atol=2e-5), float((means - trace.mean).abs().max())
    normal = torch.distributions.Normal(trace.mean, trace.std[:, None, None, None])
    assert torch.allclose(model.log_prob(trace), normal.log_prob(trace.x[1:]).sum((0, 2, 3)), rtol=1e-4, atol=0.1)
    rows = torch.tensor([2, 0])
    assert torch.allclose(model.trace_means(rows_of(trace, rows)), means[:, rows], atol=2e-5)


def test_without_fresh_noise_the_unified_trace_is_the_deployed_sampler():
    """With almost none: the same start, and the deterministic solver's frames."""
    model = unified(chunk=2, solver_steps=4)
    seen, actions = begin(2, 2, 4)
    traced = model.dreamt(model.sample_traced(seen, actions, seeds=torch.arange(2), steps=4, eta=1e-4))
    _, made = model.imagine(model.observe(seen), actions, seeds=torch.arange(2))
    for camera, z in made.latents.items():
        assert torch.allclose(traced.latents[camera], z, atol=5e-3)
    assert torch.allclose(traced.poses, made.poses, atol=5e-3)


def test_the_unified_models_gradient_is_that_of_what_was_sampled():
    model = unified(chunk=2)
    seen, actions = begin(1, 2, 4)
    trace = model.sample_traced(seen, actions, seeds=torch.arange(1), steps=4)
    require_true_gradient(model, trace, model.hidden_matrices()[0])


def test_a_unified_row_is_of_its_seed_alone():
    model = unified(chunk=2)
    seen, actions = begin(4, 2, 4)
    seeds = torch.tensor([5, 6, 7, 8])
    whole = model.sample_traced(seen, actions, seeds=seeds, steps=4)
    some = torch.tensor([2])
    alone = model.sample_traced(repeat(seen, some), actions[some], seeds=seeds[some], steps=4)
    assert torch.allclose(alone.x[:, 0], whole.x[:, 2], atol=1e-5)
    assert not torch.allclose(whole.x[1, 0], whole.x[1, 1])


def test_unified_sampling_without_a_known_density_is_refused():
    seen, actions = begin(1, 1, 4)
    seeds = torch.arange(1)
    with pytest.raises(SpecMismatch, match="design uwm is required"):
        unified("uva").sample_traced(seen, actions, seeds=seeds)
    with pytest.raises(SpecMismatch, match="a sampler with stochastic steps is required"):
        unified().sample_traced(seen, actions, seeds=seeds, steps=1)
    with pytest.raises(SpecMismatch, match="blocks in whole chunks of 3 required, got 4"):
        unified(chunk=3).sample_traced(seen, actions, seeds=seeds)
    with pytest.raises(ValueError, match="eta above 0"):
        unified().sample_traced(seen, actions, seeds=seeds, eta=2.0)
