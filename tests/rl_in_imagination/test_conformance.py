"""`check_vector_env` passes the dream in every autoreset mode and Gymnasium's own vector env, and finds each fault put in."""

from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.vector import AutoresetMode, SyncVectorEnv

from tests.oracles import DotScorer, ExactDotWorldModel, dot_tokenizer
from tests.policies.dots import starts
from worldline.errors import WorldlineError
from worldline.rl_in_imagination import Dream, ImaginedVectorEnv, check_vector_env

TOKENIZER = dot_tokenizer()
HORIZON = 5


def imagined(n: int, mode: AutoresetMode, kind: type[ImaginedVectorEnv] = ImaginedVectorEnv, **options: Any) -> Any:
    dream = Dream(ExactDotWorldModel(TOKENIZER), TOKENIZER)
    settings: dict[str, Any] = {"horizon": HORIZON, "persist": 1, "render_mode": "rgb_array"} | options
    return kind(dream, DotScorer(), starts(8), num_envs=n, autoreset_mode=mode, **settings)


def test_the_dream_conforms() -> None:
    check_vector_env(imagined, rows=4, steps=20)


@pytest.mark.parametrize("mode", list(AutoresetMode))
def test_each_autoreset_mode_conforms_when_success_ends_episodes(mode: AutoresetMode) -> None:
    """A dot is done where it starts, or soon: rows end at different frames, by success as well as by the horizon."""
    ends = {"terminated": 0, "truncated": 0}

    class Counted(ImaginedVectorEnv):
        def step(self, actions: np.ndarray) -> Any:
            result = super().step(actions)
            ends["terminated"] += int(result[2].sum())
            ends["truncated"] += int(result[3].sum())
            return result

    right = starts(8)
    right.pose[:] = torch.rand(8, 2, generator=torch.Generator().manual_seed(1)) * 0.4 + 0.4

    def make(n: int, mode: AutoresetMode) -> Any:
        env = imagined(n, mode, Counted, horizon=8)
        env.episodes.starts = right
        return env

    check_vector_env(make, steps=25, modes=(mode,))
    assert min(ends.values()) > 10


def test_gymnasiums_own_vector_env_conforms() -> None:
    """The checker asks for Gymnasium's conventions and not for ours: only refusing bad actions is beyond them."""

    def make(n: int, mode: AutoresetMode) -> Any:
        one = lambda: gymnasium.make("Pendulum-v1", max_episode_steps=5)  # noqa: E731
        return SyncVectorEnv([one] * n, autoreset_mode=mode)

    check_vector_env(make, bad_actions=False)
    with pytest.raises(WorldlineError, match="must raise an error"):
        check_vector_env(make)


# --- faults: each class breaks one promise ----------------------------------------------------------------------------------


class WrongDtype(ImaginedVectorEnv):
    def step(self, actions: np.ndarray) -> Any:
        observed, *others = super().step(actions)
        observed["agent_pos"] = observed["agent_pos"].astype(np.float64)
        return observed, *others


class IntegerFlags(ImaginedVectorEnv):
    def step(self, actions: np.ndarray) -> Any:
        observed, reward, terminated, *others = super().step(actions)
        return observed, reward, terminated.astype(int), *others


class UnmaskedInfo(ImaginedVectorEnv):
    def step(self, actions: np.ndarray) -> Any:
        *others, infos = super().step(actions)
        return *others, infos | {"frames": np.zeros(self.num_envs)}


class SharedNoise(ImaginedVectorEnv):
    """All rows draw their starts from row 0's generator."""

    def _begin(self, mask: Any) -> Any:
        self.episodes.generators = [self.episodes.generators[0]] * self.num_envs
        return super()._begin(mask)


class Unseeded(ImaginedVectorEnv):
    def reset(self, *, seed: Any = None, options: Any = None) -> Any:
        return super().reset(options=options)


class SameSeed(ImaginedVectorEnv):
    def reset(self, *, seed: Any = None, options: Any = None) -> Any:
        return super().reset(seed=[seed] * self.num_envs if isinstance(seed, int) else seed, options=options)


class ResetsAll(ImaginedVectorEnv):
    def reset(self, *, seed: Any = None, options: Any = None) -> Any:
        return super().reset(seed=seed)


class FirstAsFinal(ImaginedVectorEnv):
    """SAME_STEP hands out the next episode's first observation as the last one of this."""

    def step(self, actions: np.ndarray) -> Any:
        observed, *others, infos = super().step(actions)
        for row in np.flatnonzero(infos.get("_final_obs", [])):
            infos["final_obs"][row]["agent_pos"] = observed["agent_pos"][row].copy()
        return observed, *others, infos


class LosesFinal(ImaginedVectorEnv):
    def step(self, actions: np.ndarray) -> Any:
        *others, infos = super().step(actions)
        return *others, {key: value for key, value in infos.items() if "final" not in key}


class ActsWhileResetting(ImaginedVectorEnv):
    """NEXT_STEP: the action after an end already moves the new episode."""

    def step(self, actions: np.ndarray) -> Any:
        resetting = self._ended.clone()
        result = super().step(actions)
        if resetting.any():
            moved = self.dream.step(self.state, torch.from_numpy(np.array(actions, np.float32)))
            self.episodes.state = self.state.where(resetting, moved)
            result = (self._observed(), *result[1:])
        return result


class StepsEnded(ImaginedVectorEnv):
    def step(self, actions: np.ndarray) -> Any:
        self._ended &= self.autoreset_mode != AutoresetMode.DISABLED
        return super().step(actions)


class TakesAnything(ImaginedVectorEnv):
    def _checked(self, actions: np.ndarray) -> Any:
        return torch.from_numpy(np.nan_to_num(np.resize(actions, self.action_space.shape or ())))


class GreyPictures(ImaginedVectorEnv):
    def render(self) -> Any:
        pictures = super().render() or ()
        return tuple(x[..., :1] for x in pictures)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (WrongDtype, "observations in .* required"),
        (IntegerFlags, "terminated must be an array of 3, bool"),
        (UnmaskedInfo, 'infos\\["_frames"\\]'),
        (SharedNoise, "row 0 alone and in a batch|row alone given its seed"),
        (Unseeded, "the same seeds again"),
        (SameSeed, "an int: the same observation.* required"),
        (ResetsAll, "while another was reset"),
        (FirstAsFinal, "NEXT_STEP and SAME_STEP: row 0, episode 0, frame 5: the same observation\\['agent_pos'\\]"),
        (LosesFinal, '"_final_obs"'),
        (ActsWhileResetting, "NEXT_STEP.* episode \\d, frame 0"),
        (StepsEnded, "was not reset must raise"),
        (TakesAnything, "one row too few must raise"),
        (GreyPictures, "pictures of uint8"),
    ],
)
def test_a_fault_is_found(kind: type[ImaginedVectorEnv], message: str) -> None:
    with pytest.raises(WorldlineError, match=message):
        check_vector_env(lambda n, mode: imagined(n, mode, kind, threshold=0.7))


def test_episodes_too_long_to_check_are_told() -> None:
    with pytest.raises(WorldlineError, match=r"must end within 4 steps; got none in rows \[0, 1, 2\]\. Change steps"):
        check_vector_env(imagined, steps=4)
