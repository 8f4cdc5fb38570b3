"""The stated blend of recording policies: shares, determinism, and that it fails often and in several ways."""

from collections import Counter

import numpy as np
import pytest

from worldline.errors import SimulatorError
from worldline.sim import episode_seed, make_world
from worldline.sim.behaviours import BLENDS, CAUSES, behaviour, episode_cause


def test_twenty_episodes_hold_the_stated_shares() -> None:
    for policy, shares in BLENDS.items():
        assert sum(shares.values()) == 20
        for first in (0, 20, 40):
            assert Counter(episode_cause(policy, 7, i) for i in range(first, first + 20)) == Counter(shares)
    orders = {tuple(episode_cause("mixed", seed, i) for i in range(20)) for seed in range(5)}
    assert len(orders) == 5
    assert episode_cause("expert", 0, 3) == "expert"
    with pytest.raises(SimulatorError, match="mixed"):
        episode_cause("mixd", 0, 0)


def test_episode_seeds_are_disjoint_streams() -> None:
    drawn = [episode_seed(seed, index) for seed in range(5) for index in range(500)]
    assert len(set(drawn)) == len(drawn) and max(drawn) < 2**48
    assert episode_seed(3, 4) == episode_seed(3, 4) != episode_seed(4, 3)


def outcomes(policy: str, base: int, episodes: int) -> dict[str, list[bool]]:
    """Success of the first episodes of a blend, by cause."""
    task = "drawer-open-v3"
    world, rehearsal = (make_world(f"metaworld/{task}", cameras=()) for _ in range(2))
    found: dict[str, list[bool]] = {}
    for index in range(episodes):
        seed, cause = episode_seed(base, index), episode_cause(policy, base, index)
        act = behaviour(cause, task, seed=seed, horizon=160, rehearsal=rehearsal)
        world.reset(seed)
        found.setdefault(cause, []).append(any(world.drive(act).success for _ in range(40)))
    return found


def test_mixed_fails_in_two_of_five_episodes_and_in_four_ways() -> None:
    outcome = outcomes("mixed", 0, 30)
    assert 0.4 <= 1 - np.mean([success for cause in outcome.values() for success in cause]) <= 0.85
    assert sum(not all(successes) for successes in outcome.values()) >= 4
    assert all(outcome["expert"])


def test_contact_succeeds_about_as_often_as_it_fails() -> None:
    outcome = outcomes("contact", 1, 40)
    assert 0.25 <= np.mean([success for cause in outcome.values() for success in cause]) <= 0.75
    assert 0 < np.mean(outcome["clumsy"]) < 1


def test_mistaken_presses_somewhere_else() -> None:
    """It goes where the object would be in another start: often beside it, sometimes near enough."""
    task = "button-press-topdown-v3"
    world, rehearsal = (make_world(f"metaworld/{task}", cameras=()) for _ in range(2))
    pressed, away = [], []
    for index in range(20):
        seed = episode_seed(2, index)
        act = behaviour("mistaken", task, seed=seed, horizon=160, rehearsal=rehearsal)
        button = world.reset(seed).state[4:6]
        steps = [world.drive(act) for _ in range(40)]
        pressed.append(any(step.success for step in steps))
        away.append(float((steps[20].frame.state[:2] - button).norm()))
    assert 0.2 <= np.mean(pressed) <= 0.8
    assert max(d for d, p in zip(away, pressed, strict=True) if not p) > 0.05
    assert max(d for d, p in zip(away, pressed, strict=True) if p) < max(away)


@pytest.mark.parametrize("cause", CAUSES)
def test_a_behaviour_is_a_function_of_its_seed(cause: str) -> None:
    world = make_world("metaworld/reach-v3", cameras=(), horizon=160)
    rehearsal = make_world("metaworld/reach-v3", cameras=(), horizon=160)

    def actions(seed: int) -> np.ndarray:
        act = behaviour(cause, "reach-v3", seed=seed, horizon=160, rehearsal=rehearsal)
        world.reset(seed)
        return np.concatenate([world.drive(act).consumed for _ in range(10)])

    assert np.array_equal(actions(1), actions(1))
