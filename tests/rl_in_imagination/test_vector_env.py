"""The dream behind Gymnasium's vector interface: same frames as the torch core, episodes that end as declared.

What any vector environment must keep (spaces, seeds by row, autoreset) is in test_conformance.py.
"""

from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.vector import AutoresetMode

from tests.oracles import DotPolicy, DotScorer, ExactDotWorldModel, dot_tokenizer, move
from tests.policies.dots import starts
from worldline.executor import ChunkExecutor
from worldline.rl_in_imagination import ImaginedVectorEnv, to_observation
from worldline.rl_in_imagination.dream import Dream, rollout

TOKENIZER = dot_tokenizer()
N, HORIZON = 6, 5


def make(mode: AutoresetMode = AutoresetMode.NEXT_STEP, *, n: int = N, horizon: int = HORIZON, **options: Any) -> Any:
    dream = Dream(ExactDotWorldModel(TOKENIZER), TOKENIZER)
    return ImaginedVectorEnv(
        dream, DotScorer(), starts(n), num_envs=n, horizon=horizon, autoreset_mode=mode, **({"persist": 1} | options)
    )


def block(env: Any, x: float = 0.0) -> np.ndarray:
    action = np.zeros(env.action_space.shape, np.float32)
    action[..., 0] = x
    return action


def test_pictures_show_what_is_observed() -> None:
    env = make(render_mode="rgb_array")
    env.reset(seed=3)
    observed, *_ = env.step(env.action_space.sample())
    camera = env.dream.spec.cameras[0]
    pictures = env.render()
    assert len(pictures) == N and pictures[0].shape == (camera.height, camera.width, 3)
    assert np.array_equal(pictures, observed["pixels"][camera.name])
    assert make().render() is None


def test_a_policy_sees_what_it_sees_in_the_dream() -> None:
    """The same starts, policy and noise seeds through `rollout` and through Gymnasium: equal poses and probabilities."""
    env, policy = make(horizon=99, persist=99), DotPolicy(0.5)
    observed, _ = env.reset(seed=0)
    begin, seeds = env.state.observation, env.state.seeds
    made = rollout(env.dream, policy, DotScorer(), begin, frames=5, seeds=seeds)
    executor = ChunkExecutor(policy)
    acting = executor.reset(N)
    for i in range(1, 5):
        action, acting = executor.block(to_observation(observed, instruction=""), acting, seeds=seeds)
        observed, reward, *_ = env.step(action.numpy())
        assert torch.equal(torch.from_numpy(observed["agent_pos"]), made.poses[:, i])
        assert np.allclose(reward, made.probability[:, i])


def test_other_seeds_begin_elsewhere_and_unseeded_rows_go_on_drawing() -> None:
    env = make()
    first = env.reset(seed=7)[0]["agent_pos"]
    assert not np.array_equal(first, make().reset(seed=8)[0]["agent_pos"])
    again = env.reset(seed=[7, *[None] * (N - 1)])[0]["agent_pos"]
    assert np.array_equal(again[0], first[0]) and not np.array_equal(again[1:], first[1:])


def end_by_horizon(env: Any) -> tuple[Any, ...]:
    """Steps of standing still until the horizon; the last step's result."""
    env.reset(seed=1)
    out: tuple[Any, ...] = ()
    for i in range(HORIZON):
        out = env.step(block(env))
        assert out[3].all() == (i == HORIZON - 1)
    return out


@pytest.mark.parametrize("mode", list(AutoresetMode))
def test_the_horizon_is_no_failure_and_the_next_episode_begins_at_a_start(mode: AutoresetMode) -> None:
    env = make(mode, threshold=2.0)
    observed, _, terminated, truncated, infos = end_by_horizon(env)
    assert truncated.all() and not terminated.any() and infos["_success_probability"].all()
    if mode == AutoresetMode.NEXT_STEP:
        observed = env.step(block(env, 1.0))[0]
    if mode == AutoresetMode.DISABLED:
        with pytest.raises(gymnasium.error.ResetNeeded, match="rows \\[0, 1, 2"):
            env.step(block(env))
        observed = env.reset(options={"reset_mask": truncated})[0]
    begun = torch.from_numpy(observed["agent_pos"].copy())
    assert all((begun[i] == env.episodes.starts.pose).all(1).any() for i in range(N)), "not one block on"
    after = env.step(block(env, 1.0))[0]["agent_pos"]
    assert np.allclose(after, move(begun, torch.from_numpy(block(env, 1.0))), atol=1e-6)


def test_infos_of_the_last_frame_are_the_same_in_every_mode() -> None:
    reference = end_by_horizon(make(threshold=2.0))[4]
    infos = end_by_horizon(make(AutoresetMode.SAME_STEP, threshold=2.0))[4]
    for key in ("success_probability", "is_success"):
        assert (infos["final_info"][key] == reference[key]).all()


def test_a_reset_of_some_rows_tells_of_those() -> None:
    env = make(AutoresetMode.DISABLED)
    env.reset(seed=0)
    mask = np.arange(N) == 2
    assert env.reset(options={"reset_mask": mask})[1]["_is_success"].tolist() == mask.tolist()


def test_success_terminates_and_rows_end_on_their_own() -> None:
    """Faster dots cross the goal line sooner; a row that ends begins again while the others go on."""
    env = make(horizon=50)
    env.reset(seed=2)
    actions = block(env) + np.linspace(0.4, 1.0, N, dtype=np.float32)[:, None, None] * np.float32([1, 0])
    first = np.full(N, -1)
    for i in range(20):
        before = env.state.observation.pose[:, 0].clone()
        _, _, terminated, truncated, infos = env.step(actions)
        assert not truncated.any() and (infos["is_success"] == terminated).all()
        resumed = env.state.observation.pose[:, 0] < before
        assert (resumed.numpy() <= (first >= 0)).all(), "only rows that ended go back to a start"
        first[(first < 0) & terminated] = i
    assert (first >= 0).all() and len(set(first)) > 1 and (np.diff(first) <= 0).all()


def test_success_must_last() -> None:
    once, twice = make(persist=1, horizon=50), make(persist=3, horizon=50)
    ended = []
    for env in (once, twice):
        env.reset(seed=2)
        ended.append(next(i for i in range(50) if env.step(block(env, 1.0))[2][0]))
    assert ended[1] == ended[0] + 2


@pytest.mark.parametrize(
    ("action", "message"),
    [(np.zeros((N, 1), np.float32), "required, got \\(6, 1\\)"), (None, "finite actions required.*rows \\[4\\]")],
)
def test_bad_actions_say_what_was_wanted(action: np.ndarray | None, message: str) -> None:
    env = make()
    env.reset(seed=0)
    if action is None:
        action = block(env)
        action[4] = np.nan
    with pytest.raises(ValueError, match=message):
        env.step(action)


def test_bad_resets_say_what_was_wanted() -> None:
    env = make()
    with pytest.raises(gymnasium.error.ResetNeeded):
        env.step(block(env))
    with pytest.raises(gymnasium.error.ResetNeeded, match="first reset"):
        env.reset(options={"reset_mask": np.eye(N, dtype=bool)[0]})
    with pytest.raises(ValueError, match="one seed a row"):
        env.reset(seed=[1, 2])
    env.reset(seed=0)
    with pytest.raises(ValueError, match="at least one True"):
        env.reset(options={"reset_mask": np.zeros(N, bool)})
