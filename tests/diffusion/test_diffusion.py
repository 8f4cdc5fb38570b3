"""Paths, levels, noise and samplers against closed forms."""

import math

import pytest
import torch

from tests.oracles import gaussian_denoiser, gaussian_flow
from worldline.diffusion import (
    LevelDistribution,
    add_noise,
    clean_from_velocity,
    cosine_path,
    linear_path,
    noise_from_clean,
    row_noise,
    sample_euler,
    sample_heun,
    solver_levels,
    velocity_from_clean,
)

PATHS = [linear_path, cosine_path]


@pytest.mark.parametrize("path", PATHS)
def test_conversions_round_trip(path):
    generator = torch.Generator().manual_seed(0)
    clean, noise = (torch.randn(5, 3, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    level = torch.linspace(0.05, 1, 5, dtype=torch.float64)
    x = add_noise(path, clean, noise, level)
    assert torch.allclose(noise_from_clean(path, x, clean, level), noise)
    velocity = velocity_from_clean(path, x, clean, level)
    assert torch.allclose(clean_from_velocity(path, x, velocity, level), clean)


@pytest.mark.parametrize("path", PATHS)
def test_ends_of_the_path_are_exactly_data_and_noise(path):
    clean, noise = torch.randn(2, 3), torch.randn(2, 3)
    assert torch.equal(add_noise(path, clean, noise, torch.zeros(2)), clean)
    assert torch.allclose(add_noise(path, clean, noise, torch.ones(2)), noise, atol=1e-6)


@pytest.mark.parametrize("path", PATHS)
def test_derivatives_match_finite_differences(path):
    level = torch.linspace(0.1, 0.9, 7, dtype=torch.float64)
    step = 1e-6
    ahead, behind, here = path(level + step), path(level - step), path(level)
    assert torch.allclose((ahead.alpha - behind.alpha) / (2 * step), here.d_alpha, atol=1e-6)
    assert torch.allclose((ahead.sigma - behind.sigma) / (2 * step), here.d_sigma, atol=1e-6)


def _error(sampler, path, steps: int) -> float:
    noise = torch.linspace(-2, 2, 9, dtype=torch.float64)[:, None]
    sample = sampler(gaussian_denoiser(path, 0.7, 0.5), noise, solver_levels(steps).double(), path)
    return float((sample - gaussian_flow(noise, 0.7, 0.5)).abs().mean())


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(("sampler", "order"), [(sample_euler, 1), (sample_heun, 2)])
def test_order_of_convergence(path, sampler, order):
    # the last step to level 0 is first order, but as steps grow it spans an interval that shrinks too
    slope = math.log2(_error(sampler, path, 64) / _error(sampler, path, 128))
    assert slope == pytest.approx(order, abs=0.35)


def test_one_step_from_pure_noise_is_the_conditional_mean():
    sample = sample_euler(gaussian_denoiser(linear_path, 0.7, 0.5), torch.randn(6, 2), solver_levels(1), linear_path)
    assert torch.allclose(sample, torch.full_like(sample, 0.7))


def test_levels_have_their_atoms_and_range():
    distribution = LevelDistribution(clean=0.25, pure=0.25, low=0.2, high=0.6)
    level = distribution.sample((40_000,), torch.Generator().manual_seed(0))
    assert (level == 0).float().mean().item() == pytest.approx(0.25, abs=0.02)
    assert (level == 1).float().mean().item() == pytest.approx(0.25, abs=0.02)
    inside = level[(level > 0) & (level < 1)]
    assert inside.min() >= 0.2 and inside.max() <= 0.6
    assert distribution.contains(0.0) and distribution.contains(1.0) and distribution.contains(0.3)
    assert not distribution.contains(0.8)
    with pytest.raises(ValueError, match="sum to at most 1"):
        LevelDistribution(clean=0.8, pure=0.3)


def test_solver_levels_run_from_one_to_zero():
    for steps in (1, 2, 5):
        levels = solver_levels(steps)
        assert levels[0] == 1 and levels[-1] == 0 and len(levels) == steps + 1 and (levels.diff() < 0).all()
    with pytest.raises(ValueError, match="at least 1"):
        solver_levels(0)


def test_row_noise_is_standard_normal_and_independent_between_keys():
    noise = row_noise(torch.arange(400), 3, 0, (1, 501))
    assert noise.shape == (400, 1, 501)
    assert noise.mean().abs() < 0.01 and (noise.std() - 1).abs() < 0.01
    assert (noise**4).mean().item() == pytest.approx(3, abs=0.1)  # kurtosis of a normal
    flat = noise[:, 0]
    assert (flat[:-1] * flat[1:]).mean().abs() < 0.01  # neighbouring seeds
    assert (flat[:, :-1] * flat[:, 1:]).mean().abs() < 0.01  # neighbouring elements
    for other in (row_noise(torch.arange(400), 4, 0, (1, 501)), row_noise(torch.arange(400), 3, 1, (1, 501))):
        assert (flat * other[:, 0]).mean().abs() < 0.01


def test_row_noise_depends_on_its_row_alone():
    seeds = torch.tensor([5, -3, 2**60])
    frames = torch.tensor([0, 7, 2])
    together = row_noise(seeds, frames, 1, (4, 3))
    for i in range(3):
        assert torch.equal(together[i : i + 1], row_noise(seeds[i : i + 1], frames[i : i + 1], 1, (4, 3)))
    assert torch.equal(row_noise(seeds.flip(0), frames.flip(0), 1, (4, 3)), together.flip(0))
