"""Verbs `imagine` and `eval`: watch a world model dream held-out episodes, and measure it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from worldline.commands.outputs import check_report_folder, check_video_file, command_line
from worldline.data import LeRobotDataset, strided
from worldline.errors import WorldlineError
from worldline.eval import Report, horizon_curves, video_grid, write_mp4
from worldline.eval.probes import Probe
from worldline.eval.ranking import ReplayDiagnostic, imagine_replays, replay_diagnostic
from worldline.eval.world_model import HORIZONS, Replays, WorldModelEvaluation, evaluate_world_model, load_replays
from worldline.rl_in_imagination.dream import Dream, rollout
from worldline.rl_in_imagination.success import SuccessScorer
from worldline.types import WorldSpec, require_match
from worldline.worldmodels import load_world_model


@dataclass(frozen=True, slots=True, kw_only=True)
class Imagine:
    """Replay an episode's actions in a world model's dream; real and imagined side by side.

    Example: worldline imagine --world-model runs/wm --data data/drawer --episode 3 --out out.mp4
    """

    world_model: Path
    data: Path
    episode: int
    out: Path = Path("out.mp4")
    """Video file."""
    frames: int | None = None
    """How many frames; the whole episode by default."""
    actions: Literal["true", "negated", "zeroed"] = "true"
    """What the dream is given: the recorded actions, or wrong ones to see that it obeys them."""
    solver_steps: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        _at_least(self, frames=2, solver_steps=1)


def _at_least(config: Any, **least: int) -> None:
    for name, low in least.items():
        value = getattr(config, name)
        if value is not None and value < low:
            raise ValueError(f"--{name.replace('_', '-')}: at least {low} required, got {value}")


def load_dream(folder: Path, *, solver_steps: int | None = None) -> Dream:
    """A dream from a world-model folder, on the GPU if there is one."""
    model, tokenizer = load_world_model(folder)
    if solver_steps is not None:
        try:
            model = model.with_sampling(solver_steps=solver_steps)
        except ValueError as error:  # the model's own check of its settings
            raise WorldlineError(f"--solver-steps: {error}. Use fewer.") from error
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return Dream(model.to(device), tokenizer.to(device))


def open_for(dream: Dream, data: Path) -> tuple[LeRobotDataset, int]:
    """The dataset and the stride at which it is the world model's. Raises `SpecMismatch` with the differing fields."""
    dataset = LeRobotDataset(data, cameras=[c.name for c in dream.spec.cameras])
    stride = max(1, dream.spec.control_steps // max(1, dataset.spec.control_steps))
    require_match(strided(dataset.spec, stride), dream.spec, between=f"dataset {data} and world model")
    return dataset, stride


def run_imagine(config: Imagine, *, progress: bool = True) -> Path:
    """Write the video and return its path."""
    check_video_file(config.out)
    dream = load_dream(config.world_model, solver_steps=config.solver_steps)
    dataset, stride = open_for(dream, config.data)
    if not 0 <= config.episode < len(dataset):
        raise WorldlineError(f"--episode 0 to {len(dataset) - 1} required by {config.data}, got {config.episode}")
    cameras = [c.name for c in dream.spec.cameras]
    replays = load_replays(dataset, [config.episode], cameras=cameras, frames=config.frames, stride=stride)
    sign = {"true": 1.0, "negated": -1.0, "zeroed": 0.0}[config.actions]
    made = rollout(
        dream,
        None,
        None,
        replays.first,
        frames=replays.poses.shape[1],
        seeds=torch.tensor([config.seed]),
        actions=replays.actions * sign,
        keep_frames=True,
        progress="imagine" if progress else None,
    )
    label = "imagined" if config.actions == "true" else f"imagined, actions {config.actions}"
    grid = video_grid({"real": _one(replays.frames, 0), label: _one(made.frames, 0)})
    write_mp4(config.out, grid, dream.spec.fps)
    return config.out


def _one(frames: Mapping[str, Tensor], row: int) -> dict[str, Tensor]:
    return {camera: video[row] for camera, video in frames.items()}


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluate:
    """Measure a world model on held-out episodes: video quality by horizon, action sensitivity, what it gets wrong.

    Example: worldline eval --world-model runs/wm --data data/drawer --split held-out --out reports/wm
    """

    world_model: Path
    data: Path
    out: Path
    """Folder for report.json and report.html."""
    split: Literal["held-out", "train", "all"] = "held-out"
    frames: int | None = None
    """Frames of each rollout; the shortest episode by default."""
    max_episodes: int | None = None
    action_free: Path | None = None
    """A world model trained with --model.network.actions False: the second trivial predictor."""
    probe: Path | None = None
    """A probe of object positions (`worldline train probe --target object`)."""
    inverse_model: Path | None = None
    """A probe of actions (`worldline train probe --target action`)."""
    scorer: Path | None = None
    """A success scorer: adds the replay diagnostic."""
    solver_steps: int | None = None
    videos: int = 6
    """Episodes shown in the report."""
    batch: int = 16
    seed: int = 0

    def __post_init__(self) -> None:
        _at_least(self, frames=2, max_episodes=1, solver_steps=1, batch=1, videos=0)


def run_eval(config: Evaluate, *, progress: bool = True) -> Path:
    """Evaluate, write the report, return its folder."""
    check_report_folder(config.out)
    dream = load_dream(config.world_model, solver_steps=config.solver_steps)
    dataset, stride = open_for(dream, config.data)
    cameras = [c.name for c in dream.spec.cameras]
    episodes = dataset.split(config.split)[: config.max_episodes]
    replays = load_replays(dataset, episodes, cameras=cameras, frames=config.frames, stride=stride)
    judges = _load_judges(config, dream.spec)
    found = evaluate_world_model(
        dream,
        replays,
        action_free=judges.action_free,
        probe=judges.probe,
        probe_truth=_probe_truth(judges.probe, replays, dataset) if judges.probe else None,
        inverse_model=judges.inverse_model,
        seed=config.seed,
        batch=config.batch,
        progress=progress,
    )
    results = dict(found.results)
    diagnostic = None
    if judges.scorer is not None and replays.frame_success is not None:
        options: dict[str, Any] = {"seed": config.seed, "batch": config.batch, "progress": progress}
        probability = imagine_replays(dream, judges.scorer, replays, **options)
        diagnostic = replay_diagnostic(judges.scorer, replays, probability)
        results["replay_diagnostic"] = diagnostic.to_dict()
    report = Report(
        f"World model {config.world_model.name}",
        command=command_line("eval", config),
        provenance={
            "world_model": str(config.world_model),
            "data": str(config.data),
            "tokenizer": dream.tokenizer.latent_spec.fingerprint,
        },
    )
    if judges.scorer is not None and diagnostic is None:
        report.warning(f"{config.data} holds no success labels: the replay diagnostic was not run.")
    _page(report, found, diagnostic, config.videos, dream.spec.fps)
    report.write(config.out, results)
    return config.out


@dataclass(frozen=True, slots=True, kw_only=True)
class _Judges:
    """What `eval` measures with, all of it made for the world model's cameras."""

    action_free: Dream | None
    probe: Probe | None
    inverse_model: Probe | None
    scorer: SuccessScorer | None


def _load_judges(config: Evaluate, spec: WorldSpec) -> _Judges:
    judges = _Judges(
        action_free=load_dream(config.action_free, solver_steps=config.solver_steps) if config.action_free else None,
        probe=Probe.from_pretrained(config.probe) if config.probe else None,
        inverse_model=Probe.from_pretrained(config.inverse_model) if config.inverse_model else None,
        scorer=SuccessScorer.from_pretrained(config.scorer) if config.scorer else None,
    )
    if judges.action_free is not None:
        require_match(spec, judges.action_free.spec, between="world model and --action-free")
    for judge, flag, only in (
        (judges.probe, "--probe", ("cameras",)),
        (judges.inverse_model, "--inverse-model", ("cameras", "control_steps")),
        (judges.scorer, "--scorer", ("cameras", "control_steps")),
    ):
        if judge is not None:
            require_match(spec, judge.spec, between=f"world model and {flag}", only=only)
    return judges


def _probe_truth(probe: Probe, replays: Replays, dataset: LeRobotDataset) -> Tensor:
    """What the probe should read, from the recorded states (object) or, without them, from the real frames."""
    camera = probe.config.names[0].partition("/")[0]
    if probe.config.target == "object" and dataset.spec.action.embodiment == "metaworld-sawyer":
        from worldline.sim.metaworld import object_pixels

        n = len(replays.states)
        flat = object_pixels(replays.states.flatten(0, 1), dataset.spec.camera(camera))
        return flat.unflatten(0, (n, -1))
    return probe.read_video(replays.frames)


def _page(
    report: Report, found: WorldModelEvaluation, diagnostic: ReplayDiagnostic | None, videos: int, fps: float
) -> None:
    results = found.results
    report.text(
        f"{results['episodes']} held-out episodes of {results['frames']} frames, each imagined from its first frame under its "
        "recorded actions. **Moved** pixels are those of the real video that differ from the first frame."
    )
    shown = [k for k in ("true", "shuffled", "action-free") if k in found.dreams]
    for i in range(min(videos, results["episodes"])):
        columns = {"real": _one(found.replays.frames, i)} | {_label(k): _one(found.dreams[k], i) for k in shown}
        title = f"episode {found.replays.episodes[i]} ({found.replays.causes[i]})"
        report.video(title, video_grid(columns, cell=128), fps)
    for camera in found.metrics["true"]:
        curves = {_label(k): m[camera].moved_psnr for k, m in found.metrics.items()}
        masks = {_label(k): m[camera].moved_mask for k, m in found.metrics.items()}
        report.plot(f"PSNR on moved pixels, {camera}", horizon_curves(curves, masks=masks, ylabel="dB"))
        ours = found.metrics["true"][camera]
        gains = {
            f"over {_label(k)}": ours.moved_psnr - m[camera].moved_psnr
            for k, m in found.metrics.items()
            if k in ("copy-first", "action-free")
        }
        figure = horizon_curves(gains, masks=dict.fromkeys(gains, ours.moved_mask), ylabel="dB, paired")
        figure.axes[0].axhline(0.0, color="#64748b", linewidth=1)
        report.plot(f"Gain on moved pixels over trivial predictors, {camera}", figure)
    for camera in found.metrics["true"]:
        for key, title in (("moved_psnr", "PSNR on moved pixels (dB)"), ("psnr", "PSNR (dB)"), ("ssim", "SSIM")):
            _horizon_table(report, results["horizons"], camera, key, f"{title}, {camera}, by imagined frame")
    rows = [
        [r["baseline"], r["camera"], r["horizon"], r["gain_db"], r["low"], r["high"], r["episodes"]]
        for r in results["against"]
        if r["horizon"] in HORIZONS
    ]
    report.table(
        "Gain on moved pixels over trivial predictors (dB, paired over episodes)",
        ["against", "camera", "horizon", "gain", "low", "high", "episodes"],
        rows,
    )
    for worst in results["worst_gains"]:
        least = worst["smallest"]
        report.text(
            f"{worst['camera']}, against {_label(worst['baseline'])}: the interval lies above zero at {worst['above']} of the "
            f"{worst['horizons']} frames from 2 on; smallest gain {least['gain_db']:+.1f} dB [{least['low']:+.1f}, "
            f"{least['high']:+.1f}] at frame {least['horizon']}."
        )
    sensitivity = [
        [
            camera,
            name,
            row["moved_psnr"],
            (row.get("gap") or {}).get("gain_db"),
            row["dream_change_rms"],
        ]
        for camera, variants in results["action_sensitivity"].items()
        for name, row in variants.items()
    ]
    report.table(
        "Action sensitivity (noise fixed)",
        ["camera", "actions", "moved PSNR", "gap to true (dB)", "change of the dream (RMS grey levels)"],
        sensitivity,
    )
    _optional_tables(report, results)
    for camera, found_lpips in results["lpips"].items():
        if found_lpips["mean"] is None:
            report.text(f"{camera}: {found_lpips['reason']}")
    if diagnostic is not None:
        add_diagnostic(report, diagnostic)
    report.text(
        f"Speed: {results['speed']['frames_per_second']:.1f} imagined frames/s at batch {results['speed']['batch']} on {results['speed']['device']}."
    )


def _horizon_table(report: Report, horizons: Sequence[Mapping[str, Any]], camera: str, key: str, title: str) -> None:
    """One row a predictor, one column a horizon."""
    cells = {(row["predictor"], row["horizon"]): row[key] for row in horizons if row["camera"] == camera}
    columns = sorted({h for _, h in cells})
    rows = [[_label(p), *(cells[p, h] for h in columns)] for p in dict.fromkeys(p for p, _ in cells)]
    report.table(title, ["", *map(str, columns)], rows)


def _optional_tables(report: Report, results: Mapping[str, Any]) -> None:
    if "object_position" in results:
        found = results["object_position"]
        horizons = list(found["real"]["error_at"])
        names = [k for k in found if isinstance(found[k], dict)]
        rows = [[_label(k), *(found[k]["error_at"][h] for h in horizons)] for k in names]
        report.table("Object position error by frame (pixels, read by a probe)", ["frames read", *horizons], rows)
        if found["episodes_where_it_moved"]:
            rows = [[_label(k), *(found[k]["error_at_where_it_moved"][h] for h in horizons)] for k in names]
            title = f"The same in the {found['episodes_where_it_moved']} episodes where the object moved"
            report.table(title, ["frames read", *horizons], rows)
    else:
        report.text("Object position: not measured (no --probe given).")
    if "action_following" in results:
        found = results["action_following"]
        rows = [[_label(k), *found[k]["r2"], found[k]["r2_mean"]] for k in ("tokenizer", "true", "copy-first")]
        report.table(
            "Action following (R² of actions read by an inverse model)", ["frames read", *found["names"], "mean"], rows
        )
    else:
        report.text("Action following: not measured (no --inverse-model given).")


def _label(name: str) -> str:
    return {"true": "imagined", "tokenizer": "reconstructed", "copy-first": "first frame repeated"}.get(
        name, f"{name} actions" if name in ("shuffled", "negated", "zeroed") else name
    )


def add_diagnostic(report: Report, diagnostic: ReplayDiagnostic) -> None:
    """The replay diagnostic as a table: the confusion matrix on imagined and on real frames, and by cause."""
    rows: list[Sequence[Any]] = []
    for name, c in (("imagined replays", diagnostic.calibration), ("real frames", diagnostic.on_real_frames)):
        rows.append(
            [
                name,
                c.true_positives,
                c.false_negatives,
                c.false_positives,
                c.true_negatives,
                c.balanced_accuracy,
                c.auroc,
            ]
        )
    found = diagnostic.threshold_interval
    between = f" [{found.low:.2g}, {found.high:.2g}]" if found is not None else ""
    report.table(
        "Replay diagnostic: held-out episodes' own actions, scored against their recorded success",
        [
            "scored on",
            "success, seen",
            "success, missed",
            "failure, called success",
            "failure, seen",
            "balanced accuracy",
            "AUROC",
        ],
        rows,
        note=f"Threshold {diagnostic.threshold:.2g}{between}, from {diagnostic.threshold_from}.",
    )
    report.table(
        "By cause",
        ["cause", "episodes", "true successes", "imagined successes"],
        [[cause, *counts] for cause, counts in diagnostic.by_cause.items()],
    )
