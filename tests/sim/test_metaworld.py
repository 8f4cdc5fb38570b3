"""Meta-World as a simulated world: starts, consumed actions, cameras, success, names."""

import numpy as np
import pytest
import torch

from worldline.errors import SimulatorError
from worldline.sim import SimulatedWorld, disjoint_starts, make_world, start_states
from worldline.sim.cameras import MOVED, project, shrink
from worldline.sim.metaworld import expert, instruction_for, tasks

FIVE = ("drawer-open-v3", "door-open-v3", "button-press-topdown-v3", "reach-v3", "push-v3")


@pytest.mark.parametrize("task", FIVE)
def test_every_seed_gives_its_own_start(task: str) -> None:
    name = f"metaworld/{task}"
    states = start_states(name, range(30))
    objects_and_goal = np.concatenate([states[:, 4:18], states[:, 36:]], axis=1)
    gaps = np.abs(objects_and_goal[:, None] - objects_and_goal[None]).max(-1) + np.eye(30)
    assert gaps.min() > 1e-5
    assert np.array_equal(states[:5], start_states(name, range(5)))


def test_overlapping_seed_lists_are_found_out() -> None:
    apart = disjoint_starts("metaworld/drawer-open-v3", range(10), range(100, 110))
    assert apart.disjoint and apart.nearest > 1e-6
    overlapping = disjoint_starts("metaworld/drawer-open-v3", [1, 2, 3], [3, 4])
    assert not overlapping.disjoint and overlapping.same == ((3, 3),) and overlapping.nearest == 0.0


@pytest.mark.parametrize("task", FIVE)
def test_the_first_state_is_that_of_the_scene(task: str) -> None:
    """Meta-World's own reset reports (and draws) the objects of another start: they jump at the first step."""
    world = make_world(f"metaworld/{task}", cameras=())
    for seed in range(3):
        first = world.reset(seed).state
        after = world.step(torch.zeros(4, 4)).frame.state
        assert torch.allclose(first[4:7], after[4:7], atol=5e-3)
        assert torch.allclose(first[36:], after[36:], atol=1e-6)


def test_a_start_does_not_depend_on_what_was_played_before() -> None:
    world = make_world("metaworld/drawer-open-v3", cameras=("corner2",), size=32, horizon=160)
    act = expert("drawer-open-v3")
    first = world.reset(5)
    steps = [world.drive(act) for _ in range(3)]
    for _ in range(20):
        world.drive(act)
    again = world.reset(5)
    act = expert("drawer-open-v3")
    repeated = [world.drive(act) for _ in range(3)]
    world.close()
    assert torch.equal(first.images["corner2"], again.images["corner2"])
    assert torch.equal(first.state, again.state)
    for a, b in zip(steps, repeated):
        assert torch.equal(a.frame.images["corner2"], b.frame.images["corner2"])
        assert torch.equal(a.consumed, b.consumed) and a.reward == b.reward


def test_consumed_actions_are_clipped_and_move_the_hand() -> None:
    world = make_world("metaworld/reach-v3", cameras=(), horizon=40)
    block = torch.tensor([[3.0, 0.0, 0.5, -7.0]]).repeat(4, 1)
    start = world.reset(0)
    step = world.step(block)
    assert torch.equal(step.consumed, torch.tensor([[1.0, 0.0, 0.5, -1.0]]).repeat(4, 1)) and step.sent == 4
    for _ in range(4):
        step = world.step(block)
    moved = step.frame.pose - start.pose
    assert moved[0] > 0.05 and moved[2] > 0.02 and abs(moved[1]) < 0.02
    assert torch.equal(step.frame.pose, step.frame.state[:4])


def test_an_episode_ends_at_the_horizon_and_not_before() -> None:
    world = make_world("metaworld/reach-v3", cameras=(), horizon=12)
    world.reset(0)
    ends = [world.step(torch.zeros(4, 4)) for _ in range(3)]
    assert [step.truncated for step in ends] == [False, False, True]
    assert not any(step.terminated for step in ends)
    with pytest.raises(SimulatorError, match="reset"):
        world.step(torch.zeros(4, 4))


@pytest.mark.parametrize("task", FIVE)
def test_experts_succeed_within_the_horizon_and_doing_nothing_does_not(task: str) -> None:
    world = make_world(f"metaworld/{task}", cameras=())
    world.reset(12)
    act = expert(task)
    held = [world.drive(act).success for _ in range(40)]
    assert any(held) and not held[0]
    world.reset(12)
    assert not any(world.step(torch.zeros(4, 4)).success for _ in range(40))


@pytest.mark.parametrize("task", ["reach-v3", "drawer-open-v3"])
def test_corner2_is_upright_and_the_goal_is_shown_where_it_is_the_task(task: str) -> None:
    """Geometry decides: the hand's blue finger and the goal must be at the pixels a pinhole camera puts them."""
    size = 96
    world = make_world(f"metaworld/{task}", cameras=("corner2",), size=size)
    frame = world.reset(2)
    image = frame.images["corner2"].float()
    world.close()
    red, green, blue = image
    finger = (blue > 150) & (green > 150) & (red < 60)
    rows, columns = finger.nonzero().float().mean(0).tolist()
    row, column = project(MOVED["corner2"], frame.pose[:3].numpy(), size)
    assert abs(columns - column) < 12 and -4 < rows - row < 20  # fingers hang below the hand: upright
    goal = (green > 150) & (red < 60) & (blue < 60)
    assert bool(goal.any()) == (task == "reach-v3")
    if goal.any():
        row, column = project(MOVED["corner2"], frame.state[36:39].numpy(), size)
        found = goal.nonzero().float().mean(0)
        assert abs(found[0] - row) < 3 and abs(found[1] - column) < 3


def test_shrink_is_the_area_mean() -> None:
    image = np.random.default_rng(0).integers(0, 256, (6, 9, 3), dtype=np.uint8)
    expected = image.reshape(2, 3, 3, 3, 3).mean(axis=(1, 3))
    assert np.abs(shrink(image, 3) - expected).max() <= 0.5 + 1e-9


def test_every_task_with_an_expert_can_be_made() -> None:
    assert len(tasks()) == 50
    for task in tasks():
        world = make_world(f"metaworld/{task}", cameras=("corner2",), horizon=4)
        assert isinstance(world, SimulatedWorld) and world.spec.fps == 20.0 and world.instruction
        world.close()


def test_instructions_follow_from_names() -> None:
    assert instruction_for("drawer-open-v3") == "open the drawer"
    assert instruction_for("button-press-topdown-v3") == "press the button from above"
    assert instruction_for("reach-v3") == "reach the goal"
    assert instruction_for("pick-place-wall-v3") == "pick and place the object past the wall"


def test_mistakes_are_named() -> None:
    with pytest.raises(SimulatorError, match="drawer-open-v3"):
        make_world("metaworld/drawer-opne-v3")
    with pytest.raises(SimulatorError, match=r"corner2, corner3.*gripperPOV"):
        make_world("metaworld/reach-v3", cameras=("wrist",))
    with pytest.raises(SimulatorError, match="metaworld/<task>"):
        make_world("drawer-open-v3")
    with pytest.raises(SimulatorError, match="multiple"):
        make_world("metaworld/reach-v3", horizon=10, control_steps=4)
    world = make_world("metaworld/reach-v3", cameras=())
    with pytest.raises(SimulatorError, match="reset"):
        world.step(torch.zeros(4, 4))
    world.reset(0)
    with pytest.raises(SimulatorError, match=r"\(4, 4\) required"):
        world.step(torch.zeros(3, 4))
    with pytest.raises(SimulatorError, match="finite"):
        world.step(torch.full((4, 4), float("nan")))
