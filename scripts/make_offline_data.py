"""Makes the offline RL data sets: Minari folders of float32 transitions, and what their returns are.

    python scripts/make_offline_data.py --out offline-data
    python scripts/make_offline_data.py --out offline-data --tasks halfcheetah --quality medium

Point mazes: a waypoint pilot wanders from random cell to random cell and earns at most a tenth of what going to the goal does, so that a
learner must stitch. Hopper and HalfCheetah, as in D4RL: a soft actor-critic (Stable-Baselines3) is trained until its own noisy
behaviour returns a third of an expert's. `replay` is everything that it did until then, from random actions on; `medium` is new
episodes of where it stopped. Needs `pip install "worldline[offline,sb3]"`.

The training is the expensive part, 20 minutes of one CPU core for 100,000 steps (10 with --width 128), and is kept every 5000 steps
beside the data: run the same command again after an interruption. Data sets that are there are read, not made again.
"""

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import tyro
from result_tables import row, table

from worldline.data.minari import read_minari, write_minari
from worldline.data.trajectories import Trajectories, join
from worldline.sim.control import CONTROL_TASKS, Act, ControlTask, collect_trajectories, evaluate_returns, make_control
from worldline.sim.waypoints import WaypointPilot

LEVELS = {"hopper": 1200.0, "halfcheetah": 4000.0}  # a third of what an expert gets
EVERY = 5000  # environment steps between two judgements, each of which is kept
JUDGED = 10  # episodes of a judgement
TOGETHER = 50  # episodes collected in step
HELD_OUT = 1_000_000_000  # seeds of judgements and references; data sets start from seeds far below


@dataclass(frozen=True, slots=True, kw_only=True)
class MakeOfflineData:
    """Collect each data set that is not there yet, and print their returns."""

    out: Path
    tasks: tuple[str, ...] = ("pointmaze/umaze", "hopper")
    """Of pointmaze/umaze, pointmaze/medium, hopper, halfcheetah."""
    steps: int = 100_000
    """Transitions of a data set, rounded up to whole episodes; `replay` has as many as the training took."""
    quality: tuple[Literal["medium", "replay"], ...] = ("medium", "replay")
    """Of the tasks whose behaviour is trained."""
    level: float | None = None
    """Return at which training stops. Default: 1200 for hopper, 4000 for halfcheetah."""
    budget: int = 300_000
    """Environment steps after which training gives up."""
    width: int = 256
    """Units in each of the two hidden layers of the actor and the critics."""
    seed: int = 0

    def __post_init__(self) -> None:
        if unknown := set(self.tasks) - set(CONTROL_TASKS):
            raise ValueError(f"tasks of {', '.join(CONTROL_TASKS)} required, got {', '.join(sorted(unknown))}")
        if self.steps < 1 or self.budget < EVERY:
            raise ValueError(
                f"steps of at least 1 and a budget of at least {EVERY} required, got {self.steps}, {self.budget}"
            )


# --- Mazes ------------------------------------------------------------------------------------------------------------


def wander(task: ControlTask, config: MakeOfflineData) -> Trajectories:
    """Episodes of the waypoint pilot."""
    pilot = WaypointPilot(task, seed=config.seed)
    episodes, about = -(-config.steps // task.horizon), {"policy": "waypoints, noise 0.5"}
    return collect_trajectories(task, pilot, episodes=episodes, seed=first_seed(config), provenance=about)


# --- Trained behaviour ------------------------------------------------------------------------------------------------


class Training:
    """A soft actor-critic, trained in pieces of `EVERY` steps, each kept in a folder that appears whole."""

    def __init__(self, task: ControlTask, config: MakeOfflineData) -> None:
        from stable_baselines3 import SAC

        self.task, self.home = task, config.out / f"{folder_name(task.name)}-sac"
        self.level = LEVELS[task.name] if config.level is None else config.level
        self.budget, self.history = config.budget, []  # history: [steps, mean return] of each judgement
        kept = sorted(self.home.glob("at-*"), key=steps_of)
        if kept:
            # room for all of this run: the budget may have been raised, and what was kept has only room for the old one
            room = {"buffer_size": max(config.budget, steps_of(kept[-1])) + 1}
            self.agent = SAC.load(kept[-1] / "agent.zip", env=task.make_env(), device="cpu", custom_objects=room)
            self.history = json.loads((kept[-1] / "history.json").read_text())
            self._restore(np.load(kept[-1] / "replay.npz"))
            return
        self.agent = SAC(
            "MlpPolicy",
            task.make_env(),
            buffer_size=config.budget + 1,  # never full, so that it stays in order
            learning_starts=EVERY,
            policy_kwargs={"net_arch": [config.width, config.width]},
            seed=config.seed,
            device="cpu",
        )

    @property
    def best(self) -> float:
        return self.history[-1][1] if self.history else -np.inf

    def run(self) -> "Training":
        """Train until the behaviour returns `level`."""
        while self.best < self.level:
            done = self.agent.num_timesteps
            if done >= self.budget:
                raise SystemExit(
                    f"{self.task.name}: a return of {self.level:g} required, got {self.best:.0f} after {done} steps "
                    f"(judgements in {self.home}). Raise --budget, or lower --level."
                )
            self.agent.learn(min(EVERY, self.budget - done), reset_num_timesteps=False)
            returns, _ = evaluate_returns(self.task, self.act, episodes=JUDGED, seed=HELD_OUT)
            self.history.append([self.agent.num_timesteps, float(returns.mean())])
            print(f"{self.task.name}: {self.agent.num_timesteps} steps, return {self.best:.0f}", flush=True)
            self._keep()
        return self

    def act(self, seen: torch.Tensor) -> torch.Tensor:
        """With the noise that it explores with."""
        return torch.from_numpy(self.agent.predict(seen.numpy(), deterministic=False)[0])

    def replay(self) -> Trajectories:
        """Everything it did, cut where an episode ended, or where the training was interrupted."""
        numbers = self._numbers()
        done, seen, after = numbers["dones"], numbers["observations"], numbers["next_observations"]
        over = done | np.append((after[:-1] != seen[1:]).any(1), True)
        lengths = np.diff(np.flatnonzero(over), prepend=-1)
        return Trajectories(
            spec=self.task.spec,
            observations=torch.from_numpy(seen).float(),
            actions=torch.from_numpy(self.agent.policy.unscale_action(numbers["actions"])).float(),
            rewards=torch.from_numpy(numbers["rewards"]).float(),
            next_observations=torch.from_numpy(after).float(),
            terminated=torch.from_numpy(done & ~numbers["timeouts"]),
            lengths=torch.from_numpy(lengths),
            provenance=({"policy": "SAC in training", "simulator": self.task.name},) * len(lengths),
        )

    def _keep(self) -> None:
        """All that a later run needs but the random state and the episode that was going on."""
        writing = self.home / "writing"
        shutil.rmtree(writing, ignore_errors=True)
        writing.mkdir(parents=True)
        self.agent.save(writing / "agent.zip")
        np.savez(writing / "replay.npz", **self._numbers())
        (writing / "history.json").write_text(json.dumps(self.history))
        older = list(self.home.glob("at-*"))
        writing.rename(self.home / f"at-{self.agent.num_timesteps}")
        for folder in older:
            shutil.rmtree(folder)

    def _numbers(self) -> dict[str, Any]:
        """Arrays of all steps so far, the oldest first."""
        buffer: Any = self.agent.replay_buffer
        assert not buffer.full, (
            f"a replay buffer with room for all {self.agent.num_timesteps} steps required, got one of {buffer.buffer_size} that has "
            "wrapped: its first steps are lost"
        )
        names = ("observations", "next_observations", "actions", "rewards", "dones", "timeouts")
        numbers = {name: getattr(buffer, name)[: buffer.pos, 0] for name in names}
        return numbers | {name: numbers[name].astype(bool) for name in ("dones", "timeouts")}

    def _restore(self, numbers: Any) -> None:
        buffer: Any = self.agent.replay_buffer
        assert len(numbers["rewards"]) == self.agent.num_timesteps, (
            f"all {self.agent.num_timesteps} steps of the training required in {self.home}, got {len(numbers['rewards'])}: the replay buffer "
            "had wrapped. Delete that folder and train again."
        )
        for name in numbers.files:
            getattr(buffer, name)[: len(numbers[name]), 0] = numbers[name]
        buffer.pos = len(numbers["rewards"])


def steps_of(kept: Path) -> int:
    """After how many environment steps a folder was kept."""
    return int(kept.name.removeprefix("at-"))


def medium(training: Training, config: MakeOfflineData) -> Trajectories:
    """New episodes of the behaviour that training stopped at."""
    steps, score = training.history[-1]
    about = {"policy": f"SAC after {steps} steps", "score": f"{score:.1f}"}
    return collect(training.task, training.act, config, about)


def collect(task: ControlTask, act: Act, config: MakeOfflineData, about: dict[str, str]) -> Trajectories:
    """Whole episodes until there are enough steps."""
    parts: list[Trajectories] = []
    while sum(part.steps for part in parts) < config.steps:
        seed = first_seed(config) + TOGETHER * len(parts)
        parts.append(collect_trajectories(task, act, episodes=TOGETHER, seed=seed, provenance=about))
    return join(parts)


# --- Data sets --------------------------------------------------------------------------------------------------------


def first_seed(config: MakeOfflineData) -> int:
    return 100_000 * config.seed


def folder_name(name: str) -> str:
    return name.replace("/", "-")


def data_sets(task: ControlTask, config: MakeOfflineData) -> dict[str, Trajectories]:
    """Those of one task, by folder: read where they are, made where they are not."""
    qualities: Sequence[str] = ("wander",) if task.maze else config.quality
    found: dict[str, Trajectories] = {}
    training: Training | None = None
    for quality in qualities:
        name = f"{folder_name(task.name)}-{quality}"
        folder = config.out / name
        if not folder.is_dir():
            if quality == "wander":
                data = wander(task, config)
            else:
                training = training or Training(task, config).run()
                data = training.replay() if quality == "replay" else medium(training, config)
            write_minari(data, folder, env_id=None if task.maze else task.env_id)
        found[name] = read_minari(folder)
    return found


def describe(name: str, data: Trajectories) -> str:
    low, middle, high = data.returns.quantile(torch.tensor([0.25, 0.5, 0.75])).tolist()
    ended = data.terminated.sum() / len(data)
    return row(
        name,
        data.steps,
        len(data),
        f"{data.returns.mean():.1f}",
        f"{low:.1f}, {middle:.1f}, {high:.1f}",
        f"{ended:.2f}",
    )


def references(task: ControlTask) -> list[str]:
    """What random actions return, and in a maze the pilot that goes to the goal and stays."""
    draw = torch.Generator().manual_seed(0)
    acts: dict[str, Act] = {
        "random actions": lambda seen: torch.rand(len(seen), task.spec.action.dim, generator=draw) * 2 - 1
    }
    if task.maze:
        acts["straight to the goal"] = WaypointPilot(task, seed=0, noise=0.0, wander=False)
    return [
        describe(f"{task.name}, {said}", collect_trajectories(task, act, episodes=TOGETHER, seed=HELD_OUT))
        for said, act in acts.items()
    ]


def main(config: MakeOfflineData) -> None:
    torch.set_num_threads(1)
    rows = []
    for name in config.tasks:
        task = make_control(name)
        rows += [describe(folder, data) for folder, data in data_sets(task, config).items()] + references(task)
    print(table("| data | steps | episodes | mean return | its quartiles | share terminated |", rows))


if __name__ == "__main__":
    main(tyro.cli(MakeOfflineData, description=__doc__))
