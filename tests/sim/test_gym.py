"""The Gymnasium adapter, on a point that moves along a line."""

import gymnasium
import pytest
import torch

from tests.sim.toys import POINT, PointEnv, Push
from worldline.data import LeRobotDataset
from worldline.errors import SimulatorError
from worldline.sim import SimulatedWorld, make_world
from worldline.sim.gym import GymWorld
from worldline.sim.record import record
from worldline.sim.rollout import rollout_policy


def test_consumed_actions_spec_and_pictures() -> None:
    world = make_world(f"gym/{POINT}", size=16, horizon=40, control_steps=2)
    assert isinstance(world, SimulatedWorld)
    assert world.spec.fps == 5.0 and world.spec.action.low == (-0.5,) and world.spec.action.embodiment == POINT
    first = world.reset(3)
    assert first.images["rgb"].shape == (3, 16, 16)
    step = world.step(torch.tensor([[-9.0], [0.1]]))
    assert torch.allclose(step.consumed, torch.tensor([[-0.5], [0.1]]))
    assert torch.allclose(step.frame.state, first.state - 0.4) and step.reward == 2.0 and step.success is False
    assert int(step.frame.images["rgb"][0, 0, 0]) < int(first.images["rgb"][0, 0, 0])
    assert torch.equal(world.reset(3).state, first.state) and not torch.equal(world.reset(4).state, first.state)


def test_an_end_inside_a_block() -> None:
    world = make_world(f"gym/{POINT}", cameras=(), control_steps=8)
    world.reset(0)
    step = world.step(torch.cat([torch.full((4, 1), 0.4), torch.full((4, 1), -0.3)]))
    assert step.terminated and step.success and not step.truncated
    assert step.sent < 8 and step.reward == step.sent
    assert torch.allclose(step.consumed[step.sent :], step.consumed[step.sent - 1].expand(8 - step.sent, 1))
    with pytest.raises(SimulatorError, match="reset"):
        world.step(torch.zeros(8, 1))


def test_the_horizon_truncates() -> None:
    world = make_world(f"gym/{POINT}", cameras=(), horizon=8, control_steps=4)
    world.reset(0)
    assert [world.step(torch.zeros(4, 1)).truncated for _ in range(2)] == [False, True]


def test_unknown_success_is_none() -> None:
    world = GymWorld("MountainCarContinuous-v0", cameras=(), rate_hz=20.0)
    world.reset(0)
    assert world.step(torch.zeros(4, 1)).success is None


def test_success_that_is_told_at_the_end_alone_is_a_success(tmp_path, monkeypatch) -> None:
    """Many simulators are silent until an episode is over: that is "not yet", in records and in rollouts."""
    spoken = PointEnv.step

    def silent(self, action):
        seen, reward, done, cut, info = spoken(self, action)
        return seen, reward, done, cut, info if done else {}

    monkeypatch.setattr(PointEnv, "step", silent)

    def push() -> Push:
        return Push(make_world(f"gym/{POINT}", cameras=(), control_steps=2).spec, 0.1)

    record(f"gym/{POINT}", tmp_path / "data", episodes=1, policy=push, horizon=60, control_steps=2, progress=False)
    episode = LeRobotDataset(tmp_path / "data").episode(0)
    assert episode.success is True and episode.terminated and episode.frame_success is not None
    assert episode.frame_success.tolist() == [False] * (len(episode) - 1) + [True]
    options = {"cameras": (), "control_steps": 2}
    (rolled,) = rollout_policy(f"gym/{POINT}", push(), seeds=[3], horizon=60, **options)
    assert rolled.success is True
    (cut,) = rollout_policy(f"gym/{POINT}", push(), seeds=[3], horizon=4, **options)
    assert cut.success is None and cut.frame_success is None  # nothing was said


def test_mistakes_are_named() -> None:
    with pytest.raises(SimulatorError, match="Box actions required"):
        make_world("gym/CartPole-v1", cameras=())
    with pytest.raises(SimulatorError, match="CartPole-v1"):
        make_world("gym/CartPoel-v1", cameras=())
    with pytest.raises(SimulatorError, match="cameras: rgb"):
        make_world(f"gym/{POINT}", cameras=("corner2",))


def test_a_missing_drawing_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Environments import what they draw with at the first picture, long after they were made."""
    world = make_world(f"gym/{POINT}", size=16)

    def render(self: object) -> None:
        raise gymnasium.error.DependencyNotInstalled("pygame is not installed")

    monkeypatch.setattr(type(world._env), "render", render)  # type: ignore[attr-defined]
    with pytest.raises(SimulatorError, match=r"cannot be rendered: pygame is not installed"):
        world.reset(0)
