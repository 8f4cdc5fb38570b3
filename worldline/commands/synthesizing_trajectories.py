"""Verb `synthesize` with --trajectory-model: whole low-dimensional trajectories, near the data and near a policy, as a Minari dataset."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from worldline.commands.outputs import command_line
from worldline.commands.rollouts import weights_of
from worldline.commands.sampling import SolverFlags, load_trajectory_model
from worldline.data.minari import write_minari
from worldline.data.trajectories import IMAGINED_BY, Trajectories
from worldline.errors import PolicyError, WorldlineError
from worldline.eval import Report
from worldline.eval.plots import score_bars
from worldline.eval.trajectories import policy_log_likelihood
from worldline.policies import load_policy
from worldline.rl_in_imagination.guidance import policy_score
from worldline.types import Policy, StochasticPolicy
from worldline.worldmodels.trajectories import Guidance


@dataclass(frozen=True, slots=True, kw_only=True)
class SynthesizeTrajectories:
    """Sample whole low-dimensional trajectories by diffusion, moved towards what a policy would do, and write them as a Minari dataset.

    Every trajectory says which model, policy, guidance and seed it came from, and its score: the mean log-density of its actions under the
    policy. `worldline offline-rl --data REAL IMAGINED` learns from both.

    Example: worldline synthesize --trajectory-model runs/hopper-trajectories --policy runs/td3bc/seed-0 --out data/hopper-imagined
    """

    trajectory_model: Path
    """Made by `worldline train trajectory`."""
    out: Path
    """Folder for the dataset; its report is out/synthesis/report.html."""
    policy: str | None = None
    """The policy that trajectories are moved towards; none: as the data's behaviour."""
    trajectories: int = 1024
    guidance: Guidance = field(default_factory=Guidance)
    solver: SolverFlags = field(default_factory=SolverFlags)
    batch: int = 256
    seed: int = 0

    def __post_init__(self) -> None:
        if self.trajectories < 1 or self.batch < 1:
            raise ValueError(f"trajectories and batch of at least 1 required, got {self.trajectories} and {self.batch}")


def run_synthesize_trajectories(config: SynthesizeTrajectories, *, progress: bool = True) -> Path:
    """Sample, score, write; returns the dataset's folder. Raises `SpecMismatch` if model and policy are of different tasks."""
    if config.out.exists():
        raise WorldlineError(
            f"--out {config.out}: a new folder is required, this exists. Choose another, or delete it."
        )
    model = load_trajectory_model(config.trajectory_model, config.solver)
    policy = None if config.policy is None else load_policy(config.policy, spec=model.spec)
    score = None if policy is None else policy_score(policy, model.spec)
    seeds = config.seed * 1_048_576 + torch.arange(config.trajectories)
    about = {IMAGINED_BY: weights_of(config.trajectory_model), "policy": config.policy or "none"}
    if policy is not None:
        about |= {"coefficient": f"{config.guidance.coefficient:g}", "guided_on": config.guidance.on}
    guidance = config.guidance if policy is not None else None
    options: dict[str, Any] = {"batch": config.batch, "progress": progress}
    made = model.generate(seeds, guidance=guidance, score=score, provenance=about, **options)
    scores = trajectory_scores(made, policy)
    if scores is not None:
        told = tuple({**p, "score": f"{float(s):.4f}"} for p, s in zip(made.provenance, scores))
        made = replace(made, provenance=told)
    write_minari(made, config.out, description=f"imagined by {config.trajectory_model}")
    _report(config, made, scores, about)
    return config.out


def trajectory_scores(made: Trajectories, policy: Policy | None) -> Tensor | None:
    """Mean log-density of each trajectory's actions "e"; None without a policy that has one."""
    if policy is None or not isinstance(policy, StochasticPolicy):
        return None
    try:
        each = policy_log_likelihood(policy, made)
    except PolicyError:  # a diffusion policy has a score, but no density
        return None
    total = torch.zeros(len(made)).index_add(0, made.episode, each.float())
    return total / made.lengths


def _report(config: SynthesizeTrajectories, made: Trajectories, scores: Tensor | None, about: dict[str, Any]) -> None:
    report = Report(f"{len(made)} imagined trajectories", command=command_line("synthesize", config), provenance=about)
    ended = int(made.terminated.sum())
    report.text(
        f"**{len(made)}** trajectories of up to {int(made.lengths.max())} transitions, {made.steps:,} in all; {ended} of them end. Mean reward "
        f"of a step {made.rewards.mean():.3f}."
    )
    results: dict[str, Any] = {"trajectories": len(made), "steps": made.steps, "ended": ended, **about}
    if scores is not None:
        report.plot("Scores", score_bars(scores.tolist(), xlabel="mean log-density under the policy"))
        results["score"] = {"mean": float(scores.mean()), "least": float(scores.min()), "greatest": float(scores.max())}
    else:
        report.warning("No policy with a density was given: the trajectories have no score.")
    report.write(config.out / "synthesis", results)
