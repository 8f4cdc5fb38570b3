"""What guides a trajectory: the gradient of a policy's log-density by the action (Policy-Guided Diffusion 2404.06356).

Any policy can guide. In this order: one that says its own score (`ScorePolicy`: diffusion policies), one with a density
(`StochasticPolicy`: Gaussian, tanh-Gaussian), and any other, which counts as a Gaussian around what it does, of one standard deviation
that is half the action range (the paper's choice for deterministic policies: unit variance where actions lie in [-1, 1]).
"""

import torch
from jaxtyping import Float
from torch import Tensor

from worldline.data.trajectories import low_dimensional
from worldline.errors import SpecMismatch
from worldline.types import Policy, ScorePolicy, StochasticPolicy, WorldSpec
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

    def score(observations: Float[Tensor, "n t o"], actions: Float[Tensor, "n t a"]) -> Float[Tensor, "n t a"]:
        seen, sent = low_dimensional(observations.flatten(0, 1)), actions.flatten(0, 1)[:, None]
        state = policy.reset(len(sent))
        if isinstance(policy, ScorePolicy):
            slope = policy.score(seen, state, sent)
        elif isinstance(policy, StochasticPolicy):
            with torch.enable_grad():
                at = sent.detach().requires_grad_()
                (slope,) = torch.autograd.grad(policy.log_prob(seen, state, at).sum(), at)
        else:
            chunk, _ = policy.act(seen, state, seeds=torch.zeros(len(sent), dtype=torch.long))
            low, high = torch.tensor(policy.spec.action.low), torch.tensor(policy.spec.action.high)
            slope = (chunk[:, :1].to(sent) - sent) / ((high - low) / 2).to(sent).square()
        return slope[:, 0].unflatten(0, observations.shape[:2])

    return score


def require_same_task(provided: WorldSpec, required: WorldSpec, *, between: str) -> None:
    """Raise `SpecMismatch` unless both see the same numbers and send the same actions; rates and names of places may differ."""
    lines = []
    if (got := provided.pose_names) != (want := required.pose_names):
        lines.append(f"  observation: required {len(want)} numbers {list(want)}, got {len(got)} {list(got)}")
    for name in ("names", "low", "high", "embodiment"):
        if (got := getattr(provided.action, name)) != (want := getattr(required.action, name)):
            lines.append(f"  action.{name}: required {want!r}, got {got!r}")
    if provided.cameras:
        lines.append(f"  cameras: required none, got {[camera.name for camera in provided.cameras]}")
    if lines:
        raise SpecMismatch(f"{between} do not fit:\n" + "\n".join(lines) + "\nUse parts made for the same task.")
