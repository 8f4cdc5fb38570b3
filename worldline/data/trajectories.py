"""Low-dimensional episodes end to end, one row a step: what offline RL and trajectory models learn from.

    observations[i] --actions[i]--> next_observations[i]        rewards[i] came with it

An episode's last step is *terminated* (nothing follows: its next observation is worth nothing) or *truncated* (the clock ran out, or
somebody stopped recording: its next observation is worth what it is worth). Which of the two is data, never inferred from the end.

The spec is that of every other part: no cameras, the observation's numbers are `pose_names`, one control step a frame.
`spec.action.embodiment` names the environment (a Gymnasium id where there is one).
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from worldline.errors import DatasetError
from worldline.types import ActionSpec, Observation, WorldSpec

_ROUNDING = 1e-4  # of a dimension's range: how far an action may stand outside it, to be clipped in silence


IMAGINED_BY = "trajectory_model"  # in the provenance of an episode that one made


def control_spec(
    environment: str, observations: Sequence[str] | int, low: Sequence[float], high: Sequence[float], *, rate_hz: float
) -> WorldSpec:
    """The spec of a low-dimensional control task: what is seen are `observations` (names, or so many), what is sent lies in [low, high]."""
    names = tuple(f"o{i}" for i in range(observations)) if isinstance(observations, int) else tuple(observations)
    action = ActionSpec(
        names=tuple(f"a{i}" for i in range(len(low))),
        low=tuple(float(x) for x in low),
        high=tuple(float(x) for x in high),
        kind="absolute",
        space="joint",
        rate_hz=rate_hz,
        source="commanded",
        embodiment=environment,
    )
    return WorldSpec(cameras=(), fps=rate_hz, control_steps=1, action=action, pose_names=names)


def unnamed(spec: WorldSpec) -> bool:
    """Whether the numbers seen have no names but their places (o0, o1, ...), as in datasets of others."""
    return spec.pose_names == tuple(f"o{i}" for i in range(len(spec.pose_names)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Trajectories:
    """Episodes of a low-dimensional task, their steps in one table, in physical units.

    Raises `DatasetError` for tables that do not fit each other or the spec, NaN, and actions outside the range.
    """

    spec: WorldSpec
    observations: Float[Tensor, "n o"]
    actions: Float[Tensor, "n a"]
    rewards: Float[Tensor, " n"]
    next_observations: Float[Tensor, "n o"]
    terminated: Bool[Tensor, " n"]
    lengths: Int[Tensor, " e"]  # steps of each episode; they sum to n
    provenance: tuple[Mapping[str, str], ...] = field(default=())  # one an episode, or none at all

    def __post_init__(self) -> None:
        n, dims = len(self.rewards), {"observations": len(self.spec.pose_names), "actions": self.spec.action.dim}
        for name, width in (dims | {"next_observations": dims["observations"]}).items():
            got = tuple(getattr(self, name).shape)
            if got != (n, width):
                raise DatasetError(f"{name}: shape {(n, width)} required by the rewards and the spec, got {got}")
        if len(self.terminated) != n or int(self.lengths.sum()) != n or bool((self.lengths < 1).any()):
            raise DatasetError(
                f"{n} steps in episodes of at least one step are required, got {len(self.terminated)} terminated flags and episodes of "
                f"{int(self.lengths.sum())} steps in all, the shortest {int(self.lengths.min()) if len(self.lengths) else 0}"
            )
        if self.provenance and len(self.provenance) != len(self.lengths):
            raise DatasetError(f"provenance: none or {len(self.lengths)} entries required, got {len(self.provenance)}")
        early = self.terminated & ~self.last
        if early.any():
            raise DatasetError(f"only an episode's last step may be terminated; {self._where(early)} is not its last")
        for name in ("observations", "actions", "rewards", "next_observations"):
            broken = ~getattr(self, name).isfinite().reshape(n, -1).all(1)
            if broken.any():
                raise DatasetError(
                    f"{name}: finite numbers required, got NaN or infinity in {int(broken.sum())} of {n} steps, first in {self._where(broken)}"
                )
        low, high = torch.tensor(self.spec.action.low), torch.tensor(self.spec.action.high)
        slack = _ROUNDING * (high - low)
        outside = ((self.actions < low - slack) | (self.actions > high + slack)).any(1)
        if outside.any():
            at = int(outside.nonzero()[0])
            raise DatasetError(
                f"actions within [{_numbers(low)}] .. [{_numbers(high)}] required, got [{_numbers(self.actions[at])}] in "
                f"{self._where(outside)} ({int(outside.sum())} of {n} steps). Record what the environment consumes, after its own clipping."
            )

    def __len__(self) -> int:
        """Episodes."""
        return len(self.lengths)

    @property
    def steps(self) -> int:
        """Steps of all episodes."""
        return len(self.rewards)

    @property
    def starts(self) -> Int[Tensor, " e"]:
        """Each episode's first step."""
        return self.lengths.cumsum(0) - self.lengths

    @property
    def last(self) -> Bool[Tensor, " n"]:
        """Whether a step is its episode's last."""
        flag = torch.zeros(self.steps, dtype=torch.bool)
        flag[self.lengths.cumsum(0) - 1] = True
        return flag

    @property
    def episode(self) -> Int[Tensor, " n"]:
        """The episode of each step."""
        return torch.repeat_interleave(torch.arange(len(self)), self.lengths)

    @property
    def returns(self) -> Float[Tensor, " e"]:
        """Sum of each episode's rewards."""
        return torch.zeros(len(self)).index_add(0, self.episode, self.rewards.float())

    @property
    def imagined(self) -> Bool[Tensor, " e"]:
        """Which episodes a trajectory model made: pieces, whose returns are not those of whole episodes."""
        return torch.tensor([IMAGINED_BY in about for about in self.provenance or ({},) * len(self)], dtype=torch.bool)

    def select(self, episodes: Iterable[int]) -> "Trajectories":
        """The episodes named, in that order."""
        chosen = torch.as_tensor(list(episodes), dtype=torch.long)
        starts, lengths = self.starts[chosen], self.lengths[chosen]
        rows = torch.cat([torch.arange(int(s), int(s + n)) for s, n in zip(starts, lengths)]) if len(chosen) else chosen
        return replace(
            self,
            observations=self.observations[rows],
            actions=self.actions[rows],
            rewards=self.rewards[rows],
            next_observations=self.next_observations[rows],
            terminated=self.terminated[rows],
            lengths=lengths,
            provenance=tuple(self.provenance[i] for i in chosen.tolist()) if self.provenance else (),
        )

    def windows(self, length: int, *, stride: int = 1, past_end: bool = False) -> Int[Tensor, "w length"]:
        """Rows of every window of `length` consecutive steps of one episode, `stride` apart; an episode's last window ends with it.

        `past_end`: windows run on past the end of a terminated episode, which repeats its last step, up to one that begins there. So a
        terminal step is met as often as any other, and terminated episodes may be shorter than a window.

        Raises `DatasetError` if no episode is long enough.
        """
        found = []
        ended = self.terminated[self.lengths.cumsum(0) - 1] & past_end
        for start, n, ends in zip(self.starts.tolist(), self.lengths.tolist(), ended.tolist()):
            last = n - 1 if ends else n - length
            if last >= 0:
                first = torch.arange(0, last + 1, stride)
                if first[-1] != last:
                    first = torch.cat([first, torch.tensor([last])])
                found.append(start + (first[:, None] + torch.arange(length)).clamp(max=n - 1))
        if not found:
            raise DatasetError(
                f"episodes of at least {length} steps (the window) required, got {len(self)} episodes of at most {int(self.lengths.max())}. "
                "Use a shorter window or longer episodes."
            )
        return torch.cat(found)

    def outside_windows(self, length: int) -> list[int]:
        """Episodes that no window of `length` meets, `past_end`: cut short before they filled one."""
        ended = self.terminated[self.lengths.cumsum(0) - 1]
        return ((self.lengths < length) & ~ended).nonzero()[:, 0].tolist()

    def _where(self, steps: Bool[Tensor, " n"]) -> str:
        at = int(steps.nonzero()[0])
        episode = int(self.episode[at])
        return f"step {at - int(self.starts[episode])} of episode {episode}"


def join(parts: Sequence[Trajectories]) -> Trajectories:
    """All episodes of several sets of one task. Raises `DatasetError` if their specs differ."""
    first = parts[0]
    for part in parts[1:]:
        if (part.spec.action, part.spec.pose_names) != (first.spec.action, first.spec.pose_names):
            raise DatasetError(f"sets of one task required, got specs that differ:\n  {first.spec}\n  {part.spec}")
    told = any(part.provenance for part in parts)
    return replace(
        first,
        **{
            name: torch.cat([getattr(part, name) for part in parts])
            for name in ("observations", "actions", "rewards", "next_observations", "terminated", "lengths")
        },
        provenance=tuple(about for part in parts for about in (part.provenance or ({},) * len(part))) if told else (),
    )


def low_dimensional(observations: Float[Tensor, "n o"]) -> Observation:
    """What a policy sees of a task without cameras and instruction."""
    return Observation(images={}, pose=observations, instruction=("",) * len(observations))


def _numbers(values: Tensor) -> str:
    return ", ".join(f"{x:g}" for x in values.tolist())
