"""The dream behind Stable-Baselines3's interface: its conventions, and that its own PPO learns in the exact dot world."""

import importlib
import sys
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.vector import AutoresetMode
from torch import Tensor

pytest.importorskip("stable_baselines3", reason='an extra: pip install "worldline[sb3]"')

from stable_baselines3 import PPO
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from stable_baselines3.common.vec_env import VecMonitor

from tests.oracles import DotScorer, ExactDotWorldModel, K, dot_tokenizer, move
from tests.policies.dots import starts
from worldline.errors import WorldlineError
from worldline.rl_in_imagination import Dream, ImaginedVectorEnv
from worldline.rl_in_imagination.stable_baselines import ImaginedVecEnv, observation_key

TOKENIZER = dot_tokenizer()
N, HORIZON = 4, 5


def inner(n: int = N, mode: AutoresetMode = AutoresetMode.SAME_STEP, **options: Any) -> ImaginedVectorEnv:
    settings: dict[str, Any] = {"horizon": HORIZON, "persist": 1} | options
    dream = Dream(ExactDotWorldModel(TOKENIZER), TOKENIZER)
    return ImaginedVectorEnv(dream, DotScorer(), starts(64), num_envs=n, autoreset_mode=mode, **settings)


def make(n: int = N, **options: Any) -> ImaginedVecEnv:
    return ImaginedVecEnv(inner(n, **options))


def full_speed(n: int = N, x: float = 1.0) -> np.ndarray:
    return np.tile(np.array([x, 0.0] * K, np.float32), (n, 1))


def test_spaces_are_flat_and_hold_what_comes_back() -> None:
    env = make()
    env.seed(3)
    observed: Any = env.reset()
    assert sorted(env.observation_space.spaces) == ["agent_pos", "top"]  # pyright: ignore
    assert env.action_space == gymnasium.spaces.Box(-1, 1, (2 * K,), np.float32)
    for _ in range(2 * HORIZON):
        for row in range(N):
            assert env.observation_space.contains({key: x[row] for key, x in observed.items()})
        observed, reward, done, infos = env.step(np.stack([env.action_space.sample() for _ in range(N)]))
        assert reward.dtype == np.float32 and done.dtype == bool and reward.shape == done.shape == (N,)
        assert len(infos) == N


def test_actions_reach_the_world_in_its_own_units_and_order() -> None:
    """In a world whose actions go from -0.2 to 1: 0 is the middle of the range, and beyond 1 is clipped."""
    env = make(horizon=99)
    env._low, env._high = np.full((K, 2), -0.2, np.float32), np.full((K, 2), 1.0, np.float32)
    env.seed(0)
    before = torch.from_numpy(env.reset()["agent_pos"])
    actions = np.array([[1.0, -1.0, 0.0, 0.5]] * N, np.float32)
    after = env.step(actions)[0]["agent_pos"]  # pyright: ignore
    block = torch.tensor([[[1.0, -0.2], [0.4, 0.7]]] * N)
    assert np.allclose(after, move(before, block), atol=1e-6)
    plain, beyond = make(), make()
    results = []
    for one, speed in ((plain, 1.0), (beyond, 7.0)):
        one.seed(0)
        one.reset()
        results.append(one.step(full_speed(x=speed))[0]["agent_pos"])  # pyright: ignore
    assert np.array_equal(*results)


def test_ends_are_told_as_stable_baselines_wants_them() -> None:
    """Against the same dreams in mode DISABLED, where the last frame is what is returned."""
    env, reference = make(horizon=6), inner(mode=AutoresetMode.DISABLED, horizon=6)
    env.seed(5)
    env.reset()
    reference.reset(seed=5)
    speeds = np.array([1.0, 0.2, 0.9, 0.0], np.float32)
    actions = np.stack([full_speed(1, x)[0] for x in speeds])
    successes = failures = 0
    for _ in range(30):
        observed, reward, done, infos = env.step(actions)
        last, wanted, terminated, truncated, told = reference.step(actions.reshape(N, K, 2))
        assert np.array_equal(done, terminated | truncated) and np.array_equal(reward, wanted.astype(np.float32))
        for row, info in enumerate(infos):
            assert info["is_success"] == terminated[row]
            assert info["success_probability"] == told["success_probability"][row]
            assert info["TimeLimit.truncated"] == (truncated[row] and not terminated[row])
            assert ("terminal_observation" in info) == done[row]
            if done[row]:
                final = info["terminal_observation"]
                assert np.array_equal(final["agent_pos"], last["agent_pos"][row])
                assert np.array_equal(final["top"], last["pixels"]["top"][row])
        successes, failures = successes + terminated.sum(), failures + (done & ~terminated).sum()
        if done.any():
            last = reference.reset(options={"reset_mask": done})[0]
        assert np.array_equal(observed["agent_pos"], last["agent_pos"])  # pyright: ignore
    assert successes > 3 and failures > 3


def test_success_at_the_horizon_is_not_truncated() -> None:
    """Values must not bootstrap where the episode was won, even at the last moment."""
    env = ImaginedVecEnv(inner(horizon=1, threshold=-1.0), reward="success")
    env.reset()
    _, reward, done, infos = env.step(full_speed())
    assert (reward == 1).all() and reward.dtype == np.float32, "whatever the scorer's reward is: here 0"
    assert done.all() and all(i["is_success"] and not i["TimeLimit.truncated"] for i in infos)


def test_a_row_follows_its_own_seed() -> None:
    whole, alone = make(), make(1)
    seeds = whole.seed(11)
    alone.seed(seeds[2])
    a, b = whole.reset()["agent_pos"][2], alone.reset()["agent_pos"][0]  # pyright: ignore
    for i in range(3 * HORIZON):
        assert np.array_equal(a, b)
        x = 0.1 * i
        actions = full_speed()
        actions[2] = full_speed(1, x)[0]
        a = whole.step(actions)[0]["agent_pos"][2]  # pyright: ignore
        b = alone.step(full_speed(1, x))[0]["agent_pos"][0]  # pyright: ignore
    first = whole.reset()["agent_pos"]  # pyright: ignore
    assert not np.array_equal(first, whole.reset()["agent_pos"]), "a seed counts for one reset"  # pyright: ignore


def test_questions_to_the_rows_are_answered_by_the_dream() -> None:
    env = make(render_mode="rgb_array")
    env.reset()
    assert env.get_attr("num_envs", [0, 2]) == [N, N] and not env.has_attr("no_such_attribute")
    assert env.env_is_wrapped(gymnasium.Wrapper) == [False] * N
    env.set_attr("mark", 3)
    assert env.get_attr("mark") == [3] * N
    assert len(env.env_method("render", indices=1)) == 1
    picture = env.render()
    assert picture is not None and picture.shape == (32, 32, 3) and picture.dtype == np.uint8
    with pytest.raises(WorldlineError, match=r"for all rows is required.*got indices \[1\]"):
        env.set_attr("mark", 4, [1])
    env.close()


def test_what_goes_wrong_is_said() -> None:
    with pytest.raises(WorldlineError, match="mode SAME_STEP is required, got NEXT_STEP"):
        ImaginedVecEnv(inner(mode=AutoresetMode.NEXT_STEP))
    env = make()
    with pytest.raises(gymnasium.error.ResetNeeded):
        env.step(full_speed())
    env.reset()
    with pytest.raises(gymnasium.error.ResetNeeded, match="step_async"):
        env.step_wait()
    with pytest.raises(ValueError, match=r"shape \(4, 4\).*got \(4, 2\)"):
        env.step(full_speed()[:, :2])
    with pytest.raises(ValueError, match=r"finite actions required.*rows \[0, 1, 2, 3\]"):
        env.step(full_speed() * np.nan)


def test_keys_are_names_that_torch_takes() -> None:
    names = ["top", "observation.images.left", "type", "keys", "agent_pos", "training"]
    keys = [observation_key(name) for name in names]
    assert keys == ["top", "observation_images_left", "type_", "keys_", "agent_pos_", "training_"]
    torch.nn.ModuleDict({key: torch.nn.Identity() for key in keys})


def test_without_stable_baselines_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "stable_baselines3.common.vec_env.base_vec_env", None)
    monkeypatch.delitem(sys.modules, "worldline.rl_in_imagination.stable_baselines")
    with pytest.raises(WorldlineError, match=r'pip install "worldline\[sb3\]"'):
        importlib.import_module("worldline.rl_in_imagination.stable_baselines")


# --- learning ---------------------------------------------------------------------------------------------------------------


class SmallEyes(BaseFeaturesExtractor):
    """The picture and the pose in 32 numbers: Stable-Baselines3's own network wants pictures of 36 pixels at least."""

    def __init__(self, observation_space: gymnasium.spaces.Dict) -> None:
        super().__init__(observation_space, features_dim=32)
        assert observation_space["top"].shape == (3, 16, 16), "transposed by PPO itself"
        self.net = torch.nn.Linear(3 * 16 * 16 + 2, 32)

    def forward(self, observed: dict[str, Tensor]) -> Tensor:
        return self.net(torch.cat([observed["top"].flatten(1), observed["agent_pos"]], 1)).relu()


def test_unmodified_ppo_learns_to_reach_the_goal() -> None:
    """A random walk of 12 frames hardly ever crosses the world; actions are sampled, before and after."""
    env, judge = VecMonitor(make(32, horizon=12)), VecMonitor(make(32, horizon=12))
    settings = {"features_extractor_class": SmallEyes, "net_arch": [32]}
    model = PPO(
        "MultiInputPolicy",
        env,
        n_steps=16,
        batch_size=128,
        n_epochs=4,
        gamma=0.9,
        learning_rate=3e-3,
        policy_kwargs=settings,
        seed=0,
        device="cpu",
    )

    def success() -> float:
        judge.seed(1000)
        returns, _ = evaluate_policy(model, judge, n_eval_episodes=64, deterministic=False)
        return float(np.mean(returns))  # a success is worth 1

    before = success()
    model.learn(30 * 16 * 32)
    assert before < 0.2 and success() > 0.95
