"""Makes the post-training tables of docs/results.md: a world model, the same after RLIR, and the same after as much more supervised training.

    python scripts/make_posttraining.py --out results-posttraining

One set of several Meta-World tasks. On its training episodes learn a world model (--minutes of CPU time of one thread), and two inverse dynamics
models of different architectures on disjoint halves: one rewards, the other judges. The world model is post-trained for --rl-minutes; the control
goes on with supervised training for the same time. On test episodes, which nothing of all this saw, each dreams every episode from its first frame:

- how well the judge reads the commanded actions off the dreams, paired by episode, and the ceiling: off real video through the tokenizer;
- moved-pixel PSNR, action sensitivity and latent Frechet distance (`worldline eval`);
- how each ranks policies of another lineage on one of the tasks (`worldline rank --against` the model as it was).

Everything is kept in --out; run the same command again after an interruption. Prints Markdown, and writes it to OUT/tables.md. What takes hours
here is deepened on a bigger machine with the same command and more --tasks, --seeds, --minutes or --jobs.
"""

import hashlib
import json
import shutil
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import tyro
from result_tables import number, row, table
from stages import kept, pace, record, seconds_a_step, together, train

from worldline.checkpoint import best_device, load_config, to_json
from worldline.commands.dreaming import Evaluate, run_eval
from worldline.commands.outputs import report_results
from worldline.commands.posttraining import Posttrain, run_posttrain
from worldline.commands.ranking import Rank, run_rank
from worldline.commands.ranking_page import change_rows
from worldline.commands.rollouts import weights_of
from worldline.eval.intervals import paired_interval
from worldline.eval.replays import Replays, join_replays, load_replays, open_for
from worldline.rl_in_imagination.inverse import InverseModel
from worldline.tokenizers import Tokenizer
from worldline.trainers import inverse, policy, scorer, tokenizer, video_action, world_model
from worldline.trainers.loop import LoopConfig
from worldline.trainers.posttraining import PosttrainSettings, opening
from worldline.types import Clip
from worldline.worldmodels import load_world_model

ARMS = ("pretrained", "supervised", "rlir")
# half of the episodes and architecture of the inverse models
INVERSE: dict[str, tuple[Any, Any]] = {"reward": ("first", "conv"), "judge": ("second", "transformer")}
HORIZONS = (5, 10, 20, 40)
# demonstrations, steps, seed of the policies to rank; corrupted ones share a training
CLONES = {"bc20": (20, 600, 0), "bc5": (5, 300, 1), "bc2": (2, 200, 2)}
CORRUPTED = ("bc20@noise=0.5", "bc20@noise=1.0,lag=4", "bc5@noise=1.0")


@dataclass(frozen=True, slots=True, kw_only=True)
class MakePosttraining:
    """Record, train, post-train, judge, print the tables."""

    out: Path
    tasks: tuple[str, ...] = ("drawer-open-v3", "door-open-v3", "button-press-topdown-v3")
    seeds: int = 2
    """Of world models, inverse models and post-training; datasets, tokenizer and ranked policies are shared."""
    minutes: float = 20.0
    """CPU time of one thread of the world model's training."""
    rl_minutes: float = 20.0
    """Of post-training, its checks apart, and of the supervised control."""
    inverse_minutes: float = 10.0
    """Of each inverse model."""
    fakes: float = 0.2
    """Share of the inverse models' windows that show no motion and carry another window's action. With 0.1 the convolutional one read a
    quarter of the actions' variance off one frame held still (skill 0.26; its audit allows 0.2)."""
    design: Literal["autoregressive", "uwm"] = "autoregressive"
    episodes: int = 300
    """Scripted episodes of all kinds a task that everything learns from. With 60 of them an inverse model reads nine tenths of the
    variance of the actions it has seen (R2 0.93) and a third of those that it has not."""
    tests: int = 20
    """And those that judge, a task."""
    scripted: str = "perturbed"
    """Recording policy. Where actions follow from what is seen (mixed: a quarter are the expert's), an inverse model learns to read them off
    one still frame, and its audit fails."""
    frames: int = 41
    batch_size: int | None = None
    """Clips a step of the world models' trainings (None: the preset's, which is small because small batches buy more steps on a CPU)."""
    tokenizer_steps: int = 1500
    ranked: str | None = "drawer-open-v3"
    """The task whose policies are ranked (None: none)."""
    ranked_episodes: int = 50
    scorer_steps: int = 400
    """Of the success scorer that ranks."""
    rl: PosttrainSettings = field(default_factory=lambda: PosttrainSettings(check_every=20, patience=99))
    """Its iterations are those that fit into --rl-minutes."""
    jobs: int = 1
    """Trainings at a time, each in a process of its own: for machines with many cores, with or without a GPU."""


def prepare(config: MakePosttraining) -> None:
    for task in config.tasks:
        record(config.out / task / "data", f"metaworld/{task}", config.episodes, policy=config.scripted, seed=0)
        record(config.out / task / "test", f"metaworld/{task}", config.tests, policy=config.scripted, seed=1000)
    loop = replace(tokenizer.PRESETS["tiny"][1]["loop"], steps=config.tokenizer_steps)
    train(tokenizer, tokenizer.TrainTokenizer(data=real(config), out=config.out / "tok", loop=loop))
    if config.ranked is not None:
        record(config.out / config.ranked / "demonstrations", f"metaworld/{config.ranked}", 27, policy="expert", seed=3)
        together(config.jobs, [partial(clone, config.out / config.ranked, name) for name in CLONES])


def clone(home: Path, name: str) -> Path:
    """A policy to be ranked."""
    episodes, steps, seed = CLONES[name]
    settings = policy.TrainPolicy(data=(home / "demonstrations",), out=home / name, episodes=episodes)
    return train(policy, replace(settings, loop=LoopConfig(steps=steps, batch_size=64, lr=1e-3, seed=seed)))


def real(config: MakePosttraining) -> tuple[Path, ...]:
    return tuple(config.out / task / "data" for task in config.tasks)


def timed(module: Any, settings: Any, minutes: float) -> Path:
    """Train for so much CPU time of one thread."""
    steps = max(20, round(60 * minutes / seconds_a_step(module, settings)))
    return train(module, replace(settings, loop=replace(settings.loop, steps=steps)))


# --- models -----------------------------------------------------------------------------------------------------------


def pretraining(config: MakePosttraining, seed: int) -> tuple[Any, Any]:
    """The stage of the world model and its settings."""
    module: Any = world_model if config.design == "autoregressive" else video_action
    build: Any = module.TrainWorldModel if config.design == "autoregressive" else module.TrainVideoAction
    preset = module.PRESETS["tiny"][1]
    data: dict[str, Any] = {
        "data": real(config),
        "tokenizer": config.out / "tok",
        "out": config.out / f"pretrained{seed}",
    }
    loop = replace(preset["loop"], seed=seed)
    if config.batch_size is not None:
        loop = replace(loop, batch_size=config.batch_size)
    return module, build(**data, model=replace(preset["model"], text="hashed"), loop=loop)


def pretrain(config: MakePosttraining, seed: int) -> Path:
    module, settings = pretraining(config, seed)
    return timed(module, settings, config.minutes)


def learn_inverse(config: MakePosttraining, seed: int, name: str) -> Path:
    """The one that rewards, or the one that judges."""
    half, architecture = INVERSE[name]
    out = config.out / f"{name}{seed}"
    settings = inverse.TrainInverse(
        data=real(config), tokenizer=config.out / "tok", out=out, half=half, fakes=config.fakes
    )
    model, loop = replace(settings.model, architecture=architecture), replace(settings.loop, seed=seed)
    return timed(inverse, replace(settings, model=model, loop=loop), config.inverse_minutes)


def inverses(config: MakePosttraining, seed: int) -> dict[str, Path]:
    return {name: config.out / f"{name}{seed}" for name in INVERSE}


def posttraining(config: MakePosttraining, seed: int) -> Posttrain:
    rl = replace(config.rl, seed=seed)
    return Posttrain(
        world_model=config.out / f"pretrained{seed}",
        **inverses(config, seed),
        data=real(config),
        out=config.out / f"rlir{seed}",
        rl=rl,
        override_audit=True,
        videos=3,
    )


def models_of(settings: Posttrain) -> list[str]:
    return [weights_of(folder) for folder in (settings.world_model, settings.reward, settings.judge)]


def seconds_an_iteration(settings: Posttrain) -> float:
    """CPU seconds of an iteration of post-training, its checks apart, timed once for these models and updates: both are in the file's name."""

    def run(iterations: int, out: Path) -> None:
        rl = replace(settings.rl, iterations=iterations, check_every=100, check_clips=4)
        run_posttrain(replace(settings, out=out, rl=rl, videos=0), progress=False)

    timed_with = json.dumps([to_json(settings.rl.grpo), models_of(settings)], sort_keys=True)
    mark = hashlib.sha256(timed_with.encode()).hexdigest()[:8]
    return pace(run, settings.out.with_name(f"{settings.out.name}-{mark}"), (1, 3))


def post_train(config: MakePosttraining, seed: int) -> Path:
    settings = posttraining(config, seed)
    told = to_json(settings.rl)
    rl = {f"rl.{k}": v for k, v in told.items() if k not in ("grpo", "iterations")}
    grpo = {f"rl.grpo.{k}": v for k, v in told["grpo"].items()}
    made_with = {"models": models_of(settings), "rl-minutes": config.rl_minutes, **rl, **grpo}
    if not kept(settings.out, made_with, done="report.json"):  # before anything is timed
        iterations = max(2, round(60 * config.rl_minutes / seconds_an_iteration(settings)))
        run_posttrain(replace(settings, rl=replace(settings.rl, iterations=iterations)))
    return settings.out


def supervise(config: MakePosttraining, seed: int) -> Path:
    """The control: it goes on at a third of the rates, which cool down to nothing again."""
    module, settings = pretraining(config, seed)
    loop = replace(settings.loop, lr=settings.loop.lr / 3, muon_lr=settings.loop.muon_lr / 3)
    control = replace(settings, out=config.out / f"supervised{seed}", init_from=settings.out, loop=loop)
    return timed(module, control, config.rl_minutes)


def arms(config: MakePosttraining) -> dict[int, dict[str, Path]]:
    """The world models of each seed."""
    seeds = range(config.seeds)
    first = [partial(pretrain, config, seed) for seed in seeds]
    together(config.jobs, [*first, *(partial(learn_inverse, config, seed, name) for seed in seeds for name in INVERSE)])
    together(config.jobs, [partial(part, config, seed) for seed in seeds for part in (post_train, supervise)])
    return {seed: {arm: config.out / f"{arm}{seed}" for arm in ARMS} for seed in seeds}


# --- judging ----------------------------------------------------------------------------------------------------------


def tests_of(config: MakePosttraining, begun: Path) -> Replays:
    spec = load_world_model(begun)[0].spec
    parts = []
    for task in config.tasks:
        dataset, stride = open_for(spec, config.out / task / "test")
        cameras = [c.name for c in spec.cameras]
        parts.append(load_replays(dataset, range(len(dataset)), cameras=cameras, frames=config.frames, stride=stride))
    return join_replays(parts)


@torch.no_grad()
def agreement(folder: Path, judges: dict[str, Path], replays: Replays, *, dreams: bool = True) -> dict[str, np.ndarray]:
    """What each judge reads off each test episode, dreamt from its first frame, or as the tokenizer shows it."""
    device = best_device()
    model, seeing = load_world_model(folder)
    readers = {name: InverseModel.from_pretrained(judge) for name, judge in judges.items()}
    for module in (model, seeing, *readers.values()):
        module.to(device)  # pyright: ignore[reportAttributeAccessIssue]
    found: dict[str, list[torch.Tensor]] = {name: [] for name in readers}
    for rows in torch.arange(len(replays.poses)).split(20):
        clip = clip_of(replays, seeing, rows, device)
        latents = dict(clip.frames)
        if dreams:
            count = clip.actions.shape[1] // model.spec.chunk * model.spec.chunk
            clip = replace(clip, actions=clip.actions[:, :count])
            _, made = model.imagine(model.observe(opening(clip)), clip.actions, seeds=rows + 7919)
            latents = {c: torch.cat([clip.frames[c][:, :1].to(z), z], 1) for c, z in made.latents.items()}
        frames = seeing.decode(latents)
        for name, reader in readers.items():
            found[name].append(reader.agreement(frames, clip.actions).mean(1).cpu())
    return {name: torch.cat(each).numpy() for name, each in found.items()}


def clip_of(replays: Replays, seeing: Tokenizer, rows: torch.Tensor, device: str) -> Clip:
    frames = seeing.encode({c: x[rows].to(device) for c, x in replays.frames.items()})
    told = tuple(replays.instruction[int(i)] for i in rows)
    poses, actions = replays.poses[rows].to(device), replays.actions[rows].to(device)
    return Clip(frames=frames, poses=poses, actions=actions, instruction=told)


def evaluated(config: MakePosttraining, folder: Path) -> dict[str, Any]:
    out = folder.with_name(f"eval-{folder.name}")
    if not kept(out, {"model": weights_of(folder), "frames": config.frames}, done="report.json"):
        data = tuple(config.out / task / "test" for task in config.tasks)
        run_eval(Evaluate(world_model=folder, data=data, out=out, split="all", frames=config.frames))
    return report_results(out)


def ranked(config: MakePosttraining, seed: int, made: dict[str, Path]) -> list[str]:
    """A row an arm: how it ranks the policies, and what changed since pretraining."""
    if config.ranked is None:
        return []
    home, world = config.out / config.ranked, f"metaworld/{config.ranked}"
    judge = scorer.TrainScorer(
        data=(home / "data",),
        out=home / f"success{seed}",
        tokenizer=config.out / "tok",
        loop=LoopConfig(steps=config.scorer_steps, batch_size=64, lr=1e-3, ema=0.99, seed=seed),
    )
    train(scorer, judge)
    rows, first = [], config.out / f"rank-{ARMS[0]}{seed}"
    for arm in ARMS:
        out = config.out / f"rank-{arm}{seed}"
        if arm != ARMS[0] and not (out / "rollouts").is_dir():
            shutil.copytree(first / "rollouts", out / "rollouts")  # the true rollouts are the same
        rank = Rank(
            world_model=made[arm],
            scorer=judge.out,
            policies=tuple(str(home / name) for name in (*CLONES, *CORRUPTED)),
            truth=world,
            data=(home / "test",),
            replays="all",
            episodes=config.ranked_episodes,
            imagined_episodes=config.ranked_episodes,
            against=None if arm == ARMS[0] else first,
            out=out,
        )
        run_rank(rank)
        results = report_results(out)
        s, change = results["statistics"], results["change"]
        cells = [number(s[name], 3) for name in ("pearson", "mmrv", "bias", "mean_absolute_error")]
        rows.append(
            row(f"{arm}, {seed}", *cells, *(r[3] for r in change_rows(change)))
            if change
            else row(f"{arm}, {seed}", *cells, *["–"] * 4)
        )
    return rows


# --- tables -----------------------------------------------------------------------------------------------------------


def following(
    made: dict[str, Path], judges: dict[str, Path], replays: Replays, seed: int
) -> tuple[list[str], dict[str, np.ndarray]]:
    """What the judge, and the reward model, read off each arm's dreams; and the judge's word on each test episode."""
    read = {arm: agreement(folder, judges, replays) for arm, folder in made.items()}
    said = {arm: each["judge"] for arm, each in read.items()}
    earned = {arm: each["reward"].mean() for arm, each in read.items()}
    ceiling = agreement(made["pretrained"], judges, replays, dreams=False)["judge"]
    gap = ceiling.mean() - said["pretrained"].mean()
    rows = []
    for arm, values in said.items():
        closed = "–" if arm == "pretrained" or gap <= 0 else f"{(values.mean() - said['pretrained'].mean()) / gap:.0%}"
        cells = ["–" if arm == base else _paired(values, said[base]) for base in ("pretrained", "supervised")]
        rows.append(row(f"{arm}, {seed}", f"{values.mean():.3f}", *cells, closed, f"{earned[arm]:.3f}"))
    rows.append(row(f"real video through the tokenizer, {seed}", f"{ceiling.mean():.3f}", *["–"] * 4))
    return rows, said


def over_seeds(said: list[dict[str, np.ndarray]]) -> list[str]:
    """The rows of all seeds together: each test episode by its mean over them."""
    mean = {arm: np.mean([one[arm] for one in said], 0) for arm in ARMS}
    rows = []
    for arm, values in mean.items():
        cells = ["–" if arm == base else _paired(values, mean[base]) for base in ("pretrained", "supervised")]
        rows.append(row(f"{arm}, all {len(said)} seeds", f"{values.mean():.3f}", *cells, "–", "–"))
    return rows


def _paired(ours: np.ndarray, theirs: np.ndarray) -> str:
    found = paired_interval(torch.from_numpy(ours), torch.from_numpy(theirs))
    if found.mean is None or found.interval is None:
        return "–"
    return f"{found.mean:+.3f} [{found.interval.low:+.3f}, {found.interval.high:+.3f}]"


def pictures(config: MakePosttraining, made: dict[str, Path], seed: int) -> list[str]:
    rows = []
    for arm, folder in made.items():
        found = evaluated(config, folder)
        at = {(h["predictor"], h["camera"], h["horizon"]): h["moved_psnr"] for h in found["horizons"]}
        distance = {(r["predictor"], r["last"]): r["distance"] for r in found["latent_frechet"]["rows"]}
        last = max((r for p, r in distance if p == "true"), default=None)
        for camera, sensitivity in found["action_sensitivity"].items():
            rows.append(
                row(
                    f"{arm}, {seed}",
                    camera,
                    *(f"{at['true', camera, h]:.2f}" if ("true", camera, h) in at else "–" for h in HORIZONS),
                    *(f"{sensitivity[kind]['gap']['gain_db']:+.2f}" for kind in ("shuffled", "negated", "zeroed")),
                    "–" if last is None else f"{distance['true', last]:.3f}",
                )
            )
    return rows


def audits(judges: dict[str, Path], seed: int) -> list[str]:
    rows = []
    for name, folder in judges.items():
        facts = load_config(folder, part="inverse")["provenance"]
        skills = {s["kind"]: s["skill"] for s in facts["audit"]["scores"]}
        worst = max((k for k in skills if k not in ("exact", "tokenizer")), key=lambda k: skills[k])
        cells = [
            f"{facts['r2']:.2f}",
            f"{skills['exact']:.2f}",
            f"{skills['tokenizer']:.2f}",
            f"{worst} {skills[worst]:.2f}",
        ]
        rows.append(row(f"{name}, {seed}", *cells, "; ".join(facts["audit"]["failures"]) or "passed"))
    return rows


def main(config: MakePosttraining) -> None:
    torch.set_num_threads(1)
    prepare(config)
    sections: dict[str, list[str]] = {"audit": [], "following": [], "pictures": [], "ranking": []}
    paces, said, made_by = [], [], arms(config)
    together(config.jobs, [partial(evaluated, config, folder) for made in made_by.values() for folder in made.values()])
    ranks = together(config.jobs, [partial(ranked, config, seed, made) for seed, made in made_by.items()])
    for seed, made in made_by.items():
        judges = inverses(config, seed)
        replays = tests_of(config, made["pretrained"])
        sections["audit"] += audits(judges, seed)
        rows, by_episode = following(made, judges, replays, seed)
        sections["following"] += rows
        said.append(by_episode)
        sections["pictures"] += pictures(config, made, seed)
        sections["ranking"] += ranks[seed]
        report = report_results(made["rlir"])
        took = seconds_an_iteration(posttraining(config, seed))
        paces.append(
            f"Seed {seed}: {len(report['history'])} iterations of {took:.1f} CPU seconds; published: iteration {report['best_iteration']}; "
            f"stopped because {report['stopped']}."
        )
    if len(said) > 1:
        sections["following"] += over_seeds(said)
    heads = {
        "audit": "| inverse model, seed | R2 | skill on real clips | through the tokenizer | on the worst kind of spoiled clips | audit |",
        "following": "| world model, seed | judge | - pretrained | - supervised | gap closed | reward model |",
        "pictures": f"| world model, seed | camera | {' | '.join(f'moved PSNR at {h}' for h in HORIZONS)} | over shuffled actions, dB | negated "
        "| zeroed | latent Frechet, last clip |",
        "ranking": "| world model, seed | r | MMRV | bias | mean absolute error | r - pretrained | MMRV | bias | mean absolute error |",
    }
    parts = [
        f"{len(config.tasks)} tasks, {config.design}: {config.minutes:g} CPU minutes of pretraining, {config.rl_minutes:g} of post-training or of "
        f"supervised training; {config.tests} test episodes a task of {config.frames} frames, dreamt from the first.",
        *(table(heads[name], rows) for name, rows in sections.items() if rows),
        *paces,
    ]
    text = "\n\n".join(parts) + "\n"
    (config.out / "tables.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main(tyro.cli(MakePosttraining, description=__doc__))
