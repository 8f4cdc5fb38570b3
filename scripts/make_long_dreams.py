"""Makes the long-dream tables of docs/results.md: what each mechanism does to a dream of 125 frames.

    python scripts/make_long_dreams.py --out results-long

One fixed set of Meta-World tasks, two cameras, scripted play that never comes to rest. Every arm is the `tiny` world model with
other settings, trained on the same data for the same arithmetic (as many steps as the FLOPs of --budget allow), and measured by
`worldline eval` on the same test episodes. Then the settings of sampling are swept on the first arm: the level history is given, and
guidance, each by the error early (frame 10) and late (frame 100). Everything is kept in --out; run the same command again after
an interruption. Prints Markdown, and writes it to OUT/tables.md.

What takes hours here is deepened on a bigger machine with the same command and more --tasks, --seeds, --budget or --arms.
"""

import json
import shutil
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import tyro
from result_tables import row, table
from stages import kept, record, train, training_gflop

from worldline.commands.dreaming import Evaluate, run_eval
from worldline.commands.outputs import report_results
from worldline.commands.rollouts import weights_of
from worldline.commands.sampling import load_dream
from worldline.diffusion import LevelDistribution
from worldline.eval.drift import drift_results
from worldline.eval.excess import ExcessRatio, excess_ratio, excess_ratio_of_reports
from worldline.eval.replays import Replays, join_replays, load_replays, open_for
from worldline.eval.video_metrics import compare_videos
from worldline.eval.world_model import replay_in_dream
from worldline.rl_in_imagination.dream import Dream
from worldline.trainers import probe, tokenizer, world_model
from worldline.trainers.loop import LoopConfig
from worldline.trainers.world_model import TrainWorldModel
from worldline.worldmodels import AutoregressiveConfig
from worldline.worldmodels.memory import MemoryConfig

PLAIN: AutoregressiveConfig = world_model.PRESETS["tiny"][1]["model"]
FULL = replace(
    PLAIN,
    network=replace(PLAIN.network, memory=MemoryConfig(start=True, recent=1, nearest=2)),
    own_history=0.5,
    own_rounds=6,
    history_level=0.1,  # by drift, of an earlier model: 0.88 of the excess at 0 (docs/results.md)
    action_dropout=0.05,  # as in Ctrl-World and Astra
    text="hashed",
)


def _network(**changes: Any) -> AutoregressiveConfig:
    return replace(FULL, network=replace(FULL.network, **changes))


ARMS: dict[str, AutoregressiveConfig] = {
    "full": FULL,
    "no-bank": _network(memory=MemoryConfig()),
    "no-history-noise": replace(FULL, history=LevelDistribution(clean=1.0), own_history=0.0, history_level=0.0),
    "per-view": _network(cross_view=False),
    "plain": PLAIN,
    # further ones, by flag
    "noise-only": replace(FULL, own_history=0.0),
    "no-guidance": replace(FULL, action_dropout=0.0),
    "additive": _network(adapter="additive"),
    "cross-attention": _network(adapter="cross-attention"),
    "camera-missing": replace(FULL, camera_dropout=0.2),  # measured also with either camera hidden
    "camera-noisy": replace(FULL, camera_noise=0.2),  # measured also with either camera noisy
    "one-action-a-clip": FULL,  # trained and measured on data whose blocks are the mean of their clip's
}
FIVE = ("full", "no-bank", "no-history-noise", "per-view", "plain")
# what is done to a camera's first frame in these arms; the noise is of a picture whose range is 0 to 1
WORSE = {
    "camera-missing": lambda camera: {"hidden": (camera,)},
    "camera-noisy": lambda camera: {"noisy": {camera: 0.2}},
}
HELD = 8  # frames of a clip that share one action in `one-action-a-clip`
HISTORY_LEVELS = (0.0, 0.05, 0.1, 0.2, 0.3)
GUIDANCES = (1.0, 1.25, 1.5, 2.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class MakeLongDreams:
    """Record, train an arm at a time, evaluate, sweep, print the tables."""

    out: Path
    tasks: tuple[str, ...] = ("drawer-open-v3", "door-open-v3", "button-press-topdown-v3")
    arms: tuple[str, ...] = FIVE
    """The first is compared with each of the others, and swept."""
    seeds: int = 1
    budget: float = 1.0
    """Multiplies all training. 1: about 30 minutes of one CPU core an arm (4,000 steps of `plain`)."""
    episodes: int = 80
    """Training episodes a task."""
    tests: int = 20
    """Test episodes a task, from other starts."""
    horizon: int = 500
    """Control steps of an episode; 4 are a frame."""
    sweeps: bool = True

    def __post_init__(self) -> None:
        if unknown := set(self.arms) - set(ARMS):
            raise ValueError(f"arms of {', '.join(ARMS)} required, got {', '.join(sorted(unknown))}")
        if self.horizon < 424:
            raise ValueError(f"a horizon of at least 424 control steps (106 frames) required, got {self.horizon}")


def prepare(config: MakeLongDreams) -> None:
    """Datasets, tokenizer, inverse model, object probe and pose probes."""
    home = config.out
    for task in config.tasks:
        for name, episodes, seed in ((task, config.episodes, 0), (f"{task}-test", config.tests, 1000)):
            made = record(home / name, f"metaworld/{task}", episodes, policy="play", horizon=config.horizon, seed=seed)
            if "one-action-a-clip" in config.arms:
                hold_actions(made, home / f"{name}-held")
    loop = replace(tokenizer.PRESETS["tiny"][1]["loop"], steps=steps(config, 1000))
    train(tokenizer, tokenizer.TrainTokenizer(data=data(config), out=home / "tok", loop=loop))
    short = LoopConfig(steps=steps(config, 400), batch_size=64, lr=1e-3, ema=0.99)
    judge = partial(probe.TrainProbe, data=data(config), tokenizer=home / "tok", loop=short)
    train(probe, judge(out=home / "inverse", target="action"))
    train(probe, judge(out=home / "object", target="object"))
    for camera in ("corner2", "gripperPOV"):
        train(probe, judge(out=home / f"pose-{camera}", target="pose", columns=(0, 1, 2), camera=camera))


def steps(config: MakeLongDreams, base: int) -> int:
    return max(20, int(base * config.budget))


def data(config: MakeLongDreams, arm: str = "", test: bool = False) -> tuple[Path, ...]:
    suffix = ("-test" if test else "") + ("-held" if arm == "one-action-a-clip" else "")
    return tuple(config.out / f"{task}{suffix}" for task in config.tasks)


def hold_actions(source: Path, target: Path) -> None:
    """A copy of a dataset in which the frames of each clip of `HELD` share one action block, the mean of theirs."""
    if target.exists():
        return
    part = target.with_name(f".{target.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    shutil.copytree(source, part)
    for file in sorted(part.glob("data/*/*.parquet")):
        content = pq.read_table(file)
        episodes, frames = (content[name].to_numpy() for name in ("episode_index", "frame_index"))
        actions = np.stack(content["action"].to_pylist()).astype(np.float32)
        for clip in np.unique(np.stack([episodes, frames // HELD], 1), axis=0):
            rows = (episodes == clip[0]) & (frames // HELD == clip[1])
            actions[rows] = actions[rows].mean(0)
        at = content.schema.get_field_index("action")
        held = pa.array(actions.tolist(), type=content.schema.field("action").type)
        pq.write_table(content.set_column(at, content.schema.field("action"), held), file)
    part.rename(target)


def training(config: MakeLongDreams, arm: str, seed: int) -> tuple[TrainWorldModel, float]:
    """The training of one arm at the FLOPs of all, and its GFLOP a step."""
    loop = replace(world_model.PRESETS["tiny"][1]["loop"], seed=seed)

    def of(name: str, count: int) -> TrainWorldModel:
        return TrainWorldModel(
            data=data(config, name),
            tokenizer=config.out / "tok",
            out=config.out / f"{name}{seed}",
            model=ARMS[name],
            loop=replace(loop, steps=count),
        )

    per_step = training_gflop(of(arm, 1), lead=config.horizon // 8)
    total = training_gflop(of("plain", 1)) * 4000 * config.budget
    return of(arm, max(20, round(total / per_step))), per_step


def evaluate(config: MakeLongDreams, arm: str, folder: Path, seed: int) -> Path:
    """The report of one arm."""
    report = config.out / f"eval-{arm}{seed}"
    if not kept(report, {"model": weights_of(folder)}, done="report.json"):
        run_eval(
            Evaluate(
                world_model=folder,
                data=data(config, arm, test=True),
                split="all",
                out=report,
                probe=config.out / "object",
                inverse_model=config.out / "inverse",
                pose_probes=(config.out / "pose-corner2", config.out / "pose-gripperPOV"),
                videos=9,
            )
        )
    return report


def results(report: Path) -> dict[str, Any]:
    return report_results(report)


def span(found: Any, digits: int = 0) -> str:
    return f"[{found['low']:.{digits}f}, {found['high']:.{digits}f}]"


def ratio_cell(found: ExcessRatio) -> str:
    if found.ratio is None or found.interval is None:
        return "no ratio: the base does not drift"
    return f"{found.ratio:.2f} [{found.interval.low:.2f}, {found.interval.high:.2f}]"


def arm_rows(arm: str, seed: int, report: Path, base: Path | None, count: int, per_step: float) -> tuple[str, str]:
    """An arm's row of the drift table and of the control table."""
    r = results(report)
    cameras = list(r["action_sensitivity"])
    at = {(h["predictor"], h["camera"], h["horizon"]): h for h in r["horizons"]}

    def both(measure: str, horizon: int) -> str:
        cells = [at[("true", camera, horizon)][measure] for camera in cameras]
        return " / ".join(f"{c:.3f}" if measure.endswith("ssim") else f"{c:.1f}" for c in cells)

    excess = r["drift"]["excess"]["predictors"]["true"]["all"]
    ratio = "" if base is None else ratio_cell(excess_ratio_of_reports(report, base))
    drift = row(
        f"{arm}, {seed}",
        count,
        f"{per_step:.0f}",
        *(both("moved_psnr", h) for h in (1, 10, 100)),
        both("moved_ssim", 100),
        f"{excess['early']:.0f} → {excess['late']:.0f}",
        f"{excess['mean']:.0f} {span(excess)}",
        ratio,
    )
    gaps = [r["action_sensitivity"][camera]["shuffled"]["gap"] for camera in cameras]
    multi = [c for c in r["multi_view"]["consistency"] if c["predictor"] == "true" and c["horizon"] == 40]
    frechet = [f for f in r["latent_frechet"]["rows"] if f["predictor"] == "true"][-1:]
    control = row(
        f"{arm}, {seed}",
        " / ".join(f"{g['gain_db']:+.1f} {span(g, 1)}" if g else "–" for g in gaps),
        f"{r['action_following']['true']['r2_mean']:.2f} of {r['action_following']['tokenizer']['r2_mean']:.2f}",
        " / ".join(f"{r['object_position']['true']['error_at'][h]:.1f}" for h in ("20", "60", "100")),
        " / ".join(f"{100 * r['pose_error'][h - 1]:.1f}" for h in (10, 40, 100)),
        f"{multi[0]['excess']:+.3f} {span(multi[0], 3)}" if multi else "–",
        f"{frechet[0]['distance']:.2f}" if frechet else "–",
        f"{r['speed']['frames_per_second']:.0f}",
    )
    return drift, control


# --- sweeps -----------------------------------------------------------------------------------------------------------


def drift_of(folder: Path, replays: Replays, sampling: dict[str, Any]) -> dict[str, Any]:
    """Early and late error on frames in motion, by episode, of one world model under other settings of sampling."""
    dream = load_dream(folder, sampling)
    made = replay_in_dream(dream, replays, progress=f"sweep {sampling}")
    metrics = {
        c: compare_videos(x[:, 1:], made.frames[c][:, 1:], x[:, 0].contiguous()) for c, x in replays.frames.items()
    }
    found = drift_results(replays.frames, {"true": metrics}, episodes=replays.episodes)
    one_step = [float(m.moved_mse[:, 0][m.moved_mask[:, 0]].mean()) for m in metrics.values()]
    return {**found["excess"]["predictors"]["true"]["all"], "one_step": float(np.mean(one_step))}


def load_tests(config: MakeLongDreams, dream: Dream) -> Replays:
    parts = []
    for test in data(config, test=True):
        dataset, stride = open_for(dream.spec, test)
        cameras = [c.name for c in dream.spec.cameras]
        parts.append(load_replays(dataset, range(len(dataset)), cameras=cameras, frames=None, stride=stride))
    return join_replays(parts)


def worse_rows(config: MakeLongDreams, arm: str, folder: Path, seed: int) -> list[str]:
    """One row a camera: how well it is imagined when its first frame is shown as it is, and when it is hidden or noisy."""
    dream, rows = load_dream(folder), []
    whole = load_tests(config, dream)
    for camera, real in whole.frames.items():
        cells = []
        for shown in (whole, replace(whole, **WORSE[arm](camera))):
            made = replay_in_dream(dream, shown, progress=f"{arm}: {camera}").frames[camera]
            found = compare_videos(real[:, 1:], made[:, 1:], real[:, 0].contiguous())
            for h in (1, 10, 40):
                mask = found.moved_mask[:, h - 1]
                cells.append(f"{found.psnr[:, h - 1].mean():.1f} ({found.moved_psnr[:, h - 1][mask].mean():.1f})")
        rows.append(row(f"{arm}: {camera}, {seed}", *cells))
    return rows


def sweep(config: MakeLongDreams, folder: Path, name: str, values: tuple[float, ...]) -> list[str]:
    """One row a value: errors one frame ahead, early, late, and the excess against the first value's."""
    out = config.out / f"sweep-{folder.name}-{name}.json"
    found: dict[str, Any] = json.loads(out.read_text()) if kept(out, {"model": weights_of(folder)}) else {}
    replays = load_tests(config, load_dream(folder))
    for value in values:
        if str(value) not in found:
            found[str(value)] = drift_of(folder, replays, {name: value})
            out.write_text(json.dumps(found))
    base = _excesses(found[str(values[0])])
    return [
        row(
            f"{value:g}",
            *(f"{found[str(value)][key]:.0f}" for key in ("one_step", "early", "late")),
            f"{found[str(value)]['mean']:.0f} {span(found[str(value)])}",
            ratio_cell(excess_ratio(_excesses(found[str(value)]), base)),
        )
        for value in values
    ]


def _excesses(found: dict[str, Any]) -> np.ndarray:
    return np.array([np.nan if v is None else v for v in found["per_episode"]])


def main(config: MakeLongDreams) -> None:
    prepare(config)
    drift, control, worse = [], [], []
    first: dict[int, Path] = {}
    for seed in range(config.seeds):
        made = {}
        for arm in config.arms:
            settings, per_step = training(config, arm, seed)
            folder = train(world_model, settings)
            first.setdefault(seed, folder)
            if arm in WORSE:
                worse += worse_rows(config, arm, folder, seed)
            made[arm] = (evaluate(config, arm, folder, seed), settings.loop.steps, per_step)
        base = made["plain"][0] if "plain" in made else None
        for arm, (report, count, per_step) in made.items():
            against = base if arm not in ("plain", "one-action-a-clip") else None
            rows = arm_rows(arm, seed, report, against, count, per_step)
            drift.append(rows[0])
            control.append(rows[1])
    sections = [
        "Cells with a slash: corner2 / gripperPOV. Errors are squared grey levels on moved pixels of frames in motion, both cameras.",
        table(
            "| arm, seed | steps | GFLOP a step | moved PSNR at 1 | at 10 | at 100 | moved SSIM at 100 | error at 10 → at 100 "
            "| excess | excess / plain's |",
            drift,
        ),
        table(
            "| arm, seed | true - shuffled actions, dB | actions read off it, R² | object off at 20 / 60 / 100, pixels "
            "| pose off at 10 / 40 / 100 (metres and gripper, x100) | views apart at 40, beyond real | latent Frechet, late | frames/s |",
            control,
        ),
    ]
    if worse:
        head = "| PSNR, all (moved) pixels; arm: camera, seed | as it is: at 1 | at 10 | at 40 | missing or noisy: at 1 | at 10 | at 40 |"
        sections.append(table(head, worse))
    if config.sweeps:
        head = "| {} | error at 1 | at 10 | at 100 | excess | excess / the first row's |"
        for name, values in (("history_level", HISTORY_LEVELS), ("guidance", GUIDANCES)):
            sections += [f"{config.arms[0]}, seed 0:", table(head.format(name), sweep(config, first[0], name, values))]
    text = "\n\n".join(sections) + "\n"
    (config.out / "tables.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main(tyro.cli(MakeLongDreams, description=__doc__))
