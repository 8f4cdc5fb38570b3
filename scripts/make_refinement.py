"""Makes the refinement tables of docs/results.md: a cloned policy made better in the dream, and its controls on the same real data.

    python scripts/make_refinement.py --out results-refinement

For every task and seed: a policy cloned from few demonstrations; the same after PPO in the frozen world model; after fine-tuning on
imagined successes; and two controls that are given the real episodes the world model learned from, and no dream: cloning of the
successes among them ("filtered-bc"), and implicit Q-learning. Last the first control after PPO in the dream: what a dream adds to
the best that real data give without one. All act in the simulator from the same starts, which no training saw. World model and
scorer learn from scripted episodes and from rollouts of a policy of another lineage, never of the refined one.
Everything is kept in --out; run the same command again after an interruption. Prints Markdown, and writes it to OUT/tables.md (tables-unet.md).

What takes hours here is deepened on a bigger machine with the same command and more --tasks, --seeds, --budget or --jobs.
"""

from dataclasses import dataclass, field, fields, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import tyro
from result_tables import row, table
from scipy.stats import binomtest
from stages import kept, record, together, train, truth_settings
from statsmodels.stats.multitest import multipletests

from worldline.commands.outputs import report_results
from worldline.commands.refining import Refine, run_refine
from worldline.commands.rollouts import Kept, Truth, identity_of, weights_of
from worldline.commands.sampling import load_dream
from worldline.commands.synthesizing import Synthesize, run_synthesize
from worldline.errors import DatasetError
from worldline.eval.intervals import newcombe_paired, wilson
from worldline.policies import load_policy
from worldline.rl_in_imagination.success import episode_success
from worldline.rl_in_imagination.synthesis import SynthesisConfig
from worldline.trainers import offline, policy, scorer, tokenizer, world_model, world_model_edm
from worldline.trainers.loop import LoopConfig
from worldline.trainers.refinement import RefineSettings

ARMS = ("cloned", "refined", "fine-tuned", "filtered-bc", "iql", "filtered-bc, refined")
CONTROLS = ("filtered-bc", "iql")
REFINED = {  # arm: from which it is refined, and its folder
    "refined": ("cloned", "refined"),
    "filtered-bc, refined": ("filtered-bc", "filtered-bc-refined"),
}
PERSIST = 2  # frames that success must hold, as the scorers' rule


@dataclass(frozen=True, slots=True, kw_only=True)
class MakeRefinement:
    """Record, train, refine, judge in the simulator, print the tables."""

    out: Path
    tasks: tuple[str, ...] = ("drawer-open-v3", "button-press-topdown-v3")
    seeds: int = 2
    """Of policies, world models, scorers and refinements; datasets and tokenizers are shared."""
    budget: float = 1.0
    """Multiplies the training steps of tokenizer, world model and scorer, and the imagined episodes."""
    scripted: str = "perturbed"
    """Recording policy of the scripted episodes. perturbed: attempts that mostly go wrong; mixed: a quarter are the expert's, which
    gives the controls more demonstrations than the cloned policy had."""
    episodes: int = 240
    """Scripted episodes a task that world model and scorer learn from."""
    rollouts: int = 80
    """And rollouts of a policy of another lineage."""
    demonstrations: tuple[int, ...] = (3,)
    """That the policies are cloned from: few, so that they fail often. One number for all tasks, or one a task."""
    policy_steps: tuple[int, ...] = (600,)
    """Training steps of cloning: one number for all tasks, or one a task."""
    test_episodes: int = 100
    curve_episodes: int = 50
    """True and imagined ones of every checked policy along a refinement."""
    test_seed: int = 50
    """Of the first training seed's true starts: another number, other starts."""
    frames: int = 41
    """Of an episode, in the dream and in the simulator."""
    world_model: Literal["transformer", "unet"] = "transformer"
    """The dream: the autoregressive transformer, or World4RL's U-Net with two-hot actions. Both may be made in one --out."""
    rl: RefineSettings = field(default_factory=RefineSettings)
    doubt_steps: int = 0
    """Of refinement: end dreams that leave what the world model knows (`worldline refine --doubt-steps`)."""
    jobs: int = 1
    """Tasks and seeds at a time, each in a process of its own: for machines with many cores, with or without a GPU."""
    arms: tuple[Literal["refined", "fine-tuned", "filtered-bc", "iql", "filtered-bc, refined"], ...] = ARMS[1:]
    """What is made beside the cloned policy; fewer take less time."""

    def __post_init__(self) -> None:
        if "filtered-bc, refined" in self.arms and "filtered-bc" not in self.arms:
            raise ValueError(f"arms: 'filtered-bc, refined' begins at 'filtered-bc', got {self.arms}")
        for name in ("demonstrations", "policy_steps"):
            if len(getattr(self, name)) not in (1, len(self.tasks)):
                raise ValueError(
                    f"{name}: one number, or one for each of {self.tasks} required, got {getattr(self, name)}"
                )


def of(config: MakeRefinement, task: str, numbers: tuple[int, ...]) -> int:
    """The number of a task."""
    return numbers[0] if len(numbers) == 1 else numbers[config.tasks.index(task)]


def steps(config: MakeRefinement, base: int) -> int:
    return max(20, int(base * config.budget))


def prepare(config: MakeRefinement, task: str) -> None:
    """Datasets, the other lineage's policy and its rollouts, the tokenizer."""
    home, world = config.out / task, f"metaworld/{task}"
    record(home / "scripted", world, config.episodes, policy=config.scripted, seed=0)
    demonstrations = of(config, task, config.demonstrations) + 7
    record(home / "demonstrations", world, demonstrations, policy="expert", seed=2)
    record(home / "other-demonstrations", world, demonstrations, policy="expert", seed=3)
    clone(config, task, home / "other-demonstrations", home / "other", seed=1000)
    record(home / "rollouts", world, config.rollouts, policy=str(home / "other"), seed=4)
    loop = replace(tokenizer.PRESETS["tiny"][1]["loop"], steps=steps(config, 1000))
    train(tokenizer, tokenizer.TrainTokenizer(data=real(home), out=home / "tok", loop=loop))


def real(home: Path) -> tuple[Path, ...]:
    """What world models, scorers and the controls learn from."""
    return home / "scripted", home / "rollouts"


def clone(config: MakeRefinement, task: str, data: Path, out: Path, *, seed: int) -> Path:
    loop = LoopConfig(steps=of(config, task, config.policy_steps), batch_size=64, lr=1e-3, seed=seed)
    episodes = of(config, task, config.demonstrations)
    settings = policy.TrainPolicy(data=(data,), out=out, kind="bc", episodes=episodes, demonstrations="all", loop=loop)
    return train(policy, settings)


def train_scorer(config: MakeRefinement, task: str, seed: int) -> Path:
    home = config.out / task
    loop = LoopConfig(steps=steps(config, 800), batch_size=64, lr=1e-3, ema=0.99, seed=seed)
    return train(
        scorer, scorer.TrainScorer(data=real(home), out=home / f"success{seed}", tokenizer=home / "tok", loop=loop)
    )


def dreamt(config: MakeRefinement, name: str, seed: int) -> str:
    """The name of a folder of this kind of world model, or of what comes from its dreams."""
    return f"{name}{'-unet' if config.world_model == 'unet' else ''}{seed}"


def train_dream(config: MakeRefinement, task: str, seed: int) -> Path:
    """The world model. Both kinds train for about as long: a step of the U-Net costs a quarter of the transformer's."""
    home = config.out / task
    unet = config.world_model == "unet"
    module: Any = world_model_edm if unet else world_model
    model = module.PRESETS["tiny"][1]["model"]
    loop = replace(module.PRESETS["tiny"][1]["loop"], steps=steps(config, 15_000 if unet else 4000), seed=seed)
    settings: dict[str, Any] = {"data": real(home), "tokenizer": home / "tok", "loop": loop}
    settings["out"] = home / dreamt(config, "wm", seed)
    if unet:
        return train(
            module, world_model_edm.TrainWorldModelEDM(model=replace(model, action_encoding="two-hot"), **settings)
        )
    return train(module, world_model.TrainWorldModel(model=model, **settings))


def arms(config: MakeRefinement, task: str, seed: int) -> dict[str, Path]:
    """The policies of one task and seed."""
    home = config.out / task
    judges = train_dream(config, task, seed), train_scorer(config, task, seed)
    cloned = clone(config, task, home / "demonstrations", home / f"cloned{seed}", seed=seed)
    longer = LoopConfig(steps=4 * of(config, task, config.policy_steps), batch_size=64, lr=1e-3, seed=seed)
    filtered = policy.TrainPolicy(
        data=real(home), out=home / f"filtered-bc{seed}", init_from=cloned, demonstrations="success", loop=longer
    )
    iql = offline.TrainOffline(data=real(home), out=home / f"iql{seed}", init_from=cloned, loop=longer)
    make = {
        "refined": lambda: refine(config, task, "refined", seed, cloned),
        "fine-tuned": lambda: fine_tune(config, task, cloned, imagine(config, home, cloned, judges, seed), seed),
        "filtered-bc": lambda: train(policy, filtered),
        "iql": lambda: train(offline, iql),
        "filtered-bc, refined": lambda: refine(config, task, "filtered-bc, refined", seed, filtered.out),
    }
    return {"cloned": cloned} | {name: make[name]() for name in ARMS[1:] if name in config.arms}


def fine_tune(config: MakeRefinement, task: str, cloned: Path, imagined: Path | None, seed: int) -> Path:
    """`cloned`, trained on on its demonstrations and the imagined successes, half and half; itself where there are none."""
    if imagined is None:
        return cloned
    home = config.out / task
    settings = policy.TrainPolicy(
        data=(home / "demonstrations", imagined),
        out=home / dreamt(config, "fine-tuned", seed),
        demonstrations="success",
        init_from=cloned,
        imagined_share=0.5,
        loop=LoopConfig(steps=of(config, task, config.policy_steps), batch_size=64, lr=5e-4, seed=seed),
    )
    return train(policy, settings)


def refine(config: MakeRefinement, task: str, arm: str, seed: int, start: Path) -> Path:
    """`start` after PPO in the dream of the task and seed; imagined and true success at every check are kept beside it."""
    home = config.out / task
    out = home / dreamt(config, REFINED[arm][1], seed)
    settings = Refine(
        policy=start,
        world_model=home / dreamt(config, "wm", seed),
        scorer=home / f"success{seed}",
        data=real(home),
        out=out,
        rl=replace(config.rl, seed=seed, frames=config.frames, iterations=steps(config, config.rl.iterations)),
        doubt_steps=config.doubt_steps,
        override_audit=True,
        truth=f"metaworld/{task}",
        truth_episodes=config.curve_episodes,
    )
    if not kept(out, made_from(settings, start, settings.world_model, settings.scorer), done="report.json"):
        run_refine(settings)
    return out


def made_from(settings: Refine | Synthesize, *models: Path) -> dict[str, Any]:
    """What decides what comes out: the settings, and the weights behind their folders."""
    told = {f.name: getattr(settings, f.name) for f in fields(settings) if f.name not in ("out", "batch", "processes")}
    return {**told, "models": [weights_of(folder) for folder in models]}


def imagine(config: MakeRefinement, home: Path, cloned: Path, judges: tuple[Path, Path], seed: int) -> Path | None:
    """The dataset of imagined successes; None where none was imagined, so that there is nothing to fine-tune on."""
    out = home / dreamt(config, "imagined", seed)
    settings = Synthesize(
        policies=(str(cloned), f"{cloned}@noise=0.3"),
        world_model=judges[0],
        scorer=judges[1],
        data=real(home),
        out=out,
        episodes=steps(config, 400),
        make=SynthesisConfig(frames=config.frames),
        override_audit=True,
        seed=seed,
    )
    if not kept(out, made_from(settings, cloned, *judges), done="synthesis/report.json"):
        try:
            run_synthesize(settings)
        except DatasetError as error:
            print(f"{out}: {error}", flush=True)
            return None
    return out


def cell(config: MakeRefinement, task: str, seed: int) -> dict[str, np.ndarray]:
    """One task and seed from world model to true success."""
    torch.manual_seed(0)
    return judge(config, task, seed, arms(config, task, seed))


def judge(config: MakeRefinement, task: str, seed: int, made: dict[str, Path]) -> dict[str, np.ndarray]:
    """True success of every arm's episodes, from the same starts."""
    home = config.out / task
    spec = load_dream(home / dreamt(config, "wm", seed)).spec
    settings = truth_settings(
        task, spec, episodes=config.test_episodes, frames=config.frames, seed=config.test_seed + seed
    )
    found = {}
    with Truth(settings, Kept(config.out / "truth")) as truth:
        for name, folder in made.items():
            acting = load_policy(str(folder), spec=spec)
            frames = truth.frame_success(identity_of(str(folder), acting), acting, progress=f"{task} {name} {seed}")
            found[name] = episode_success(frames, persist=PERSIST).numpy()
    return found


# --- tables -----------------------------------------------------------------------------------------------------------


def rate(won: np.ndarray) -> str:
    between = wilson(int(won.sum()), len(won))
    return f"{won.mean():.2f} [{between.low:.2f}, {between.high:.2f}]"


def gain(ours: np.ndarray, theirs: np.ndarray) -> str:
    between = newcombe_paired(ours.astype(float), theirs.astype(float))
    return f"{ours.mean() - theirs.mean():+.2f} [{between.low:+.2f}, {between.high:+.2f}]"


def mean_gain(cells: list[tuple[np.ndarray, np.ndarray]]) -> str:
    """Mean over tasks and seeds of paired gains; the interval resamples tasks x seeds, and the episodes within each."""
    generator = np.random.default_rng(0)
    draws = []
    for _ in range(4000):
        means = []
        for i in generator.integers(len(cells), size=len(cells)):
            ours, theirs = cells[i]
            rows = generator.integers(len(ours), size=len(ours))
            means.append(ours[rows].mean() - theirs[rows].mean())
        draws.append(np.mean(means))
    low, high = np.quantile(draws, [0.025, 0.975])
    return f"{np.mean([a.mean() - b.mean() for a, b in cells]):+.3f} [{low:+.3f}, {high:+.3f}]"


def losses(cells: dict[str, tuple[np.ndarray, np.ndarray]]) -> str:
    """Cells in which an arm is worse than the cloned policy, by McNemar's exact test, two-sided, after Holm."""
    p = []
    for ours, theirs in cells.values():
        won, lost = int((ours & ~theirs).sum()), int((~ours & theirs).sum())
        p.append(binomtest(won, won + lost).pvalue if won + lost else 1.0)
    kept = multipletests(p, method="holm")[0]
    worse = [name for (name, (a, b)), significant in zip(cells.items(), kept) if significant and a.mean() < b.mean()]
    return ", ".join(worse) or "none"


def curve_rows(config: MakeRefinement) -> list[str]:
    """Imagined against true success along each refinement."""
    rows = []
    refined = [folders for arm, folders in REFINED.items() if arm in config.arms]
    for task in config.tasks:
        for seed, (started, folder) in product(range(config.seeds), refined):
            report = report_results(config.out / task / dreamt(config, folder, seed))
            for r in report["truth"]["checked"]:
                published = " (published)" if r["iteration"] == report["best_iteration"] else ""
                low, high = r["true_interval"]
                rows.append(
                    row(
                        f"{task}, {seed}",
                        started,
                        f"{r['iteration']}{published}",
                        f"{r['imagined']:.2f}",
                        f"{r['true']:.2f} [{low:.2f}, {high:.2f}]",
                        f"{r['called_success']} of {r['failures']}",
                    )
                )
    return rows


def main(config: MakeRefinement) -> None:
    together(config.jobs, [partial(prepare, config, task) for task in config.tasks])
    cells = [(task, seed) for task in config.tasks for seed in range(config.seeds)]
    found = together(config.jobs, [partial(cell, config, *one) for one in cells])
    won = {f"{task}, {seed}": made for (task, seed), made in zip(cells, found)}
    ours = [name for name in ("refined", "fine-tuned") if name in config.arms]
    controls = [name for name in CONTROLS if name in config.arms]
    rows = [
        row(cell, *map(rate, made.values()), *(gain(made[name], made["cloned"]) for name in ours))
        for cell, made in won.items()
    ]
    arms_made = list(next(iter(won.values())))
    summary: list[str] = []
    for name in arms_made[1:]:
        against: list[Any] = [mean_gain([(made[name], made["cloned"]) for made in won.values()])]
        for control in controls:
            pairs = [(made[name], made[control]) for made in won.values()]
            against.append("–" if name in CONTROLS else mean_gain(pairs))
        worse = losses({cell: (made[name], made["cloned"]) for cell, made in won.items()})
        summary.append(row(name, *against, worse))
    columns = [*arms_made, *(f"{name} - cloned" for name in ours)]
    means = ["mean gain over tasks and seeds", "on cloned", *(f"on {name}" for name in controls), "significant losses"]
    sections = [
        f"True success, {config.test_episodes} episodes each from the same starts.",
        table(row("task, seed", *columns), rows),
        table(row(*means), summary),
        table(
            "| task, seed | started from | iteration | imagined success | true success | true failures that the dream calls a success |",
            curve_rows(config),
        ),
    ]
    text = "\n\n".join(sections) + "\n"
    (config.out / f"tables{'-unet' if config.world_model == 'unet' else ''}.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main(tyro.cli(MakeRefinement, description=__doc__))
