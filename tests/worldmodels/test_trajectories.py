"""Trajectory diffusion: layout, learning, guidance against closed forms."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from worldline.data.trajectories import Trajectories, control_spec
from worldline.diffusion import LogNormalSigmas
from worldline.errors import CheckpointError, DatasetError, WorldlineError
from worldline.types import TrajectoryModel
from worldline.worldmodels.trajectories import (
    Guidance,
    Layout,
    TrajectoryConfig,
    TrajectoryDiffusion,
    TrajectorySolver,
    Windows,
)
from worldline.worldmodels.trajectories.layout import as_trajectories, gather

SPEC = control_spec("toy", ["x"], [-2.0], [2.0], rate_hz=10.0)
TINY = TrajectoryConfig(length=8, width=16, depth=2)


def wander(episodes: int = 200, steps: int = 12, seed: int = 0, edge: float = 0.8) -> Trajectories:
    """x' = x + a / 4, a ~ N(-x / 2, 0.5) within the range; reward -x^2; done beyond `edge`."""
    g = torch.Generator().manual_seed(seed)
    parts: dict[str, list[Tensor]] = {k: [] for k in ("o", "a", "r", "n", "d")}
    lengths = []
    for _ in range(episodes):
        x = torch.rand(1, generator=g) * 1.94 * edge - 0.97 * edge
        for i in range(steps):
            a = (-x / 2 + 0.5 * torch.randn(1, generator=g)).clamp(-1.9, 1.9)
            after = x + a / 4
            done = after.abs() > edge
            for k, v in zip(parts, (x, a, -(x**2)[0], after, done[0])):
                parts[k].append(v)
            x = after
            if done or i == steps - 1:
                lengths.append(i + 1)
                break
    o, a, r, n, d = (torch.stack(v) for v in parts.values())
    return Trajectories(
        spec=SPEC,
        observations=o,
        actions=a,
        rewards=r,
        next_observations=n,
        terminated=d,
        lengths=torch.tensor(lengths),
    )


def fitted(config: TrajectoryConfig = TINY, seed: int = 0) -> TrajectoryDiffusion:
    torch.manual_seed(seed)
    model = TrajectoryDiffusion(config, SPEC)
    model.layout.fit(wander())
    return model.eval()


# --- layout -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("squash", [True, False])
@pytest.mark.parametrize("changes", [True, False])
def test_steps_come_back_from_the_numbers_that_are_diffused(changes, squash):
    data = wander()
    layout = Layout(SPEC, changes=changes, squash=squash).fit(data)
    windows = gather(data, data.windows(8, past_end=True))
    z = layout.pack(windows)
    assert z.shape[2] == layout.width == len(layout.names) == 4 + changes
    flat = layout.pack(gather(data, torch.arange(data.steps)[:, None]))[:, 0]
    assert flat[:, :3].mean(0).abs().max() < 1e-3 and (flat[:, :3].std(0) - 1).abs().max() < 1e-2
    back = layout.unpack(z)
    for name in ("observations", "actions", "rewards"):
        assert torch.allclose(getattr(back, name), getattr(windows, name), atol=1e-4), name
    assert torch.equal(back.terminal, windows.terminal) and windows.terminal.any()


def walks(n: int = 400, t: int = 16) -> Trajectories:
    """A quarter of a unit a second at 100 Hz: a step is a hundredth of the spread of where it is."""
    g = torch.Generator().manual_seed(0)
    v = torch.randn(n, 1, 1, generator=g).expand(n, t, 1) * 0.01
    x = torch.randn(n, 1, 1, generator=g) + v * torch.arange(t)[None, :, None]
    zero = torch.zeros(n * t)
    return Trajectories(
        spec=SPEC, observations=x.reshape(-1, 1), actions=zero[:, None], rewards=zero, next_observations=(x + v).reshape(-1, 1),
        terminated=zero.bool(), lengths=torch.full((n,), t),
    )  # fmt: skip


def test_changes_say_each_observation_again_and_both_are_heard():
    """As noisy as a network is, in normalised numbers: where it is comes out no worse, how far it goes a good deal better."""
    data, g = walks(), torch.Generator().manual_seed(1)
    layout = Layout(SPEC, changes=True).fit(data)
    assert layout.width == 5 and layout.names[-1] == "change of x"
    windows = gather(data, data.windows(16))
    z = layout.pack(windows)
    assert torch.allclose(layout.unpack(z).observations, windows.observations, atol=1e-4)
    assert z[:, :-1, 4].std() == pytest.approx(1, abs=0.1)
    made = layout.unpack(z + 0.05 * torch.randn(z.shape, generator=g)).observations - windows.observations
    plain = Layout(SPEC).fit(data)
    other = plain.unpack(plain.pack(windows) + 0.05 * torch.randn(z[..., :4].shape, generator=g)).observations
    other = other - windows.observations
    assert made.std() < other.std() / 3  # sixteen words on the place in place of one
    assert made.diff(dim=1).std() < 0.02 * other.diff(dim=1).std()


def test_the_trajectory_found_is_the_nearest_to_places_and_changes():
    """Against a general solver of the weighted squares."""
    layout = Layout(SPEC, changes=True).fit(walks())
    z = torch.randn(1, 6, 5, generator=torch.Generator().manual_seed(2))
    raw = (z * layout.std + layout.mean)[0]
    places, changes = raw[:, 0], raw[:-1, 4]
    a, b = 1 / layout.std[0], 1 / layout.std[4]
    left = torch.cat([torch.eye(6) * a, torch.diff(torch.eye(6), dim=0) * b])
    right = torch.cat([places * a, changes * b])
    expected = torch.linalg.lstsq(left.double(), right.double()[:, None]).solution[:, 0]
    assert torch.allclose(layout.unpack(z).observations[0, :, 0].double(), expected, atol=1e-5)


@pytest.mark.parametrize("squash", [True, False])
def test_whatever_is_sampled_is_an_action_and_the_ends_of_the_range_are_kept_to_a_thousandth(squash):
    layout = Layout(SPEC, squash=squash).fit(wander())
    actions = layout.unpack(100 * torch.randn(50, 8, 4)).actions
    assert (actions.abs() <= 2).all()
    ends = Windows(
        torch.zeros(1, 2, 1), torch.tensor([[[-2.0], [2.0]]]), torch.zeros(1, 2), torch.zeros(1, 2, dtype=torch.bool)
    )
    assert torch.allclose(layout.unpack(layout.pack(ends)).actions, ends.actions, atol=0.0021)


def test_slope_is_the_derivative_of_the_action():
    layout = Layout(SPEC).fit(wander())
    z = torch.randn(3, 8, 4, dtype=torch.float64).requires_grad_()
    layout = layout.double()
    (grad,) = torch.autograd.grad(layout.unpack(z).actions.sum(), z)
    assert torch.allclose(layout.slope(z), grad[..., 1:2])
    plain = Layout(SPEC, squash=False).fit(wander()).double()
    (grad,) = torch.autograd.grad(plain.unpack(z).actions.sum(), z)
    inside = plain.unpack(z).actions.abs() < 2
    assert inside.any() and torch.allclose(plain.slope(z)[inside], grad[..., 1:2][inside])
    assert (plain.slope(5 * z) > 0).all()  # an action beyond its range can be led back


def test_a_window_gives_one_transition_less_unless_it_ends():
    x = torch.arange(8.0).reshape(2, 4, 1)
    terminal = torch.tensor([[False] * 4, [False, True, False, True]])
    made = as_trajectories(Windows(x, x / 10, x[..., 0], terminal), SPEC, ({"seed": "5"}, {"seed": "6"}))
    assert made.lengths.tolist() == [3, 2]  # the second is cut behind its first terminal step
    assert made.observations[:, 0].tolist() == [0, 1, 2, 4, 5]
    assert made.next_observations[:4, 0].tolist() == [1, 2, 3, 5]
    assert made.terminated.tolist() == [False, False, False, False, True]
    assert made.provenance[1]["seed"] == "6"


def test_windows_run_past_a_terminal_step_and_meet_it_as_often_as_any_other():
    data = wander()
    assert data.terminated.any() and int(data.lengths.min()) < 8
    rows, episode = data.windows(8, past_end=True), data.episode
    assert (episode[rows] == episode[rows[:, :1]]).all()
    for step in data.terminated.nonzero()[:, 0]:
        assert int((rows == step).any(1).sum()) == min(8, int(data.lengths[episode[step]]))
    plain = data.windows(8)
    assert (plain[:, 1:] - plain[:, :-1] == 1).all()


# --- learning ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("network", ["unet", "transformer"])
def test_a_model_learns_the_dynamics_of_its_data(network):
    """Sampled next states follow from sampled states and actions: far better than 'nothing moves'."""
    torch.manual_seed(0)
    data = wander(400)
    config = replace(TINY, network=network, rewards="read" if network == "unet" else "diffused", width=32, depth=2)
    model = TrajectoryDiffusion(config, SPEC)
    model.layout.fit(data)
    answers_nothing = 2 if config.rewards == "read" else 1  # of each part the loss is then 1
    first, last = learn(model, data, steps=900 if network == "unet" else 1200, lr=4e-3 if network == "unet" else 2e-3)
    assert first == pytest.approx(answers_nothing, rel=0.2) and last < 0.6
    made = model.eval().generate(torch.arange(300))
    moved = (made.next_observations - made.observations)[~made.terminated]  # behind an end is nothing
    error, trivial = (moved - made.actions[~made.terminated] / 4).square().mean().sqrt(), moved.square().mean().sqrt()
    assert error < 0.6 * trivial  # the transformer is the slower one
    reward = (made.rewards + made.observations[:, 0].square()).square().mean().sqrt()
    assert reward < 0.6 * made.rewards.std()
    # and they are of the behaviour: actions lean against the state
    slope = (made.observations * made.actions).mean() / made.observations.square().mean()
    assert float(slope) == pytest.approx(-0.5, abs=0.2)


def learn(model, data, *, steps, lr):
    """The loss of the first and of the last step."""
    rows, losses = data.windows(8, past_end=True), []
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps)
    for _ in range(steps):
        loss = model.loss(gather(data, rows[torch.randint(len(rows), (64,))]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    return losses[0], losses[-1]


def test_a_reward_that_jumps_is_read_off_sharply():
    """A goal that pays from one place on: what a diffused reward blurs, and the reason why rewards are read."""
    walked = wander(400)
    data = replace(walked, rewards=(walked.next_observations[:, 0] > 0.3).float())
    blurred = {}
    for rewards in ("read", "diffused"):
        torch.manual_seed(0)
        model = TrajectoryDiffusion(replace(TINY, rewards=rewards, width=32, depth=2), SPEC)
        model.layout.fit(data)
        learn(model, data, steps=400, lr=4e-3)
        made = model.eval().generate(torch.arange(200))
        made = made.rewards[~made.terminated], made.next_observations[~made.terminated, 0]
        near = (made[1] - 0.3).abs() < 0.3
        blurred[rewards] = float((made[0] - (made[1] > 0.3).float())[near].abs().mean())
    assert blurred["read"] < 0.5 * blurred["diffused"], blurred


# --- sampling ---------------------------------------------------------------------------------------------------------


def test_a_row_is_of_its_seed_alone_and_the_model_keeps_the_contract():
    model = fitted(replace(TINY, solver=TrajectorySolver(steps=4, churn=2.0)))
    seeds = torch.tensor([3, 1, 4])
    whole = model.sample(seeds, length=8)
    assert isinstance(model, TrajectoryModel)
    assert torch.allclose(model.sample(seeds[1:2], length=8), whole[1:2], atol=1e-5)
    assert not torch.allclose(whole[0], whole[1])


def test_training_shows_every_level_that_sampling_asks_for():
    """Counted, not only declared: of sigmas far out the paper's normal shows next to none."""
    asked = []
    model = fitted(replace(TINY, solver=TrajectorySolver(steps=16, heun=True, churn=8.0)))
    denoise = model.denoise

    def note(x, level):
        asked.append(float(model.path(level).sigma[0]))
        return denoise(x, level)

    model.denoise = note
    model.sample(torch.arange(2), length=8)
    seen = model.config.sigmas.sample((100_000,), torch.Generator().manual_seed(0)).log()
    for sigma in asked:
        assert model.config.sigmas.contains(sigma)
        near = ((seen - math.log(sigma)).abs() < 0.35).float().mean()
        assert near > 0.005, sigma
    published = LogNormalSigmas(log_mean=-1.2, log_std=1.2, low=0.002, high=80.0).sample(
        (100_000,), torch.Generator().manual_seed(0)
    )
    assert ((published.log() - math.log(40.0)).abs() < 0.35).float().mean() < 0.0005


class Gaussian(TrajectoryDiffusion):
    """The exact denoiser of normalised steps that are independent Gaussians N(0, std^2), in place of a network."""

    std = 0.5

    def denoise(self, x, level):
        sigma = self.path(level).sigma[:, None, None]
        return x * self.std**2 / (self.std**2 + sigma**2)


def gaussian(steps: int, **solver) -> Gaussian:
    config = replace(TINY, rewards="diffused", solver=TrajectorySolver(steps=steps, **solver))
    wide = control_spec("toy", ["x"], [-1e4], [1e4], rate_hz=10.0)  # so wide that tanh is the identity
    model = Gaussian(config, wide)
    model.layout.std[1] = 1e-4
    model.layout.reach.fill_(1e3)
    return model


def upwards(observations: Tensor, actions: Tensor) -> Tensor:
    return torch.ones_like(actions)


@pytest.mark.parametrize("coefficient", [0.05, 0.2, 0.8])
@pytest.mark.parametrize("heun", [False, True])
def test_guidance_moves_the_mean_by_the_closed_form(coefficient, heun):
    """Every nudge is carried to the end by the flow of the Gaussian: it shrinks as std / sqrt(std^2 + sigma^2).

    A policy that wants more and more has a gradient that is the same everywhere; over t steps of one dimension its normalised entries
    are 1 / sqrt(t).
    """
    steps, seeds, t = 400, torch.arange(16), 8
    model, guidance = gaussian(steps, heun=heun), Guidance(coefficient=coefficient)
    moved = model.sample(seeds, length=t, guidance=guidance, score=upwards)[..., 1]
    shift = (moved - model.sample(seeds, length=t)[..., 1]) / (1e4 * 1e-4)
    i = torch.arange(steps - 1, dtype=torch.float64)
    levels = 80 ** (1 / 7) + i / (steps - 1) * (0.002 ** (1 / 7) - 80 ** (1 / 7))
    schedule = (1 - i / steps) + 0.3 * torch.sin(math.pi * (i + 1) / steps)
    carried = model.std / torch.sqrt(model.std**2 + levels**14)
    expected = coefficient * 256 / steps * float((schedule * carried).sum()) / math.sqrt(t)
    assert float(shift.mean()) == pytest.approx(expected, rel=0.02)
    assert float(shift.std()) < 0.01 * expected  # it is the same wherever a trajectory is


def test_guidance_of_the_estimate_moves_the_mean_by_its_recursion():
    """One Euler step takes x to r x + (1 - r)(D(x) + push), r the ratio of sigmas: the push enters (1 - r) of itself."""
    steps, t = 64, 8
    model, guidance = gaussian(steps), Guidance(coefficient=0.3, on="denoised")
    seeds = torch.arange(4)
    moved = model.sample(seeds, length=t, guidance=guidance, score=upwards)[..., 1]
    shift = (moved - model.sample(seeds, length=t)[..., 1]) / (1e4 * 1e-4)
    i = torch.arange(steps, dtype=torch.float64)
    sigma = (80 ** (1 / 7) + i / (steps - 1) * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
    gain, push = model.std**2 / (model.std**2 + sigma**2), torch.zeros(())
    for k in range(steps - 1):
        r = sigma[k + 1] / sigma[k]
        weight = 0.3 * ((1 - k / steps) + 0.3 * math.sin(math.pi * (k + 1) / steps)) / math.sqrt(t)
        push = r * push + (1 - r) * (gain[k] * push + weight)
    expected = float(gain[-1] * push)  # the last step is not guided
    assert float(shift.mean()) == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("on", ["noised", "denoised"])
def test_a_coefficient_moves_as_far_in_few_steps_as_in_many(on):
    def shift(steps: int) -> float:
        free, moved = (
            gaussian(steps).sample(torch.arange(2), length=8, guidance=g, score=upwards)[..., 1]
            for g in (None, Guidance(coefficient=0.1, on=on))
        )
        return float((moved - free).mean())

    assert shift(32) == pytest.approx(shift(256), rel=0.1)


def test_a_gradient_of_zero_moves_nothing():
    """The released code divides by the norm before it adds 1e-8: NaN."""
    model, seeds = fitted(), torch.arange(3)
    still = model.sample(seeds, length=8, guidance=Guidance(), score=lambda o, a: torch.zeros_like(a))
    assert torch.equal(still, model.sample(seeds, length=8))


def test_only_actions_are_pushed_and_the_network_decides_what_follows():
    model = gaussian(16)
    free, pushed = (
        model.sample(torch.arange(4), length=8, guidance=g, score=upwards) for g in (None, Guidance(coefficient=0.5))
    )
    assert torch.equal(free[..., 0], pushed[..., 0]) and torch.equal(free[..., 2:], pushed[..., 2:])
    assert (pushed[..., 1] > free[..., 1]).all()


def test_actions_that_are_driven_off_are_noticed_among_many_observations():
    """Only actions are pushed: two of a hundred numbers are a small share of all, and all of theirs."""
    spec = control_spec("many", 48, [-1.0] * 2, [1.0] * 2, rate_hz=10.0)
    torch.manual_seed(0)
    model = TrajectoryDiffusion(replace(TINY, solver=TrajectorySolver(steps=4)), spec)
    seeds, push = torch.arange(4), lambda o, a: torch.ones_like(a)
    model.sample(seeds, length=8, guidance=Guidance(coefficient=0.01), score=push)
    with pytest.raises(WorldlineError, match=r"near the data are required.*\(a[01] most often\)"):
        model.sample(seeds, length=8, guidance=Guidance(coefficient=1e3), score=push)


def test_what_is_learned_does_not_depend_on_units():
    """In tenths of millimetres or in metres: the numbers that are diffused are the same."""
    data = walks(50)
    small = replace(
        data,
        observations=1e-4 * data.observations,
        next_observations=1e-4 * data.next_observations,
        rewards=1e-4 * data.rewards,
    )
    torch.manual_seed(0)
    packed = [Layout(data.spec, changes=True, squash=False).fit(d).pack(gather(d, d.windows(8))) for d in (data, small)]
    assert torch.allclose(*packed, atol=1e-4) and float(packed[1].std((0, 1))[-1]) == pytest.approx(1.0, abs=0.2)
    still = replace(data, observations=data.observations * 0 + 1e3, next_observations=data.next_observations * 0 + 1e3)
    assert Layout(data.spec, changes=True).fit(still).std[0] == 1.0  # what never changes is not blown up


def test_a_reward_of_the_end_alone_is_read_at_ends_alone():
    """The end comes by chance: neither observation nor action tells of it, and its windows repeat it."""
    g = torch.Generator().manual_seed(0)
    lengths = torch.randint(2, 16, (300,), generator=g)
    n = int(lengths.sum())
    last = torch.zeros(n, dtype=torch.bool)
    last[lengths.cumsum(0) - 1] = True
    seen = torch.randn(n, 1, generator=g)
    data = Trajectories(
        spec=SPEC,
        observations=seen,
        actions=torch.rand(n, 1, generator=g) - 0.5,
        rewards=-10.0 * last,
        next_observations=torch.where(last[:, None], seen, torch.cat([seen[1:], seen[:1]])),
        terminated=last,
        lengths=lengths,
    )
    torch.manual_seed(0)
    model = TrajectoryDiffusion(TINY, SPEC)
    model.layout.fit(data)
    learn(model, data, steps=150, lr=3e-3)
    windows = gather(data, data.windows(8, past_end=True)[:400])
    read, ends = model._rewards(windows).detach(), windows.terminal
    first = ends & ~torch.cat([torch.zeros(400, 1, dtype=torch.bool), ends[:, :-1]], 1)
    assert float(read[first].mean()) < -9 and float(read[:, :-1][~ends[:, :-1]].mean()) > -0.5


def test_a_transformer_is_not_asked_beyond_what_it_learned():
    model = fitted(replace(TINY, network="transformer"))
    with pytest.raises(ValueError, match=r"a length of at most 8 is required"):
        model.sample(torch.arange(2), length=16)


@pytest.mark.parametrize(("heun", "order"), [(False, 1), (True, 2)])
def test_the_sampler_converges_at_its_order(heun, order):
    def error(steps: int) -> float:
        model = gaussian(steps, heun=heun)
        start = 80 * torch.randn(4, 8, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        from worldline.diffusion import edm_levels, sample_edm

        levels = edm_levels(steps, model.path, 80.0, 0.002).double()
        made = sample_edm(model.denoise, start, levels, model.path, heun=heun, noise=torch.randn)
        exact = start * model.std / math.sqrt(model.std**2 + 80**2)
        return float((made - exact).abs().mean())

    assert math.log2(error(64) / error(128)) == pytest.approx(order, abs=0.35)


# --- errors and storage -------------------------------------------------------------------------------------------------


def test_what_drives_trajectories_off_is_named():
    model = fitted()
    with pytest.raises(WorldlineError, match=r"near the data are required.*guidance coefficient 1000000000"):
        model.sample(torch.arange(4), length=8, guidance=Guidance(coefficient=1e9), score=upwards)
    with pytest.raises(WorldlineError, match="finite score of the policy"):
        model.sample(torch.arange(4), length=8, guidance=Guidance(), score=lambda o, a: a / 0)
    with pytest.raises(ValueError, match="requires a policy's score"):
        model.sample(torch.arange(4), length=8, guidance=Guidance())
    with pytest.raises(ValueError, match=r"multiple of 2 is required.*got 7"):
        model.sample(torch.arange(4), length=7)
    with pytest.raises(ValueError, match=r"coefficient of at least 0 is required, got -1"):
        Guidance(coefficient=-1.0)
    with pytest.raises(ValueError, match="length of 8 to 64"):
        TrajectoryConfig(length=4)
    with pytest.raises(DatasetError, match=r"at least 16 steps \(the window\) required"):
        wander().windows(16)


@pytest.mark.parametrize("network", ["unet", "transformer"])
def test_a_checkpoint_samples_what_the_model_did(tmp_path, network):
    model = fitted(replace(TINY, network=network))
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.05)
    model.save_pretrained(tmp_path / "model")
    again = TrajectoryDiffusion.from_pretrained(tmp_path / "model")
    seeds = torch.arange(3)
    assert torch.equal(again.sample(seeds, length=8), model.sample(seeds, length=8))
    assert again.config == model.config and again.spec == model.spec
    with pytest.raises(CheckpointError, match="policy is required here, this is a trajectory-model"):
        from worldline.policies import ClonedPolicy

        ClonedPolicy.from_pretrained(tmp_path / "model")
