"""What offline agents learn from: one table of real transitions for all members, and a synthetic one for each member.

A batch is a function of (member's seed, update) alone, so that a member draws the same whether it is trained alone or among others, and a
killed run goes on with the batches it would have had. Every batch holds a fixed number of synthetic rows, the first ones.

Observations are normalised and actions in unit coordinates once, here; networks are given table rows as they are.
A truncated transition is an ordinary row: its next observation is worth what it is worth. Only `terminated` ends value.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from worldline.data.trajectories import Trajectories
from worldline.diffusion.noise import mix
from worldline.errors import DatasetError, WorldlineError
from worldline.policies.states import StatePolicies

_ROUNDING = 1e-4  # of half the range: how far a synthetic action may stand outside it
_REAL, _SYNTHETIC = 101, 102  # streams of random numbers


@dataclass(frozen=True, slots=True, kw_only=True)
class _Transitions:
    """n transitions for each of e members."""

    observations: Float[Tensor, "e n o"]
    actions: Float[Tensor, "e n a"]
    rewards: Float[Tensor, "e n"]
    next_observations: Float[Tensor, "e n o"]
    terminated: Bool[Tensor, "e n"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SyntheticTables(_Transitions):
    """Made-up ones, in physical units, in any order. Member j has `counts[j]`; what stands behind them only fills the table (None: all count)."""

    counts: Int[Tensor, " e"] | None = None


class Batch(_Transitions):
    """Those of one update: observations normalised, actions in unit coordinates, rewards scaled."""

    __slots__ = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Scaling:
    """What observations and rewards are brought to before anything learns from them."""

    mean: Float[Tensor, " o"]
    std: Float[Tensor, " o"]
    reward: float  # factor


def fit_scaling(real: Trajectories, *, rewards: Literal["raw", "return-range"] = "raw") -> Scaling:
    """As published. Observations (TD3+BC, 2106.06860, section 5): less the mean, over the standard deviation + 1e-3. Rewards: left alone
    (TD3+BC), or times the longest episode's steps over the range of returns (IQL, 2110.06169: 1000 over it, D4RL's episodes
    being of 1000 steps); of imagined pieces only where there is nothing else.

    Raises `DatasetError` for "return-range" where all returns are alike.
    """
    seen = real.observations.double()
    factor = 1.0
    if rewards == "return-range":
        whole = real if real.imagined.all() else real.select((~real.imagined).nonzero()[:, 0].tolist())
        returns = whole.returns
        spread = float(returns.max() - returns.min())
        if spread <= 0:
            raise DatasetError(
                f"rewards return-range: episodes of different return required, got {len(whole)} of {float(returns[0]):g}. Use raw."
            )
        factor = int(whole.lengths.max()) / spread
    return Scaling(mean=seen.mean(0).float(), std=(seen.std(0, correction=0) + 1e-3).float(), reward=factor)


def episode_weights(returns: Float[Tensor, " e"], temperature: float) -> Float[Tensor, " e"]:
    """How much more a step of a good episode counts (Hong et al. 2306.13085): exp(g / temperature), g the return brought to [0, 1] by the
    least and the greatest. Divided by their mean. A high temperature, and returns all alike, give 1 everywhere.
    """
    if not temperature > 0:
        raise ValueError(f"a temperature above 0 is required, got {temperature}")
    spread = (returns.max() - returns.min()).clamp(min=torch.finfo(returns.dtype).tiny)
    weights = ((returns - returns.max()) / spread / temperature).exp()
    return weights / weights.mean()


def step_weights(real: Trajectories, temperature: float) -> Float[Tensor, " n"]:
    """`episode_weights` of each step: whole episodes among themselves, and imagined pieces, whose returns are of fewer steps, among themselves."""
    weights = torch.empty(len(real))
    for group in (~real.imagined, real.imagined):
        if group.any():
            weights[group] = episode_weights(real.returns[group], temperature)
    return weights[real.episode]


class Replay:
    """The tables and how they are drawn from.

    Args:
        policies: of the members; says how observations are normalised and actions scaled, and the device.
        batch_size: rows a member and update.
        synthetic: how many of them are synthetic (once there are synthetic tables; before that all are real).
        temperature: of `step_weights`, by which real steps are drawn; None draws them evenly.
    """

    def __init__(
        self,
        real: Trajectories,
        policies: StatePolicies,
        scaling: Scaling,
        *,
        seeds: Sequence[int],
        batch_size: int,
        synthetic: int,
        temperature: float | None = None,
    ) -> None:
        self.policies, self.scaling = policies, scaling
        device = policies.mean.device
        self.seeds = torch.tensor(seeds, device=device)
        self.batch_size, self.share = batch_size, synthetic
        self.real = self._rows(real.observations, real.actions, real.rewards, real.next_observations, real.terminated)
        self.cumulative: Tensor | None = None
        if temperature is not None:
            steps = step_weights(real, temperature).double()
            self.cumulative = (steps.cumsum(0) / steps.sum()).to(device)
        # the real table, then the members' synthetic ones
        self.rows, self.per_member = self.real, 0
        self.counts = torch.zeros(len(seeds), dtype=torch.long, device=device)

    def put(self, tables: SyntheticTables, *, update: int) -> None:
        """Make these the members' synthetic tables. Raises `WorldlineError` naming what is wrong with them."""
        self._check(tables, update)
        made = self._rows(
            tables.observations, tables.actions, tables.rewards, tables.next_observations, tables.terminated
        )
        self.rows, self.per_member = torch.cat([self.real, made.flatten(0, 1)]), made.shape[1]
        counts = torch.full_like(self.counts, self.per_member) if tables.counts is None else tables.counts
        self.counts = counts.to(self.counts.device)

    def batch(self, update: int) -> Batch:
        """Every member's rows of one update."""
        made = self.share if self.per_member else 0
        parts = []
        if made:
            place = row_integers(self.seeds, update, made, self.counts[:, None], stream=_SYNTHETIC)
            begin = len(self.real) + self.per_member * torch.arange(len(self.seeds), device=self.seeds.device)
            parts.append(place + begin[:, None])
        if made < self.batch_size:
            parts.append(self._real_rows(update, self.batch_size - made))
        index = torch.cat(parts, dim=1)
        rows = self.rows.index_select(0, index.flatten()).unflatten(0, tuple(index.shape))
        o, a = len(self.policies.mean), len(self.policies.radius)
        seen, done, after, rewards, ended = rows.split([o, a, o, 1, 1], dim=-1)
        return Batch(
            observations=seen,
            actions=done,
            rewards=rewards[..., 0],
            next_observations=after,
            terminated=ended[..., 0] > 0.5,
        )

    def _real_rows(self, update: int, count: int) -> Tensor:
        if self.cumulative is None:
            return row_integers(self.seeds, update, count, len(self.real), stream=_REAL)
        uniform = (row_integers(self.seeds, update, count, 2**31 - 1, stream=_REAL).double() + 0.5) / (2**31 - 1)
        return torch.searchsorted(self.cumulative, uniform).clamp(max=len(self.real) - 1)

    def _rows(self, seen: Tensor, done: Tensor, rewards: Tensor, after: Tensor, ended: Tensor) -> Tensor:
        """One row a transition: normalised observation, unit action, normalised next observation, scaled reward, terminated."""
        policies, device = self.policies, self.policies.mean.device
        return torch.cat(
            [
                policies.normalise(seen.to(device, torch.float32)),
                policies.to_unit(done.to(device, torch.float32)).clamp(-1, 1),
                policies.normalise(after.to(device, torch.float32)),
                self.scaling.reward * rewards.to(device, torch.float32)[..., None],
                ended.to(device, torch.float32)[..., None],
            ],
            dim=-1,
        )

    def _check(self, tables: SyntheticTables, update: int) -> None:
        where = f"synthetic data made at update {update}"
        e, o, a = len(self.seeds), len(self.policies.mean), len(self.policies.radius)
        n = tables.rewards.shape[1]
        for name, width in (("observations", o), ("actions", a), ("next_observations", o)):
            got = tuple(getattr(tables, name).shape)
            if got != (e, n, width) or n < 1:
                raise WorldlineError(
                    f"{where}: {name} of shape (members {e}, rows at least 1, {width}) required by the real data and the seeds, got {got}"
                )
        counts = tables.counts
        if counts is not None and not (len(counts) == e and 1 <= int(counts.min()) <= int(counts.max()) <= n):
            raise WorldlineError(
                f"{where}: between 1 and {n} rows of each of {e} members required, got {counts.tolist()}"
            )
        for name in ("rewards", "observations", "actions", "next_observations"):
            broken = ~getattr(tables, name).isfinite().reshape(e, n, -1).all(-1)
            if broken.any():
                member, row = broken.nonzero()[0].tolist()
                raise WorldlineError(
                    f"{where}: finite {name} required, got NaN or infinity in {int(broken.sum())} of {e * n} rows, first in row {row} of "
                    f"member {member} (seed {int(self.seeds[member])}). Look at what made them: weaker guidance, a longer trained model."
                )
        excess = self.policies.to_unit(tables.actions.to(self.policies.radius)).abs().amax(-1) - 1
        if bool((excess > _ROUNDING).any()):
            member, row = (excess > _ROUNDING).nonzero()[0].tolist()
            action = ", ".join(f"{x:g}" for x in tables.actions[member, row].tolist())
            raise WorldlineError(
                f"{where}: actions within {self.policies.spec.action.low} .. {self.policies.spec.action.high} required, got [{action}] in row "
                f"{row} of member {member} ({int((excess > _ROUNDING).sum())} of {e * n} rows). Clip them where they are made."
            )


def row_integers(
    seeds: Int[Tensor, " e"], update: int, count: int, below: int | Int[Tensor, "e 1"], *, stream: int
) -> Int[Tensor, "e count"]:
    """Even random integers in [0, below), below < 2^31 (one for all, or one a seed), as a function of (seed, update, stream)."""
    key = mix(mix(mix(seeds.long()) ^ update) ^ stream)
    bits = mix(key[:, None] + torch.arange(count, device=seeds.device)) & 0xFFFFFFFF
    return (bits * below) >> 32
