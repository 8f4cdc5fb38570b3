"""The dream as a Stable-Baselines3 `VecEnv`: its PPO, SAC and the others train in imagination unmodified.

Stable-Baselines3 takes no `gymnasium.vector.VectorEnv`. It has an interface of its own, whose conventions are kept here:
flat observations, actions in [-1, 1], one `infos` dict a row, episodes that begin again within the step that ends them.
It is an extra (`pip install "worldline[sb3]"`), so nothing else in the package imports this module.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, cast

import gymnasium
import numpy as np
from gymnasium import Space
from gymnasium.spaces import Box, Dict
from gymnasium.vector import AutoresetMode
from torch import nn

from worldline.errors import WorldlineError
from worldline.rl_in_imagination.vector_env import ImaginedVectorEnv

try:
    from stable_baselines3.common.vec_env.base_vec_env import VecEnv, VecEnvIndices, VecEnvStepReturn
except ImportError as error:
    raise WorldlineError(
        f'Stable-Baselines3 is required for ImaginedVecEnv and could not be imported ({error}): pip install "worldline[sb3]" brings it.'
    ) from error


class ImaginedVecEnv(VecEnv):
    """An `ImaginedVectorEnv` of n rows, as Stable-Baselines3 wants it.

    Observations: a flat dict, uint8 "n h w 3" a camera and `agent_pos` float32 "n p". A camera's key is its name with "_" for
    every "." and "_" behind a name that `torch.nn.ModuleDict` has taken ("type", "keys", ...) or that is "agent_pos", because
    feature extractors are kept under these keys.
    Actions: float32 "n (k a)" in [-1, 1], one block's k actions one after the other; -1 and 1 are the least and the most of
    the action spec's range, and what lies beyond is clipped to it.
    Rewards: float32 "n", the scorer's or success alone. Done: terminated or truncated; the row's next episode has then begun. `infos[row]`:
    `success_probability` and `is_success` of the step; `TimeLimit.truncated`, True only where the horizon was reached
    without success, so that values bootstrap there; where done, `terminal_observation`, the last observation of the episode.

    `seed(s)` gives row i the seed s + i at the next `reset`. All episodes of a row, until it is seeded again, follow from that.
    Rows are one dream, not n objects: `get_attr` and `env_method` answer for the `ImaginedVectorEnv`, the same for each row
    asked about; a method is called once.

    Args:
        env: in autoreset mode SAME_STEP.
        reward: "scorer" passes the scorer's reward on; "success" is 1 in the step that sees success and 0 in every other. A
            success scorer's reward is a probability in every frame, and an agent that wants the most of it stays just short of
            success, which would end the episode.

    Raises `WorldlineError` in another mode, if two cameras would have one key, or if the action range is not finite.
    """

    def __init__(self, env: ImaginedVectorEnv, *, reward: Literal["scorer", "success"] = "scorer") -> None:
        if env.autoreset_mode != AutoresetMode.SAME_STEP:
            raise WorldlineError(
                f"an ImaginedVectorEnv in autoreset mode SAME_STEP is required, got {env.autoreset_mode.name}. "
                "Make it with autoreset_mode=AutoresetMode.SAME_STEP."
            )
        self.env, self.reward = env, reward
        cameras = [c.name for c in env.dream.spec.cameras]
        self._keys = {camera: observation_key(camera) for camera in cameras}
        if len(set(self._keys.values())) < len(cameras):
            raise WorldlineError(
                f"cameras whose keys differ are required, got {self._keys}. Rename one in the dataset."
            )
        box, pixels = cast(Box, env.single_action_space), cast(Any, env.single_observation_space)["pixels"]
        low, high = box.low, box.high  # "k a"
        if not (np.isfinite(low).all() and np.isfinite(high).all()):
            raise WorldlineError(
                f"a finite action range is required to scale actions to [-1, 1], got {low[0]} to {high[0]}. Give the dataset's "
                "action spec its range."
            )
        self._low, self._high = low, high
        spaces: dict[str, Space[Any]] = {self._keys[camera]: pixels[camera] for camera in cameras}
        spaces["agent_pos"] = cast(Any, env.single_observation_space)["agent_pos"]
        super().__init__(env.num_envs, Dict(spaces), Box(-1.0, 1.0, (low.size,), np.float32))
        self._blocks: np.ndarray | None = None

    # --- episodes -------------------------------------------------------------------------------------------------------------

    def reset(self) -> dict[str, np.ndarray]:
        """Begin an episode in every row."""
        observed, infos = self.env.reset(seed=self._seeds)
        self._reset_seeds()
        self._reset_options()
        self.reset_infos = [_info(infos, row) for row in range(self.num_envs)]
        return self._flat(observed)

    def step_async(self, actions: np.ndarray) -> None:
        """Keep actions "n (k a)" in [-1, 1] for `step_wait`. Raises `ValueError` for another shape."""
        scaled = np.asarray(actions, np.float32)
        if scaled.shape != (self.num_envs, self._low.size):
            raise ValueError(
                f"actions of shape {(self.num_envs, self._low.size)} (n, k times a) required, got {scaled.shape}"
            )
        share = (scaled.reshape(self.num_envs, *self._low.shape) + 1) / 2
        self._blocks = self._low + share * (self._high - self._low)

    def step_wait(self) -> VecEnvStepReturn:
        """One frame on in every row. Raises `ValueError` for actions that are not finite."""
        if self._blocks is None:
            raise gymnasium.error.ResetNeeded("step_async(actions) is required before step_wait(), got none")
        blocks, self._blocks = self._blocks, None
        observed, reward, terminated, truncated, infos = self.env.step(blocks)
        if self.reward == "success":
            reward = terminated
        done, rows = terminated | truncated, []
        for row in range(self.num_envs):
            info = _info(infos["final_info"] if done[row] else infos, row)
            info["TimeLimit.truncated"] = bool(truncated[row] and not terminated[row])
            if done[row]:
                info["terminal_observation"] = self._flat(infos["final_obs"][row])
                self.reset_infos[row] = _info(infos, row)
            rows.append(info)
        return self._flat(observed), reward.astype(np.float32), done, rows

    def _flat(self, observed: Mapping[str, Any]) -> dict[str, np.ndarray]:
        pixels = {key: observed["pixels"][camera] for camera, key in self._keys.items()}
        return {**pixels, "agent_pos": observed["agent_pos"]}

    # --- what else Stable-Baselines3 asks for ---------------------------------------------------------------------------------

    def get_images(self) -> Sequence[np.ndarray | None]:
        """A uint8 picture "h w 3" of each row, for `render`, which tiles them; None without `render_mode`."""
        return self.env.render() or [None] * self.num_envs

    def close(self) -> None:
        self.env.close()

    def get_attr(self, attr_name: str, indices: VecEnvIndices = None) -> list[Any]:
        return [getattr(self.env, attr_name) for _ in self._get_indices(indices)]

    def set_attr(self, attr_name: str, value: Any, indices: VecEnvIndices = None) -> None:
        """Raises `WorldlineError` unless it is for all rows: they share the attribute."""
        if set(self._get_indices(indices)) != set(range(self.num_envs)):
            raise WorldlineError(
                f"set_attr for all rows is required, they are one dream; got indices {indices}. Leave them out."
            )
        setattr(self.env, attr_name, value)

    def env_method(
        self, method_name: str, *method_args: Any, indices: VecEnvIndices = None, **method_kwargs: Any
    ) -> list[Any]:
        """The method is called once, for all rows; its answer is repeated for each row in `indices`."""
        answer = getattr(self.env, method_name)(*method_args, **method_kwargs)
        return [answer for _ in self._get_indices(indices)]

    def env_is_wrapped(self, wrapper_class: type[gymnasium.Wrapper], indices: VecEnvIndices = None) -> list[bool]:
        """No row is an environment of its own that could be wrapped. `VecMonitor` counts returns here."""
        return [False for _ in self._get_indices(indices)]


def observation_key(camera: str) -> str:
    """A camera's key in the observations: its name, changed where `torch.nn.ModuleDict` would refuse it."""
    key = camera.replace(".", "_")
    return f"{key}_" if key == "agent_pos" or hasattr(nn.ModuleDict(), key) else key


def _info(infos: Mapping[str, Any], row: int) -> dict[str, Any]:
    return {
        "success_probability": float(infos["success_probability"][row]),
        "is_success": bool(infos["is_success"][row]),
    }
