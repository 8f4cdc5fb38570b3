"""Collect decisions in the dream: what the policy saw, what it chose, what came of it.

A decision is a chunk of m actions, sent as blocks of k over m / k frames; the policy is asked again after them. Everything is as
in the simulator's executor, in lockstep over rows: a row whose episode ends within a chunk waits for the others.

    frames      0 ---- 1 ---- 2 ---- 3 ---- 4          m = 8, k = 4: two frames a decision
    decisions   0 ----------- 1 ----------- 2
    rewards      -> decision 0 -> decision 1           of a decision: the sum over its frames
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int, Shaped, UInt8
from torch import Tensor
from torch.distributions import Independent
from tqdm import tqdm

from worldline.diffusion.noise import mix
from worldline.errors import PolicyError
from worldline.policies.heads import draw
from worldline.rl_in_imagination.episodes import ImaginedEpisodes
from worldline.types import Observation, Policy, RowState, WorldSpec


@runtime_checkable
class Actor(Policy, Protocol):
    """A policy that reinforcement learning can move: the distribution of its choice, and the actions that a choice stands for."""

    def distribution(self, observation: Observation) -> Independent: ...

    def chunk(
        self, choice: Shaped[Tensor, "n d"], observation: Observation, state: Any
    ) -> tuple[Float[Tensor, "n m a"], RowState]: ...


Critic = Callable[[Observation], Tensor]  # the return to be expected, "n"


@dataclass(frozen=True, slots=True, kw_only=True)
class Decisions:
    """n rows of t decisions, in the order in which they were made; a row may hold several episodes."""

    images: Mapping[str, UInt8[Tensor, "n t c _h _w"]]
    pose: Float[Tensor, "n t p"]
    instruction: tuple[tuple[str, ...], ...]  # "t n"
    choice: Shaped[Tensor, "n t d"]
    log_prob: Float[Tensor, "n t"]
    value: Float[Tensor, "n t"]
    after: Float[Tensor, "n t"]  # value of the last observation that came of it
    reward: Float[Tensor, "n t"]
    terminated: Bool[Tensor, "n t"]
    truncated: Bool[Tensor, "n t"]
    left: Bool[Tensor, "n t"]  # the dream left what its world model knows: ended as a failure would
    ended: Bool[Tensor, "n t"]  # terminated, left, or the horizon reached: not merely cut by the end of the collection
    live: Bool[Tensor, "n t"]  # False where a row's only episode was over already
    frames: int  # imagined in all

    def rows(self, chosen: Int[Tensor, " r"]) -> tuple[Observation, Shaped[Tensor, "r d"]]:
        """Observations and choices of decisions, by number (row * t + decision)."""
        t = self.pose.shape[1]
        return (
            Observation(
                images={c: x.flatten(0, 1)[chosen] for c, x in self.images.items()},
                pose=self.pose.flatten(0, 1)[chosen],
                instruction=tuple(self.instruction[i % t][i // t] for i in chosen.tolist()),
            ),
            self.choice.flatten(0, 1)[chosen],
        )

    def outcomes(self) -> dict[str, float]:
        """Of each row's first episode: how many ended, and the shares of those that succeeded and that left the data (NaN if none ended).

        Later ones do not count: a row has time for another only where the first was short, and it is seen to its end only if it is short too.
        """
        first = self.ended & self.live & (self.ended.cumsum(1) == 1)
        count, won, left = (int(x.sum()) for x in (first, self.terminated & first, self.left & first))
        return {
            "episodes": float(count),
            "success": won / count if count else float("nan"),
            "left": left / count if count else float("nan"),
        }


def blocks_of(chunk: Float[Tensor, "n m a"], k: int) -> list[Float[Tensor, "n k a"]]:
    """The whole blocks of a chunk. Raises `PolicyError` if there is none."""
    if chunk.shape[1] < k:
        raise PolicyError(
            f"a chunk of at least {k} actions is required (k = {k}), the policy returned {chunk.shape[1]}"
        )
    return list(chunk[:, : chunk.shape[1] // k * k].split(k, dim=1))


@torch.no_grad()
def collect(
    episodes: ImaginedEpisodes,
    actor: Actor,
    critic: Critic | None,
    *,
    decisions: int,
    seed: int,
    starts: Int[Tensor, " n"] | None = None,
    again: bool = True,
    progress: float = 0.0,
    discount: float = 1.0,
    bar: tqdm | None = None,
) -> Decisions:
    """Fresh episodes in all rows, `decisions` decisions each.

    Args:
        episodes: the rows. What they draw is decided by `seed`.
        critic: values the observations; without it they count 0.
        starts: which of the real first observations each row begins at; drawn by default.
        again: whether a row begins another episode when one ends. If not it makes no more decisions that count, and collecting
            stops when all rows are done.
        progress: weight of the potential-based shaping by the scorer's success probability (Ng et al. 1999), which does not change
            what is optimal: a reward before success is seen.
        discount: of a decision, for that shaping.

    The reward is 1 where success is seen, and 0 elsewhere. Episodes cut by the end of the collection are truncated.
    """
    n = episodes.rows
    for row in range(n):
        episodes.seed(row, _number(seed, 0, row))
    potential = episodes.begin(torch.ones(n, dtype=torch.bool), starts=starts).success
    live, state = torch.ones(n, dtype=torch.bool), actor.reset(n)
    steps: list[dict[str, Any]] = []
    frames = 0
    for i in range(decisions):
        observation = episodes.observation
        with episodes.dream.timer("policy"):
            chosen = actor.distribution(observation)
            seeds = torch.tensor([_number(seed, 1 + i, row) for row in range(n)])
            choice = draw(chosen, seeds)
            chunk, state = actor.chunk(choice, observation, state)
            value = _valued(critic, observation)
        terminated, truncated, left = (torch.zeros(n, dtype=torch.bool) for _ in range(3))
        success, last = potential, observation
        for block in blocks_of(chunk, actor.spec.control_steps):
            score, ends = episodes.advance(block)
            going = ~(terminated | truncated | left)
            last = _where(going, episodes.observation, last)
            success = torch.where(going, score.success, success)
            terminated, truncated = terminated | (ends.terminated & going), truncated | (ends.truncated & going)
            left = left | (ends.left & going)
            frames += int((going & live).sum())
            if bar is not None:
                bar.update(n)
        ended = terminated | truncated | left
        cut = torch.full((n,), i == decisions - 1) & ~ended
        worthless = terminated | left  # nothing follows
        shaped = discount * success * ~worthless - potential
        steps.append(
            {
                "images": observation.images,
                "pose": observation.pose,
                "instruction": observation.instruction,
                "choice": choice.cpu(),
                "log_prob": chosen.log_prob(choice).cpu(),
                "value": value,
                "after": _valued(critic, last),
                "reward": terminated.float() + progress * shaped,
                "terminated": terminated,
                "truncated": (truncated & ~worthless) | cut,
                "left": left,
                "ended": ended,
                "live": live,
            }
        )
        potential = success
        if not again:
            live = live & ~ended
            if not live.any():
                break
        elif ended.any() and i < decisions - 1:
            potential = torch.where(ended, episodes.begin(ended).success, potential)
            state = state.where(ended, actor.reset(n))
    return _stack(steps, frames)


def _stack(steps: list[dict[str, Any]], frames: int) -> Decisions:
    kept: dict[str, Any] = {"frames": frames}
    for field in fields(Decisions):
        if field.name == "instruction":
            kept[field.name] = tuple(step[field.name] for step in steps)
        elif field.name == "images":
            kept[field.name] = {c: torch.stack([step["images"][c] for step in steps], 1) for c in steps[0]["images"]}
        elif field.name != "frames":
            kept[field.name] = torch.stack([step[field.name] for step in steps], 1)
    return Decisions(**kept)


def _valued(critic: Critic | None, observation: Observation) -> Tensor:
    return torch.zeros(len(observation)) if critic is None else critic(observation).cpu()


def _where(mask: Tensor, new: Observation, old: Observation) -> Observation:
    def pick(a: Tensor, b: Tensor) -> Tensor:
        return torch.where(mask.view(-1, *[1] * (a.ndim - 1)), a, b)

    images = {c: pick(x, old.images[c]) for c, x in new.images.items()}
    return replace(new, images=images, pose=pick(new.pose, old.pose))


def _number(*parts: int) -> int:
    """A seed below 2^62 from several numbers."""
    key = torch.zeros((), dtype=torch.long)
    for part in parts:
        key = mix(key ^ part)
    return int(key) & ((1 << 62) - 1)


def require_actor(policy: Policy, spec: WorldSpec) -> None:
    """Raise `PolicyError` unless the policy can be trained here."""
    if not isinstance(policy, Actor):
        raise PolicyError(
            f"a policy with `distribution` and `chunk` is required to be refined, got {type(policy).__name__}: clone one with "
            "`worldline train policy`."
        )
    if policy.spec.control_steps != spec.control_steps:
        raise PolicyError(
            f"control_steps {spec.control_steps} required by the world model, got {policy.spec.control_steps}"
        )
