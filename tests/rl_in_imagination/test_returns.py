"""Returns against limits worked out by hand; an end is an end, and a clock that ran out is not."""

import pytest
import torch

from worldline.errors import WorldlineError
from worldline.rl_in_imagination.returns import advantages, group_advantages, require_finite, returns

NO = torch.zeros(1, 3, dtype=torch.bool)
REWARD, VALUE, AFTER = (
    torch.tensor([[1.0, 2.0, 4.0]]),
    torch.tensor([[10.0, 20.0, 30.0]]),
    torch.tensor([[20.0, 30.0, 40.0]]),
)


def at(*places: int) -> torch.Tensor:
    mask = NO.clone()
    mask[0, list(places)] = True
    return mask


def test_lambda_0_is_the_one_step_error() -> None:
    found = advantages(REWARD, VALUE, AFTER, NO, at(2), discount=0.5, smoothing=0.0)
    assert found.tolist() == [[1 + 10 - 10, 2 + 15 - 20, 4 + 20 - 30]]
    assert returns(REWARD, AFTER, NO, at(2), discount=0.5, smoothing=0.0).tolist() == [[11, 17, 24]]


def test_lambda_1_is_the_return_minus_the_value() -> None:
    truncated = [1 + 0.5 * (2 + 0.5 * (4 + 0.5 * 40)), 2 + 0.5 * (4 + 0.5 * 40), 4 + 0.5 * 40]
    terminated = [1 + 0.5 * (2 + 0.5 * 4), 2 + 0.5 * 4, 4.0]
    for ends, told, expected in ((at(2), NO, terminated), (NO, at(2), truncated), (NO, NO, truncated)):
        assert returns(REWARD, AFTER, ends, told, discount=0.5, smoothing=1.0).tolist() == [expected]
        found = advantages(REWARD, VALUE, AFTER, ends, told, discount=0.5, smoothing=1.0)
        assert torch.allclose(found, torch.tensor([expected]) - VALUE)


@pytest.mark.parametrize("smoothing", [0.0, 0.3, 0.95, 1.0])
@pytest.mark.parametrize("kind", ["terminated", "truncated"])
def test_advantages_are_returns_minus_values_and_nothing_passes_an_end(smoothing: float, kind: str) -> None:
    generator = torch.Generator().manual_seed(0)
    reward, value, last = (torch.randn(5, 9, generator=generator) for _ in range(3))
    ends = torch.rand(5, 9, generator=generator) < 0.3
    # within an episode the state after a decision is the one of the next; at an end it is another
    after = torch.where(ends, last, torch.cat([value[:, 1:], last[:, -1:]], 1))
    terminated, truncated = (ends, ~ends & ends) if kind == "terminated" else (~ends & ends, ends)
    options = {"discount": 0.9, "smoothing": smoothing}
    found = advantages(reward, value, after, terminated, truncated, **options)
    assert torch.allclose(found + value, returns(reward, after, terminated, truncated, **options), atol=1e-5)
    later = reward.clone()
    row, i = ends[:, :-1].nonzero()[0].tolist()
    later[row, i + 1 :] += 100
    again = advantages(later, value, after, terminated, truncated, **options)
    assert torch.equal(again[row, : i + 1], found[row, : i + 1]) and not torch.equal(again[row], found[row])


def test_a_perfect_value_leaves_no_advantage() -> None:
    reward = torch.ones(1, 4)
    value = torch.tensor(
        [[1.875, 1.75, 1.5, 1.0]]
    )  # of 4, 3, 2, 1 rewards to come, each worth half of the one before it
    after = torch.tensor([[1.75, 1.5, 1.0, 99.0]])
    ends = torch.tensor([[False, False, False, True]])
    assert torch.equal(
        advantages(reward, value, after, ends, ~ends & ends, discount=0.5, smoothing=0.7), torch.zeros(1, 4)
    )


def test_nan_rewards_are_named() -> None:
    reward = torch.zeros(3, 4)
    reward[2, 1] = float("nan")
    with pytest.raises(WorldlineError, match="finite rewards required, got nan in row 2, decision 1"):
        require_finite(reward)
    require_finite(torch.zeros(3, 4))


def test_groups_are_compared_within_themselves() -> None:
    found = group_advantages(torch.tensor([1.0, 3.0, 100.0, 104.0, 7.0, 7.0]), 2)
    half = 0.5**0.5
    assert torch.allclose(found, torch.tensor([-half, half, -half, half, 0.0, 0.0]))
    with pytest.raises(ValueError, match="whole groups of at least 2 rows required, got groups of 4 and 6 rows"):
        group_advantages(torch.zeros(6), 4)
