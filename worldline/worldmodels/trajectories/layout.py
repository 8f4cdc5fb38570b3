"""How steps become the numbers that are diffused, and back.

    one step:   [ observation | action | reward | terminal | change ]        2 o + a + 2 numbers, o + a + 2 without changes

Observations, actions and rewards are normalised by mean and standard deviation, a dimension each. Whatever is sampled is an action: what is
diffused is atanh of an action's place in the range (`squash`, PGD 2404.06356), or its place itself, which is clipped when sampled. The first spends
its resolution on the ends of the range: of a behaviour that often goes to the limit, little is left for what lies between. The terminal flag is a channel of its own:
-1 before the end and +1 at it; a sampled value above `THRESHOLD` ends the trajectory there.

The change is how far the next observation is from this one, normalised by itself (ours, not the paper's; `changes`). At high control rates a step
moves an observation by a hundredth of its spread, and a network that is right to a hundredth of the spread says nothing of the step. What is
sampled says each observation twice, where it is and how far from its neighbours; `unpack` takes the trajectory nearest to both, each by its own
spread (least squares).
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from worldline.data.trajectories import Trajectories
from worldline.types import WorldSpec

CONSTANT = 1e-6  # a dimension whose standard deviation is less than this share of its values does not change: it is left as it is
EDGE = 0.999  # how far towards the ends of the range an action is before it is unsquashed: atanh(1) is infinite
THRESHOLD = 0.0  # halfway between the two values of the terminal channel


class Windows(NamedTuple):
    """n stretches of t steps in physical units."""

    observations: Float[Tensor, "n t o"]
    actions: Float[Tensor, "n t a"]
    rewards: Float[Tensor, "n t"]
    terminal: Bool[Tensor, "n t"]


class Layout(nn.Module):
    """Normalisation of steps; part of the model, saved with its weights.

    Args:
        spec: dims of observation and action, range of the action.
        changes: say changes of the observation too.
        squash: diffuse actions unsquashed by atanh, as published.
    """

    mean: Tensor
    std: Tensor
    centre: Tensor
    radius: Tensor
    reach: Tensor

    def __init__(self, spec: WorldSpec, *, changes: bool = False, squash: bool = True) -> None:
        super().__init__()
        self.o, self.a, self.changes, self.squash = len(spec.pose_names), spec.action.dim, changes, squash
        low, high = torch.tensor(spec.action.low), torch.tensor(spec.action.high)
        told = (*spec.pose_names, *spec.action.names, "reward", "terminal")
        self.names = told + tuple(f"change of {name}" for name in spec.pose_names) * changes
        self.register_buffer("centre", (low + high) / 2, persistent=False)
        self.register_buffer("radius", (high - low) / 2, persistent=False)
        self.register_buffer("mean", torch.zeros(self.width))
        self.register_buffer("std", torch.ones(self.width))
        self.register_buffer("reach", torch.full((self.width,), 4.0))  # largest normalised value of the data

    @property
    def width(self) -> int:
        """Numbers of a step."""
        return self.o + self.a + 2 + self.o * self.changes

    @torch.no_grad()
    def fit(self, data: Trajectories) -> "Layout":
        """Take mean and standard deviation from recorded steps."""
        raw = self._numbers(data.actions, data.rewards, data.terminated, data.observations, data.next_observations)
        raw = raw.to(self.mean)
        mean, std, size = raw.double().mean(0), raw.double().std(0, correction=0), raw.double().abs().amax(0)
        if self.changes:
            size[-self.o :] = size[
                : self.o
            ]  # what is left of a change is no finer than the observations it is a difference of
        terminal = self.o + self.a + 1
        mean[terminal], std[terminal] = 0.0, 1.0  # rare ends would be blown up
        self.mean.copy_(mean)
        self.std.copy_(torch.where(std > CONSTANT * size, std, 1.0))
        self.reach.copy_(((raw - self.mean) / self.std).abs().amax(0))
        return self

    def pack(self, windows: Windows) -> Float[Tensor, "n t d"]:
        """Physical steps as normalised numbers."""
        seen = windows.observations
        raw = self._numbers(windows.actions, windows.rewards, windows.terminal, seen, _following(windows))
        return (raw - self.mean) / self.std

    def unpack(self, z: Float[Tensor, "n t d"]) -> Windows:
        """Normalised numbers as physical steps: actions within their range, terminal by the threshold."""
        raw = z * self.std + self.mean
        observations, place, reward, terminal, change = raw.split([self.o, self.a, 1, 1, self.o * self.changes], dim=-1)
        return Windows(
            self._nearest(observations, change) if self.changes else observations,
            self.centre + self.radius * (place.tanh() if self.squash else place.clamp(-1, 1)),
            reward[..., 0],
            terminal[..., 0] > THRESHOLD,
        )

    @property
    def transition_width(self) -> int:
        """Numbers of a transition (`transitions`)."""
        return 2 * self.o + self.a + 1

    def transitions(self, windows: Windows) -> Float[Tensor, "n t m"]:
        """Of every step the observation, the action's place and the next observation, normalised, and whether it is terminal: +1, or -1.

        After a terminal step there is no next observation. Without the flag its transition would look like one that moves nothing.
        """
        seen, following = windows.observations, _following(windows)
        mean, std = self.mean[: self.o], self.std[: self.o]
        place = ((windows.actions - self.centre) / self.radius).clamp(-1, 1)
        ends = 2 * windows.terminal.to(seen)[..., None] - 1
        return torch.cat([(seen - mean) / std, place, (following - mean) / std, ends], -1)

    def slope(self, z: Float[Tensor, "n t d"]) -> Float[Tensor, "n t a"]:
        """d action / d normalised number, of every action dimension: the chain rule of `unpack`."""
        part = slice(self.o, self.o + self.a)
        if not self.squash:
            # beyond the range too, where clipping leaves the action at its end: what has gone out can be led back
            return (self.radius * self.std[part]).expand(*z.shape[:-1], -1)
        squashed = z[..., part] * self.std[part] + self.mean[part]
        return self.radius * (1 - squashed.tanh().square()) * self.std[part]

    def _numbers(
        self, actions: Tensor, rewards: Tensor, terminal: Tensor, observations: Tensor, following: Tensor
    ) -> Float[Tensor, "*rows d"]:
        place = (actions - self.centre) / self.radius
        place = place.clamp(-EDGE, EDGE).atanh() if self.squash else place.clamp(-1, 1)
        ends = 2 * terminal.to(rewards) - 1
        parts = [observations, place, rewards[..., None], ends[..., None]]
        return torch.cat([*parts, following - observations] if self.changes else parts, -1)

    def _nearest(self, observations: Float[Tensor, "n t o"], change: Float[Tensor, "n t o"]) -> Float[Tensor, "n t o"]:
        """The trajectory nearest to both: to each observation, in its own spread, and to each change, in that of changes."""
        t = observations.shape[1]
        # how much more a change says of a step than two observations do
        trust = (self.std[: self.o] / self.std[-self.o :]).double().square()[:, None, None]
        step = torch.diff(torch.eye(t, dtype=torch.float64, device=observations.device), dim=0)  # "t-1 t"
        system = torch.eye(t, dtype=torch.float64, device=observations.device) + trust * (step.T @ step)  # "o t t"
        both = torch.einsum("ts,nso->otn", step.T, change[:, :-1].double()) * trust
        both = both + observations.double().permute(2, 1, 0)
        return torch.linalg.solve(system, both).permute(2, 1, 0).to(observations)


def _following(windows: Windows) -> Float[Tensor, "n t o"]:
    """The next observation of every step. After a terminal step there is none, and after a window's last step nobody knows it: it stays."""
    seen = windows.observations
    return torch.where(windows.terminal[..., None], seen, torch.cat([seen[:, 1:], seen[:, -1:]], 1))


def gather(data: Trajectories, rows: Int[Tensor, "n t"]) -> Windows:
    """The steps named, as windows."""
    return Windows(data.observations[rows], data.actions[rows], data.rewards[rows], data.terminated[rows])


def as_trajectories(windows: Windows, spec: WorldSpec, provenance: tuple[Mapping[str, str], ...] = ()) -> Trajectories:
    """Sampled windows as episodes: what follows the first terminal step is cut off.

    A step's next observation is the next step's, so a window that does not end gives one transition less than it has steps, the last of
    them truncated. After a terminal step comes nothing; its own observation stands there.
    """
    n, t = windows.rewards.shape
    ends = windows.terminal.any(1)
    end = torch.where(ends, windows.terminal.int().argmax(1) + 1, torch.full((n,), t - 1))  # transitions of each
    inside = torch.arange(t) < end[:, None]
    parts = {
        "observations": windows.observations,
        "actions": windows.actions,
        "rewards": windows.rewards,
        "next_observations": _following(windows),
        "terminated": windows.terminal & inside,
    }
    return Trajectories(spec=spec, lengths=end, provenance=provenance, **{name: x[inside] for name, x in parts.items()})
