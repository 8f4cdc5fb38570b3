"""Verb `offline-rl`: agents of several seeds on recorded data, on trajectories imagined for the policy being trained, or on both."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from worldline.checkpoint import to_json
from worldline.commands.outputs import command_line
from worldline.commands.rollouts import weights_of
from worldline.commands.sampling import SolverFlags, load_trajectory_model
from worldline.data.trajectories import unnamed
from worldline.errors import SpecMismatch
from worldline.eval import Report
from worldline.eval.plots import curve_bands
from worldline.policies.states import StatePolicies
from worldline.rl_in_imagination.dynamics import DynamicsEnsemble
from worldline.rl_in_imagination.offline import (
    AgentConfig,
    OfflineConfig,
    OfflineRun,
    StateIQLConfig,
    TD3BCConfig,
    reach_aware,
    train_offline,
)
from worldline.rl_in_imagination.offline.run import Evaluate
from worldline.rl_in_imagination.offline.synthesis import Synthesise, by_diffusion, by_rollout
from worldline.sim.control import ControlTask, collect_trajectories, make_control
from worldline.sim.environments import differ
from worldline.trainers.inputs import claim_output
from worldline.trainers.trajectory import open_trajectories
from worldline.types import WorldSpec
from worldline.worldmodels.trajectories import Guidance

PART = "set of policies"  # whose folder it is
STARTS = 1_500_000_000  # seeds of the starts that judge, far from any that data is recorded with


@dataclass(frozen=True, slots=True, kw_only=True)
class OfflineRL:
    """Learn policies from a recorded low-dimensional dataset by TD3+BC or IQL, eight seeds at once.

    With --trajectory-model most of each batch comes from trajectories that diffusion makes for the policy as it is, anew every so often
    (policy-guided diffusion; --guidance.coefficient 0: unguided); with --dynamics from rollouts in learned dynamics.

    Example: worldline offline-rl --data data/hopper-medium --trajectory-model runs/hopper-trajectories --task hopper --out runs/guided
    """

    data: tuple[str, ...]
    """Minari datasets: folders, or ids that Minari has on this machine. Vectors only."""
    out: Path
    """Folder: a policy a seed, and report.html. A run that was interrupted goes on there, under the same --task and --episodes."""
    agent: Literal["td3bc", "iql"] = "td3bc"
    """td3bc: a deterministic policy kept near the data's actions. iql: implicit Q-learning, a stochastic one."""
    trajectory_model: Path | None = None
    """Made by `worldline train trajectory`."""
    dynamics: Path | None = None
    """Made by `worldline train dynamics`."""
    rollout_steps: int = 32
    """Steps of a rollout in --dynamics; that many less one become transitions."""
    guidance: Guidance = field(default_factory=Guidance)
    solver: SolverFlags = field(default_factory=SolverFlags)
    trajectories: int = 1024
    """Imagined for each seed, each time."""
    seeds: int = 8
    """Trained at once, one policy each."""
    first_seed: int = 0
    """Of them; the others count on from it."""
    td3bc: TD3BCConfig = field(default_factory=TD3BCConfig)
    iql: StateIQLConfig = field(default_factory=StateIQLConfig)
    reach_aware: bool = False
    """TD3+BC with ten critics, of which the least counts: imagined trajectories that are cut off bootstrap from states that no critic was
    ever taught (Reach-Aware Value Learning)."""
    train: OfflineConfig = field(default_factory=lambda: OfflineConfig(updates=50_000))
    task: str | None = None
    """Simulator that judges the policies: pointmaze/umaze, pointmaze/medium, hopper, halfcheetah, or gym/ID of any Gymnasium environment of
    vectors, by its own rewards. Datasets of others, whose numbers have no names, take the task's."""
    episodes: int = 10
    """In the simulator, a seed and evaluation."""

    def __post_init__(self) -> None:
        if self.trajectory_model is not None and self.dynamics is not None:
            raise ValueError("--trajectory-model or --dynamics required, or neither; got both")
        if self.rollout_steps < 2:
            raise ValueError(f"rollout_steps of at least 2 required, got {self.rollout_steps}")
        if self.seeds < 1 or self.trajectories < 1 or self.episodes < 1:
            raise ValueError(
                f"seeds, trajectories and episodes of at least 1 required, got {self.seeds}, {self.trajectories} and {self.episodes}"
            )
        if self.trajectory_model is not None or self.dynamics is not None:
            self.train.check_synthetic()
        if self.reach_aware and self.agent != "td3bc":
            raise ValueError(
                "--reach-aware is of TD3+BC (--agent td3bc); IQL asks its critics of recorded actions only"
            )
        chosen, usual = self.td3bc, TD3BCConfig()
        for name in ("critics", "diversity", "maximise"):
            if self.reach_aware and getattr(chosen, name) != getattr(usual, name):
                raise ValueError(
                    f"--reach-aware sets --td3bc.{name} itself, got {getattr(chosen, name)}: leave one of the two out (the least of the "
                    "critics is what --td3bc.maximise least follows)"
                )


def run_offline_rl(config: OfflineRL, *, progress: bool = True) -> Path:
    """Train, judge, report; returns the folder. Raises `SpecMismatch` where data, models and task are of different tasks."""
    real = open_trajectories(config.data)
    task = make_control(config.task) if config.task else None
    if task is not None:
        require_task(real.spec, task)
        real = replace(real, spec=task.spec) if unnamed(real.spec) else real
    seeds = range(config.first_seed, config.first_seed + config.seeds)
    synthesise, made_from = synthesiser(config, real.observations, seeds)
    claim_output(config.out, PART, {}, identity=())  # what must be the same when it goes on `train_offline` knows
    found = train_offline(
        real,
        agent_config(config),
        config.train,
        seeds=seeds,
        synthesise=synthesise,
        evaluate=None if task is None else judge(task, config.episodes),
        out=config.out,
        provenance=judged_by(config) | made_from,
        device="cuda" if torch.cuda.is_available() else "cpu",
        progress=progress,
    )
    _report(config, found, made_from)
    return config.out


def require_task(spec: WorldSpec, task: ControlTask) -> None:
    """Raise `SpecMismatch` unless data of this spec can be the task's: as many numbers, of the same names (where both have some), actions of
    the same range, and no other environment that they say they are of."""
    lines, got, want = [], spec.action, task.spec.action
    if differ(got.embodiment, want.embodiment):
        lines.append(f"  environment: required {want.embodiment!r}, got {got.embodiment!r}")
    names, unsaid = task.spec.pose_names, unnamed(spec) or unnamed(task.spec)
    if len(spec.pose_names) != len(names) or (spec.pose_names != names and not unsaid):
        lines.append(
            f"  observation: required {len(names)} numbers {list(names)}, got {len(spec.pose_names)} {list(spec.pose_names)}"
        )
    lines += [
        f"  action.{name}: required {list(ours)}, got {list(theirs)}"
        for name in ("low", "high")
        if len(ours := getattr(want, name)) != len(theirs := getattr(got, name)) or not np.allclose(ours, theirs)
    ]
    if lines:
        raise SpecMismatch(
            f"--task {task.name}: data of this task are required:\n"
            + "\n".join(lines)
            + "\nName the task that they were recorded in."
        )


def judged_by(config: OfflineRL) -> dict[str, Any]:
    """Who says what the policies are worth: returns of other tasks or fewer episodes are not the same curve's."""
    return {"task": config.task, "episodes": config.episodes if config.task else None}


def agent_config(config: OfflineRL) -> AgentConfig:
    """The agent asked for."""
    if config.agent == "iql":
        return config.iql
    return reach_aware(config.td3bc) if config.reach_aware else config.td3bc


def synthesiser(config: OfflineRL, starts: Tensor, seeds: range) -> tuple[Synthesise | None, dict[str, Any]]:
    """What makes synthetic data, and what is to be remembered of it."""
    if config.trajectory_model is not None:
        model = load_trajectory_model(config.trajectory_model, config.solver)
        guidance = config.guidance if config.guidance.coefficient > 0 else None
        made_from = {
            "trajectory_model": weights_of(config.trajectory_model),
            "guidance": to_json(config.guidance),
            "solver": to_json(model.config.solver),
            "trajectories": config.trajectories,
        }
        return by_diffusion(model, seeds=seeds, trajectories=config.trajectories, guidance=guidance), made_from
    if config.dynamics is not None:
        ensemble = DynamicsEnsemble.from_pretrained(config.dynamics)
        steps = config.rollout_steps
        made_from = {"dynamics": weights_of(config.dynamics), "trajectories": config.trajectories, "steps": steps}
        made = by_rollout(ensemble, starts, seeds=seeds, trajectories=config.trajectories, steps=steps)
        return made, made_from
    return None, {}


def judge(task: ControlTask, episodes: int, *, starts: int = STARTS) -> Evaluate:
    """Mean return of each member in the simulator; all from the same starts, of seeds from `starts` on."""

    def evaluate(policies: StatePolicies, update: int) -> Mapping[str, Tensor]:
        def act(seen: Tensor) -> Tensor:
            own = seen.to(policies.mean.device).unflatten(0, (policies.members, episodes))
            return policies.act(own).flatten(0, 1).cpu()

        seeds = [starts + i for i in range(episodes)] * policies.members
        found = collect_trajectories(task, act, episodes=len(seeds), seed=seeds)
        return {"return": found.returns.unflatten(0, (policies.members, episodes)).mean(1)}

    return evaluate


def _report(config: OfflineRL, found: OfflineRun, made_from: Mapping[str, Any]) -> None:
    judged = found.history.get("eval/return", [])
    results = {
        "seeds": list(found.seeds),
        "made_from": dict(made_from),
        "returns": [{"update": update, "by_seed": values.tolist()} for update, values in judged],
        "history": {
            name: [[update, values.tolist()] for update, values in points] for name, points in found.history.items()
        },
    }
    report = Report(
        f"Offline RL on {', '.join(config.data)}",
        command=command_line("offline-rl", config),
        provenance={**{name: _said(value) for name, value in made_from.items()}, "agent": config.agent},
    )
    if judged:
        last = judged[-1][1]
        report.text(
            f"After {judged[-1][0]:,} updates the policies of {len(last)} seeds earn **{last.mean():.1f}** on average (from {last.min():.1f} to "
            f"{last.max():.1f}), {config.episodes} episodes each in {config.task}, from the same starts."
        )
        report.plot(
            "Return by update",
            curve_bands({"return": _band(judged)}, ylabel="return", xlabel="update"),
            "mean of seeds, least and greatest",
        )
        report.table("Policies", ["seed", "return"], [[seed, float(value)] for seed, value in zip(found.seeds, last)])
    else:
        report.warning(
            "Nobody judged these policies: --task SIMULATOR does. Values that critics expect say little of true returns."
        )
    titles = {"q": "Value of the data's actions", "policy_q": "Value of the policy's", "q_loss": "Error of the critics"}
    for name, title in titles.items():
        if points := found.history.get(f"train/{name}"):
            report.plot(
                title,
                curve_bands({name: _band(points)}, ylabel=name, xlabel="update"),
                "mean of seeds, least and greatest",
            )
    report.write(config.out, results)


def _said(value: Any) -> Any:
    """Settings as a reader has them, not as Python does."""
    return ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, dict) else value


def _band(points: list[tuple[int, Tensor]]) -> dict[str, list[Any]]:
    return {
        "frame": [update for update, _ in points],
        "mean": [float(v.mean()) for _, v in points],
        "low": [float(v.min()) for _, v in points],
        "high": [float(v.max()) for _, v in points],
    }
