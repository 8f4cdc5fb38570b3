"""How good is a world model? Held-out episodes are imagined from their first frame under their recorded actions.

Everything is measured against two trivial predictors (the first frame repeated; the same network without actions) on all
pixels and on pixels that moved; action sensitivity repeats the dream with the noise fixed and other actions.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from worldline.eval.consistency import multi_view_results, read_dimensions
from worldline.eval.drift import drift_results
from worldline.eval.frechet_results import latent_results, video_results
from worldline.eval.intervals import PairedDifference, paired_interval
from worldline.eval.probes import Probe
from worldline.eval.protocol import HORIZONS
from worldline.eval.replays import Replays
from worldline.eval.video_metrics import Lpips, VideoMetrics, compare_videos, copy_context, lpips_distance, moved_pixels
from worldline.rl_in_imagination.dream import Dream, Rollouts, rollout
from worldline.types import VideoTokenizer

ACTION_VARIANTS = ("true", "shuffled", "negated", "zeroed")


def action_variants(actions: Float[Tensor, "n t k a"]) -> dict[str, Float[Tensor, "n t k a"]]:
    """The recorded actions and three that are wrong: shuffled, negated, zero.

    Shuffled are those of another episode; of a single episode, its own in reverse order.
    """
    shuffled = actions.roll(1, 0) if len(actions) > 1 else actions.flip(1)
    return {"true": actions, "shuffled": shuffled, "negated": -actions, "zeroed": torch.zeros_like(actions)}


def replay_in_dream(
    dream: Dream,
    replays: Replays,
    *,
    actions: Float[Tensor, "n t k a"] | None = None,
    seeds: Int[Tensor, " n"] | None = None,
    batch: int = 32,
    progress: str | None = None,
) -> Rollouts:
    """The episodes imagined from their first frames, frames kept, under their recorded `actions` or others."""
    return rollout(
        dream,
        None,
        None,
        replays.first,
        frames=replays.poses.shape[1],
        seeds=torch.arange(len(replays.poses)) if seeds is None else seeds,
        actions=replays.actions if actions is None else actions,
        keep_frames=True,
        batch=batch,
        progress=progress,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class WorldModelEvaluation:
    """`results` has JSON types; the rest is for plots and videos."""

    results: dict[str, Any]
    metrics: Mapping[str, Mapping[str, VideoMetrics]]  # predictor -> camera -> metrics
    dreams: Mapping[str, Mapping[str, UInt8[Tensor, "n t c _h _w"]]]  # predictor -> camera -> frames
    replays: Replays


def evaluate_world_model(
    dream: Dream,
    replays: Replays,
    *,
    action_free: Dream | None = None,
    probe: Probe | None = None,
    probe_truth: Float[Tensor, "n t d"] | None = None,
    inverse_model: Probe | None = None,
    pose_probes: Mapping[str, Probe] | None = None,
    i3d: Path | None = None,
    seed: int = 0,
    batch: int = 16,
    progress: bool = True,
) -> WorldModelEvaluation:
    """Imagine every replay and measure. See docs/reports.md for the keys of `results`.

    Args:
        action_free: the same network without actions, a second trivial predictor.
        probe, probe_truth: of object positions, and what it should read of every frame.
        inverse_model: a probe of actions.
        pose_probes: camera -> a probe of the pose from that camera alone.
        i3d: TorchScript file of the I3D network, for FVD.
        seed: of the noise; episodes differ by their place.
    """
    n, t = replays.poses.shape[:2]
    seeds = torch.arange(n) + seed * 1_000_003
    variants = action_variants(replays.actions)
    start = time.perf_counter()
    dreams: dict[str, Mapping[str, Tensor]] = {}
    poses = replays.poses
    for name, actions in variants.items():
        shown = f"imagine ({name} actions)" if progress else None
        made = replay_in_dream(dream, replays, actions=actions, seeds=seeds, batch=batch, progress=shown)
        dreams[name] = made.frames
        poses = made.poses if name == "true" else poses
    seconds = time.perf_counter() - start
    if action_free is not None:
        dreams["action-free"] = replay_in_dream(action_free, replays, seeds=seeds, batch=batch).frames
    dreams["copy-first"] = {
        c: torch.cat([x[:, :1], copy_context(x[:, 0].contiguous(), t - 1)], 1) for c, x in replays.frames.items()
    }
    dreams["tokenizer"] = _reconstructed(dream.tokenizer, replays)
    metrics = {
        name: {c: compare_videos(replays.frames[c][:, 1:], frames[c][:, 1:], replays.frames[c][:, 0]) for c in frames}
        for name, frames in dreams.items()
    }
    against = _against(metrics, t)
    lpips = {c: _lpips(x, dreams["true"][c]) for c, x in replays.frames.items()}
    results: dict[str, Any] = {
        "episodes": n,
        "frames": t,
        "horizons": horizon_table(metrics, t),
        "against": against,
        "worst_gains": worst_gains(against),
        "action_sensitivity": _sensitivity(metrics, dreams),
        **_pose_results(poses, replays.poses),
        "pose_error_copy": [
            float((replays.poses[:, 0] - replays.poses[:, h]).norm(dim=-1).mean()) for h in range(1, t)
        ],
        "speed": {"frames_per_second": n * (t - 1) * len(variants) / seconds, "batch": batch, "device": _device(dream)},
        "lpips": {
            c: {"mean": None if x.distance is None else float(x.distance.mean()), "reason": x.reason}
            for c, x in lpips.items()
        },
        "drift": drift_results(replays.frames, metrics, episodes=replays.episodes, lpips=lpips),
        "latent_frechet": latent_results(replays.frames, dreams, dream.tokenizer),
        "fvd": video_results(replays.frames, dreams, i3d),
    }
    if probe is not None and probe_truth is not None:
        results["object_position"] = object_position(probe, replays, dreams, probe_truth)
    if inverse_model is not None:
        results["action_following"] = action_following(inverse_model, replays, dreams)
    if pose_probes:
        poses = read_dimensions(replays.poses, dream.spec.pose_names, next(iter(pose_probes.values())))
        results["multi_view"] = multi_view_results(pose_probes, replays.frames, dreams, poses)
    return WorldModelEvaluation(results=results, metrics=metrics, dreams=dreams, replays=replays)


def _pose_results(made: Float[Tensor, "n t p"], real: Float[Tensor, "n t p"]) -> dict[str, Any]:
    """Mean distance at every imagined frame, None where some dream's poses are no numbers any more, and how many dreams came to that."""
    missed = (made - real).norm(dim=-1)[:, 1:]
    lost = ~missed.isfinite() & real[:, 1:].isfinite().all(-1)
    errors = [None if gone else float(x) for x, gone in zip(missed.mean(0), lost.any(0).tolist())]
    diverged = (
        {"episodes": int(lost.any(1).sum()), "from_frame": 1 + int(lost.any(0).int().argmax())} if lost.any() else None
    )
    return {"pose_error": errors, "diverged": diverged}


def _device(dream: Dream) -> str:
    device = getattr(dream.world_model, "device", torch.device("cpu"))
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"


def _reconstructed(tokenizer: VideoTokenizer, replays: Replays) -> dict[str, Tensor]:
    parts: dict[str, list[Tensor]] = {c: [] for c in replays.frames}
    for c, x in replays.frames.items():
        for row in x.split(4):
            parts[c].append(tokenizer.decode(tokenizer.encode({c: row}))[c].cpu())
    return {c: torch.cat(rows) for c, rows in parts.items()}


def horizon_table(metrics: Mapping[str, Mapping[str, VideoMetrics]], t: int) -> list[dict[str, Any]]:
    """One row a predictor, camera and horizon: mean PSNR and SSIM over episodes, on all and on moved pixels."""
    rows = []
    for predictor, per_camera in metrics.items():
        for camera, m in per_camera.items():
            for h in [h for h in HORIZONS if h < t]:
                mask = m.moved_mask[:, h - 1]
                moved = lambda x: float(x[:, h - 1][mask].mean()) if mask.any() else None  # noqa: B023, E731
                rows.append(
                    {
                        "predictor": predictor,
                        "camera": camera,
                        "horizon": h,
                        "psnr": float(m.psnr[:, h - 1].mean()),
                        "ssim": float(m.ssim[:, h - 1].mean()),
                        "moved_psnr": moved(m.moved_psnr),
                        "moved_ssim": moved(m.moved_ssim),
                        "episodes_with_motion": int(mask.sum()),
                    }
                )
    return rows


def _against(metrics: Mapping[str, Mapping[str, VideoMetrics]], t: int) -> list[dict[str, Any]]:
    """Moved-pixel PSNR of the model minus that of each trivial predictor, paired over episodes, at every horizon."""
    rows = []
    for predictor in ("copy-first", "action-free"):
        for camera in metrics["true"] if predictor in metrics else ():
            ours, theirs = metrics["true"][camera], metrics[predictor][camera]
            for h in range(1, t):
                mask = ours.moved_mask[:, h - 1]
                if int(mask.sum()) < 3:
                    continue
                gain = paired_interval(ours.moved_psnr[:, h - 1], theirs.moved_psnr[:, h - 1], mask=mask)
                rows.append({"baseline": predictor, "camera": camera, "horizon": h, **_gain(gain)})
    return rows


def worst_gains(against: Sequence[Mapping[str, Any]], *, since: int = 2) -> list[dict[str, Any]]:
    """Per baseline and camera: at how many horizons from `since` on the gain's interval excludes zero from below, and the
    smallest gain of them."""
    rows = []
    for baseline, camera in dict.fromkeys((r["baseline"], r["camera"]) for r in against):
        of = [r for r in against if (r["baseline"], r["camera"]) == (baseline, camera) and r["horizon"] >= since]
        if of:
            above = sum(r["low"] > 0 for r in of)
            smallest = min(of, key=lambda r: r["gain_db"])
            rows.append(
                {"baseline": baseline, "camera": camera, "horizons": len(of), "above": above, "smallest": smallest}
            )
    return rows


def _gain(gain: PairedDifference) -> dict[str, Any]:
    assert gain.interval is not None, "fewer than two episodes count"
    return {
        "gain_db": gain.mean,
        "low": gain.interval.low,
        "high": gain.interval.high,
        "episodes": gain.episodes,
        "excludes_zero": 0.0 not in gain.interval,
    }


def _sensitivity(
    metrics: Mapping[str, Mapping[str, VideoMetrics]], dreams: Mapping[str, Mapping[str, Tensor]]
) -> dict[str, Any]:
    """Per camera and variant: moved-pixel PSNR, the gap to true actions, and how far the dream itself changed (RMS grey levels)."""
    out: dict[str, Any] = {}
    for camera in metrics["true"]:
        rows: dict[str, Any] = {}
        for name in ACTION_VARIANTS:
            values, mask = metrics[name][camera].over_frames("moved_psnr")
            changed = (dreams[name][camera].float() - dreams["true"][camera].float()).square().mean().sqrt()
            rows[name] = {
                "moved_psnr": float(values[mask].mean()) if mask.any() else None,
                "dream_change_rms": float(changed),
            }
        for name in ACTION_VARIANTS[1:]:
            ours, mask = metrics["true"][camera].over_frames("moved_psnr")
            theirs, _ = metrics[name][camera].over_frames("moved_psnr")
            rows[name]["gap"] = _gain(paired_interval(ours, theirs, mask=mask)) if int(mask.sum()) >= 3 else None
        out[camera] = rows
    return out


def _lpips(real: UInt8[Tensor, "n t c h w"], imagined: UInt8[Tensor, "n t c h w"]) -> Lpips:
    moved = moved_pixels(real[:, 1:], real[:, 0])
    return lpips_distance(real[:, 1:], imagined[:, 1:], moved=moved)


def object_position(
    probe: Probe, replays: Replays, dreams: Mapping[str, Mapping[str, Tensor]], truth: Float[Tensor, "n t d"]
) -> dict[str, Any]:
    """Distance (units of the probe, pixels for objects) between where the probe sees the object and where it truly was.

    On real frames (what the probe itself gets wrong), on reconstructed, imagined and repeated frames.
    """
    out: dict[str, Any] = {"names": list(probe.config.names), "frames": truth.shape[1]}
    moved = (truth[:, -1] - truth[:, 0]).norm(dim=-1) > 1.0
    out["episodes_where_it_moved"] = int(moved.sum())
    for name, video in {
        "real": replays.frames,
        **{k: dreams[k] for k in ("tokenizer", "true", "shuffled", "copy-first")},
    }.items():
        error = (probe.read_video(video) - truth).norm(dim=-1)
        at = {str(h): float(error[:, h].mean()) for h in HORIZONS if h < truth.shape[1]}
        at_moved = (
            {str(h): float(error[moved, h].mean()) for h in HORIZONS if h < truth.shape[1]} if moved.any() else {}
        )
        out[name] = {"error_at": at, "error_at_where_it_moved": at_moved}
    return out


def action_following(
    inverse_model: Probe, replays: Replays, dreams: Mapping[str, Mapping[str, Tensor]]
) -> dict[str, Any]:
    """R^2 of the actions an inverse model reads off videos against those commanded, per action dimension and mean.

    `tokenizer` (real frames reconstructed) is the ceiling. Of a dimension that never changes there is none, nor does it count in the mean.
    """
    commanded = replays.actions.mean(2)
    spread = commanded.var((0, 1), correction=0)
    moves = spread > 1e-6
    out: dict[str, Any] = {"names": list(inverse_model.config.names)}
    for name in ("tokenizer", "true", "copy-first"):
        read = inverse_model.read_video(dreams[name])
        residual = (read - commanded).square().mean((0, 1))
        r2 = 1 - residual / spread.clamp(min=1e-6)
        each = [float(v) if there else None for v, there in zip(r2, moves.tolist())]
        out[name] = {"r2": each, "r2_mean": float(r2[moves].mean()) if moves.any() else None}
    return out
