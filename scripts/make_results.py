"""Makes the tables of docs/results.md: world models and rankings, for any tasks, seeds and budget, resumable.

    python scripts/make_results.py --tasks drawer-open-v3 door-open-v3 button-press-topdown-v3 --seeds 2 --out results

What takes hours here is deepened on a bigger machine with the same command and a larger --budget: budgets multiply the
training steps of --budget 1 (about an hour of one CPU core a task and seed, recordings and policies aside). Everything is
kept in --out; run the same command again after an interruption. Prints Markdown, and writes it to OUT/tables.md.
"""

import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import result_tables
import tyro
from stages import record, train

from worldline.commands.dreaming import Evaluate, run_eval
from worldline.commands.outputs import report_results
from worldline.commands.ranking import Rank, run_rank
from worldline.trainers import policy, probe, scorer, tokenizer, world_model
from worldline.trainers.loop import LoopConfig

# name -> (kind, demonstrations, steps, seed): six trainings from good to poor; corrupted ones share a training.
# Ten demonstrations and 400 steps already open the drawer nearly always, so the poor ones see few and train little.
POLICIES: dict[str, tuple[Literal["bc", "diffusion"], int, int, int]] = {
    "bc50": ("bc", 50, 600, 0),
    "dp50": ("diffusion", 50, 800, 2),
    "bc10": ("bc", 10, 400, 1),
    "bc5": ("bc", 5, 200, 4),
    "bc3": ("bc", 3, 60, 3),
    "dp5": ("diffusion", 5, 150, 5),
}
CORRUPTED = ("bc50@noise=0.8", "dp50@noise=1.5,lag=8")


@dataclass(frozen=True, slots=True, kw_only=True)
class MakeResults:
    """Record, train, evaluate and rank; print the tables."""

    out: Path
    tasks: tuple[str, ...] = ("drawer-open-v3",)
    seeds: int = 1
    """World-model and scorer seeds, each shown."""
    budget: float = 1.0
    """Multiplies all training steps but the policies' (whose spread of quality is the point)."""
    demos: int = 240
    """Recorded episodes a task."""
    tests: int = 60
    """Episodes of every kind recorded for evaluation (`mixed`) and the replay diagnostic (all) alone, from other starts."""
    episodes: int = 50
    imagined_episodes: int = 100
    contact: int = 240
    """World models and scorers also learn from so many episodes of the blend `contact` (0: none)."""
    mistaken: int = 240
    """And from so many of the cause `mistaken`."""
    evaluate: bool = True
    """The world-model table too, which needs two probes a task; without it rankings alone."""
    action_free: bool = True
    """Train the action-free baseline (as long as the world model)."""
    ranked_rollouts: int = 0
    """Make the second table: a world model that was also trained on so many true rollouts of every ranked policy, which
    shows how much a ranking flatters a model that has seen its policies."""
    shared_tokenizer: Path | None = None
    """Use this tokenizer for every task and train none."""


def steps(config: MakeResults, base: int) -> int:
    return max(20, int(base * config.budget))


def loop(preset: Any, **changes: Any) -> LoopConfig:
    return replace(preset, **changes)


def prepare(config: MakeResults, task: str) -> Path:
    """Datasets, tokenizer, probes and policies of one task; returns its folder."""
    home = config.out / task
    recordings = (
        ("data", config.demos, 0, "mixed"),
        ("test", config.tests, 1, "mixed"),
        ("test-contact", config.tests if config.contact else 0, 5, "contact"),
        ("test-mistaken", config.tests if config.mistaken else 0, 6, "mistaken"),
        ("contact", config.contact, 3, "contact"),
        ("mistaken", config.mistaken, 4, "mistaken"),
    )
    for name, count, seed, blend in recordings:
        if count:
            record(home / name, f"metaworld/{task}", count, seed=seed, policy=blend)
    tiny = tokenizer.PRESETS["tiny"][1]["loop"]
    if config.shared_tokenizer is None:
        train(
            tokenizer,
            tokenizer.TrainTokenizer(
                data=data_of(config, home), out=home / "tok", loop=loop(tiny, steps=steps(config, 700))
            ),
        )
    short = LoopConfig(steps=steps(config, 400), batch_size=64, lr=1e-3, ema=0.99)
    for target in ("object", "action") if config.evaluate else ():
        train(
            probe,
            probe.TrainProbe(
                data=(home / "data",),
                out=home / f"probe-{target}",
                target=target,
                tokenizer=tokenizer_of(config, home),
                loop=short,
            ),
        )
    for name, (kind, count, length, seed) in POLICIES.items():
        settings = LoopConfig(steps=length, batch_size=64, lr=1e-3, seed=seed)
        train(
            policy, policy.TrainPolicy(data=(home / "data",), out=home / name, kind=kind, episodes=count, loop=settings)
        )
    return home


def data_of(config: MakeResults, home: Path) -> tuple[Path, ...]:
    """What world models and scorers learn from. Policies and probes learn from the blend `mixed` alone."""
    extra = {"contact": config.contact, "mistaken": config.mistaken}
    return (home / "data", *(home / name for name, count in extra.items() if count))


def tests_of(config: MakeResults, home: Path) -> tuple[Path, ...]:
    """Replays of episodes of every kind the world model learned from: they set the ranking's threshold."""
    extra = {"test-contact": config.contact, "test-mistaken": config.mistaken}
    return (home / "test", *(home / name for name, count in extra.items() if count))


def tokenizer_of(config: MakeResults, home: Path) -> Path:
    return config.shared_tokenizer or home / "tok"


@dataclass(frozen=True, slots=True, kw_only=True)
class Judge:
    """Where one world model, its scorer and its ranking lie."""

    model: Path
    scorer: Path
    ranking: Path


def train_world_model(config: MakeResults, out: Path, seed: int, data: tuple[Path, ...], **network: Any) -> Path:
    tiny = world_model.PRESETS["tiny"][1]
    made = world_model.TrainWorldModel(
        data=data,
        tokenizer=tokenizer_of(config, out.parent),
        out=out,
        model=replace(tiny["model"], network=replace(tiny["model"].network, **network)),
        loop=loop(tiny["loop"], steps=steps(config, tiny["loop"].steps), seed=seed),
    )
    return train(world_model, made)


def train_judge(config: MakeResults, home: Path, seed: int) -> Judge:
    """A world model and a scorer from the same data."""
    judge = Judge(model=home / f"wm{seed}", scorer=home / f"scorer{seed}", ranking=home / f"rank{seed}")
    data = data_of(config, home)
    train_world_model(config, judge.model, seed, data)
    settings = LoopConfig(steps=steps(config, 400), batch_size=64, lr=1e-3, ema=0.99, seed=seed)
    train(
        scorer,
        scorer.TrainScorer(data=data, out=judge.scorer, tokenizer=tokenizer_of(config, home), loop=settings),
    )
    return judge


def rank(config: MakeResults, home: Path, task: str, judge: Judge) -> dict[str, Any]:
    """Rank the policies in one world model. Starts and true rollouts are the first seed's: only the model differs."""
    out = judge.ranking
    first = home / "rank0" / "rollouts"
    if first.is_dir() and not (out / "rollouts").is_dir():
        shutil.copytree(first, out / "rollouts")
    run_rank(
        Rank(
            world_model=judge.model,
            scorer=judge.scorer,
            policies=tuple(str(home / name) for name in (*POLICIES, *CORRUPTED)),
            truth=f"metaworld/{task}",
            data=tests_of(config, home),
            replays="all",
            episodes=config.episodes,
            imagined_episodes=config.imagined_episodes,
            out=out,
        )
    )
    return report_results(out)


def run_seed(config: MakeResults, home: Path, task: str, seed: int) -> tuple[dict[str, Any] | None, dict[str, Any]]:
    """Train one world model and scorer, evaluate, rank. Returns both reports' results."""
    judge = train_judge(config, home, seed)
    evaluated = evaluate(config, home, seed, judge) if config.evaluate else None
    return evaluated, rank(config, home, task, judge)


def evaluate(config: MakeResults, home: Path, seed: int, judge: Judge) -> dict[str, Any]:
    """Against the trivial predictors on the test episodes; the action-free one, trained as long, for the first seed."""
    free = None
    if config.action_free and seed == 0:
        free = train_world_model(config, home / "wm-action-free", seed, data_of(config, home), actions=False)
    evaluation = Evaluate(
        world_model=judge.model,
        data=(home / "test",),
        split="all",
        out=home / f"eval{seed}",
        probe=home / "probe-object",
        inverse_model=home / "probe-action",
        scorer=judge.scorer,
        action_free=free,
    )
    run_eval(evaluation)
    return report_results(home / f"eval{seed}")


def run_seed_with_ranked(config: MakeResults, home: Path, task: str, seed: int) -> dict[str, Any]:
    """The ranking by a world model that has seen rollouts of the policies it ranks."""
    data = list(data_of(config, home))
    for name in (*POLICIES, *CORRUPTED):
        data.append(home / "ranked" / name.replace("@", "-").replace(",", "-"))
        record(data[-1], f"metaworld/{task}", config.ranked_rollouts, policy=str(home / name), seed=2)
    judge = Judge(
        model=train_world_model(config, home / f"wm-ranked-seen{seed}", seed, tuple(data)),
        scorer=home / f"scorer{seed}",
        ranking=home / f"rank-ranked-seen{seed}",
    )
    return rank(config, home, task, judge)


def main(config: MakeResults) -> None:
    dreams, ranks, seen, rates = [], [], [], []
    for task in config.tasks:
        home = prepare(config, task)
        rankings = []
        for seed in range(config.seeds):
            evaluated, ranked = run_seed(config, home, task, seed)
            if evaluated:
                dreams += [f"{task}, seed {seed}", result_tables.world_model(evaluated)]
                dreams += [result_tables.object_position(evaluated)]
            rankings.append(ranked)
            ranks.append(result_tables.ranking_row(task, seed, ranked))
            if config.ranked_rollouts:
                found = run_seed_with_ranked(config, home, task, seed)
                seen.append(result_tables.ranking_row(task, seed, found))
        rates += [task, result_tables.policies(rankings)]
    sections = ["World models", *dreams, "Rankings", result_tables.table(result_tables.RANKING, ranks), *rates]
    if config.ranked_rollouts:
        title = f"Rankings by world models that also saw {config.ranked_rollouts} rollouts of every ranked policy"
        sections += [title, result_tables.table(result_tables.RANKING, seen)]
    text = "\n\n".join(sections) + "\n"
    (config.out / "tables.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main(tyro.cli(MakeResults, description=__doc__))
