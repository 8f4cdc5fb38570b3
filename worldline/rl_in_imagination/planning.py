"""Best of N: a policy's chunks are tried in the dream, and the one whose outcome a scorer likes best is sent.

Every candidate is imagined with the same noise (a row's own), from the same observation: what differs is what the actions do. Candidate 0 is
what the policy would do alone, and wins ties; so with one candidate, or a scorer that cannot tell, this is the policy itself.
"""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from worldline.diffusion.noise import mix, row_noise
from worldline.errors import PolicyError
from worldline.executor import ChunkExecutor, index_observation
from worldline.rl_in_imagination.dream import Dream
from worldline.types import Observation, Policy, RowState, Scorer, require_match


class BestOfN:
    """A `Policy` that thinks before it acts.

    Args:
        policy: proposes. It must draw (a diffusion or video-action policy, a Gaussian one that samples), or `spread` must be given.
        dream, scorer: where chunks are tried, and what is wanted: the success probability of the last imagined frame.
        candidates: chunks tried at each decision.
        beyond: frames imagined after the chunk, in which the policy goes on alone: outcomes are rarely seen within a chunk.
        spread: standard deviation of Gaussian noise added to all candidates but the first, in half-ranges of the action.

    Raises `SpecMismatch` if policy, dream and scorer are not about the same world.
    """

    def __init__(
        self,
        policy: Policy,
        dream: Dream,
        scorer: Scorer,
        *,
        candidates: int = 8,
        beyond: int = 0,
        spread: float = 0.0,
    ) -> None:
        if candidates < 1 or beyond < 0 or spread < 0:
            raise PolicyError(
                f"candidates of at least 1, beyond and spread of at least 0 required, got {candidates}, {beyond} and {spread}"
            )
        require_match(dream.spec, policy.spec, between="world model and policy")
        require_match(
            dream.spec, scorer.spec, between="world model and scorer", only=("cameras", "fps", "control_steps")
        )
        self.policy, self.dream, self.scorer, self.spec = policy, dream, scorer, policy.spec
        self.candidates, self.beyond, self.spread = candidates, beyond, spread

    def reset(self, n: int) -> RowState:
        return self.policy.reset(n)

    @torch.no_grad()
    def act(
        self, observation: Observation, state: Any, *, seeds: Int[Tensor, " n"]
    ) -> tuple[Float[Tensor, "n m a"], RowState]:
        n, count = len(observation), self.candidates
        rows = torch.arange(n).repeat(count)  # candidate by candidate
        which = torch.arange(count).repeat_interleave(n)
        own = torch.where(which == 0, seeds[rows], mix(seeds[rows] ^ (which * 7_919 + 1)) & 0x7FFF_FFFF)
        chunks, held = self.policy.act(index_observation(observation, rows), state.index(rows), seeds=own)
        if self.spread:
            half = (torch.tensor(self.spec.action.high) - torch.tensor(self.spec.action.low)) / 2
            noise = row_noise(own, 0, 0, tuple(chunks.shape[1:]), stream=3) * half * self.spread
            noise = noise * (which > 0)[:, None, None]
            chunks = (chunks + noise).clamp(torch.tensor(self.spec.action.low), torch.tensor(self.spec.action.high))
        liked = self._outcomes(index_observation(observation, rows), held, chunks, seeds[rows]).unflatten(0, (count, n))
        best = liked.max(0)
        chosen = torch.where(best.values > liked[0], best.indices, 0) * n + torch.arange(n)
        return chunks[chosen], held.index(chosen)

    def _outcomes(self, observation: Observation, policy: Any, chunks: Tensor, seeds: Tensor) -> Float[Tensor, " m"]:
        """Success probability at the end of every candidate. `seeds` are alike for candidates of one row."""
        k = self.spec.control_steps
        state, scoring = self.dream.start(observation, seeds=seeds), self.scorer.reset(len(seeds))
        scoring, score = self.scorer.step(scoring, state.observation, None)
        for block in chunks.split(k, 1):
            if block.shape[1] < k:
                break  # the executor sends whole blocks
            state = self.dream.step(state, block)
            scoring, score = self.scorer.step(scoring, state.observation, block)
        if self.beyond:
            executor = ChunkExecutor(self.policy)
            acting = executor.resumed(policy)
            for _ in range(self.beyond):
                block, acting = executor.block(state.observation, acting, seeds=mix(seeds) & 0x7FFF_FFFF)
                state = self.dream.step(state, block)
                scoring, score = self.scorer.step(scoring, state.observation, block)
        return score.success.cpu()
