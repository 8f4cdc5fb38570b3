"""Heads of policies: from features to a normalised chunk of actions, flattened.

- Gaussian: log-likelihood, the standard deviation capped at one normalised unit (World4RL 2509.19080).
- Discretised: every action dimension a distribution over bins, learned from two-hot targets, so that its mean is the Gaussian's.
- Diffusion (Chi et al. 2303.04137): the chunk is denoised along the linear path by a residual network.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn
from torch.distributions import Categorical, Independent, Normal

from worldline.diffusion import LevelDistribution, add_noise, linear_path, row_noise, sample_euler, solver_levels
from worldline.policies.encoder import mlp
from worldline.tokenizers.actions import TwoHot

LEAST_LOG_STD = -3.0  # of normalised units; the greatest is 0


def draw(distribution: Independent, seeds: Int[Tensor, " n"]) -> Shaped[Tensor, "n d"]:
    """A sample of Gaussian or categorical choices by the rows' own seeds: a row's does not depend on its neighbours."""
    base = distribution.base_dist
    if isinstance(base, Categorical):
        logits = base.logits
        uniform = 0.5 * (1 + torch.erf(row_noise(seeds, 0, 0, tuple(logits.shape[1:])) / 2**0.5))
        gumbel = -(-uniform.clamp(1e-7, 1 - 1e-7).log()).log()
        return (logits + gumbel.to(logits)).argmax(-1)
    assert isinstance(base, Normal)
    return base.mean + base.stddev * row_noise(seeds, 0, 0, tuple(base.mean.shape[1:])).to(base.mean)


class GaussianHead(nn.Module):
    """Mean and standard deviation of every action of the chunk, in normalised units."""

    def __init__(self, features: int, hidden: int, size: int, *, sample: bool = False) -> None:
        super().__init__()
        self.sample = sample
        self.net = mlp(features, hidden, size)
        self.log_std = nn.Parameter(torch.full((size,), -1.0))

    def distribution(self, features: Float[Tensor, "n f"]) -> Independent:
        return Independent(Normal(self.net(features), self.log_std.clamp(LEAST_LOG_STD, 0).exp()), 1)

    def meant(self, choice: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
        """The normalised chunk that a choice stands for: itself."""
        return choice

    def losses(
        self, features: Float[Tensor, "n f"], chunk: Float[Tensor, "n d"], generator: torch.Generator | None
    ) -> Float[Tensor, " n"]:
        """Negative log-density of each row's normalised chunk, a number of it."""
        return -self.distribution(features).log_prob(chunk) / chunk.shape[1]

    def act(self, features: Tensor, seeds: Tensor) -> Tensor:
        chosen = self.distribution(features)
        return draw(chosen, seeds) if self.sample else chosen.mean


class DiscreteHead(nn.Module):
    """Probabilities of the bins of every action of the chunk."""

    def __init__(self, features: int, hidden: int, size: int, *, code: TwoHot, sample: bool = False) -> None:
        super().__init__()
        self.code, self.sample = code, sample
        self.net = mlp(features, hidden, size * code.bins)

    def distribution(self, features: Float[Tensor, "n f"]) -> Independent:
        logits = self.net(features).unflatten(1, (-1, self.code.bins))
        return Independent(Categorical(logits=logits), 1)

    def meant(self, choice: Int[Tensor, "n d"]) -> Float[Tensor, "n d"]:
        """The normalised chunk that bins stand for: their values."""
        return self.code.values.to(choice.device)[choice]

    def losses(
        self, features: Float[Tensor, "n f"], chunk: Float[Tensor, "n d"], generator: torch.Generator | None
    ) -> Float[Tensor, " n"]:
        """Cross entropy of each row's two-hot codes, a number of the chunk."""
        logits = self.net(features).unflatten(1, (-1, self.code.bins))
        each = F.cross_entropy(logits.flatten(0, 1), self.code.encode(chunk).flatten(0, 1), reduction="none")
        return each.unflatten(0, (len(chunk), -1)).mean(1)

    def act(self, features: Tensor, seeds: Tensor) -> Tensor:
        chosen = self.distribution(features)
        if self.sample:
            return self.meant(draw(chosen, seeds))
        return self.code.decode(chosen.base_dist.probs)


class DiffusionHead(nn.Module):
    """Denoises the chunk given the features; predicts the clean chunk."""

    levels = LevelDistribution(pure=0.2, low=0.02)

    def __init__(self, features: int, hidden: int, size: int, *, steps: int) -> None:
        super().__init__()
        self.size, self.steps = size, steps
        self.enter = nn.Linear(features + size + 1, hidden)
        self.blocks = nn.ModuleList(mlp(hidden + size + 1, hidden, hidden, 1) for _ in range(3))
        self.leave = nn.Linear(hidden, size)

    def predict(self, features: Tensor, x: Tensor, level: Tensor) -> Tensor:
        given = torch.cat([x, 2 * level[:, None] - 1], dim=1)
        h = self.enter(torch.cat([features, given], dim=1))
        for block in self.blocks:
            h = h + block(torch.cat([F.silu(h), given], dim=1))
        return self.leave(F.silu(h))

    def losses(
        self, features: Float[Tensor, "n f"], chunk: Float[Tensor, "n d"], generator: torch.Generator | None
    ) -> Float[Tensor, " n"]:
        """Weighted squared error of each row's denoised chunk, at a level drawn."""
        level = self.levels.sample((len(chunk),), generator).to(chunk)
        noise = torch.randn(chunk.shape, generator=generator).to(chunk)
        clean = self.predict(features, add_noise(linear_path, chunk, noise, level), level)
        weight = (1 / level**2).clamp(max=10.0)[:, None]
        return (weight * (clean - chunk).square()).mean(1)

    def act(self, features: Tensor, seeds: Tensor) -> Tensor:
        return self.denoise(features, row_noise(seeds, 0, 0, (self.size,)).to(features))

    def denoise(self, features: Float[Tensor, "n f"], start: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
        """The chunk that noise leads to: the solver adds none of its own, so the noise decides it."""
        return sample_euler(
            lambda x, level: self.predict(features, x, level), start, solver_levels(self.steps), linear_path
        )
