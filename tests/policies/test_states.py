"""Low-dimensional policies: densities against torch.distributions and integrals, scores against differences, members against each other."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.distributions import Normal, TransformedDistribution
from torch.distributions.transforms import AffineTransform, TanhTransform

from worldline.data.trajectories import control_spec, low_dimensional
from worldline.errors import CheckpointError, PolicyError, SpecMismatch
from worldline.executor import ChunkExecutor
from worldline.policies import BatchedMLP, ClonedPolicy, StatePolicies, StatePolicy, StatePolicyConfig, load_policy
from worldline.policies.states import INSIDE
from worldline.types import CameraSpec, Policy, ScorePolicy, StochasticPolicy

SPEC = control_spec("toy", 3, [-1.0, 0.0], [3.0, 0.5], rate_hz=10.0)
KINDS = ("deterministic", "tanh-gaussian", "gaussian")


def policies(kind: str, seeds: tuple[int, ...] = (3, 5, 8), spec=SPEC, **options) -> StatePolicies:
    o = len(spec.pose_names)
    config = StatePolicyConfig(kind=kind, hidden=(16, 16), **options)  # pyright: ignore[reportArgumentType]
    return StatePolicies(config, spec, seeds=seeds, mean=0.1 * torch.arange(o), std=1.0 + torch.arange(o))


def inside(n: int, e: int = 3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    low, high = torch.tensor(SPEC.action.low), torch.tensor(SPEC.action.high)
    seen = torch.randn(e, n, 3, generator=generator)
    return seen, low + (high - low) * (0.05 + 0.9 * torch.rand(e, n, 2, generator=generator))


def test_a_member_of_many_is_the_network_of_its_seed_alone() -> None:
    together = BatchedMLP((4, 16, 16, 2), seeds=(0, 7, 11))
    alone = BatchedMLP((4, 16, 16, 2), seeds=(7,))
    x = torch.randn(3, 5, 4)
    assert torch.equal(together.weights[0][1:2], alone.weights[0]) and together.members == 3
    assert torch.allclose(together(x)[1:2], alone(x[1:2]), atol=1e-6)
    assert torch.allclose(together(x[:2], first=2), together(x)[:2], atol=1e-6)
    assert not torch.equal(together.weights[0][0], together.weights[0][1])
    assert not torch.equal(BatchedMLP((4, 2), (7,), stream=1).weights[0], BatchedMLP((4, 2), (7,)).weights[0])


def test_it_is_the_perceptron_written_out() -> None:
    net = BatchedMLP((4, 8, 2), seeds=(0, 1))
    x = torch.randn(2, 5, 4)
    for member in range(2):
        hidden = (x[member] @ net.weights[0][member] + net.biases[0][member]).relu()
        assert torch.allclose(net(x)[member], hidden @ net.weights[1][member] + net.biases[1][member], atol=1e-6)
    assert float(net.weights[0].detach().abs().max()) <= 1 / math.sqrt(4)  # as nn.Linear begins


@pytest.mark.parametrize("kind", KINDS)
def test_actions_are_in_the_range_and_a_row_depends_on_itself(kind: str) -> None:
    many = policies(kind)
    seen = 20 * torch.randn(3, 50, 3)
    seeds = torch.arange(150).reshape(3, 50)
    for chosen in (many.act(seen), many.act(seen, seeds=seeds)):
        assert bool(
            (chosen >= torch.tensor(SPEC.action.low)).all() and (chosen <= torch.tensor(SPEC.action.high)).all()
        )
    some = many.act(seen[:, 7:9], seeds=seeds[:, 7:9])
    assert torch.allclose(some, many.act(seen, seeds=seeds)[:, 7:9], atol=1e-5)
    assert torch.equal(many.act(seen), many.act(seen, seeds=seeds)) == (kind == "deterministic")


def test_log_prob_is_that_of_torch_distributions() -> None:
    seen, actions = inside(6)
    many = policies("tanh-gaussian")
    centre, spread = many.location(many.normalise(seen))
    assert spread is not None
    affine = AffineTransform(many.centre, many.radius)
    told = TransformedDistribution(Normal(centre, spread.exp()), [TanhTransform(), affine]).log_prob(actions).sum(-1)
    assert torch.allclose(many.log_prob(seen, actions), told, atol=1e-3)
    many = policies("gaussian")
    centre, spread = many.location(many.normalise(seen))
    assert spread is not None
    told = TransformedDistribution(Normal(centre, spread.exp()), [affine]).log_prob(actions).sum(-1)
    assert torch.allclose(many.log_prob(seen, actions), told, atol=1e-5)


def test_a_tanh_gaussian_integrates_to_one_over_its_range() -> None:
    spec = control_spec("toy", 3, [-1.0], [3.0], rate_hz=10.0)
    many = policies("tanh-gaussian", seeds=(2,), spec=spec)
    grid = torch.linspace(-1, 3, 20_001)[None, :, None]
    density = many.log_prob(torch.full((1, 20_001, 3), 0.7), grid).exp()
    assert float(torch.trapezoid(density[0].detach(), grid[0, :, 0])) == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_the_score_is_the_slope_of_the_log_density(kind: str) -> None:
    many = policies(kind).double()
    seen, actions = (x.double() for x in inside(4))
    found = many.score(seen, actions)
    for axis in range(2):
        nudge = torch.zeros(2, dtype=torch.float64)
        nudge[axis] = 1e-5
        slope = (many.log_prob(seen, actions + nudge) - many.log_prob(seen, actions - nudge)) / 2e-5
        assert torch.allclose(found[..., axis], slope, rtol=1e-4, atol=1e-6)


def test_a_deterministic_policy_counts_as_a_unit_gaussian_around_its_action() -> None:
    many = policies("deterministic")
    seen, actions = inside(4)
    own = many.act(seen)
    assert torch.allclose(many.score(seen, own), torch.zeros_like(own), atol=1e-5)
    assert torch.allclose(many.score(seen, actions), (own - actions) / many.radius**2, atol=1e-5)


def test_at_the_edge_of_the_range_a_tanh_gaussian_is_finite_and_points_inward() -> None:
    many = policies("tanh-gaussian")
    low, high = torch.tensor(SPEC.action.low), torch.tensor(SPEC.action.high)
    seen = torch.zeros(3, 4, 3)
    actions = torch.stack([low, high, low - 50, high + 50])[None].expand(3, -1, -1)
    assert bool(many.log_prob(seen, actions).isfinite().all())
    score = many.score(seen, actions)
    assert bool(score.isfinite().all())
    inner = many.centre + INSIDE * many.radius
    assert torch.allclose(many.log_prob(seen, actions)[:, 1], many.log_prob(seen, inner.expand(3, 4, 2))[:, 0], atol=1)
    # at z = 7 a normal falls more steeply than the stretching of tanh rises, so the score leads back
    assert bool((score[:, 0] > 0).all() and (score[:, 1] < 0).all() and (score[:, 3] < 0).all())


@pytest.mark.parametrize("kind", KINDS)
def test_one_member_keeps_the_contracts(kind: str) -> None:
    many = policies(kind, sample=True)
    one = many.member(1)
    assert isinstance(one, Policy) and isinstance(one, StochasticPolicy) and isinstance(one, ScorePolicy)
    seen, actions = inside(4)
    observation, state = low_dimensional(seen[1]), one.reset(4)
    chunk, _ = one.act(observation, state, seeds=torch.arange(4))
    assert chunk.shape == (4, 1, 2)
    seeds = torch.arange(4).expand(3, 4)
    assert torch.allclose(chunk[:, 0], many.act(seen, seeds=seeds)[1], atol=1e-5)
    assert torch.allclose(one.log_prob(observation, state, actions[1, :, None]), many.log_prob(seen, actions)[1])
    asked = actions[1, :, None].clone().requires_grad_()
    (slope,) = torch.autograd.grad(one.log_prob(observation, state, asked).sum(), asked)
    assert torch.allclose(one.score(observation, state, actions[1, :, None]), slope, rtol=1e-3, atol=1e-4)
    executor = ChunkExecutor(one)
    block, _ = executor.block(observation, executor.reset(4), seeds=torch.arange(4))
    assert block.shape == (4, 1, 2)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_saved_comes_back(kind: str, tmp_path: Path) -> None:
    one = policies(kind).member(2)
    one.save_pretrained(tmp_path / "policy", provenance={"seed": 8})
    again = load_policy(str(tmp_path / "policy"), spec=SPEC)
    assert isinstance(again, StatePolicy) and again.config == one.config and again.spec == SPEC
    observation = low_dimensional(torch.randn(4, 3))
    seeds = torch.arange(4)
    assert torch.equal(
        again.act(observation, again.reset(4), seeds=seeds)[0], one.act(observation, one.reset(4), seeds=seeds)[0]
    )
    with pytest.raises(CheckpointError, match="not a valid PolicyConfig"):
        ClonedPolicy.from_pretrained(tmp_path / "policy")


def test_what_does_not_fit_is_refused_with_both_sides_named() -> None:
    one = policies("deterministic").member(0)
    with pytest.raises(SpecMismatch, match=r"sees 3 numbers \(o0, o1, o2\), got observations of 5"):
        one.act(low_dimensional(torch.zeros(2, 5)), one.reset(2), seeds=torch.arange(2))
    with pytest.raises(PolicyError, match="one member required, got 3"):
        StatePolicy(policies("deterministic"))
    camera = replace(SPEC, cameras=(CameraSpec(name="top", height=8, width=8),))
    with pytest.raises(SpecMismatch, match=r"without cameras.*got cameras \['top'\]"):
        policies("deterministic", spec=camera)
    with pytest.raises(SpecMismatch, match="finite action range"):
        policies("deterministic", spec=control_spec("toy", 3, [-math.inf], [1.0], rate_hz=1.0))
    with pytest.raises(SpecMismatch, match="positive std of 3 numbers"):
        StatePolicies(StatePolicyConfig(), SPEC, seeds=(0,), mean=torch.zeros(3), std=torch.zeros(3))
    with pytest.raises(ValueError, match="hidden widths"):
        StatePolicyConfig(hidden=(0,))
