"""Where a dream has left what its world model knows: two denoisings of the same next frame that disagree.

A frame that the data decides comes out alike whatever noise it began as; one that it does not decide comes out different every time.
The distance of two denoisings, in whitened latents, is the doubt of a frame. Its limit is set on dreams of real held-out episodes
under their own actions: rollouts that doubt more than those do have left the data, and end there (as MOReL 2005.05951 ends them).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from scipy.stats import spearmanr
from torch import Tensor
from tqdm import tqdm

from worldline.diffusion.noise import mix
from worldline.executor import index_observation
from worldline.rl_in_imagination.dream import Dream, DreamState
from worldline.tokenizers.whitening import whiten
from worldline.types import Observation


@dataclass(frozen=True, slots=True, kw_only=True)
class Doubt:
    """Doubts frames of `dream`; more than `limit` is too much. `sampler`: the world model as it is sampled for that, with more than
    one solver step where the dream's own has one: a single step gives the mean, which hardly depends on the noise."""

    dream: Dream
    sampler: Any
    limit: float = float("inf")

    @classmethod
    def of(cls, dream: Dream, *, solver_steps: int = 2) -> "Doubt":
        """Raises `ValueError` if training never showed the levels of so many solver steps."""
        world: Any = dream.world_model
        return cls(dream=dream, sampler=world.with_sampling(solver_steps=solver_steps))

    @torch.no_grad()
    def __call__(self, state: DreamState, blocks: Float[Tensor, "n k a"]) -> Float[Tensor, " n"]:
        """Root mean square distance of two denoisings of the frame that `blocks` lead to from `state`, in whitened latents."""
        spec = self.dream.spec
        assert spec.latent is not None
        low, high = torch.tensor(spec.action.low), torch.tensor(spec.action.high)
        actions = blocks.clamp(low, high)[:, None]
        found = []
        for draw in (1, 2):
            seeds = mix(state.seeds ^ draw)
            made = self.sampler.imagine(state.world, actions, seeds=seeds)[1].latents
            found.append(torch.cat([z.flatten(1) for z in whiten(made, spec.latent).values()], 1))
        return (found[0] - found[1]).square().mean(1).sqrt().cpu()

    def exceeded(self, state: DreamState, blocks: Float[Tensor, "n k a"]) -> Bool[Tensor, " n"]:
        """Where it doubts more than its limit."""
        return self(state, blocks) > self.limit

    def along(
        self, first: Observation, actions: Float[Tensor, "n t k a"], *, seeds: Tensor, progress: str | None = None
    ) -> tuple[Float[Tensor, "n t"], dict[str, Tensor]]:
        """Doubts of every imagined frame of given actions, and those frames "n t c h w" a camera."""
        state, doubts, frames = self.dream.start(first, seeds=seeds), [], []
        for i in tqdm(range(actions.shape[1]), desc=progress, unit="frame", disable=progress is None, leave=False):
            doubts.append(self(state, actions[:, i]))
            state = self.dream.step(state, actions[:, i])
            frames.append(state.observation.images)
        return torch.stack(doubts, 1), {c: torch.stack([f[c] for f in frames], 1) for c in frames[0]}


@dataclass(frozen=True, slots=True, kw_only=True)
class DoubtCalibration:
    """How the limit was set, and what doubt is worth: its rank correlation (Spearman's) with the true error of the same frames; None
    where it is undefined."""

    limit: float
    episodes: int
    quantile: float
    correlation: float | None  # over frames of all episodes: both may merely grow with the dream's length
    correlation_between: float | None  # between episodes at the same frame, averaged over frames: which dream is worse

    def __post_init__(self) -> None:
        assert self.limit > 0


def calibrate(
    doubt: Doubt,
    first: Observation,
    real: dict[str, Tensor],
    actions: Float[Tensor, "n t k a"],
    *,
    ends: Sequence[int | None] = (),
    quantile: float = 0.95,
    batch: int = 32,
    progress: str | None = None,
) -> DoubtCalibration:
    """Dreams of real episodes under their own actions: this share of them stays below the limit throughout.

    Args:
        real: camera -> "n t c h w", the frames that the actions truly led to.
        ends: the frame (0: the first) at which an episode terminated; None: it goes on. What would come after does not count.
    """
    n = len(actions)
    doubts, errors = [], []
    for rows in torch.arange(n).split(batch):
        found, made = doubt.along(
            index_observation(first, rows), actions[rows], seeds=rows + 15_485_863, progress=progress
        )
        doubts.append(found)
        missed = [(x.float() - real[c][rows].float()).square().flatten(2).mean(2) for c, x in made.items()]
        errors.append(torch.stack(missed).mean(0))
    last = torch.tensor([actions.shape[1] if end is None else end for end in ends or (None,) * n]) - 1
    index = torch.minimum(torch.arange(actions.shape[1]).expand(n, -1), last[:, None])
    every, error = torch.cat(doubts).gather(1, index), torch.cat(errors).gather(1, index)
    at_frames = [_rank_correlation(every[:, i], error[:, i]) for i in range(every.shape[1])]
    defined = [found for found in at_frames if found is not None]
    limit = float(every.amax(1).quantile(quantile))
    return DoubtCalibration(
        limit=max(limit, 1e-9),
        episodes=n,
        quantile=quantile,
        correlation=_rank_correlation(every.flatten(), error.flatten()),
        correlation_between=float(np.mean(defined)) if defined else None,
    )


def _rank_correlation(x: Float[Tensor, " n"], y: Float[Tensor, " n"]) -> float | None:
    """Spearman's; None where all of x or all of y are alike."""
    if len(x) < 2 or not (x != x[0]).any() or not (y != y[0]).any():
        return None
    return float(np.asarray(spearmanr(x.numpy(), y.numpy()))[0])
