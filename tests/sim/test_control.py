"""Tasks of offline RL: one simulator for all rows is the real environment, and says the truth about single steps."""

import sys
from collections.abc import Iterator

import gymnasium
import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("mujoco", reason='an extra: pip install "worldline[offline]"')
pytest.importorskip("gymnasium_robotics", reason='an extra: pip install "worldline[offline]"')

from worldline.data.trajectories import join
from worldline.errors import SimulatorError
from worldline.sim.control import CONTROL_TASKS, Act, ControlTask, collect_trajectories, evaluate_returns, make_control
from worldline.sim.waypoints import WaypointPilot


@pytest.fixture(scope="module", params=CONTROL_TASKS)
def task(request: pytest.FixtureRequest) -> ControlTask:
    return make_control(request.param)


@pytest.fixture(scope="module")
def umaze() -> ControlTask:
    return make_control("pointmaze/umaze")


@pytest.fixture(scope="module")
def hopper() -> ControlTask:
    return make_control("hopper")


def jitter(task: ControlTask, seed: int, *, hold: int = 5) -> Iterator[np.ndarray]:
    """Random actions, each sent `hold` times, as a policy that gets somewhere would."""
    rng = np.random.default_rng(seed)
    while True:
        action = rng.uniform(-1, 1, task.spec.action.dim).astype(np.float32)
        yield from [action] * hold


def random(task: ControlTask, seed: int) -> Act:
    draw = torch.Generator().manual_seed(seed)
    return lambda seen: torch.rand(len(seen), task.spec.action.dim, generator=draw) * 2 - 1


def real_steps(task: ControlTask, steps: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Steps of the Gymnasium environment itself, episode after episode, in float64."""
    env, found = task.make_env(), []
    seen, over, actions = None, True, jitter(task, 0)
    for i in range(steps):
        if over:
            seen, _ = env.reset(seed=i)
        action = next(actions)
        after, reward, terminated, truncated, _ = env.step(action)
        found.append((seen, action, reward, after, terminated))
        seen, over = after, terminated or truncated
    columns = [torch.from_numpy(np.array(column)) for column in zip(*found)]
    return columns[0], columns[1].double(), columns[2], columns[3], columns[4]


def test_the_spec_is_what_the_environment_is(task: ControlTask) -> None:
    env = task.make_env()
    inner = env.unwrapped
    assert env.observation_space.shape == (len(task.spec.pose_names),)
    assert isinstance(env.action_space, gymnasium.spaces.Box)
    assert env.action_space.low.tolist() == list(task.spec.action.low)
    assert env.action_space.high.tolist() == list(task.spec.action.high)
    assert task.spec.action.rate_hz == pytest.approx(1 / getattr(inner, "point_env", inner).dt)  # pyright: ignore
    assert task.spec.action.embodiment == task.name and make_control(task.spec.action.embodiment).spec == task.spec
    env.reset(seed=0)
    if not task.name.startswith("hopper"):  # which falls long before
        ended = [env.step(np.zeros(task.spec.action.dim, np.float32))[2:4] for _ in range(task.horizon)]
        assert not any(any(flags) for flags in ended[:-1]) and ended[-1] == (False, True)


def test_a_step_from_an_observation_is_the_recorded_step(task: ControlTask) -> None:
    seen, actions, rewards, after, terminated = real_steps(task, 400)
    inside = (seen.abs() < 10).all(1) if task.name == "hopper" else torch.ones(len(seen), dtype=torch.bool)
    got, gained, ended = task.step_from(seen, actions)
    assert inside.float().mean() > 0.95
    assert (got - after)[inside].abs().max() < 1e-9 and (gained - rewards)[inside].abs().max() < 1e-6
    assert torch.equal(ended[inside], terminated[inside])
    got, gained, _ = task.step_from(seen.float(), actions.float())
    assert got.dtype == gained.dtype == torch.float32
    assert (got - after)[inside].abs().max() < 1e-3 and (got - after)[inside].abs().median() < 1e-6
    backwards = task.step_from(seen.flip(0), actions.flip(0))[0].flip(0)
    assert torch.equal(backwards[inside], task.step_from(seen, actions)[0][inside]), "a row knows nothing of the others"


def test_rollouts_are_the_environment_s(task: ControlTask) -> None:
    """Three rows of open-loop actions, against three environments one after the other."""
    plans = [jitter(task, row) for row in range(3)]
    data = collect_trajectories(
        task, lambda _: torch.from_numpy(np.stack([next(p) for p in plans])), episodes=3, seed=7
    )
    for row, episode in enumerate(data.select([row]) for row in range(3)):
        env, plan = task.make_env(), jitter(task, row)
        seen, _ = env.reset(seed=7 + row)
        for step in range(min(episode.steps, 60)):
            assert np.allclose(episode.observations[step], seen, atol=1e-5)
            seen, reward, terminated, *_ = env.step(next(plan))
            assert np.allclose(episode.next_observations[step], seen, atol=1e-5)
            assert float(episode.rewards[step]) == pytest.approx(float(reward), abs=1e-5)
            assert bool(episode.terminated[step]) == terminated


def test_seeds_decide_starts_whoever_acts(task: ControlTask) -> None:
    def starts(seed: int, act: Act) -> Tensor:
        data = collect_trajectories(task, act, episodes=4, seed=seed)
        return data.observations[data.starts]

    idle = starts(3, lambda seen: torch.zeros(len(seen), task.spec.action.dim))
    assert torch.equal(idle, starts(3, random(task, 1)))
    assert torch.equal(idle[1:], starts(4, random(task, 1))[:-1])
    assert len(idle.unique(dim=0)) == 4


def test_falls_terminate_and_clocks_truncate(hopper: ControlTask, umaze: ControlTask) -> None:
    fallen = collect_trajectories(hopper, random(hopper, 0), episodes=5, seed=0)
    assert torch.equal(fallen.terminated, fallen.last) and fallen.lengths.max() < 200
    assert len(fallen.lengths.unique()) > 1
    returns, lengths = evaluate_returns(hopper, random(hopper, 0), episodes=5, seed=0)
    assert torch.equal(returns, fallen.returns) and torch.equal(lengths, fallen.lengths)
    wandered = collect_trajectories(umaze, random(umaze, 0), episodes=2, seed=0)
    assert wandered.lengths.tolist() == [300, 300] and not wandered.terminated.any()
    assert wandered.provenance[1] == {"simulator": "pointmaze/umaze", "seed": "1"}


def test_actions_are_kept_as_consumed(umaze: ControlTask) -> None:
    data = collect_trajectories(umaze, lambda seen: torch.full((len(seen), 2), 7.0), episodes=1, seed=0)
    assert (data.actions == 1).all()


def test_the_goal_is_one_place_and_pays_every_step_within_its_radius(umaze: ControlTask) -> None:
    assert umaze.goal is not None
    goal = torch.tensor(umaze.maze[umaze.goal])
    data = collect_trajectories(umaze, WaypointPilot(umaze, seed=0), episodes=12, seed=0)
    near = (data.next_observations[:, :2] - goal).norm(dim=1) <= 0.45
    assert torch.equal(data.rewards, near.float()) and near.any()
    assert not ((data.observations[data.starts][:, :2] - goal).norm(dim=1) <= 0.45).any(), "no episode begins there"


@pytest.mark.parametrize(("name", "episodes"), [("pointmaze/umaze", 40), ("pointmaze/medium", 20)])
def test_wandering_goes_everywhere_and_is_far_from_the_best(name: str, episodes: int) -> None:
    task = make_control(name)
    parts = [
        collect_trajectories(task, WaypointPilot(task, seed=i), episodes=episodes // 2, seed=100 * i) for i in (0, 1)
    ]
    data = join(parts)
    centres = torch.tensor(list(task.maze.values()))
    visited = torch.cdist(data.observations[:, :2], centres, p=float("inf")).argmin(1)
    assert len(visited.unique()) == len(centres)
    best, _ = evaluate_returns(task, WaypointPilot(task, seed=0, noise=0.0, wander=False), episodes=5, seed=0)
    assert 0.02 * best.mean() < data.returns.mean() < 0.3 * best.mean()
    assert best.min() > 0.5 * task.horizon


def test_a_pilot_s_row_is_its_own(umaze: ControlTask) -> None:
    few = collect_trajectories(umaze, WaypointPilot(umaze, seed=5), episodes=2, seed=0)
    many = collect_trajectories(umaze, WaypointPilot(umaze, seed=5), episodes=4, seed=0).select([0, 1])
    assert torch.equal(few.observations, many.observations) and torch.equal(few.actions, many.actions)


def test_mistakes_are_named(umaze: ControlTask, hopper: ControlTask) -> None:
    with pytest.raises(SimulatorError, match=r"unknown control task 'hoper'; did you mean hopper\?"):
        make_control("hoper")
    with pytest.raises(SimulatorError, match=r"a task with a maze required \(pointmaze/umaze, .*\), got hopper"):
        WaypointPilot(hopper, seed=0)
    with pytest.raises(SimulatorError, match=r"actions: shape \(3, 2\) required, got \(3, 3\)"):
        umaze.step_from(torch.zeros(3, 4), torch.zeros(3, 3))
    with pytest.raises(SimulatorError, match=r"observations: finite numbers required, .* in 1 of 3 rows"):
        umaze.step_from(torch.tensor([[0.0], [float("nan")], [0.0]]).expand(3, 4), torch.zeros(3, 2))
    with pytest.raises(SimulatorError, match=r"actions of the policy: shape \(2, 3\) required, got \(2, 1\)"):
        evaluate_returns(hopper, lambda seen: torch.zeros(len(seen), 1), episodes=2, seed=0)


def test_a_state_at_which_the_simulator_gives_up_is_refused_and_forgotten(
    umaze: ControlTask, tmp_path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # MuJoCo writes a log of its own
    with pytest.raises(SimulatorError, match=r"pointmaze/umaze: .* it gave up at positions \[999"):
        umaze.step_from(torch.tensor([[1e12, 0.0, 0.0, 0.0]]), torch.zeros(1, 2))
    after, _, _ = umaze.step_from(torch.tensor([[1.0, 1.0, 0.5, 0.0]]), torch.zeros(1, 2))
    assert 1.0 < after[0, 0] < 1.006


class Count(gymnasium.Env):
    """Counts up from 0 or 10 and pays the action; from 0 the episode ends at 3, from 10 it is cut off at 15, by the environment itself."""

    observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (1,), np.float64)
    action_space = gymnasium.spaces.Box(-0.5, 0.5, (1,), np.float64)

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        self.count = 10.0 * float(self.np_random.integers(2))
        return np.array([self.count]), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict]:
        self.count += 1
        return np.array([self.count]), float(action[0]), self.count == 3, self.count == 15, {}


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gymnasium.envs.registration.registry", dict(gymnasium.registry))
    monkeypatch.setattr(gymnasium, "registry", gymnasium.envs.registration.registry)
    gymnasium.register("Count-v0", Count, max_episode_steps=100)
    gymnasium.register("Endless-v0", Count)


def test_any_gymnasium_environment_of_vectors_is_a_task_with_its_own_rewards_and_ends(registered: None) -> None:
    task = make_control("gym/Count-v0")
    assert (
        task.spec.pose_names == ("o0",)
        and task.spec.action.high == (0.5,)
        and task.spec.action.embodiment == "Count-v0"
    )
    data = collect_trajectories(task, lambda seen: torch.full((len(seen), 1), 0.25), episodes=12, seed=3)
    firsts = data.observations[data.starts, 0]
    assert set(firsts.tolist()) == {0.0, 10.0}
    assert torch.equal(data.lengths, torch.where(firsts == 0, 3, 5))
    assert torch.equal(data.terminated[data.last], firsts == 0), "what is cut off is not terminated"
    assert torch.equal(data.returns, 0.25 * data.lengths)
    again, _ = evaluate_returns(task, lambda seen: torch.full((len(seen), 1), 7.0), episodes=12, seed=3)
    assert torch.equal(again, 0.5 * data.lengths), (
        "environments used again begin where their seeds say, actions are clipped"
    )
    env = task.make_env()
    assert [float(env.reset(seed=3 + i)[0][0]) for i in range(12)] == firsts.tolist()


def test_the_clock_of_a_gymnasium_environment_is_its_own() -> None:
    data = collect_trajectories(
        make_control("gym/Pendulum-v1"), lambda seen: torch.zeros(len(seen), 1), episodes=1, seed=0
    )
    assert data.lengths.tolist() == [200] and not data.terminated.any() and data.spec.action.low == (-2.0,)


def test_gymnasium_environments_that_are_no_tasks_are_refused(registered: None) -> None:
    for name, said in (
        ("Pendulm-v1", r"unknown Gymnasium environment 'Pendulm-v1'; did you mean .*Pendulum-v1"),
        ("CartPole-v1", r"gym/CartPole-v1: an action space that is a Box of one axis is required .* got Discrete\(2\)"),
        ("Endless-v0", r"gym/Endless-v0: an environment with a time limit is required"),
        ("no_such_package:Thing-v0", r"gym/no_such_package:Thing-v0 could not be made: No module named"),
    ):
        with pytest.raises(SimulatorError, match=said):
            make_control(f"gym/{name}")
    with pytest.raises(SimulatorError, match=r"can be set to any state .*, got gym/Count-v0"):
        make_control("gym/Count-v0").step_from(torch.zeros(1, 1), torch.zeros(1, 1))


def test_the_extra_is_named_where_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    task = make_control("pointmaze/umaze")
    monkeypatch.setitem(sys.modules, "gymnasium_robotics", None)
    with pytest.raises(SimulatorError, match=r'pip install "worldline\[offline\]"'):
        task.make_env()
