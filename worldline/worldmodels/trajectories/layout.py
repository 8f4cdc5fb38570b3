"""How steps become the numbers that are diffused, and back.

    one step:   [ observation | squashed action | reward | terminal ]        o + a + 2 numbers

Observations, actions and rewards are normalised by mean and standard deviation, a dimension each. Actions are first unsquashed:
atanh of their place in the range, so that whatever is sampled is an action (PGD 2404.06356). The terminal flag is a channel of its own:
-1 before the end and +1 at it; a sampled value above `THRESHOLD` ends the trajectory there.
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from einops import pack
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from worldline.data.trajectories import Trajectories
from worldline.types import WorldSpec

LEAST_STD = 1e-3  # of a dimension that does not change, in its own units
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
    """

    mean: Tensor
    std: Tensor
    centre: Tensor
    radius: Tensor
    reach: Tensor

    def __init__(self, spec: WorldSpec) -> None:
        super().__init__()
        self.o, self.a = len(spec.pose_names), spec.action.dim
        low, high = torch.tensor(spec.action.low), torch.tensor(spec.action.high)
        self.register_buffer("centre", (low + high) / 2, persistent=False)
        self.register_buffer("radius", (high - low) / 2, persistent=False)
        self.register_buffer("mean", torch.zeros(self.width))
        self.register_buffer("std", torch.ones(self.width))
        self.register_buffer("reach", torch.full((self.width,), 4.0))  # largest normalised value of the data

    @property
    def width(self) -> int:
        """Numbers of a step."""
        return self.o + self.a + 2

    @torch.no_grad()
    def fit(self, data: Trajectories) -> "Layout":
        """Take mean and standard deviation from recorded steps."""
        raw = self._join(
            Windows(data.observations[None], data.actions[None], data.rewards[None], data.terminated[None])
        )
        raw = raw[0].to(self.mean)
        mean, std = raw.double().mean(0), raw.double().std(0, correction=0)
        mean[-1], std[-1] = 0.0, 1.0  # rare ends would be blown up
        self.mean.copy_(mean)
        self.std.copy_(std.clamp(min=LEAST_STD))
        self.reach.copy_(((raw - self.mean) / self.std).abs().amax(0))
        return self

    def pack(self, windows: Windows) -> Float[Tensor, "n t d"]:
        """Physical steps as normalised numbers."""
        return (self._join(windows) - self.mean) / self.std

    def unpack(self, z: Float[Tensor, "n t d"]) -> Windows:
        """Normalised numbers as physical steps: actions within their range, terminal by the threshold."""
        raw = z * self.std + self.mean
        observations, squashed, reward, terminal = raw.split([self.o, self.a, 1, 1], dim=-1)
        return Windows(
            observations,
            self.centre + self.radius * squashed.tanh(),
            reward[..., 0],
            terminal[..., 0] > THRESHOLD,
        )

    def slope(self, z: Float[Tensor, "n t d"]) -> Float[Tensor, "n t a"]:
        """d action / d normalised number, of every action dimension: the chain rule of `unpack`."""
        part = slice(self.o, self.o + self.a)
        squashed = z[..., part] * self.std[part] + self.mean[part]
        return self.radius * (1 - squashed.tanh().square()) * self.std[part]

    def _join(self, windows: Windows) -> Float[Tensor, "n t d"]:
        place = ((windows.actions - self.centre) / self.radius).clamp(-EDGE, EDGE)
        terminal = 2 * windows.terminal.to(windows.rewards) - 1
        return pack([windows.observations, place.atanh(), windows.rewards, terminal], "n t *")[0]


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
    following = torch.cat([windows.observations[:, 1:], windows.observations[:, -1:]], dim=1)
    following = torch.where((windows.terminal & inside)[..., None], windows.observations, following)
    parts = {
        "observations": windows.observations,
        "actions": windows.actions,
        "rewards": windows.rewards,
        "next_observations": following,
        "terminated": windows.terminal & inside,
    }
    return Trajectories(spec=spec, lengths=end, provenance=provenance, **{name: x[inside] for name, x in parts.items()})
