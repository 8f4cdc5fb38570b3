"""EDM's path, preconditioning and sampler against closed forms."""

import math

import pytest
import torch

from tests.oracles import gaussian_denoiser
from worldline.diffusion import (
    EDMPath,
    LogNormalSigmas,
    add_noise,
    clean_from_velocity,
    edm_levels,
    loss_weight,
    noise_from_clean,
    precondition,
    sample_edm,
    sample_euler,
    sample_heun,
    velocity_from_clean,
)

PATH = EDMPath(largest=10.0)
SIGMAS = torch.tensor([0.004, 0.1, 0.5, 1.0, 3.0, 10.0], dtype=torch.float64)


def no_noise(step: int) -> torch.Tensor:
    raise AssertionError("without churn no noise is asked for")


def test_the_path_turns_levels_into_sigmas_and_back():
    level = torch.linspace(0.05, 1, 9, dtype=torch.float64)
    here, step = PATH(level), 1e-6
    assert torch.allclose(PATH.level(here.sigma), level)
    assert (here.alpha == 1).all()
    assert torch.allclose((PATH(level + step).sigma - PATH(level - step).sigma) / (2 * step), here.d_sigma)
    assert float(PATH(torch.tensor(0.0)).sigma) == 0 and float(PATH(torch.tensor(1.0)).sigma) == 10
    clean, noise = torch.randn(2, 9, 3, dtype=torch.float64)
    x = add_noise(PATH, clean, noise, level)
    assert torch.allclose(noise_from_clean(PATH, x, clean, level), noise)
    assert torch.allclose(clean_from_velocity(PATH, x, velocity_from_clean(PATH, x, clean, level), level), clean)


def test_steps_are_those_of_karras():
    """Equation 5 with DIAMOND's numbers."""
    for steps in (2, 3, 8):
        sigma = PATH(edm_levels(steps, PATH, 5.0, 0.002)).sigma
        i = torch.arange(steps)
        expected = (5 ** (1 / 7) + i / (steps - 1) * (0.002 ** (1 / 7) - 5 ** (1 / 7))) ** 7
        assert torch.allclose(sigma[:-1], expected, rtol=1e-4) and sigma[-1] == 0
    assert torch.allclose(PATH(edm_levels(1, PATH, 5.0, 0.002)).sigma, torch.tensor([5.0, 0.0]))
    with pytest.raises(ValueError, match="at least 1"):
        edm_levels(0, PATH, 5.0, 0.002)


@pytest.mark.parametrize("sigma_data", [0.5, 1.0, 2.0])
def test_preconditioning_keeps_its_promises(sigma_data):
    c = precondition(SIGMAS, sigma_data)
    # of Gaussian data the ideal denoiser is skip * x
    path = lambda sigma: PATH(PATH.level(sigma))  # noqa: E731
    x = torch.linspace(-3, 3, 6, dtype=torch.float64)
    assert torch.allclose(c.skip * x, gaussian_denoiser(path, 0.0, sigma_data)(x, SIGMAS))
    # input, and what the network should answer, have unit variance whatever sigma: for independent data and noise
    assert torch.allclose(c.into**2 * (sigma_data**2 + SIGMAS**2), torch.ones_like(SIGMAS))
    answer = ((1 - c.skip) ** 2 * sigma_data**2 + c.skip**2 * SIGMAS**2) / c.out**2
    assert torch.allclose(answer, torch.ones_like(SIGMAS))
    assert torch.allclose(c.out**2 * loss_weight(SIGMAS, sigma_data), torch.ones_like(SIGMAS))
    assert torch.allclose(c.noise, SIGMAS.log() / 4)


def test_the_weighted_loss_of_a_network_that_answers_nothing_is_one_at_every_sigma():
    generator = torch.Generator().manual_seed(0)
    clean, noise = torch.randn(2, 6, 40_000, generator=generator, dtype=torch.float64)
    sigma = SIGMAS[:, None]
    denoised = precondition(sigma, 1.0).skip * (clean + sigma * noise)
    assert (loss_weight(sigma, 1.0) * (denoised - clean) ** 2).mean(1).numpy() == pytest.approx(1, abs=0.03)


def flow(x: torch.Tensor, mean: float, std: float, sigma: float) -> torch.Tensor:
    """Where the exact probability flow carries x at `sigma`: the monotone map between two Gaussians."""
    return mean + std * (x - mean) / math.sqrt(std**2 + sigma**2)


@pytest.mark.parametrize(("sampler", "order"), [(sample_euler, 1), (sample_heun, 2)])
def test_samplers_take_the_path_at_their_order(sampler, order):
    x = 10 * torch.linspace(-2, 2, 9, dtype=torch.float64)[:, None]

    def error(steps: int) -> float:
        levels = edm_levels(steps, PATH, 10.0, 0.002).double()
        made = sampler(gaussian_denoiser(PATH, 0.7, 0.5), x, levels, PATH)
        return float((made - flow(x, 0.7, 0.5, 10.0)).abs().mean())

    assert math.log2(error(64) / error(128)) == pytest.approx(order, abs=0.35)


def test_without_churn_it_is_eulers():
    x = 10 * torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    predict, levels = gaussian_denoiser(PATH, 0.7, 0.5), edm_levels(6, PATH, 10.0, 0.004)
    made = sample_edm(predict, x, levels, PATH, noise=no_noise)
    assert torch.equal(made, sample_euler(predict, x, levels, PATH))
    one = sample_edm(predict, x, edm_levels(1, PATH, 10.0, 0.004), PATH, noise=no_noise)
    assert torch.equal(one, predict(x, torch.ones(5)))


@pytest.mark.parametrize("churn", [0.0, 3.0, 10.0])
def test_the_denoiser_is_told_the_sigma_that_the_state_has(churn):
    """DIAMOND's is told the one before noise was added. If all data is 0, the state is nothing but noise of its sigma."""
    generator, asked = torch.Generator().manual_seed(0), []

    def predict(x: torch.Tensor, level: torch.Tensor) -> torch.Tensor:
        asked.append((float(x.std()), float(PATH(level).sigma[0])))
        return torch.zeros_like(x)

    fresh = lambda step: torch.randn(200, 500, generator=generator)  # noqa: E731
    sample_edm(predict, 5 * fresh(0), edm_levels(8, PATH, 5.0, 0.004), PATH, churn=churn, noise=fresh)
    assert len(asked) == 8
    for has, told in asked:
        assert has == pytest.approx(told, rel=0.01)
    assert (asked[0][1] > 5.5) == (churn > 0)  # it was raised, but not beyond what the path knows
    assert max(told for _, told in asked) <= 10 * (1 + 1e-5)


def test_with_churn_samples_still_have_the_spread_of_the_data():
    generator = torch.Generator().manual_seed(0)
    fresh = lambda step: torch.randn(20_000, 1, generator=generator)  # noqa: E731

    def spread(steps: int) -> float:
        predict, levels = gaussian_denoiser(PATH, 0.0, 0.5), edm_levels(steps, PATH, 10.0, 0.002)
        return float(sample_edm(predict, 10 * fresh(0), levels, PATH, churn=10.0, noise=fresh).std())

    assert spread(300) == pytest.approx(0.5, abs=0.012)  # its error falls with the steps
    assert abs(spread(300) - 0.5) < abs(spread(40) - 0.5)


def test_sigmas_of_training_have_their_ends_and_their_middle():
    sigmas = LogNormalSigmas(log_mean=0.3, log_std=1.2, low=0.5, high=5.0, pure=0.25)
    drawn = sigmas.sample((40_000,), torch.Generator().manual_seed(0))
    normal = torch.distributions.Normal(0.3, 1.2)
    above, below = float(1 - normal.cdf(torch.tensor(5.0).log())), float(normal.cdf(torch.tensor(0.5).log()))
    assert float((drawn == 5).float().mean()) == pytest.approx(0.25 + 0.75 * above, abs=0.01)
    assert float((drawn == 0.5).float().mean()) == pytest.approx(0.75 * below, abs=0.01)
    assert drawn.min() == 0.5 and drawn.max() == 5
    assert sigmas.contains(0.5) and sigmas.contains(5.0) and sigmas.contains(2.0)
    assert not sigmas.contains(0.4) and not sigmas.contains(5.1)
    assert not LogNormalSigmas(pure=1.0).contains(1.0)
    with pytest.raises(ValueError, match="0 < low <= high"):
        LogNormalSigmas(low=2.0, high=1.0)
