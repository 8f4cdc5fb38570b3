"""Makes the unified-model tables of docs/results.md: one network for all beside models made for one thing each.

    python scripts/make_video_action.py --out results-video-action

One set of several Meta-World tasks: expert demonstrations, scripted attempts, and more recordings of the same tasks that are used as video alone.
On it learn, each for the same CPU time (--minutes of one thread; a few steps are timed first): both designs of unified models, without and with
the video alone; a cloned Gaussian and a diffusion policy; the autoregressive world model; an inverse model. Then

- policies: true success in the simulator, by task, from the same starts, which no training saw;
- forward: moved-pixel PSNR and action sensitivity on test episodes, beside the autoregressive world model (`worldline eval`);
- inverse: R2 of the actions between test frames, beside the inverse model made for that;
- planning: the better unified policy with its chunks first tried in its own dream (best of --candidates, judged by a scorer), beside itself alone;
- guidance: joint dreams whose actions are moved towards the cloned policy (policy-guided diffusion), by coefficient: how likely the actions become
  under it, and whether the imagined frames go along, as the inverse model reads them.

Everything is kept in --out; run the same command again after an interruption. Prints Markdown, and writes it to OUT/tables.md. What takes hours
here is deepened on a bigger machine with the same command and more --tasks, --seeds or --minutes.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from make_refinement import PERSIST, gain, rate
from result_tables import row, table
from stages import kept, record, seconds_a_step, train, truth_settings

from worldline.commands.dreaming import Evaluate, run_eval
from worldline.commands.outputs import report_results
from worldline.commands.rollouts import Kept, Truth, identity_of, weights_of
from worldline.commands.sampling import load_dream
from worldline.data import LeRobotDataset
from worldline.eval.probes import Probe
from worldline.eval.replays import Replays, join_replays, load_replays, open_for
from worldline.policies import load_policy
from worldline.rl_in_imagination.dream import Dream
from worldline.rl_in_imagination.guidance import block_score
from worldline.rl_in_imagination.planning import BestOfN
from worldline.rl_in_imagination.success import SuccessScorer, episode_success
from worldline.trainers import policy, probe, scorer, tokenizer, video_action, world_model
from worldline.trainers.loop import LoopConfig
from worldline.types import Clip, Observation, Policy
from worldline.worldmodels import VideoActionModel
from worldline.worldmodels.trajectories import Guidance
from worldline.worldmodels.video_action import INVERSE, JOINT

UNIFIED = ("uwm", "uva", "uwm+video", "uva+video")
CLONED = ("bc", "diffusion")
HORIZONS = (5, 10, 20, 40)
GUIDED_AT = (0, 10, 20, 30)  # frames of test episodes from which guided dreams begin
COEFFICIENTS = (0.0, 0.64, 1.28, 3.2, 6.4)


@dataclass(frozen=True, slots=True, kw_only=True)
class MakeVideoAction:
    """Record, train, judge, print the tables."""

    out: Path
    tasks: tuple[str, ...] = ("drawer-open-v3", "door-open-v3", "button-press-topdown-v3")
    seeds: int = 1
    minutes: float = 20.0
    """CPU time of training each model, on one thread."""
    demonstrations: int = 20
    """Of the expert, a task."""
    attempts: int = 60
    """Scripted episodes of all kinds, a task: what follows when things go wrong."""
    videos: int = 100
    """More such episodes, a task, of which no action is looked at."""
    tests: int = 20
    """A task, for forward and inverse."""
    episodes: int = 100
    """In the simulator, a task."""
    frames: int = 41
    tokenizer_steps: int = 1500
    planned: int = 30
    """Of those, planned: a decision dreams every candidate, and an episode takes 20 seconds where the policy alone takes 1."""
    candidates: int = 8
    """Chunks tried at each decision of a planning policy."""
    beyond: int = 8
    """Frames imagined after each."""


def prepare(config: MakeVideoAction) -> None:
    for task in config.tasks:
        world, home = f"metaworld/{task}", config.out / task
        record(home / "demonstrations", world, config.demonstrations, policy="expert", seed=2)
        record(home / "attempts", world, config.attempts, policy="mixed", seed=0)
        record(home / "video", world, config.videos, policy="mixed", seed=6, without_actions=True)
        record(home / "test", world, config.tests, policy="mixed", seed=1000)
    loop = replace(tokenizer.PRESETS["tiny"][1]["loop"], steps=config.tokenizer_steps)
    train(tokenizer, tokenizer.TrainTokenizer(data=acting(config), out=config.out / "tok", loop=loop))


def acting(config: MakeVideoAction) -> tuple[Path, ...]:
    """What everything learns from."""
    return tuple(config.out / task / kind for task in config.tasks for kind in ("demonstrations", "attempts"))


def stage_of(config: MakeVideoAction, arm: str, seed: int) -> tuple[Any, Any]:
    """The stage of an arm and its settings, their number of steps apart."""
    out, tok = config.out / f"{arm}{seed}", config.out / "tok"
    data: dict[str, Any] = {"data": acting(config), "out": out}
    if arm in CLONED:
        loop = LoopConfig(steps=1, batch_size=64, lr=1e-3, ema=0.995, seed=seed)
        kind: Any = arm
        return policy, policy.TrainPolicy(**data, kind=kind, demonstrations="expert", loop=loop)
    if arm == "autoregressive":
        preset = world_model.PRESETS["tiny"][1]
        settings = replace(preset["model"], text="hashed")
        loop = replace(preset["loop"], seed=seed)
        return world_model, world_model.TrainWorldModel(**data, tokenizer=tok, model=settings, loop=loop)
    if arm == "inverse":
        loop = LoopConfig(steps=1, batch_size=64, lr=1e-3, ema=0.99, seed=seed)
        return probe, probe.TrainProbe(**data, target="action", tokenizer=tok, loop=loop)
    if arm == "scorer":
        loop = LoopConfig(steps=1, batch_size=64, lr=1e-3, ema=0.99, seed=seed)
        reads = replace(scorer.TrainScorer(**data).scorer, text="hashed")
        return scorer, scorer.TrainScorer(**data, tokenizer=tok, scorer=reads, loop=loop)
    preset = video_action.PRESETS["tiny"][1]
    settings = replace(preset["model"], design=arm.partition("+")[0], text="hashed")
    more = tuple(config.out / task / "video" for task in config.tasks) if arm.endswith("+video") else ()
    loop = replace(preset["loop"], seed=seed)
    return video_action, video_action.TrainVideoAction(
        **data, video=more, tokenizer=tok, model=settings, demonstrations="success", loop=loop
    )


def trained(config: MakeVideoAction, arm: str, seed: int) -> Path:
    module, settings = stage_of(config, arm, seed)
    steps = max(20, round(60 * config.minutes / seconds_a_step(module, settings)))
    return train(module, replace(settings, loop=replace(settings.loop, steps=steps)))


# --- policies ---------------------------------------------------------------------------------------------------------


def successes(
    config: MakeVideoAction, folder: Path, seed: int, episodes: int, judge: Path | None = None
) -> dict[str, np.ndarray]:
    """Task -> true success of episodes, the same starts for every policy. With a scorer (`judge`) a unified one plans in its own dream."""
    found = {}
    for task in config.tasks:
        spec = LeRobotDataset(config.out / task / "demonstrations").spec
        settings = truth_settings(task, spec, episodes=episodes, frames=config.frames, seed=70 + seed)
        acts: Policy = load_policy(str(folder), spec=spec)
        known = identity_of(str(folder), acts)
        if judge is not None:
            options = {"candidates": config.candidates, "beyond": config.beyond}
            acts = BestOfN(acts, load_dream(folder), SuccessScorer.from_pretrained(judge), **options)
            known = [*known, "planning", options, weights_of(judge)]
        with Truth(settings, Kept(config.out / "truth")) as truth:
            frames = truth.frame_success(known, acts, progress=f"{folder.name} {task}")
        found[task] = episode_success(frames, persist=PERSIST).numpy()
    return found


def policy_tables(config: MakeVideoAction, seed: int) -> list[str]:
    """Of all policies, and of the better design planning."""
    won = {arm: successes(config, trained(config, arm, seed), seed, config.episodes) for arm in (*CLONED, *UNIFIED)}
    rows = []
    for arm, by_task in won.items():
        every = np.concatenate(list(by_task.values()))
        others = [np.concatenate(list(won[base].values())) for base in CLONED]
        less = np.concatenate(list(won[arm.removesuffix("+video")].values()))
        rows.append(
            row(
                f"{arm}, {seed}",
                *(rate(by_task[task]) for task in config.tasks),
                rate(every),
                *(gain(every, other) for other in others),
                gain(every, less) if arm.endswith("+video") else "–",
            )
        )
    head = f"| policy, seed | {' | '.join(config.tasks)} | all | - bc | - diffusion | - without the video |"
    best = max(UNIFIED, key=lambda arm: np.concatenate(list(won[arm].values())).mean())
    return [table(head, rows), *planning_tables(config, best, seed)]


def planning_tables(config: MakeVideoAction, best: str, seed: int) -> list[str]:
    """The policy alone and with its chunks first tried in its own dream, from the same starts."""
    judge, folder = trained(config, "scorer", seed), trained(config, best, seed)
    by_name = {
        best: successes(config, folder, seed, config.planned),
        f"{best}, best of {config.candidates}": successes(config, folder, seed, config.planned, judge),
    }
    every = {name: np.concatenate(list(by_task.values())) for name, by_task in by_name.items()}
    rows = [
        row(f"{name}, {seed}", *(rate(by_task[task]) for task in config.tasks), rate(every[name]))
        for name, by_task in by_name.items()
    ]
    plans = table(f"| policy, seed, {config.planned} episodes a task | {' | '.join(config.tasks)} | all |", rows)
    alone, planned = every.values()
    return [plans, f"Planning - alone: {gain(planned, alone)}"]


# --- forward and inverse ----------------------------------------------------------------------------------------------


def forward_table(config: MakeVideoAction, seed: int) -> str:
    found = {}
    for arm in ("autoregressive", *UNIFIED):
        out = config.out / f"eval-{arm}{seed}"
        folder = trained(config, arm, seed)
        if not kept(out, {"model": weights_of(folder), "frames": config.frames}, done="report.json"):
            data = tuple(config.out / task / "test" for task in config.tasks)
            run_eval(Evaluate(world_model=folder, data=data, out=out, split="all", frames=config.frames))
        found[arm] = report_results(out)
    rows = []
    for arm, results in found.items():
        at = {(h["predictor"], h["camera"], h["horizon"]): h["moved_psnr"] for h in results["horizons"]}
        for camera, sensitivity in results["action_sensitivity"].items():
            theirs = found["autoregressive"]["action_sensitivity"][camera]
            shares = [
                sensitivity[kind]["gap"]["gain_db"] / theirs[kind]["gap"]["gain_db"]
                for kind in ("shuffled", "negated", "zeroed")
            ]
            rows.append(
                row(
                    f"{arm}, {seed}",
                    camera,
                    *(f"{at['true', camera, h]:.1f}" for h in HORIZONS if ("true", camera, h) in at),
                    f"{at['copy-first', camera, min(20, config.frames - 1)]:.1f}"
                    if ("copy-first", camera, min(20, config.frames - 1)) in at
                    else "–",
                    *(f"{sensitivity[kind]['gap']['gain_db']:+.1f}" for kind in ("shuffled", "negated", "zeroed")),
                    f"{100 * min(shares):.0f}%",
                )
            )
    head = (
        f"| world model, seed | camera | {' | '.join(f'moved PSNR at {h}' for h in HORIZONS if h < config.frames)} | first frame repeated, at 20 "
        "| over shuffled actions, dB | negated | zeroed | least share of the autoregressive model's |"
    )
    return table(head, rows)


def tests_of(config: MakeVideoAction, dream: Dream) -> Replays:
    cameras = [c.name for c in dream.spec.cameras]
    parts = []
    for task in config.tasks:
        dataset, stride = open_for(dream.spec, config.out / task / "test")
        parts.append(load_replays(dataset, range(len(dataset)), cameras=cameras, frames=config.frames, stride=stride))
    return join_replays(parts)


def inverse_table(config: MakeVideoAction, seed: int) -> str:
    dream = load_dream(trained(config, "uwm", seed))
    replays = tests_of(config, dream)
    truth = replays.actions.flatten(0, 1).mean(1).numpy()  # the mean action of a block: what a probe reads
    read = {}
    for arm in UNIFIED:
        model = VideoActionModel.from_pretrained(trained(config, arm, seed))
        latents = dream.tokenizer.encode(replays.frames)
        read[arm] = blocks(model, latents, replays.poses, replays.instruction).flatten(0, 1).mean(1).numpy()
    alone = Probe.from_pretrained(trained(config, "inverse", seed))
    read["inverse model"] = alone.read_video(replays.frames).flatten(0, 1).numpy()
    names = dream.spec.action.names
    rows = [
        row(
            f"{name}, {seed}",
            *(f"{1 - np.square(x[:, i] - truth[:, i]).mean() / truth[:, i].var():.2f}" for i in range(len(names))),
        )
        for name, x in read.items()
    ]
    return table(f"| inverse, seed | {' | '.join(f'R2 of {name}' for name in names)} |", rows)


def blocks(model: VideoActionModel, latents: Any, poses: torch.Tensor, instruction: tuple[str, ...]) -> torch.Tensor:
    """The block that leaves each frame, "n t-1 k a", by the inverse query for one coming frame."""
    h, t, found = model.config.history, poses.shape[1], []
    query, (k, a) = INVERSE.first(1, model.config.horizon), (model.spec.control_steps, model.spec.action.dim)
    for i in range(t - 1):
        begin = max(0, i + 1 - h)
        seen = Clip(
            frames={c: z[:, begin : i + 1] for c, z in latents.items()},
            poses=poses[:, begin : i + 1],
            actions=torch.zeros(len(poses), i - begin, k, a),
            instruction=instruction,
        )
        coming = {c: z[:, i + 1 : i + 2] for c, z in latents.items()}
        found.append(model.sample(seen, query, seeds=torch.arange(len(poses)), frames=coming).actions[:, 0])
    return torch.stack(found, 1)


# --- guidance ---------------------------------------------------------------------------------------------------------


def guided_table(config: MakeVideoAction, seed: int) -> str:
    """Joint dreams of one horizon from test frames, guided by the cloned policy."""
    dream = load_dream(trained(config, "uwm", seed))
    model: Any = dream.world_model
    replays = tests_of(config, dream)
    guide: Any = load_policy(str(trained(config, "bc", seed)), spec=dream.spec)
    reader = Probe.from_pretrained(trained(config, "inverse", seed))
    latents = dream.tokenizer.encode(replays.frames)
    horizon, rows = model.config.horizon, []
    shown = {c: torch.cat([x[:, i] for i in GUIDED_AT]) for c, x in replays.frames.items()}
    pose, told = torch.cat([replays.poses[:, i] for i in GUIDED_AT]), replays.instruction * len(GUIDED_AT)
    now = Observation(images=shown, pose=pose, instruction=told)
    n, (k, a) = len(pose), (model.spec.control_steps, model.spec.action.dim)
    seen = Clip(
        frames={c: torch.cat([z[:, i : i + 1] for i in GUIDED_AT]) for c, z in latents.items()},
        poses=pose[:, None],
        actions=torch.zeros(n, 0, k, a),
        instruction=told,
    )
    recorded = torch.cat([replays.actions[:, i : i + horizon] for i in GUIDED_AT]).mean(2).flatten(0, 1)
    for coefficient in COEFFICIENTS:
        guidance = Guidance(coefficient=coefficient) if coefficient else None
        made = model.sample(
            seen, JOINT, seeds=torch.arange(n), guidance=guidance, score=block_score(guide, now) if guidance else None
        )
        chunk = made.actions.flatten(1, 2)[:, : guide.chunk_length]
        likely = guide.log_prob(now, guide.reset(n), chunk).detach() / chunk[0].numel()
        frames = dream.tokenizer.decode({c: torch.cat([seen.frames[c].to(z), z], 1) for c, z in made.latents.items()})
        read, said = reader.read_video(frames).flatten(0, 1), made.actions.mean(2).flatten(0, 1)
        moves = recorded.std(0) > 1e-3
        r2 = 1 - (read - said).square().mean(0)[moves] / said.var(0)[moves].clamp(min=1e-6)
        rows.append(
            row(
                f"{coefficient:g}, {seed}",
                f"{float(likely.mean()):.2f} [{float(likely.quantile(0.05)):.2f}, {float(likely.quantile(0.95)):.2f}]",
                f"{float((said - recorded).abs().mean()):.3f}",
                f"{float(r2.mean()):.2f}",
            )
        )
    head = (
        "| guidance coefficient, seed | log-density of the actions under the cloned policy, a number (5% to 95% of dreams) | mean distance from the recorded "
        "actions | R2 of the imagined actions as read off the imagined frames |"
    )
    return table(head, rows)


def main(config: MakeVideoAction) -> None:
    torch.set_num_threads(1)
    prepare(config)
    sections = [
        f"{len(config.tasks)} tasks, {config.minutes:g} CPU minutes of one thread each; a task: {config.demonstrations} demonstrations, "
        f"{config.attempts} attempts, {config.videos} episodes of video alone where that is said. True success of {config.episodes} "
        "episodes a task from the same starts."
    ]
    for seed in range(config.seeds):
        sections += [*policy_tables(config, seed), forward_table(config, seed), inverse_table(config, seed)]
        sections.append(guided_table(config, seed))
    text = "\n\n".join(sections) + "\n"
    (config.out / "tables.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main(tyro.cli(MakeVideoAction, description=__doc__))
