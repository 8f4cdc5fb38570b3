"""How good is a world model? Held-out episodes are imagined from their first frame under their recorded actions.

Everything is measured against two trivial predictors (the first frame repeated; the same network without actions) on all
pixels and on pixels that moved; action sensitivity repeats the dream with the noise fixed and other actions.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from worldline.data import LeRobotDataset
from worldline.errors import DatasetError
from worldline.eval.intervals import PairedDifference, paired_interval
from worldline.eval.probes import Probe
from worldline.eval.video_metrics import VideoMetrics, compare_videos, copy_context, lpips_distance
from worldline.rl_in_imagination.dream import Dream, rollout
from worldline.types import Observation, VideoTokenizer

HORIZONS = (1, 2, 5, 10, 20, 30, 40)
ACTION_VARIANTS = ("true", "shuffled", "negated", "zeroed")


@dataclass(frozen=True, slots=True, kw_only=True)
class Replays:
    """n real episodes cut to t frames, as the world model sees them: strided frames and whole action blocks."""

    episodes: tuple[int, ...]
    frames: Mapping[str, UInt8[Tensor, "n t c _h _w"]]
    poses: Float[Tensor, "n t p"]
    actions: Float[Tensor, "n t-1 k a"]
    instruction: tuple[str, ...]
    frame_success: Tensor | None  # "n t" bool; None if any episode has no labels
    states: Float[Tensor, "n t s"]
    causes: tuple[str, ...]

    @property
    def first(self) -> Observation:
        return Observation(
            images={c: x[:, 0] for c, x in self.frames.items()}, pose=self.poses[:, 0], instruction=self.instruction
        )


def load_replays(
    dataset: LeRobotDataset, episodes: Sequence[int], *, cameras: Sequence[str], frames: int | None, stride: int = 1
) -> Replays:
    """Episodes of at least `frames` frames (default: the shortest), from their first frame on.

    Raises `DatasetError` if none is long enough.
    """
    lengths = [(dataset.length(i) - 1) // stride + 1 for i in episodes]
    t = frames or min(lengths, default=0)
    chosen = [i for i, length in zip(episodes, lengths) if length >= t]
    if not chosen or t < 2:
        raise DatasetError(
            f"{dataset.root}: episodes of at least {max(t, 2)} frames required, the longest has {max(lengths, default=0)}"
        )
    read = [dataset.episode(i) for i in chosen]
    k = read[0].actions.shape[1] * stride
    rows = slice(0, (t - 1) * stride + 1, stride)
    labels = [e.frame_success for e in read]
    success = None
    if all(label is not None for label in labels):
        # a strided frame is a success if any frame since the one before it was
        success = torch.stack([_strided_any(label, stride)[:t] for label in labels if label is not None])
    return Replays(
        episodes=tuple(chosen),
        frames={c: torch.stack([e.frames[c][0 : rows.stop][::stride] for e in read]) for c in cameras},
        poses=torch.stack([e.poses[rows] for e in read]),
        actions=torch.stack([e.actions[: (t - 1) * stride].reshape(t - 1, k, -1) for e in read]),
        instruction=tuple(e.instruction for e in read),
        frame_success=success,
        states=torch.stack([e.states[rows] for e in read]),
        causes=tuple(e.provenance.get("cause", "unknown") for e in read),
    )


def join_replays(parts: Sequence[Replays]) -> Replays:
    """The episodes of several datasets, all cut to the shortest. Labels and states are kept where all parts have them alike."""
    t = min(part.poses.shape[1] for part in parts)
    alike = len({part.states.shape[2] for part in parts}) == 1
    labels = [part.frame_success[:, :t] for part in parts if part.frame_success is not None]
    return Replays(
        episodes=tuple(i for part in parts for i in part.episodes),
        frames={c: torch.cat([part.frames[c][:, :t] for part in parts]) for c in parts[0].frames},
        poses=torch.cat([part.poses[:, :t] for part in parts]),
        actions=torch.cat([part.actions[:, : t - 1] for part in parts]),
        instruction=tuple(text for part in parts for text in part.instruction),
        frame_success=torch.cat(labels) if len(labels) == len(parts) else None,
        states=torch.cat([part.states[:, :t, : None if alike else 0] for part in parts]),
        causes=tuple(cause for part in parts for cause in part.causes),
    )


def _strided_any(label: Tensor, stride: int) -> Tensor:
    if stride == 1:
        return label
    groups = label[1:][: (len(label) - 1) // stride * stride].unflatten(0, (-1, stride)).any(1)
    return torch.cat([label[:1], groups])


def action_variants(actions: Float[Tensor, "n t k a"]) -> dict[str, Float[Tensor, "n t k a"]]:
    """The recorded actions and three that are wrong: shuffled, negated, zero.

    Shuffled are those of another episode; of a single episode, its own in reverse order.
    """
    shuffled = actions.roll(1, 0) if len(actions) > 1 else actions.flip(1)
    return {"true": actions, "shuffled": shuffled, "negated": -actions, "zeroed": torch.zeros_like(actions)}


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
    seed: int = 0,
    batch: int = 16,
    progress: bool = True,
) -> WorldModelEvaluation:
    """Imagine every replay and measure. See docs/reports.md for the keys of `results`."""
    n, t = replays.poses.shape[:2]
    seeds = torch.arange(n) + seed * 1_000_003
    variants = action_variants(replays.actions)
    start = time.perf_counter()
    dreams: dict[str, Mapping[str, Tensor]] = {}
    poses = replays.poses
    for name, actions in variants.items():
        made = rollout(
            dream,
            None,
            None,
            replays.first,
            frames=t,
            seeds=seeds,
            actions=actions,
            keep_frames=True,
            batch=batch,
            progress=f"imagine ({name} actions)" if progress else None,
        )
        dreams[name] = made.frames
        poses = made.poses if name == "true" else poses
    seconds = time.perf_counter() - start
    if action_free is not None:
        dreams["action-free"] = rollout(
            action_free,
            None,
            None,
            replays.first,
            frames=t,
            seeds=seeds,
            actions=replays.actions,
            keep_frames=True,
            batch=batch,
        ).frames
    dreams["copy-first"] = {
        c: torch.cat([x[:, :1], copy_context(x[:, 0].contiguous(), t - 1)], 1) for c, x in replays.frames.items()
    }
    dreams["tokenizer"] = _reconstructed(dream.tokenizer, replays)
    metrics = {
        name: {c: compare_videos(replays.frames[c][:, 1:], frames[c][:, 1:], replays.frames[c][:, 0]) for c in frames}
        for name, frames in dreams.items()
    }
    against = _against(metrics, t)
    results: dict[str, Any] = {
        "episodes": n,
        "frames": t,
        "horizons": horizon_table(metrics, t),
        "against": against,
        "worst_gains": worst_gains(against),
        "action_sensitivity": _sensitivity(metrics, dreams),
        "pose_error": [float((poses[:, h] - replays.poses[:, h]).norm(dim=-1).mean()) for h in range(1, t)],
        "pose_error_copy": [
            float((replays.poses[:, 0] - replays.poses[:, h]).norm(dim=-1).mean()) for h in range(1, t)
        ],
        "speed": {"frames_per_second": n * (t - 1) * len(variants) / seconds, "batch": batch, "device": _device(dream)},
        "lpips": _lpips(replays, dreams["true"]),
    }
    if probe is not None and probe_truth is not None:
        results["object_position"] = object_position(probe, replays, dreams, probe_truth)
    if inverse_model is not None:
        results["action_following"] = action_following(inverse_model, replays, dreams)
    return WorldModelEvaluation(results=results, metrics=metrics, dreams=dreams, replays=replays)


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


def _lpips(replays: Replays, dreamed: Mapping[str, Tensor]) -> dict[str, Any]:
    out = {}
    for camera, real in replays.frames.items():
        found = lpips_distance(real[:, 1:], dreamed[camera][:, 1:])
        out[camera] = {"mean": None if found.distance is None else float(found.distance.mean()), "reason": found.reason}
    return out


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

    `tokenizer` (real frames reconstructed) is the ceiling.
    """
    commanded = replays.actions.mean(2)
    out: dict[str, Any] = {"names": list(inverse_model.config.names)}
    for name in ("tokenizer", "true", "copy-first"):
        read = inverse_model.read_video(dreams[name])
        residual = (read - commanded).square().mean((0, 1))
        r2 = 1 - residual / commanded.var((0, 1), correction=0).clamp(min=1e-9)
        out[name] = {"r2": [float(v) for v in r2], "r2_mean": float(r2.mean())}
    return out
