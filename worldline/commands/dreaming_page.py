"""The page of an evaluated world model: videos, curves and tables from what `eval.world_model` found."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from worldline.commands.long_horizon_page import label, long_horizon_tables, protocol_text
from worldline.eval import Report, horizon_curves, video_grid
from worldline.eval.protocol import HORIZONS
from worldline.eval.ranking import ReplayDiagnostic
from worldline.eval.world_model import WorldModelEvaluation


def evaluation_page(
    report: Report,
    found: WorldModelEvaluation,
    results: Mapping[str, Any],
    diagnostic: ReplayDiagnostic | None,
    videos: int,
    fps: float,
) -> None:
    """Everything that `eval` measured, in reading order. `results` are all that report.json will hold."""
    protocol_text(report, results["protocol"])
    report.text(
        f"{results['episodes']} episodes (split '{results['split']}') of {results['frames']} frames, each imagined from its first frame under its "
        "recorded actions. **Moved** pixels are those of the real video that differ from the first frame."
    )
    shown = [k for k in ("true", "shuffled", "action-free") if k in found.dreams]
    for i in range(min(videos, results["episodes"])):
        columns = {"real": _one(found.replays.frames, i)} | {label(k): _one(found.dreams[k], i) for k in shown}
        title = f"episode {found.replays.episodes[i]} ({found.replays.causes[i]})"
        report.video(title, video_grid(columns, cell=128), fps)
    for camera in found.metrics["true"]:
        curves = {label(k): m[camera].moved_psnr for k, m in found.metrics.items()}
        masks = {label(k): m[camera].moved_mask for k, m in found.metrics.items()}
        report.plot(f"PSNR on moved pixels, {camera}", horizon_curves(curves, masks=masks, ylabel="dB"))
        ours = found.metrics["true"][camera]
        gains = {
            f"over {label(k)}": ours.moved_psnr - m[camera].moved_psnr
            for k, m in found.metrics.items()
            if k in ("copy-first", "action-free")
        }
        figure = horizon_curves(gains, masks=dict.fromkeys(gains, ours.moved_mask), ylabel="dB, paired")
        figure.axes[0].axhline(0.0, color="#64748b", linewidth=1)
        report.plot(f"Gain on moved pixels over trivial predictors, {camera}", figure)
    for camera in found.metrics["true"]:
        for key, title in (("moved_psnr", "PSNR on moved pixels (dB)"), ("psnr", "PSNR (dB)"), ("ssim", "SSIM")):
            _horizon_table(report, results["horizons"], camera, key, f"{title}, {camera}, by imagined frame")
    long_horizon_tables(report, results)
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
            f"{worst['camera']}, against {label(worst['baseline'])}: the interval lies above zero at {worst['above']} of the "
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
    if "doubt" in results:
        report.text(doubt_text(results["doubt"]))
    report.text(
        f"Speed: {results['speed']['frames_per_second']:.1f} imagined frames/s at batch {results['speed']['batch']} on {results['speed']['device']}."
    )


def _horizon_table(report: Report, horizons: Sequence[Mapping[str, Any]], camera: str, key: str, title: str) -> None:
    """One row a predictor, one column a horizon."""
    cells = {(row["predictor"], row["horizon"]): row[key] for row in horizons if row["camera"] == camera}
    columns = sorted({h for _, h in cells})
    rows = [[label(p), *(cells[p, h] for h in columns)] for p in dict.fromkeys(p for p, _ in cells)]
    report.table(title, ["", *map(str, columns)], rows)


def _optional_tables(report: Report, results: Mapping[str, Any]) -> None:
    if "object_position" in results:
        found = results["object_position"]
        horizons = list(found["real"]["error_at"])
        names = [k for k in found if isinstance(found[k], dict)]
        rows = [[label(k), *(found[k]["error_at"][h] for h in horizons)] for k in names]
        report.table("Object position error by frame (pixels, read by a probe)", ["frames read", *horizons], rows)
        if found["episodes_where_it_moved"]:
            rows = [[label(k), *(found[k]["error_at_where_it_moved"][h] for h in horizons)] for k in names]
            title = f"The same in the {found['episodes_where_it_moved']} episodes where the object moved"
            report.table(title, ["frames read", *horizons], rows)
    else:
        report.text("Object position: not measured (no --probe given).")
    if "action_following" in results:
        found = results["action_following"]
        rows = [[label(k), *found[k]["r2"], found[k]["r2_mean"]] for k in ("tokenizer", "true", "copy-first")]
        report.table(
            "Action following (R² of actions read by an inverse model)", ["frames read", *found["names"], "mean"], rows
        )
    else:
        report.text("Action following: not measured (no --inverse-model given).")


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


def doubt_text(doubt: Mapping[str, Any]) -> str:
    """What doubt is worth, in words."""
    over, between = (
        "undefined" if doubt[key] is None else f"{doubt[key]:.2f}" for key in ("correlation", "correlation_between")
    )
    return (
        f"The rank correlation of doubt and true error is {over} over all frames (both may merely grow with the dream), and {between} "
        "between episodes at the same frame: near 0, doubt does not know which dream goes wrong."
    )


def _one(frames: Mapping[str, Tensor], row: int) -> dict[str, Tensor]:
    return {camera: video[row] for camera, video in frames.items()}
