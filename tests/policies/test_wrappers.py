"""Corrupted policies are worse by exactly what they say; Python callables and typed names fail with a reason."""

import sys
import types

import pytest
import torch

from tests.oracles import SPEC, DotPolicy, dot_tokenizer
from tests.policies.dots import small_policy, starts
from worldline.errors import PolicyError
from worldline.executor import ChunkExecutor
from worldline.policies import CallablePolicy, Corrupted, ThroughTokenizer, load_policy
from worldline.tokenizers import AutoencoderConfig, AutoencoderTokenizer, build_autoencoder
from worldline.types import Observation, Policy, TensorState


class Counting:
    """Emits 1, 2, 3, ... hundredths in the first action dimension and never repeats itself, chunk after chunk."""

    def __init__(self, m: int) -> None:
        self.m, self.spec = m, SPEC

    def reset(self, n: int) -> TensorState:
        return TensorState(tensors={"next": torch.ones(n)}, rows=n)

    def act(self, observation, state, *, seeds):
        numbers = state.tensors["next"][:, None] + torch.arange(self.m)
        chunk = torch.stack([numbers / 100, torch.zeros_like(numbers)], -1)
        return chunk, TensorState(tensors={"next": numbers[:, -1] + 1}, rows=len(state))


def sent(policy: Policy, blocks: int, n: int = 2) -> torch.Tensor:
    """The first action dimension of everything the executor sends to a row, in hundredths."""
    executor = ChunkExecutor(policy)
    state, observation, out = executor.reset(n), starts(n), []
    for _ in range(blocks):
        block, state = executor.block(observation, state, seeds=torch.arange(n))
        out.append(block)
    return (torch.cat(out, 1)[..., 0] * 100).round().long()


@pytest.mark.parametrize("m", [2, 4, 6, 7])
@pytest.mark.parametrize("lag", [0, 1, 2, 3, 5, 11])
def test_lag_delays_what_is_sent_by_exactly_that_many_control_steps(m: int, lag: int) -> None:
    plain = sent(Counting(m), 12)
    late = sent(Corrupted(Counting(m), lag=lag), 12)
    assert (late[:, :lag] == 0).all(), "the middle of the range goes out first"
    assert torch.equal(late[:, lag:], plain[:, : plain.shape[1] - lag])


def test_lag_survives_fork_and_reset_by_row() -> None:
    policy = Corrupted(Counting(4), lag=3)
    observation, seeds = starts(2), torch.arange(2)
    _, state = policy.act(observation, policy.reset(2), seeds=seeds)
    mixed = state.index(torch.tensor([1, 0])).where(torch.tensor([True, False]), policy.reset(2))
    chunk, _ = policy.act(observation, mixed, seeds=seeds)
    numbers = (chunk[..., 0] * 100).round().long()
    assert numbers.tolist() == [[0, 0, 0, 1], [2, 3, 4, 5]]


def test_noise_has_the_promised_spread_and_differs_by_row_and_call() -> None:
    policy = Corrupted(DotPolicy(0.0, chunk=4), noise=0.2)
    n = 3000
    observation = Observation(
        images={"top": starts(1).images["top"].repeat(n, 1, 1, 1)}, pose=torch.zeros(n, 2), instruction=("",) * n
    )
    clean, _ = policy.policy.act(observation, policy.policy.reset(n), seeds=torch.arange(n))
    noisy, _ = policy.act(observation, policy.reset(n), seeds=torch.arange(n))
    error = (noisy - clean)[..., 0]  # half-range 1; five standard deviations from the limits
    # the standard error of a standard deviation is std / sqrt(2 * count)
    assert abs(float(error.std()) - 0.2) < 5 * 0.2 / (2 * error.numel()) ** 0.5
    assert abs(float(error.mean())) < 5 * 0.2 / error.numel() ** 0.5
    assert len(error[:, 0].unique()) > 0.99 * n
    again, _ = policy.act(observation, policy.reset(n), seeds=torch.arange(n))
    later, _ = policy.act(observation, policy.reset(n), seeds=torch.arange(n) + n)
    assert torch.equal(noisy, again)
    assert (later != noisy).any(-1).all()


def test_noise_stays_in_the_range() -> None:
    noisy, _ = Corrupted(DotPolicy(1.0), noise=5.0).act(
        starts(50), Corrupted(DotPolicy(1.0)).reset(50), seeds=torch.arange(50)
    )
    assert noisy.abs().max() == 1.0


@pytest.mark.parametrize("bad", [{"noise": -0.1}, {"lag": -1}])
def test_negative_corruption_is_refused(bad: dict) -> None:
    with pytest.raises(PolicyError, match="at least 0"):
        Corrupted(DotPolicy(1.0), **bad)


# --- callables --------------------------------------------------------------------------------------------------------


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    module = types.ModuleType("a_users_policy")
    module.right = lambda observation: [[[1.0, 0.0]] * 4] * len(observation)
    module.flat = lambda observation: torch.zeros(len(observation), 2)
    module.number = 3
    monkeypatch.setitem(sys.modules, "a_users_policy", module)
    return module


def test_a_function_is_a_policy(module: types.ModuleType) -> None:
    policy = load_policy("a_users_policy:right", spec=SPEC)
    chunk, _ = policy.act(starts(3), policy.reset(3), seeds=torch.arange(3))
    assert chunk.shape == (3, 4, 2) and isinstance(policy, Policy)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("no_such_module:act", "no_such_module"),
        ("a_users_policy:missing", "'missing' is required in a_users_policy, got None"),
        ("a_users_policy:number", "got 3"),
    ],
)
def test_a_function_that_is_not_there(module: types.ModuleType, name: str, says: str) -> None:
    with pytest.raises(PolicyError, match=says):
        load_policy(name, spec=SPEC)


def test_a_function_that_answers_in_another_shape(module: types.ModuleType) -> None:
    policy = CallablePolicy(module.flat, SPEC, name="flat")
    with pytest.raises(PolicyError, match=r"flat: actions of shape \(3, m, 2\) required, got \(3, 2\)"):
        policy.act(starts(3), policy.reset(3), seeds=torch.arange(3))


# --- names ------------------------------------------------------------------------------------------------------------


def test_corruption_is_typed_behind_the_name(tmp_path) -> None:
    small_policy("bc").save_pretrained(tmp_path / "bc")
    policy = load_policy(f"{tmp_path / 'bc'}@noise=0.5,lag=4", spec=SPEC)
    assert isinstance(policy, Corrupted) and (policy.noise, policy.lag) == (0.5, 4)
    assert load_policy(f"{tmp_path / 'bc'}@lag=1", spec=SPEC).lag == 1


@pytest.mark.parametrize("options", ["noise", "noise=x", "lag=1.5", "speed=2", "noise=0.5,,lag=4"])
def test_a_mistyped_corruption_names_the_item(options: str, module: types.ModuleType) -> None:
    with pytest.raises(PolicyError, match="noise=NUMBER and lag=STEPS required"):
        load_policy(f"a_users_policy:right@{options}", spec=SPEC)


def test_through_a_tokenizer_a_policy_sees_what_is_left_of_the_picture() -> None:
    """Lossless patches change nothing; an untrained autoencoder hides the dot from a policy that looks for it."""
    begin, seeds = starts(5), torch.arange(5)
    policy = DotPolicy(0.5)
    plain, _ = policy.act(begin, policy.reset(5), seeds=seeds)
    exact = ThroughTokenizer(policy, dot_tokenizer())
    assert torch.equal(exact.act(begin, exact.reset(5), seeds=seeds)[0], plain)
    torch.manual_seed(0)
    lossy = AutoencoderTokenizer(SPEC.cameras, build_autoencoder(AutoencoderConfig(blocks=(8, 8), fold=2)))
    seen = []

    def act(observation: Observation) -> torch.Tensor:
        seen.append(observation)
        return torch.zeros(len(observation), 2, 2)

    through = ThroughTokenizer(CallablePolicy(act, SPEC), lossy.eval())
    through.act(begin, through.reset(5), seeds=seeds)
    frames = {"top": begin.images["top"][:, None]}
    assert torch.equal(seen[0].images["top"], lossy.decode(lossy.encode(frames))["top"][:, 0])
    assert not torch.equal(seen[0].images["top"], begin.images["top"])
    assert torch.equal(seen[0].pose, begin.pose) and seen[0].instruction == begin.instruction
