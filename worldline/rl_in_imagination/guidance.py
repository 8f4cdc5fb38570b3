"""What guides a trajectory, or a unified model's action blocks: the gradient of a policy's log-density by the action (Policy-Guided
Diffusion 2404.06356).

Any policy can guide. In this order: one that says its own score (`ScorePolicy`: diffusion policies), one with a density
(`StochasticPolicy`: Gaussian, tanh-Gaussian), and any other, which counts as a Gaussian around what it does, of one standard deviation
that is half the action range (the paper's choice for deterministic policies: unit variance where actions lie in [-1, 1]).
"""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from worldline.data.trajectories import low_dimensional, unnamed
from worldline.errors import SpecMismatch
from worldline.sim.environments import differ
from worldline.types import Observation, Policy, ScorePolicy, StochasticPolicy, WorldSpec
from worldline.worldmodels.trajectories import ScoreFunction


def policy_score(policy: Policy, spec: WorldSpec) -> ScoreFunction:
    """The policy's score at every step of trajectories, as `TrajectoryDiffusion.sample` takes it.

    Args:
        spec: of the trajectories. Raises `SpecMismatch` if the policy sees or sends something else, or decides several actions at once.
    """
    require_same_task(policy.spec, spec, between="policy and trajectories")
    if (chunk := getattr(policy, "chunk_length", 1)) != 1:
        raise SpecMismatch(
            f"a policy that decides one action at a time is required to guide steps of a trajectory, got chunks of {chunk}. "
            "Train one with a chunk of 1."
        )

    slope = chunk_score(policy)

    def score(observations: Float[Tensor, "n t o"], actions: Float[Tensor, "n t a"]) -> Float[Tensor, "n t a"]:
        seen, sent = (x.flatten(0, 1).cpu() for x in (observations, actions))  # a policy need not be where the model is
        return slope(low_dimensional(seen), sent[:, None])[:, 0].unflatten(0, observations.shape[:2]).to(actions)

    return score


def chunk_score(policy: Policy) -> Callable[[Observation, Tensor], Tensor]:
    """(observation of n rows, chunks "n m a") to the gradient of their log-density, per physical unit; the policy remembers nothing."""
    low, high = torch.tensor(policy.spec.action.low), torch.tensor(policy.spec.action.high)

    def score(observation: Observation, chunk: Float[Tensor, "n m a"]) -> Float[Tensor, "n m a"]:
        state = policy.reset(len(chunk))
        if isinstance(policy, ScorePolicy):
            return policy.score(observation, state, chunk)
        if isinstance(policy, StochasticPolicy):
            with torch.enable_grad():
                at = chunk.detach().requires_grad_()
                return torch.autograd.grad(policy.log_prob(observation, state, at).sum(), at)[0]
        own, _ = policy.act(observation, state, seeds=torch.zeros(len(chunk), dtype=torch.long))
        return (own[:, : chunk.shape[1]].to(chunk) - chunk) / ((high - low) / 2).to(chunk).square()

    return score


def block_score(policy: Policy, observation: Observation) -> Callable[[Tensor], Tensor]:
    """The policy's score of imagined action blocks "n f k a" that follow what is seen now: of the chunk that it would decide, 0 beyond.

    Raises `SpecMismatch` if the chunk is longer than the blocks.
    """
    slope = chunk_score(policy)

    def score(blocks: Float[Tensor, "n f k a"]) -> Float[Tensor, "n f k a"]:
        flat, m = blocks.flatten(1, 2), getattr(policy, "chunk_length", 1)
        if m > flat.shape[1]:
            raise SpecMismatch(
                f"a policy whose chunk fits the imagined blocks is required to guide them: {flat.shape[1]} actions, got a chunk of {m}. "
                "Use a model with a longer --model.horizon, or a policy with a shorter chunk."
            )
        found = torch.zeros_like(flat)
        found[:, :m] = slope(observation, flat[:, :m].cpu()).to(flat)
        return found.view_as(blocks)

    return score


def require_same_task(provided: WorldSpec, required: WorldSpec, *, between: str) -> None:
    """Raise `SpecMismatch` unless both see the same numbers and send the same actions; rates and names of places may differ. Where one
    learned from a dataset of others, whose numbers have no names, they must be as many, and not of an environment known to be another."""
    lines, alike = [], unnamed(provided) == unnamed(required)
    got, want = provided.pose_names, required.pose_names
    if got != want and (alike or len(got) != len(want)):
        lines.append(f"  observation: required {len(want)} numbers {list(want)}, got {len(got)} {list(got)}")
    for name in ("names", "low", "high", "embodiment"):
        got, want = getattr(provided.action, name), getattr(required.action, name)
        if got != want and (alike or name != "embodiment" or differ(got, want)):
            lines.append(f"  action.{name}: required {want!r}, got {got!r}")
    if provided.cameras:
        lines.append(f"  cameras: required none, got {[camera.name for camera in provided.cameras]}")
    if lines:
        raise SpecMismatch(f"{between} do not fit:\n" + "\n".join(lines) + "\nUse parts made for the same task.")
