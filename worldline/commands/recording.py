"""Verbs `record` and `inspect`: make a dataset in a simulator, and say what is in one."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from worldline.commands.acting import load_acting
from worldline.commands.outputs import check_report_folder, claimed, release_claim
from worldline.commands.rollouts import weights_of
from worldline.data import UNKNOWN, LeRobotDataset, Problem, inspect_dataset
from worldline.errors import DatasetError, WorldlineError
from worldline.eval import Report
from worldline.sim.base import make_world
from worldline.sim.record import record
from worldline.sim.scripted import ALL_POLICIES, policy_names


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """Record episodes in a simulator into a LeRobot dataset.

    Example: worldline record metaworld/drawer-open-v3 --episodes 200 --policy mixed --out data/drawer
    """

    world: str
    """metaworld/<task>, arm/reach, arm/place or arm/revisit (an arm with joint targets), or gym/<environment id> for any Gymnasium environment with rgb_array rendering."""
    out: Path
    """Folder for the dataset. A recording that was interrupted goes on there."""
    episodes: int = 200
    """To record."""
    policy: str | None = None
    """mixed (experts, perturbed experts, random, play), perturbed (mixed without experts, random and play), contact (between success and failure), one of their causes (docs/data.md lists them), a policy folder, module:function, ws://host:port.
    arm/reach, arm/place: mixed, expert, wrong_object, freeze, play, random. arm/revisit: mixed, revisit (--horizon 280), play, random.
    By default mixed in Meta-World and with the arm, random in Gymnasium, which has no experts."""
    cameras: tuple[str, ...] = ()
    """Views to record; the world's own by default (Meta-World: corner2 gripperPOV; arm: top wrist)."""
    size: int = 64
    """Height and width of the frames: pixels, even, at least 8."""
    seed: int = 0
    """Each episode starts from a seed of its own, made of this and its number."""
    horizon: int = 160
    """Control steps of an episode."""
    control_steps: int = 4
    """Control steps between two frames."""
    without_actions: bool = False
    """Video alone: no actions are stored, and each episode says so. Unified video-action models learn from it; what needs actions
    refuses it."""
    processes: int | None = None
    """Worker processes; one a core by default."""

    def __post_init__(self) -> None:
        for name, least in (("episodes", 1), ("seed", 0), ("horizon", 1), ("control_steps", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"--{name.replace('_', '-')}: at least {least} required, got {getattr(self, name)}")


def run_record(config: Record, *, progress: bool = True) -> Path:
    """Record, and return the dataset's folder. Goes on with an interrupted recording of the same settings."""
    label = config.policy or policy_names(config.world)[0]
    policy: Any = label
    if label not in ALL_POLICIES:
        if not _names_a_policy(label):
            raise DatasetError(
                f"--policy {label!r}: one of {', '.join(ALL_POLICIES)}, a policy folder, module:function or ws://host:port required"
            )
        policy = partial(_load, config, label)
    held, about = claimed(config.out), {"actions": UNKNOWN} if config.without_actions else {}
    if Path(folder := label.partition("@")[0]).is_dir():
        about["policy_weights"] = weights_of(
            folder
        )  # trained further it is another policy, whose episodes are not to be mixed in
    try:
        return record(
            config.world,
            config.out,
            episodes=config.episodes,
            policy=policy,
            label=label,
            cameras=config.cameras or None,
            size=config.size,
            seed=config.seed,
            horizon=config.horizon,
            control_steps=config.control_steps,
            processes=config.processes or min(cores(), max(1, config.episodes // 8)),
            resume=(config.out / ".staging").is_dir(),
            provenance=about,
            progress=progress,
        )
    except WorldlineError:
        if not held:
            release_claim(config.out)
        raise


def cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _names_a_policy(name: str) -> bool:
    base = name.partition("@")[0]
    return ":" in base or Path(base).is_dir() or "/" in base


def _load(config: Record, policy: str) -> Any:
    """Called once in every worker process: so on the CPU, a card has no room for as many copies as there are cores."""
    options = {"size": config.size, "horizon": config.horizon, "control_steps": config.control_steps}
    world = make_world(config.world, cameras=config.cameras or None, **options)
    try:
        return load_acting(policy, spec=world.spec, device="cpu")
    finally:
        world.close()


@dataclass(frozen=True, slots=True, kw_only=True)
class Inspect:
    """Report what a dataset holds and what is wrong with it.

    Example: worldline inspect data/drawer
    """

    data: Path
    """Dataset folder (LeRobotDataset v2.1 or v3.0)."""
    out: Path | None = None
    """Folder for the report; reports/inspect-NAME by default."""
    max_episodes: int | None = None
    """Look at only so many episodes."""

    def __post_init__(self) -> None:
        if self.max_episodes is not None and self.max_episodes < 1:
            raise ValueError(f"--max-episodes: at least 1 required, got {self.max_episodes}")


def run_inspect(config: Inspect, *, progress: bool = True) -> Path:
    """Write the report and return its folder."""
    out = config.out or Path("reports") / f"inspect-{config.data.name}"
    check_report_folder(out)
    dataset = LeRobotDataset(config.data)
    found = inspect_dataset(dataset, max_episodes=config.max_episodes)
    report = Report(f"Dataset {config.data.name}", command=f"worldline inspect {config.data}")
    for text in _problem_lines(found.problems):
        report.warning(text)
    summary = dict(found.summary)
    plain = [[k, _plain(v)] for k, v in summary.items() if not isinstance(v, dict)]
    report.table("At a glance", ["", "value"], plain)
    for key, value in summary.items():
        if isinstance(value, dict) and value:
            rows = list(value.items())
            if isinstance(rows[0][1], dict):
                columns = list(rows[0][1])
                report.table(
                    key.replace("_", " "),
                    ["", *columns],
                    [[name, *(_plain(row.get(c)) for c in columns)] for name, row in rows],
                )
            else:
                report.table(key.replace("_", " "), ["", "value"], [[name, _plain(v)] for name, v in rows])
    for title, picture in found.pictures.items():
        report.image(title, _image(picture))
    report.write(out, found.to_dict())
    return out


def _problem_lines(problems: Sequence[Problem]) -> list[str]:
    """One line a kind and column, naming the episodes: sixty saturated episodes are one finding."""
    grouped: dict[tuple[str, str], list[Problem]] = {}
    for problem in problems:
        grouped.setdefault((problem.kind, problem.column), []).append(problem)
    lines = []
    for (kind, column), found in grouped.items():
        episodes = [str(p.episode) for p in found if p.episode is not None]
        named = ", ".join(episodes[:12]) + (", ..." if len(episodes) > 12 else "")
        where = (
            f"{len(episodes)} episodes ({named})"
            if len(episodes) > 1
            else f"episode {named}"
            if episodes
            else "dataset"
        )
        lines.append(
            f"{kind}: {where}, {column}: {found[0].detail}" + (" (in the first of them)" if len(episodes) > 1 else "")
        )
    return lines


def _plain(value: Any) -> Any:
    if isinstance(value, float | int | str) or value is None:
        return value
    if isinstance(value, list | tuple):
        return ", ".join(f"{v:.3g}" if isinstance(v, float) else str(v) for v in value)
    return str(value)


def _image(picture: Any) -> Any:
    import torch

    return torch.from_numpy(picture.copy()).permute(2, 0, 1)
