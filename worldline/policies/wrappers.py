"""Policies made of other things: corrupted (noise, delay), wandering first, seeing through a tokenizer, any Python callable."""

import importlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from worldline.diffusion import row_noise
from worldline.errors import PolicyError
from worldline.types import Observation, Policy, TensorState, VideoTokenizer, WorldSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class CorruptedState:
    """The inner policy's state and the actions not sent yet because of the lag."""

    inner: Any
    pending: Float[Tensor, "n lag a"]

    def __len__(self) -> int:
        return len(self.pending)

    def index(self, rows: Int[Tensor, " r"]) -> "CorruptedState":
        return CorruptedState(inner=self.inner.index(rows), pending=self.pending[rows])

    def where(self, mask: Bool[Tensor, " n"], other: "CorruptedState") -> "CorruptedState":
        pending = torch.where(mask[:, None, None], other.pending, self.pending)
        return CorruptedState(inner=self.inner.where(mask, other.inner), pending=pending)


class Corrupted:
    """A policy made worse in a known way: for rankings with a known order, and for failures in training data.

    Args:
        policy: the policy to corrupt.
        noise: standard deviation of Gaussian noise on each action, in half-ranges of the action.
        lag: control steps by which every action comes late; the middle of the range is sent until the first arrives.
            Exact where all whole blocks of a chunk are sent (an executor without `execute`).
    """

    def __init__(self, policy: Policy, *, noise: float = 0.0, lag: int = 0) -> None:
        if noise < 0 or lag < 0:
            raise PolicyError(f"noise and lag must be at least 0, got noise={noise}, lag={lag}")
        self.policy, self.noise, self.lag, self.spec = policy, noise, lag, policy.spec
        self.low, self.high = torch.tensor(self.spec.action.low), torch.tensor(self.spec.action.high)

    def reset(self, n: int) -> CorruptedState:
        middle = (self.low + self.high) / 2
        return CorruptedState(inner=self.policy.reset(n), pending=middle.expand(n, self.lag, -1).clone())

    def act(
        self, observation: Observation, state: CorruptedState, *, seeds: Int[Tensor, " n"]
    ) -> tuple[Float[Tensor, "n m a"], CorruptedState]:
        chunk, inner = self.policy.act(observation, state.inner, seeds=seeds)
        k = self.spec.control_steps
        chunk = chunk[:, : max(1, chunk.shape[1] // k) * k]  # the rest is never sent, so it must not come late either
        half = (self.high - self.low) / 2
        noisy = chunk + self.noise * half * row_noise(seeds, 0, 0, tuple(chunk.shape[1:]), stream=7)
        queue = torch.cat([state.pending, noisy.clamp(self.low, self.high)], dim=1)
        m = chunk.shape[1]
        return queue[:, :m], CorruptedState(inner=inner, pending=queue[:, m:])


class Wandering:
    """A policy that first walks `blocks` blocks in a random direction, drawn by the row's seed: from there it acts as it does.

    Args:
        spread: standard deviation of the direction, in half ranges of the action.
    """

    def __init__(self, policy: Policy, *, blocks: int, spread: float) -> None:
        if blocks < 1 or spread < 0:
            raise PolicyError(f"blocks must be at least 1 and spread at least 0, got {blocks} and {spread}")
        self.policy, self.blocks, self.spread, self.spec = policy, blocks, spread, policy.spec

    def reset(self, n: int) -> "WanderingState":
        return WanderingState(inner=self.policy.reset(n), gone=torch.zeros(n, dtype=torch.bool))

    def act(
        self, observation: Observation, state: "WanderingState", *, seeds: Int[Tensor, " n"]
    ) -> tuple[Float[Tensor, "n m a"], "WanderingState"]:
        """All rows must begin together: those asked are all at their first chunk, or none is."""
        assert bool(state.gone.all()) or not bool(state.gone.any()), "rows that begin together"
        if bool(state.gone.all()):
            chunk, inner = self.policy.act(observation, state.inner, seeds=seeds)
            return chunk, replace(state, inner=inner)
        low, high = torch.tensor(self.spec.action.low), torch.tensor(self.spec.action.high)
        way = (low + high) / 2 + self.spread * (high - low) / 2 * row_noise(seeds, 0, 0, (len(low),), stream=11)
        walk = way.clamp(low, high)[:, None].repeat(1, self.blocks * self.spec.control_steps, 1)
        return walk, replace(state, gone=torch.ones_like(state.gone))


@dataclass(frozen=True, slots=True, kw_only=True)
class WanderingState:
    """The inner policy's state, and which rows have walked."""

    inner: Any
    gone: Bool[Tensor, " n"]

    def __len__(self) -> int:
        return len(self.gone)

    def index(self, rows: Int[Tensor, " r"]) -> "WanderingState":
        return WanderingState(inner=self.inner.index(rows), gone=self.gone[rows])

    def where(self, mask: Bool[Tensor, " n"], other: "WanderingState") -> "WanderingState":
        gone = torch.where(mask, other.gone, self.gone)
        return WanderingState(inner=self.inner.where(mask, other.inner), gone=gone)


class ThroughTokenizer:
    """A policy that sees every picture encoded and decoded again: as sharp as a perfect dream could show it.

    In the simulator it tells the tokenizer's share of what goes wrong in a dream from the dynamics' share.
    """

    def __init__(self, policy: Policy, tokenizer: VideoTokenizer) -> None:
        self.policy, self.tokenizer, self.spec = policy, tokenizer, policy.spec
        self._cameras = tuple(tokenizer.latent_spec.shapes)

    def reset(self, n: int) -> Any:
        return self.policy.reset(n)

    def act(
        self, observation: Observation, state: Any, *, seeds: Int[Tensor, " n"]
    ) -> tuple[Float[Tensor, "n m a"], Any]:
        frames = {camera: observation.images[camera][:, None] for camera in self._cameras}
        seen = {
            camera: video[:, 0].cpu() for camera, video in self.tokenizer.decode(self.tokenizer.encode(frames)).items()
        }
        return self.policy.act(replace(observation, images={**observation.images, **seen}), state, seeds=seeds)


class CallablePolicy:
    """A Python function `act(observation: Observation) -> actions "n m a"` (tensor or array, physical units).

    `spec` is what the surrounding world provides: the function says nothing of what it requires.
    """

    def __init__(self, function: Callable[[Observation], Any], spec: WorldSpec, *, name: str = "callable") -> None:
        self.function, self.spec, self.name = function, spec, name

    @classmethod
    def load(cls, name: str, spec: WorldSpec) -> "CallablePolicy":
        """`package.module:function`. Raises `PolicyError` naming the part that is missing."""
        module_name, _, function_name = name.partition(":")
        try:
            module = importlib.import_module(module_name)
        except ModuleNotFoundError as error:
            raise PolicyError(f"policy {name!r}: a module {module_name!r} is required, {error}") from error
        function = getattr(module, function_name, None)
        if not callable(function):
            raise PolicyError(
                f"policy {name!r}: a function {function_name!r} is required in {module_name}, got {function!r}"
            )
        return cls(function, spec, name=name)

    def reset(self, n: int) -> TensorState:
        return TensorState(tensors={}, rows=n)

    def act(
        self, observation: Observation, state: TensorState, *, seeds: Int[Tensor, " n"]
    ) -> tuple[Float[Tensor, "n m a"], TensorState]:
        return check_chunk(self.function(observation), len(observation), self.spec, self.name), state


def check_chunk(answer: Any, n: int, spec: WorldSpec, name: str) -> Float[Tensor, "n m a"]:
    """`answer` as a float tensor "n m a". Raises `PolicyError` with the shape required and the shape got."""
    actions = torch.as_tensor(answer, dtype=torch.float32)
    if actions.ndim != 3 or actions.shape[0] != n or actions.shape[2] != spec.action.dim or not actions.shape[1]:
        raise PolicyError(
            f"policy {name}: actions of shape ({n}, m, {spec.action.dim}) required, got {tuple(actions.shape)}"
        )
    return actions
