"""Makes the offline RL tables of docs/results.md: policy-guided diffusion beside unguided diffusion, a dynamics ensemble and real data alone.

    python scripts/make_offline_data.py --out offline-data
    python scripts/make_offline_rl.py --data offline-data --out results-offline-rl

For every task a trajectory model and a dynamics ensemble learn from the recorded data. Then

- against the guidance coefficient: how likely the generated actions are under the policy that they were made for, and how far generated steps
  are from the simulator's one step; beside rollouts of the same policy in the ensemble, by how many steps they have gone (a plot and a table);
- returns of TD3+BC, and of IQL on the first task, on real data, and on mostly synthetic data of each kind, made anew from the policies as
  they are. The coefficient is chosen on the first task, from starts of its own, and frozen for the others;
- the interquartile mean over tasks and seeds, and guided less real and less unguided, with a bootstrap stratified by task.

Everything is kept in --out; run the same command again after an interruption. Prints Markdown, and writes it to OUT/tables.md and the plot to
OUT/guidance.png. What takes hours here is deepened on a bigger machine with the same command and more --sets, --seeds, --updates or --jobs.
"""

import json
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from matplotlib.figure import Figure
from result_tables import row, table
from stages import kept, together, train

from worldline.commands.offline_rl import OfflineRL, run_offline_rl
from worldline.commands.rollouts import weights_of
from worldline.commands.sampling import SolverFlags
from worldline.data.trajectories import Trajectories
from worldline.eval.trajectories import (
    Values,
    interquartile_mean,
    iqm_difference,
    normalised,
    policy_log_likelihood,
    pooled_interval,
    step_errors,
)
from worldline.policies.states import StatePolicy
from worldline.rl_in_imagination.dynamics import DynamicsEnsemble
from worldline.rl_in_imagination.guidance import policy_score
from worldline.rl_in_imagination.offline import OfflineConfig, StateIQLConfig, TD3BCConfig
from worldline.sim.control import ControlTask, evaluate_returns, make_control
from worldline.sim.waypoints import WaypointPilot
from worldline.trainers import dynamics, trajectory
from worldline.trainers.trajectory import open_trajectories
from worldline.worldmodels.trajectories import Guidance, TrajectoryConfig, TrajectoryDiffusion, TrajectorySolver

ARMS = ("real", "unguided", "guided", "autoregressive")
EXPERT = {"hopper": 3234.3, "halfcheetah": 12135.0}  # what D4RL calls 100
CLIPPED = {"hopper": 10.0}  # observations so large do not tell the simulator's state
CHOOSING, JUDGING, REFERENCE = 1_600_000_000, 1_500_000_000, 1_000_000_000  # seeds of starts


@dataclass(frozen=True, slots=True, kw_only=True)
class MakeOfflineRL:
    """Train, sample, judge, print the tables."""

    data: Path
    """Folder that scripts/make_offline_data.py filled."""
    out: Path
    sets: tuple[str, ...] = ("pointmaze-umaze-wander", "hopper-medium")
    """Of the folders in --data; the coefficient is chosen on the first."""
    seeds: int = 8
    updates: int = 50_000
    every: int = 10_000
    """Updates between new synthetic data."""
    trajectories: int = 1024
    synthetic: int = 240
    """Of the 256 rows of a batch."""
    coefficients: tuple[float, ...] = (0.02, 0.05, 0.1, 0.2, 0.5)
    """That are measured against the simulator."""
    choose: tuple[float, ...] = (0.05, 0.1, 0.2)
    """Of which one is chosen by returns on the first set."""
    episodes: int = 20
    """A seed, in the simulator."""
    model: TrajectoryConfig = field(default_factory=TrajectoryConfig)
    model_steps: int = 6000
    solver: TrajectorySolver = field(default_factory=TrajectorySolver)
    hidden: int = 256
    """Width of the agents' networks."""
    iql: bool = True
    """IQL too, on the first set."""
    jobs: int = 1
    """Trainings at a time, each in a process of its own: for machines with many cores, with or without a GPU."""


def task_of(name: str) -> ControlTask:
    """`pointmaze-umaze-wander` to pointmaze/umaze."""
    first, *rest = name.split("-")
    return make_control(f"pointmaze/{rest[0]}" if first == "pointmaze" else first)


def learn_trajectories(config: MakeOfflineRL, name: str) -> Path:
    """The set's trajectory model."""
    settings = trajectory.TrainTrajectory(
        data=(str(config.data / name),), out=config.out / name / "trajectory", model=config.model
    )
    return train(trajectory, replace(settings, loop=replace(settings.loop, steps=config.model_steps)))


def learn_dynamics(config: MakeOfflineRL, name: str) -> Path:
    """The set's dynamics ensemble."""
    settings = dynamics.TrainDynamics(data=(str(config.data / name),), out=config.out / name / "dynamics")
    return train(dynamics, settings)


def trained(
    config: MakeOfflineRL,
    name: str,
    arm: str,
    *,
    agent: str = "td3bc",
    coefficient: float | None = None,
    starts: int = JUDGING,
) -> np.ndarray:
    """Returns of an arm's policies, one a seed, after training (unless it is done)."""
    whole, stepwise = config.out / name / "trajectory", config.out / name / "dynamics"
    label = f"{agent}-{arm}" + (f"-{coefficient:g}" if arm == "guided" else "")
    out, task = config.out / name / label, task_of(name)
    hidden = (config.hidden, config.hidden)
    settings = OfflineRL(
        data=(str(config.data / name),),
        out=out,
        agent="iql" if agent == "iql" else "td3bc",
        trajectory_model=whole if arm in ("guided", "unguided") else None,
        dynamics=stepwise if arm == "autoregressive" else None,
        rollout_steps=config.model.length,
        guidance=Guidance(coefficient=coefficient if coefficient is not None and arm == "guided" else 0.0),
        solver=SolverFlags(**asdict(config.solver)),
        trajectories=config.trajectories,
        seeds=config.seeds,
        td3bc=TD3BCConfig(hidden=hidden),
        iql=StateIQLConfig(hidden=hidden),
        train=OfflineConfig(
            updates=config.updates, synthetic=config.synthetic, synthesise_every=config.every, save_every=config.every
        ),
    )
    made_from = {f.name: getattr(settings, f.name) for f in fields(settings) if f.name != "out"}
    made_from["models"] = [weights_of(folder) for folder in (settings.trajectory_model, settings.dynamics) if folder]
    if not kept(out, made_from, done="report.json"):
        print(f"training {out}", flush=True)
        run_offline_rl(settings)
    returns = out / f"returns-{starts}.json"
    if not kept(returns, {"episodes": config.episodes}):
        means = []
        for seed in range(config.seeds):
            policies = StatePolicy.from_pretrained(out / f"seed-{seed}").policies
            act = lambda seen, policies=policies: policies.act(seen[None])[0]  # noqa: E731
            means.append(float(evaluate_returns(task, act, episodes=config.episodes, seed=starts)[0].mean()))
        returns.write_text(json.dumps(means))
    return np.array(json.loads(returns.read_text()))


# --- against the coefficient ----------------------------------------------------------------------------------------------


def against_coefficient(config: MakeOfflineRL, name: str) -> list[dict[str, Any]]:
    """Of generated trajectories by source: the target policy's log-likelihood of actions and the error of steps."""
    out = config.out / name / "against-coefficient.json"
    trained(config, name, "real")
    judged = [config.out / name / part for part in ("trajectory", "dynamics", "td3bc-real/seed-0")]
    made_from = {
        "models": [weights_of(folder) for folder in judged],
        "solver": config.solver,
        "coefficients": config.coefficients,
    }
    if kept(out, made_from):
        return json.loads(out.read_text())
    task, real = task_of(name), open_trajectories((str(config.data / name),))
    policy = StatePolicy.from_pretrained(config.out / name / "td3bc-real" / "seed-0")
    model = TrajectoryDiffusion.from_pretrained(config.out / name / "trajectory").with_solver(config.solver)
    ensemble = DynamicsEnsemble.from_pretrained(config.out / name / "dynamics")
    seeds, score = torch.arange(512), policy_score(policy, model.spec)
    found = []
    for coefficient in (0.0, *config.coefficients):
        made = model.generate(seeds, guidance=Guidance(coefficient=coefficient), score=score)
        found.append({"source": "diffusion", "coefficient": coefficient, **measured(task, policy, made, real, name)})
    generator = torch.Generator().manual_seed(0)
    starts = real.observations[torch.randint(real.steps, (len(seeds),), generator=generator)]
    rolled = ensemble.rollout(
        lambda now: policy.policies.act(now[None])[0], starts, steps=model.config.length, seeds=seeds
    )
    found.append({"source": "autoregressive", "coefficient": None, **measured(task, policy, rolled, real, name)})
    recorded = real.select(range(0, len(real), max(1, len(real) // 40)))
    found.append({"source": "recorded", "coefficient": None, **measured(task, policy, recorded, real, name)})
    out.write_text(json.dumps(found))
    return found


def measured(
    task: ControlTask, policy: StatePolicy, made: Trajectories, real: Trajectories, name: str
) -> dict[str, Any]:
    errors = step_errors(task, made, real, clipped=CLIPPED.get(task.name))
    likely = policy_log_likelihood(policy, made)
    by_step = []
    if int(made.lengths.max()) <= 64:
        place = torch.arange(made.steps) - made.starts[made.episode]
        for first in range(0, int(made.lengths.max()), 4):
            rows = (place >= first) & (place < first + 4)
            part = replace(made, **{k: getattr(made, k)[rows] for k in ("observations", "actions", "rewards", "next_observations", "terminated")}, lengths=torch.ones(int(rows.sum()), dtype=torch.long), provenance=())  # fmt: skip
            by_step.append(
                [
                    first + 2,
                    float(step_errors(task, part, real, most=512, clipped=CLIPPED.get(task.name)).observation.median()),
                ]
            )
    quantiles = errors.observation.quantile(torch.tensor([0.5, 0.9])).tolist()
    return {
        "likelihood": float(likely.mean()),
        "error": quantiles[0],
        "error_90": quantiles[1],
        "reward": float(errors.reward.mean()),
        "ends": float(errors.terminated.float().mean()),
        "by_step": by_step,
        "steps": made.steps,
    }


def plot(config: MakeOfflineRL, found: dict[str, list[dict[str, Any]]]) -> None:
    figure = Figure(figsize=(5.2 * len(found), 8), layout="constrained")
    grid = figure.subplots(2, len(found), squeeze=False)
    for (name, rows), above, below in zip(found.items(), grid[0], grid[1]):
        diffusion = [r for r in rows if r["source"] == "diffusion"]
        above.plot(
            [r["error"] for r in diffusion],
            [r["likelihood"] for r in diffusion],
            marker="o",
            label="diffusion, by coefficient",
        )
        for r in diffusion:
            above.annotate(
                f"{r['coefficient']:g}",
                (r["error"], r["likelihood"]),
                xytext=(4, 4),
                textcoords="offset points",
                fontsize=8,
            )
        for r in rows:
            if r["source"] != "diffusion":
                above.plot(max(r["error"], 1e-4), r["likelihood"], "s", label=r["source"])
        above.set(
            title=name, xlabel="median error of a step (stds)", ylabel="log-likelihood under the policy", xscale="log"
        )
        above.margins(x=0.1)
        above.legend(frameon=False, fontsize=8)
        for r in rows:
            if r["by_step"]:
                label = r["source"] + (f" {r['coefficient']:g}" if r["coefficient"] is not None else "")
                below.plot(*zip(*r["by_step"]), label=label)
        below.set(xlabel="step of the trajectory", ylabel="median error of a step (stds)", yscale="log")
        below.legend(frameon=False, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.15), ncols=3)
    figure.savefig(config.out / "guidance.png", dpi=110)


# --- tables ---------------------------------------------------------------------------------------------------------------


def references(task: ControlTask) -> tuple[float, float]:
    """Returns that count as 0 and 100: random actions, and going straight to the goal (mazes) or D4RL's expert."""
    draw = torch.Generator().manual_seed(0)
    low, _ = evaluate_returns(task, lambda seen: torch.rand(len(seen), task.spec.action.dim, generator=draw) * 2 - 1, episodes=50, seed=REFERENCE)  # fmt: skip
    if task.name in EXPERT:
        return float(low.mean()), EXPERT[task.name]
    high, _ = evaluate_returns(task, WaypointPilot(task, seed=0, noise=0.0, wander=False), episodes=50, seed=REFERENCE)
    return float(low.mean()), float(high.mean())


def spread(values: np.ndarray) -> str:
    return (
        f"{values.mean():.1f} ± {values.std(ddof=1) / np.sqrt(len(values)):.1f}"
        if len(values) > 1
        else f"{values.mean():.1f}"
    )


def main(config: MakeOfflineRL) -> None:
    torch.set_num_threads(1)
    config.out.mkdir(parents=True, exist_ok=True)
    first = config.sets[0]
    agents = {"td3bc": config.sets, **({"iql": config.sets[:1]} if config.iql else {})}
    wanted = [(agent, name) for agent, sets in agents.items() for name in sets]
    together(
        config.jobs,
        [partial(part, config, name) for name in config.sets for part in (learn_trajectories, learn_dynamics)],
    )
    choosing = [partial(trained, config, first, "guided", coefficient=c, starts=CHOOSING) for c in config.choose]
    plain = [
        partial(trained, config, name, arm, agent=agent) for agent, name in wanted for arm in ARMS if arm != "guided"
    ]
    together(config.jobs, [*choosing, *plain])
    tried = {c: trained(config, first, "guided", coefficient=c, starts=CHOOSING) for c in config.choose}
    chosen = max(tried, key=lambda c: interquartile_mean({first: tried[c]}))
    guided = [partial(trained, config, name, "guided", agent=agent, coefficient=chosen) for agent, name in wanted]
    together(config.jobs, [*guided, *(partial(against_coefficient, config, name) for name in config.sets)])
    found = {name: against_coefficient(config, name) for name in config.sets}
    plot(config, found)
    guided_rows = [
        row(name, r["source"], "–" if r["coefficient"] is None else f"{r['coefficient']:g}", f"{r['likelihood']:.2f}", f"{r['error']:.4f}", f"{r['error_90']:.4f}", f"{r['reward']:.3f}", f"{r['ends']:.3f}")
        for name, rows in found.items()
        for r in rows
    ]  # fmt: skip
    scores: dict[str, Values] = {}
    return_rows = []
    bounds = {name: references(task_of(name)) for name in config.sets}
    for agent, sets in agents.items():
        for arm in ARMS:
            returns = {
                name: trained(config, name, arm, agent=agent, coefficient=chosen if arm == "guided" else None)
                for name in sets
            }
            scores[f"{agent} {arm}"] = {
                n: normalised(v, low=bounds[n][0], high=bounds[n][1]) for n, v in returns.items()
            }
            return_rows.append(row(agent, arm, *(spread(returns[n]) if n in returns else "–" for n in config.sets)))
    pooled = []
    for agent in agents:
        for other in ("real", "unguided", "autoregressive"):
            a, b = scores[f"{agent} guided"], scores[f"{agent} {other}"]
            interval = pooled_interval(iqm_difference, a, b)
            pooled.append(row(agent, f"guided − {other}", f"{interquartile_mean(a):.1f}", f"{interquartile_mean(b):.1f}", f"{iqm_difference(a, b):+.1f} [{interval.low:+.1f}, {interval.high:+.1f}]"))  # fmt: skip
    text = "\n\n".join(
        [
            f"{config.seeds} seeds, {config.updates:,} updates, hidden {config.hidden}, {config.trajectories} trajectories of {config.model.length} steps a "
            f"seed every {config.every:,}, {config.synthetic} of 256 rows synthetic, {config.solver.evaluations} evaluations.",
            table("| data | source | coefficient | log-likelihood under the target policy | median error of a step, stds | 90% | reward error, stds | wrong ends |", guided_rows),
            "Returns of guided TD3+BC on the first set, by coefficient (starts of their own): "
            + ", ".join(f"{c:g}: {spread(v)}" for c, v in tried.items())
            + f". Chosen and frozen: {chosen:g}.",
            table("| agent | data | " + " | ".join(f"return, {n}" for n in config.sets) + " |", return_rows),
            "0 and 100: " + "; ".join(f"{n} {low:.1f}, {high:.1f}" for n, (low, high) in bounds.items()) + ".",
            table("| agent | difference | interquartile mean | of the other | difference [95%] |", pooled),
        ]
    )  # fmt: skip
    (config.out / "tables.md").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main(tyro.cli(MakeOfflineRL, description=__doc__))
