"""The dream as a `gymnasium.vector.VectorEnv`: for agents and tools that speak Gymnasium.

A thin shell over `Dream`: one env step is one frame, its action the block of k control actions that leads there. The
tensors stay available (`env.state`), so code that needs the device or forks rows does not go through numpy.

`terminated`: the scorer saw success, by the rule that labels episodes everywhere else. `truncated`: the horizon was
reached. An episode can be both; a value estimate must bootstrap from the last observation unless it terminated, and in
every autoreset mode that observation is delivered (see `ImaginedVectorEnv`).
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import gymnasium
import numpy as np
import torch
from gymnasium import Space
from gymnasium.spaces import Box, Dict
from gymnasium.vector import AutoresetMode
from gymnasium.vector.utils import batch_space
from torch import Tensor

from worldline.rl_in_imagination.dream import Dream, DreamState
from worldline.rl_in_imagination.episodes import ImaginedEpisodes
from worldline.types import Observation, Score, Scorer


class ImaginedVectorEnv(gymnasium.vector.VectorEnv):
    """`num_envs` dreams side by side.

    Observations, as LeRobot's environments name them: `{"pixels": {camera: uint8 "n h w 3"}, "agent_pos": float32 "n p"}`.
    Actions: float32 "n k a" in physical units, within the action spec's range (clipped to it, as in the simulator).
    Rewards: the scorer's. `infos`: `success_probability` (float) and `is_success` (bool) per row.

    Args:
        dream: world model and tokenizer.
        scorer: gives rewards and tells success.
        starts: real first observations; every episode starts at one of them, drawn from the row's own generator.
        num_envs: n.
        horizon: frames an episode may have after the first.
        threshold, persist: success is a probability above `threshold` for `persist` frames in a row. By default the
            scorer's own (`scorer.config`), else 0.5 and 1.
        autoreset_mode: what happens to a row whose episode ended.
            NEXT_STEP (Gymnasium's default): the last observation is returned; the next `step` ignores the row's action and
            returns the next episode's first observation, reward 0.
            SAME_STEP: the next episode's first observation is returned at once, the last one in `infos["final_obs"]`.
            DISABLED: the row must be reset by `reset(options={"reset_mask": ...})` before the next `step`.
        render_mode: "rgb_array" lets `render` return one picture a row, cameras side by side.

    Raises `SpecMismatch` if a start lacks a camera, or the scorer wants one that the dream does not make or another rate.
    """

    def __init__(
        self,
        dream: Dream,
        scorer: Scorer,
        starts: Observation,
        *,
        num_envs: int,
        horizon: int,
        threshold: float | None = None,
        persist: int | None = None,
        autoreset_mode: AutoresetMode = AutoresetMode.NEXT_STEP,
        render_mode: Literal["rgb_array"] | None = None,
    ) -> None:
        if num_envs < 1 or horizon < 1 or not len(starts):
            raise ValueError(
                f"num_envs, horizon and starts must be at least 1, got {num_envs}, {horizon} and {len(starts)}"
            )
        self.episodes = ImaginedEpisodes(
            dream, scorer, starts, rows=num_envs, horizon=horizon, threshold=threshold, persist=persist
        )
        spec, self.dream = dream.spec, dream
        self.num_envs, self.render_mode, self.autoreset_mode = num_envs, render_mode, autoreset_mode
        self.metadata = {"render_modes": ["rgb_array"], "render_fps": spec.fps, "autoreset_mode": autoreset_mode}
        self._cameras = [c.name for c in spec.cameras]
        pixels: dict[str, Space[Any]] = {c.name: Box(0, 255, (c.height, c.width, 3), np.uint8) for c in spec.cameras}
        self.single_observation_space = Dict(
            {"pixels": Dict(pixels), "agent_pos": Box(-np.inf, np.inf, (len(spec.pose_names),), np.float32)}
        )
        low, high = (
            np.tile(np.array(x, np.float32), (spec.control_steps, 1)) for x in (spec.action.low, spec.action.high)
        )
        self.single_action_space = Box(low, high, dtype=np.float32)
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self._ended = torch.zeros(num_envs, dtype=torch.bool)

    @property
    def state(self) -> DreamState:
        """The dreams themselves: torch, on the model's device, to look into or to fork."""
        if self.episodes.state is None:
            raise gymnasium.error.ResetNeeded("reset() is required before anything else, got none")
        return self.episodes.state

    # --- Gymnasium ----------------------------------------------------------------------------------------------------

    def reset(
        self, *, seed: int | Sequence[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Begin episodes: all rows, or those where `options["reset_mask"]` is True.

        A row's seed decides its starts and noise for all its episodes until it is seeded again; an int s means s, s+1, ...
        """
        seeds = [seed + i for i in range(self.num_envs)] if isinstance(seed, int) else seed or [None] * self.num_envs
        if len(seeds) != self.num_envs:
            raise ValueError(f"one seed a row is required, {self.num_envs} in all, got {len(seeds)}")
        given = (options or {}).get("reset_mask")
        mask = np.ones(self.num_envs, bool) if given is None else np.asarray(given)
        if mask.shape != (self.num_envs,) or mask.dtype != np.bool_ or not mask.any():
            raise ValueError(f"reset_mask must be {self.num_envs} booleans, at least one True, got {given!r}")
        if self.episodes.state is None and not mask.all():
            raise gymnasium.error.ResetNeeded("the first reset() must be of all rows, got a reset_mask")
        for row in np.flatnonzero(mask).tolist():
            if (own := seeds[row]) is not None:
                self.episodes.seed(row, own)
        score = self._begin(torch.from_numpy(mask))
        return self._observed(), self._infos({}, score, np.flatnonzero(mask).tolist())

    def step(self, actions: np.ndarray) -> tuple[dict[str, Any], np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """One frame on in every row. Raises `ValueError` for blocks of another shape or that are not finite."""
        blocks = self._checked(actions)
        resetting = self._ended.clone()
        if resetting.any() and self.autoreset_mode == AutoresetMode.DISABLED:
            raise gymnasium.error.ResetNeeded(
                f"rows {resetting.nonzero().flatten().tolist()} have ended and must be reset first: "
                'reset(options={"reset_mask": terminated | truncated})'
            )
        score, ends = self.episodes.advance(blocks)
        if resetting.any():
            score = _pick(resetting, self._begin(resetting), score)
        terminated, truncated = ends.terminated & ~resetting, ends.truncated & ~resetting
        self._ended = terminated | truncated
        reward = torch.where(resetting, 0.0, score.reward)
        rows, infos = range(self.num_envs), {}
        if self._ended.any() and self.autoreset_mode == AutoresetMode.SAME_STEP:
            ended, last = self._ended.clone(), self._observed()
            for row in ended.nonzero().flatten().tolist():
                final = {"final_obs": _row(last, row), "final_info": self._info(score, row, bool(terminated[row]))}
                infos = self._add_info(infos, final, row)
            score, success = _pick(ended, self._begin(ended), score), terminated & ~ended
        else:
            success = terminated
        infos = self._infos(infos, score, rows, success)
        return self._observed(), reward.double().numpy(), terminated.numpy(), truncated.numpy(), infos

    def render(self) -> tuple[np.ndarray, ...] | None:
        """One uint8 picture "h w 3" a row, cameras side by side; None without `render_mode`."""
        if self.render_mode is None:
            return None
        height = max(c.height for c in self.dream.spec.cameras)
        images = [_channels_last(self.state.observation.images[camera]) for camera in self._cameras]
        padded = [np.pad(x, ((0, 0), (0, height - x.shape[1]), (0, 0), (0, 0))) for x in images]
        return tuple(np.concatenate(padded, axis=2))

    # --- the dream under it -------------------------------------------------------------------------------------------

    def _begin(self, mask: Tensor) -> Score:
        self._ended[mask] = False
        return self.episodes.begin(mask)

    def _checked(self, actions: np.ndarray) -> Tensor:
        blocks = np.array(actions, dtype=np.float32)
        if blocks.shape != self.action_space.shape:
            raise ValueError(f"action blocks of shape {self.action_space.shape} (n k a) required, got {blocks.shape}")
        if not np.isfinite(blocks).all():
            raise ValueError(f"finite actions required, got NaN or infinity in rows {_bad_rows(blocks)}")
        self.state  # noqa: B018 (raises if reset() was never called)
        return torch.from_numpy(blocks)

    # --- what is handed out -------------------------------------------------------------------------------------------

    def _observed(self) -> dict[str, Any]:
        observation = self.state.observation
        pixels = {camera: _channels_last(observation.images[camera]) for camera in self._cameras}
        return {"pixels": pixels, "agent_pos": observation.pose.float().numpy().copy()}

    def _infos(
        self, infos: dict[str, Any], score: Score, rows: Iterable[int], success: Tensor | None = None
    ) -> dict[str, Any]:
        for row in rows:
            infos = self._add_info(infos, self._info(score, int(row), success is not None and bool(success[row])), row)
        return infos

    def _info(self, score: Score, row: int, success: bool) -> dict[str, Any]:
        return {"success_probability": float(score.success[row]), "is_success": success}


def to_observation(observed: Mapping[str, Any], *, instruction: str = "") -> Observation:
    """What a `Policy` takes, from what this environment (or a LeRobot-style one) returns."""
    pose = torch.as_tensor(np.asarray(observed["agent_pos"], np.float32))
    images = {c: torch.from_numpy(np.ascontiguousarray(x.transpose(0, 3, 1, 2))) for c, x in observed["pixels"].items()}
    return Observation(images=images, pose=pose, instruction=(instruction,) * len(pose))


def _pick(mask: Tensor, new: Score, old: Score) -> Score:
    return Score(reward=torch.where(mask, new.reward, old.reward), success=torch.where(mask, new.success, old.success))


def _row(observed: Mapping[str, Any], row: int) -> dict[str, Any]:
    pixels = {camera: x[row].copy() for camera, x in observed["pixels"].items()}
    return {"pixels": pixels, "agent_pos": observed["agent_pos"][row].copy()}


def _channels_last(images: Tensor) -> np.ndarray:
    return np.ascontiguousarray(images.permute(0, 2, 3, 1).numpy())


def _bad_rows(blocks: np.ndarray) -> list[int]:
    return np.flatnonzero(~np.isfinite(blocks).all(axis=(1, 2))).tolist()
