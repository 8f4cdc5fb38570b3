"""The dream behind Gymnasium's vector interface: same frames as the torch core, episodes that end as declared."""

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


def test_what_comes_back_fits_the_declared_spaces() -> None:
    env = make(render_mode="rgb_array")
    observed, infos = env.reset(seed=3)
    assert env.observation_space.contains(observed) and not infos["is_success"].any()
    observed, reward, terminated, truncated, infos = env.step(env.action_space.sample())
    assert env.observation_space.contains(observed)
    assert reward.shape == terminated.shape == truncated.shape == (N,)
    assert infos["_success_probability"].all()
    camera = env.dream.spec.cameras[0]
    pictures = env.render()
    assert len(pictures) == N and pictures[0].shape == (camera.height, camera.width, 3)
    assert np.array_equal(pictures[0], observed["pixels"][camera.name][0])
    assert env.metadata["autoreset_mode"] == AutoresetMode.NEXT_STEP


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


def test_seeds_decide_starts_and_nothing_else_does() -> None:
    first = make().reset(seed=7)[0]["agent_pos"]
    assert np.array_equal(first, make().reset(seed=7)[0]["agent_pos"])
    assert not np.array_equal(first, make().reset(seed=8)[0]["agent_pos"])
    env = make()
    env.reset(seed=7)
    again = env.reset(seed=[7, *[None] * (N - 1)])[0]["agent_pos"]
    assert np.array_equal(again[0], first[0]), "a seeded row starts over"
    assert not np.array_equal(again[1:], first[1:]), "the others go on drawing"


def end_by_horizon(env: Any) -> tuple[Any, ...]:
    """Steps of standing still until the horizon; the last step's result."""
    env.reset(seed=1)
    out: tuple[Any, ...] = ()
    for i in range(HORIZON):
        out = env.step(block(env))
        assert out[3].all() == (i == HORIZON - 1)
    return out


def test_next_step_mode_delivers_the_last_observation_then_ignores_one_action() -> None:
    env = make(threshold=2.0)
    observed, _, terminated, truncated, _ = end_by_horizon(env)
    assert truncated.all() and not terminated.any(), "the horizon is no failure"
    last = observed["agent_pos"].copy()
    observed, reward, terminated, truncated, _ = env.step(block(env, 1.0))
    assert (reward == 0).all() and not (terminated | truncated).any()
    assert not np.array_equal(observed["agent_pos"], last), "new episodes have begun"
    begun = torch.from_numpy(observed["agent_pos"].copy())
    assert all((begun[i] == env.episodes.starts.pose).all(1).any() for i in range(N)), (
        "at one of the starts, not one block on"
    )
    after = env.step(block(env, 1.0))[0]["agent_pos"]
    assert np.allclose(after, move(begun, torch.from_numpy(block(env, 1.0))), atol=1e-6)


def test_same_step_mode_hands_the_last_observation_in_infos() -> None:
    reference = end_by_horizon(make(threshold=2.0))
    env = make(AutoresetMode.SAME_STEP, threshold=2.0)
    observed, _, _, truncated, infos = end_by_horizon(env)
    assert truncated.all() and infos["_final_obs"].all()
    final = np.stack([o["agent_pos"] for o in infos["final_obs"]])
    assert np.array_equal(final, reference[0]["agent_pos"])
    assert (infos["final_info"]["success_probability"] == reference[4]["success_probability"]).all()
    assert not np.array_equal(observed["agent_pos"], final)


def test_disabled_mode_wants_a_reset_of_the_rows_that_ended() -> None:
    env = make(AutoresetMode.DISABLED, threshold=2.0)
    end_by_horizon(env)
    with pytest.raises(gymnasium.error.ResetNeeded, match="rows \\[0, 1, 2"):
        env.step(block(env))
    before = env.state.observation.pose.clone()
    mask = np.zeros(N, bool)
    mask[2] = True
    observed, infos = env.reset(options={"reset_mask": mask})
    kept = np.flatnonzero(~mask)
    assert np.array_equal(observed["agent_pos"][kept], before.numpy()[kept])
    assert infos["_is_success"].tolist() == mask.tolist()


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
