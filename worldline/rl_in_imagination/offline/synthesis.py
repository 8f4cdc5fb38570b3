"""Synthetic data for each member of an offline agent, from its own policy as it is: by guided diffusion, or step by step.

Both give every member as many transitions, from rows whose seeds are functions of (member's seed, update, row): the same whether a member is
trained alone or among others, and whenever a run goes on.
"""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from worldline.data.trajectories import Trajectories
from worldline.policies.states import StatePolicies
from worldline.rl_in_imagination.dynamics import DynamicsEnsemble
from worldline.rl_in_imagination.guidance import require_same_task
from worldline.rl_in_imagination.offline.replay import SyntheticTables
from worldline.worldmodels.trajectories import Guidance, ScoreFunction, TrajectoryDiffusion, Windows
from worldline.worldmodels.trajectories.layout import as_trajectories

Synthesise = Callable[[StatePolicies, int], SyntheticTables]
_ROWS = 1024  # trajectories denoised at a time


def by_diffusion(
    model: TrajectoryDiffusion, *, seeds: Sequence[int], trajectories: int, guidance: Guidance | None
) -> Synthesise:
    """Whole trajectories for each member, moved towards its policy (or not, without guidance)."""

    def synthesise(policies: StatePolicies, update: int) -> SyntheticTables:
        require_same_task(policies.spec, model.spec, between="policy and trajectory model")
        model.to(policies.mean.device)
        rows = row_seeds(seeds, update, trajectories)
        share = max(1, _ROWS // len(seeds))
        parts = [
            model.sample_windows(some.flatten(), guidance=guidance, score=members_score(policies))
            for some in rows.split(share, dim=1)
        ]
        made = [torch.cat([x.unflatten(0, (len(seeds), -1)) for x in kind], 1).cpu() for kind in zip(*parts)]
        return tables([as_trajectories(Windows(*(x[j] for x in made)), model.spec) for j in range(len(seeds))])

    return synthesise


def by_rollout(
    model: DynamicsEnsemble,
    starts: Float[Tensor, "s o"],
    *,
    seeds: Sequence[int],
    trajectories: int,
    steps: int,
) -> Synthesise:
    """Rollouts of `steps` - 1 transitions of each member's policy in learned dynamics, from recorded states drawn anew each time."""

    def synthesise(policies: StatePolicies, update: int) -> SyntheticTables:
        require_same_task(policies.spec, model.spec, between="policy and dynamics")
        model.to(device := policies.mean.device)
        rows = row_seeds(seeds, update, trajectories)
        found = []
        for j, own in enumerate(rows):
            generator = torch.Generator().manual_seed(int(own[0]))
            chosen = starts[torch.randint(len(starts), (trajectories,), generator=generator)]
            alone = policies.member(j).policies

            def act(now: Tensor, alone: StatePolicies = alone) -> Tensor:
                return alone.act(now[None])[0]

            found.append(model.rollout(act, chosen.to(device), steps=steps, seeds=own.to(device)))
        return tables(found)

    return synthesise


def members_score(policies: StatePolicies) -> ScoreFunction:
    """The score of e policies at the steps of trajectories of which the first share is the first member's, and so on."""
    e = policies.members

    def score(observations: Float[Tensor, "n t o"], actions: Float[Tensor, "n t a"]) -> Float[Tensor, "n t a"]:
        own = (x.reshape(e, -1, x.shape[-1]) for x in (observations, actions))
        return policies.score(*own).reshape(actions.shape)

    return score


def row_seeds(seeds: Sequence[int], update: int, count: int) -> Int[Tensor, "e n"]:
    """A seed a row that no other member, update or row has (of seeds and updates below a million, and as many rows)."""
    return (torch.tensor(seeds)[:, None] * 1_000_003 + update) * 1_048_576 + torch.arange(count)


def tables(sets: Sequence[Trajectories]) -> SyntheticTables:
    """One table of each member's transitions. Members whose trajectories end early have fewer, and their tables are filled up."""
    counts = torch.tensor([made.steps for made in sets])
    rows = [torch.arange(int(counts.max())) % made.steps for made in sets]
    return SyntheticTables(
        counts=counts,
        **{
            name: torch.stack([getattr(made, name)[chosen] for made, chosen in zip(sets, rows)])
            for name in ("observations", "actions", "rewards", "next_observations", "terminated")
        },
    )
