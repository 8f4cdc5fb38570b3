"""Imagined episodes side by side: where they start, when they end, and by which rule; torch all through.

What `ImaginedVectorEnv` shows to Gymnasium and what refinement collects from. A row's starts and noise come from its own
generator, so what one row does never depends on another. Nothing begins by itself: rows that ended are begun again by `begin`.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from worldline.executor import index_observation
from worldline.rl_in_imagination.doubt import Doubt
from worldline.rl_in_imagination.dream import Dream, DreamState
from worldline.types import Observation, Score, Scorer, require_match


@dataclass(frozen=True, slots=True, kw_only=True)
class Ends:
    """Which rows' episodes are over. Several may be true."""

    terminated: Bool[Tensor, " n"]  # success was seen
    truncated: Bool[Tensor, " n"]  # the horizon was reached
    left: Bool[Tensor, " n"]  # the dream left what the world model knows: what it shows from here on is worth nothing


class ImaginedEpisodes:
    """`rows` episodes in one dream.

    Args:
        dream, scorer: what makes the frames and what judges them.
        starts: real first observations; every episode begins at one of them, drawn by its row.
        horizon: frames an episode may have after the first.
        threshold, persist: success is a probability above `threshold` for `persist` frames in a row. By default the
            scorer's own (`scorer.config`), else 0.5 and 1.
        doubt: ends episodes that doubt more than its limit, at the cost of two more denoisings of every frame.

    Raises `SpecMismatch` if the scorer wants a camera that the dream does not make, or another rate.
    """

    def __init__(
        self,
        dream: Dream,
        scorer: Scorer,
        starts: Observation,
        *,
        rows: int,
        horizon: int,
        threshold: float | None = None,
        persist: int | None = None,
        doubt: Doubt | None = None,
    ) -> None:
        if rows < 1 or horizon < 1 or not len(starts):
            raise ValueError(f"rows, horizon and starts must be at least 1, got {rows}, {horizon} and {len(starts)}")
        require_match(
            dream.spec, scorer.spec, between="world model and scorer", only=("cameras", "fps", "control_steps")
        )
        own = getattr(scorer, "config", None)
        self.threshold = getattr(own, "threshold", 0.5) if threshold is None else threshold
        self.persist = getattr(own, "persist", 1) if persist is None else persist
        self.dream, self.scorer, self.starts, self.rows, self.horizon = dream, scorer, starts, rows, horizon
        self.doubt = doubt
        self.generators = [np.random.default_rng() for _ in range(rows)]
        self.state: DreamState | None = None
        self._scoring: Any = None
        self._elapsed = torch.zeros(rows, dtype=torch.long)
        self._held = torch.zeros(rows, dtype=torch.long)  # frames in a row above the threshold

    def seed(self, row: int, seed: int) -> None:
        """Decides the row's starts and noise from its next episode on."""
        self.generators[row] = np.random.default_rng(seed)

    @property
    def observation(self) -> Observation:
        """What the rows see now."""
        assert self.state is not None, "begin() first"
        return self.state.observation

    def begin(self, mask: Bool[Tensor, " n"], *, starts: Int[Tensor, " n"] | None = None) -> Score:
        """New episodes where `mask`; the score of the first frames, there and (anything) elsewhere.

        `starts`: which first observation each row begins at, instead of one drawn.
        """
        rows = mask.nonzero().flatten()
        drawn = [self.generators[row].integers((len(self.starts), 1 << 62)) for row in rows.tolist()]
        where = torch.tensor([d[0] for d in drawn]) if starts is None else starts[rows]
        observation = index_observation(self.starts, where)
        fresh = self.dream.start(observation, seeds=torch.tensor([d[1] for d in drawn]))
        scoring, score = self.scorer.step(self.scorer.reset(len(rows)), observation, None)
        spread = (mask.long().cumsum(0) - 1).clamp(min=0)  # row of `fresh` for each row
        if self.state is None:
            assert mask.all(), "the first episodes are of all rows"
            self.state, self._scoring = fresh, scoring
        else:
            self.state = self.state.where(mask, fresh.index(spread))
            self._scoring = self._scoring.where(mask, scoring.index(spread))
        score = Score(reward=score.reward[spread].cpu(), success=score.success[spread].cpu())
        self._elapsed[mask] = 0
        self._held = torch.where(mask, (score.success > self.threshold).long(), self._held)
        return score

    def advance(self, blocks: Float[Tensor, "n k a"]) -> tuple[Score, Ends]:
        """One frame on in every row."""
        assert self.state is not None, "begin() first"
        left = torch.zeros(self.rows, dtype=torch.bool)
        if self.doubt is not None:
            with self.dream.timer("doubt"):
                left = self.doubt.exceeded(self.state, blocks)
        self.state = self.dream.step(self.state, blocks)
        with self.dream.timer("scorer"):
            self._scoring, score = self.scorer.step(self._scoring, self.state.observation, blocks)
        score = Score(reward=score.reward.cpu(), success=score.success.cpu())
        self._elapsed = self._elapsed + 1
        self._held = torch.where(score.success > self.threshold, self._held + 1, 0)
        terminated = (self._held >= self.persist) & ~left
        return score, Ends(terminated=terminated, truncated=self._elapsed >= self.horizon, left=left)
