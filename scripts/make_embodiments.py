"""Makes the tables of docs/results.md on one world model for several robots: against a model for each, and by router.

    pip install -e '.[metaworld,pusht]'
    python scripts/make_embodiments.py --out results-embodiments

Three action spaces: Meta-World's hand deltas (4-D, two cameras), absolute targets of a four-joint arm (two cameras), a pusher's
absolute place in the plane (2-D, one camera). One model with shared action experts is trained for three times the steps of
each single model, the robots drawn evenly: every robot gets as many batches as in its own model. Both once more with few
episodes a robot. The same trained mixture is then sampled with its router as learned, shuffled, uniform, and fixed by embodiment.
Errors are over imagined frames of test episodes, paired between models. Everything is kept in --out; run the same command
again after an interruption. Prints Markdown, and writes it to OUT/tables.md.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from result_tables import row, table
from stages import record, train
from torch import Tensor

from worldline.commands.sampling import load_dream
from worldline.eval.intervals import bootstrap_distribution
from worldline.eval.replays import Replays, load_replays, open_for
from worldline.eval.world_model import replay_in_dream
from worldline.rl_in_imagination.dream import Dream
from worldline.trainers import tokenizer, world_model, world_models
from worldline.types import Clip
from worldline.worldmodels import MultiWorldModel
from worldline.worldmodels.embodiments import member_folder
from worldline.worldmodels.experts import report_routing

ROBOTS: dict[str, tuple[str, dict[str, Any]]] = {
    "sawyer": ("metaworld/drawer-open-v3", {"policy": "play"}),
    "arm": ("arm/reach", {"policy": "mixed"}),
    "pusher": ("gym/gym_pusht:gym_pusht/PushT-v0", {"policy": "random", "horizon": 80, "control_steps": 2}),
}
ROUTERS = ("learned", "shuffled", "uniform", "fixed")


@dataclass(frozen=True, slots=True, kw_only=True)
class MakeEmbodiments:
    """Record, train one model for all and one for each, with all episodes and with few, and print the tables."""

    out: Path
    robots: tuple[str, ...] = tuple(ROBOTS)
    """Of sawyer, arm, pusher."""
    seeds: int = 1
    budget: float = 1.0
    """Multiplies all training steps. 1: 1,200 steps of each single model, about an hour of one CPU core in all."""
    episodes: int = 120
    few: int = 10
    """Training episodes a robot in low data."""
    tests: int = 40
    frames: int = 21
    """Of each rollout, the given one included."""

    def __post_init__(self) -> None:
        if unknown := set(self.robots) - set(ROBOTS):
            raise ValueError(f"robots of {', '.join(ROBOTS)} required, got {', '.join(sorted(unknown))}")


def steps(config: MakeEmbodiments, base: int) -> int:
    return max(20, int(base * config.budget))


def prepare(config: MakeEmbodiments, robot: str) -> None:
    """Datasets and tokenizer of one robot."""
    world, options = ROBOTS[robot]
    for name, episodes, seed in (("data", config.episodes, 0), ("test", config.tests, 1000)):
        record(config.out / robot / name, world, episodes, seed=seed, **options)
    loop = replace(tokenizer.PRESETS["tiny"][1]["loop"], steps=steps(config, 500))
    data, out = (config.out / robot / "data",), config.out / robot / "tok"
    train(tokenizer, tokenizer.TrainTokenizer(data=data, out=out, loop=loop))


def train_single(config: MakeEmbodiments, robot: str, few: int | None, seed: int) -> Path:
    preset = world_model.PRESETS["tiny"][1]
    return train(
        world_model,
        world_model.TrainWorldModel(
            data=(config.out / robot / "data",),
            tokenizer=config.out / robot / "tok",
            out=config.out / robot / f"single{seed}{'-few' if few else ''}",
            model=preset["model"],
            max_episodes=few,
            loop=replace(preset["loop"], steps=steps(config, 1200), seed=seed, compile="no"),
        ),
    )


def train_joint(config: MakeEmbodiments, few: int | None, seed: int) -> Path:
    preset = world_models.PRESETS["tiny"][1]
    return train(
        world_models,
        world_models.TrainWorldModels(
            data=tuple(config.out / robot / "data" for robot in config.robots),
            tokenizer=tuple(config.out / robot / "tok" for robot in config.robots),
            out=config.out / f"joint{seed}{'-few' if few else ''}",
            balance=True,
            model=preset["model"],
            max_episodes=few,
            loop=replace(preset["loop"], steps=len(config.robots) * steps(config, 1200), seed=seed, compile="no"),
        ),
    )


def load_test(config: MakeEmbodiments, dream: Dream, robot: str) -> Replays:
    dataset, stride = open_for(dream.spec, config.out / robot / "test")
    cameras = [c.name for c in dream.spec.cameras]
    return load_replays(dataset, range(config.tests), cameras=cameras, frames=config.frames, stride=stride)


def relative_error(dream: Dream, replays: Replays, actions: Tensor | None = None) -> np.ndarray:
    """By episode: squared error of all imagined frames over that of the first frame repeated."""
    made = replay_in_dream(dream, replays, actions=actions).frames

    def squared(video: dict[str, Tensor]) -> Tensor:
        parts = [(video[c].float() - x.float()).square().flatten(1).mean(1) for c, x in replays.frames.items()]
        return torch.stack(parts).mean(0)

    copied = {c: x[:, :1].expand_as(x) for c, x in replays.frames.items()}
    return (squared(dict(made)) / squared(copied)).numpy()


def mean_with_interval(values: np.ndarray, digits: str = ".2f") -> str:
    draws = bootstrap_distribution((values,), lambda x, axis: x.mean(axis), resamples=4000, seed=0)
    low, high = np.quantile(draws, [0.025, 0.975])
    return f"{values.mean():{digits}} [{low:{digits}}, {high:{digits}}]"


def compare(config: MakeEmbodiments, few: int | None, seed: int) -> list[str]:
    """One row a robot: the joint model, the single one, and their paired difference."""
    joint, rows = train_joint(config, few, seed), []
    for robot in config.robots:
        single = load_dream(train_single(config, robot, few, seed))
        member = load_dream(member_folder(joint, single.spec.action.embodiment))
        replays = load_test(config, single, robot)
        ours, theirs = relative_error(member, replays), relative_error(single, replays)
        shuffled = relative_error(member, replays, replays.actions.roll(1, 0))
        cells = [mean_with_interval(x) for x in (ours, theirs)]
        rows.append(
            row(
                f"{robot}, {few or config.episodes} episodes, {seed}",
                *cells,
                mean_with_interval(ours - theirs, "+.3f"),
                mean_with_interval(shuffled - ours, "+.2f"),
            )
        )
    return rows


def route(config: MakeEmbodiments, seed: int) -> tuple[list[str], list[str]]:
    """Errors of the joint model by router, and how the learned router uses its experts."""
    joint = train_joint(config, None, seed)
    model, errors, routings = MultiWorldModel.from_pretrained(joint), [], {}
    for robot in config.robots:
        embodiment = load_dream(train_single(config, robot, None, seed)).spec.action.embodiment
        dream = load_dream(member_folder(joint, embodiment))
        replays = load_test(config, dream, robot)
        learned = relative_error(dream, replays)
        cells = [mean_with_interval(learned)]
        for router in ROUTERS[1:]:
            other = relative_error(load_dream(member_folder(joint, embodiment), {"router": router}), replays)
            cells.append(f"{other.mean():.2f} ({mean_with_interval(other - learned, '+.3f')})")
        errors.append(row(f"{robot}, {seed}", *cells))
        clip = Clip(
            frames=dream.tokenizer.encode(replays.frames),
            actions=replays.actions,
            poses=replays.poses,
            instruction=replays.instruction,
        )
        routings[embodiment] = [model.member(embodiment).routing(clip)]
    report = report_routing(routings)
    experts = [
        row(f"{robot}, {seed}", f"{found['entropy']:.2f}", " / ".join(f"{share:.2f}" for share in found["load"]))
        for robot, found in zip(config.robots, report["embodiments"].values(), strict=True)
    ]
    return errors, [*experts, row(f"information of embodiment and expert, {seed}", f"{report['information']:.2f}", "")]


def main(config: MakeEmbodiments) -> None:
    for robot in config.robots:
        prepare(config, robot)
    compared: list[str] = []
    errors: list[str] = []
    experts: list[str] = []
    for seed in range(config.seeds):
        for few in (None, config.few):
            compared += compare(config, few, seed)
        more_errors, more_experts = route(config, seed)
        errors += more_errors
        experts += more_experts
    sections = [
        f"Squared error of {config.frames - 1} imagined frames as a share of the first frame repeated; mean over episodes [95%].",
        table("| robot, data, seed | joint | single | joint - single | shuffled actions - true, joint |", compared),
        table("| robot, seed | learned |" + "".join(f" {r} (minus learned) |" for r in ROUTERS[1:]), errors),
        table("| robot, seed | routing entropy, nats | load of each expert |", experts),
    ]
    text = "\n\n".join(sections) + "\n"
    (config.out / "tables.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main(tyro.cli(MakeEmbodiments, description=__doc__))
