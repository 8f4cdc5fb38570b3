"""What traced sampling of every world model has in common: its steps, and their log-density."""

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from worldline.diffusion import linear_path
from worldline.diffusion.stochastic import Renoised, gaussian_log_prob, renoised_std
from worldline.errors import SpecMismatch
from worldline.types import Clip, Imagination, Trace


class TracedSampling:
    """What makes a world model a `TracedWorldModel`: `tracing`, a module with `require_traceable`, `sample_traced` and `trace_means` of it."""

    tracing: ClassVar[Any]

    def traced_chunk(self: Any) -> int:
        """Frames that are denoised together: a dream is traced in whole chunks of them."""
        return self.spec.chunk

    def require_traceable(self, steps: int, eta: float = 1.0) -> None:
        """Raises `SpecMismatch` if sampling by so many steps has no known log-probability, `ValueError` for an eta or levels out of range."""
        require_stochastic(steps, eta)
        self.tracing.require_traceable(self, steps)

    def sample_traced(
        self,
        seen: Clip,
        actions: Float[Tensor, "n f k a"],
        *,
        seeds: Int[Tensor, " n"],
        steps: int = 4,
        eta: float = 1.0,
    ) -> Trace:
        """The f frames that follow, by `steps` solver steps each, all but the last stochastic and kept. Row i is of its seed alone.

        Args:
            seen: real frames (raw latents "n t c h w", t >= 1) and the blocks between them, as `observe` takes them.
            eta: fresh noise of a step, above 0 and at most 1 (`diffusion.stochastic`).

        Raises as `require_traceable` does.
        """
        self.require_traceable(steps, eta)
        return self.tracing.sample_traced(self, seen, actions, seeds=seeds, steps=steps, eta=eta)

    def trace_means(self, trace: Trace) -> Float[Tensor, "s n f d"]:
        """Where each step of a trace would go on average by the weights as they are, with gradients."""
        return self.tracing.trace_means(self, trace)

    def log_prob(self, trace: Trace) -> Float[Tensor, " n"]:
        """Of a trace's steps with a density together, exactly, with gradients."""
        return step_log_probs(self.trace_means(trace), trace).sum((0, 2))

    def dreamt(self, trace: Trace) -> Imagination:
        """The frames that its steps led to."""
        return trace.context.imagination


def require_stochastic(steps: int, eta: float = 1.0) -> None:
    """Raise `SpecMismatch` for a sampler without a step that has a density, `ValueError` for fresh noise out of range."""
    if steps < 2:
        raise SpecMismatch(
            f"a sampler with stochastic steps is required: at least 2 solver steps, of which the last is deterministic, got {steps}"
        )
    if not 0 < eta <= 1:
        raise ValueError(f"eta above 0 and at most 1 required, got {eta}")


def trace_of(
    parts: Sequence[Renoised],
    levels: Sequence[float],
    *,
    eta: float,
    context: Any,
    join: Callable[[list[Tensor]], Float[Tensor, "n f d"]],
) -> Trace:
    """One path from those of its parts, frames or chunks, whose states `join` puts side by side."""
    steps = len(levels) - 1
    return Trace(
        std=torch.tensor([renoised_std(a, b, linear_path, eta=eta) for a, b in zip(levels[:-2], levels[1:-1])]),
        mean=torch.stack([join([part.mean[j] for part in parts]) for j in range(steps - 1)]),
        x=torch.stack([join([part.x[j] for part in parts]) for j in range(steps)]),
        level=torch.tensor(levels[:-1]),
        context=context,
    )


def step_log_probs(means: Float[Tensor, "s n f d"], trace: Trace) -> Float[Tensor, "s n f"]:
    """Log-density of every step of every frame, given where it would go on average."""
    spread = trace.std.tolist()
    return torch.stack([gaussian_log_prob(trace.x[j + 1], means[j], std) for j, std in enumerate(spread)])
