"""The container of low-dimensional episodes: what it refuses and how it says so, and that nothing crosses an episode's end."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from worldline.data.trajectories import Trajectories, control_spec, join, low_dimensional
from worldline.errors import DatasetError

SPEC = control_spec("line", ("x", "v"), low=(-1.0,), high=(1.0,), rate_hz=10.0)


def line(*lengths: int, ends: bool = False, first: float = 0.0) -> Trajectories:
    """x counts steps from 100 e + `first` in episode e, v is -x; the reward is x; with `ends` the last step terminates."""
    x = torch.cat([100.0 * e + first + torch.arange(n + 1.0) for e, n in enumerate(lengths)])
    seen = torch.stack([x, -x], 1)
    final = torch.tensor(lengths).add(1).cumsum(0) - 1
    before, after = torch.ones(len(x), dtype=torch.bool), torch.ones(len(x), dtype=torch.bool)
    before[final], after[final - torch.tensor(lengths)] = False, False
    terminated = torch.zeros(sum(lengths), dtype=torch.bool)
    if ends:
        terminated[torch.tensor(lengths).cumsum(0) - 1] = True
    return Trajectories(
        spec=SPEC,
        observations=seen[before],
        actions=torch.linspace(-1, 1, sum(lengths))[:, None],
        rewards=x[before],
        next_observations=seen[after],
        terminated=terminated,
        lengths=torch.tensor(lengths),
        provenance=tuple({"episode": str(e)} for e in range(len(lengths))),
    )


def test_episodes_are_where_they_were_put() -> None:
    data = line(3, 1, 4, ends=True)
    assert len(data) == 3 and data.steps == 8
    assert data.starts.tolist() == [0, 3, 4]
    assert data.last.nonzero()[:, 0].tolist() == [2, 3, 7] and torch.equal(data.last, data.terminated)
    assert data.episode.tolist() == [0, 0, 0, 1, 2, 2, 2, 2]
    assert data.returns.tolist() == [0 + 1 + 2, 100, 200 + 201 + 202 + 203]


@pytest.mark.parametrize("length", [1, 2, 3, 5])
@pytest.mark.parametrize("stride", [1, 2, 7])
def test_windows_never_cross_episodes_and_reach_both_ends(length: int, stride: int) -> None:
    data = line(5, 2, 9)
    windows = data.windows(length, stride=stride)
    assert windows.shape[1] == length and (windows.diff(dim=1) == 1).all()
    episodes = data.episode[windows]
    assert (episodes == episodes[:, :1]).all()
    for episode, (start, n) in enumerate(zip(data.starts.tolist(), data.lengths.tolist())):
        firsts = windows[episodes[:, 0] == episode, 0] - start
        want = [] if n < length else sorted({*range(0, n - length + 1, stride), n - length})
        assert firsts.tolist() == want


def test_a_window_longer_than_every_episode_is_refused() -> None:
    with pytest.raises(DatasetError, match=r"episodes of at least 6 steps .* got 2 episodes of at most 5"):
        line(5, 2).windows(6)


def test_select_takes_whole_episodes_in_the_order_named() -> None:
    data = line(3, 1, 4, ends=True)
    chosen = data.select([2, 0, 2])
    assert chosen.lengths.tolist() == [4, 3, 4]
    assert chosen.rewards.tolist() == [200, 201, 202, 203, 0, 1, 2, 200, 201, 202, 203]
    assert torch.equal(chosen.observations[:, 0], chosen.rewards)
    assert torch.equal(chosen.next_observations[:, 0], chosen.rewards + 1)
    assert [about["episode"] for about in chosen.provenance] == ["2", "0", "2"]
    assert torch.equal(chosen.terminated, chosen.last)


def test_join_keeps_every_episode_and_who_made_it() -> None:
    real, imagined = replace(line(3, 2), provenance=()), line(4, ends=True)
    both = join([real, imagined])
    assert both.lengths.tolist() == [3, 2, 4] and both.terminated.sum() == 1
    assert both.provenance == ({}, {}, {"episode": "0"})
    assert torch.equal(both.select([2]).actions, imagined.actions)
    assert join([real, real]).provenance == ()


def test_join_of_two_tasks_is_refused() -> None:
    other = replace(line(2), spec=control_spec("plane", ("x", "v"), (-1.0,), (1.0,), rate_hz=10.0))
    with pytest.raises(DatasetError, match=r"one task required(.|\n)*line(.|\n)*plane"):
        join([line(2), other])


def put(name: str, row: int, value: float | bool) -> Callable[[Trajectories], Trajectories]:
    """A change of one row of one table."""

    def change(data: Trajectories) -> Trajectories:
        table = getattr(data, name).clone()
        table[row] = value
        return replace(data, **{name: table})

    return change


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda d: replace(d, spec=control_spec("line", 3, (-1.0,), (1.0,), rate_hz=1.0)), r"observations: shape \(5, 3\) required .* got \(5, 2\)"),
        (lambda d: replace(d, spec=control_spec("line", 2, (-1.0,) * 2, (1.0,) * 2, rate_hz=1.0)), r"actions: shape \(5, 2\) required .* got \(5, 1\)"),
        (lambda d: replace(d, lengths=torch.tensor([3, 3])), r"5 steps in episodes of at least one step .* got 5 terminated flags and episodes of 6 steps"),
        (lambda d: replace(d, lengths=torch.tensor([5, 0])), r"at least one step are required, .* the shortest 0"),
        (lambda d: replace(d, provenance=({},)), r"none or 2 entries required, got 1"),
        (put("terminated", 3, True), r"only an episode's last step may be terminated; step 0 of episode 1"),
        (put("rewards", 4, float("nan")), r"rewards: finite numbers required, got NaN or infinity in 1 of 5 steps, first in step 1 of episode 1"),
        (put("next_observations", 1, float("inf")), r"next_observations: finite .* first in step 1 of episode 0"),
        (put("actions", 2, 1.5), r"actions within \[-1\] .. \[1\] required, got \[1.5\] in step 2 of episode 0 \(1 of 5 steps\)\. Record what"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_by_name(change: Callable[[Trajectories], Trajectories], said: str) -> None:
    with pytest.raises(DatasetError, match=said):
        change(line(3, 2))


def test_rounding_at_the_edge_of_the_range_is_no_mistake() -> None:
    assert put("actions", 0, -1.0 - 1e-6)(line(3)).actions[0] < -1


def test_a_policy_sees_numbers_and_nothing_else() -> None:
    seen = low_dimensional(line(3).observations)
    assert len(seen) == 3 and seen.images == {} and seen.instruction == ("", "", "")
