"""Drift: the error of a dream by frame, over the frames in which the real video still moves.

Recorded arms stop, and a still scene is easy, so the plain mean by horizon flatters late frames. A frame counts for an
episode only if the real video changed from the frame before it: more than `share` of some camera's pixels by more than
`threshold` grey levels. What share of the episodes that is stands beside every curve.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, UInt8
from scipy import stats
from torch import Tensor

from worldline.errors import WorldlineError
from worldline.eval.excess import Excess, bands_within, excess_error
from worldline.eval.intervals import paired_interval
from worldline.eval.protocol import PROTOCOL
from worldline.eval.video_metrics import Lpips, VideoMetrics, moved_pixels

MEASURES = ("psnr", "ssim", "mse", "moved_psnr", "moved_ssim", "moved_mse")
PREDICTORS = ("true", "action-free", "copy-first", "tokenizer")
ALL = "all"  # the mean over cameras


def moving_frames(
    real: Mapping[str, UInt8[Tensor, "n t c _h _w"]],
    *,
    threshold: int = PROTOCOL.moving_threshold,
    share: float = PROTOCOL.moving_share,
) -> Bool[Tensor, "n t2"]:
    """Which of frames 1 to t2 = t - 1 differ from the frame before them, in at least one camera.

    Raises `WorldlineError` without cameras or with fewer than two frames.
    """
    if not real or next(iter(real.values())).shape[1] < 2:
        raise WorldlineError(f"moving_frames: two frames of some camera required, got {_shapes(real)}.")
    changed = [
        moved_pixels(x[:, 1:], x[:, 0], moved_against="previous", threshold=threshold).flatten(2).float().mean(-1)
        for x in real.values()
    ]
    return torch.stack(changed).amax(0) > share


def drift_curve(
    values: Float[Tensor, "n t"], counts: Bool[Tensor, "n t"], *, level: float = PROTOCOL.level
) -> dict[str, list[Any]]:
    """Mean over the episodes that count at each frame, with Student's t interval over them, and how many they are.

    `mean` is None where no episode counts, `low` and `high` where fewer than two do.
    """
    data, mask = values.double().cpu().numpy(), counts.cpu().numpy()
    out: dict[str, list[Any]] = {"mean": [], "low": [], "high": [], "episodes": []}
    for frame in range(data.shape[1]):
        column = data[mask[:, frame], frame]
        n = len(column)
        mean = float(column.mean()) if n else None
        half = stats.t.ppf((1 + level) / 2, n - 1) * column.std(ddof=1) / n**0.5 if n > 1 else None
        out["mean"].append(mean)
        out["low"].append(None if half is None or mean is None else mean - float(half))
        out["high"].append(None if half is None or mean is None else mean + float(half))
        out["episodes"].append(n)
    return out


def drift_results(
    real: Mapping[str, UInt8[Tensor, "n t c _h _w"]],
    metrics: Mapping[str, Mapping[str, VideoMetrics]],
    *,
    episodes: tuple[int, ...],
    lpips: Mapping[str, Lpips] | None = None,
) -> dict[str, Any]:
    """What `report.json` holds under `drift`; its keys are in docs/reports.md.

    Args:
        real: the recorded videos, the context frame first.
        metrics: predictor -> camera -> metrics of the frames after the context.
        episodes: the episodes' numbers, by which two reports are paired.
        lpips: camera -> LPIPS of the predictor `true`.
    """
    moving = moving_frames(real)
    curves = []
    for predictor in (p for p in PREDICTORS if p in metrics):
        for camera, m in metrics[predictor].items():
            named = {name: getattr(m, name) for name in MEASURES}
            if predictor == "true" and lpips is not None and lpips[camera].distance is not None:
                named |= {"lpips": lpips[camera].distance, "moved_lpips": lpips[camera].moved_distance}
            for name, values in named.items():
                counts = moving & m.moved_mask if name.startswith("moved") else moving
                row = {"predictor": predictor, "camera": camera, "measure": name}
                curves.append({**row, **drift_curve(values, counts)})
    return {
        "moving": {"share": moving.float().mean(0).tolist(), "episodes": moving.sum(0).tolist()},
        "curves": curves,
        "excess": _excess_results(moving, metrics, episodes),
    }


def _excess_results(
    moving: Tensor, metrics: Mapping[str, Mapping[str, VideoMetrics]], episodes: tuple[int, ...]
) -> dict[str, Any]:
    unit = "squared grey levels on moved pixels"
    frames, base = moving.shape[1], {"episodes": list(episodes), "unit": unit, "frames": list(PROTOCOL.excess_frames)}
    try:
        bands = bands_within(frames)
    except WorldlineError as too_short:
        return {**base, "bands": None, "reason": str(too_short), "predictors": {}}
    predictors = {}
    for predictor in (p for p in PREDICTORS if p in metrics):
        found = {c: excess_error(m.moved_mse, moving & m.moved_mask) for c, m in metrics[predictor].items()}
        found[ALL] = _over_cameras(found)
        predictors[predictor] = {camera: _excess_row(e) for camera, e in found.items()}
    return {**base, "bands": [list(b) for b in bands], "reason": "", "predictors": predictors}


def _over_cameras(found: Mapping[str, Excess]) -> Excess:
    """The mean over cameras of the episodes that are defined in all of them."""
    parts = list(found.values())
    return Excess(
        early=torch.stack([e.early for e in parts]).mean(0),
        late=torch.stack([e.late for e in parts]).mean(0),
        defined=torch.stack([e.defined for e in parts]).all(0),
        bands=parts[0].bands,
    )


def _excess_row(found: Excess) -> dict[str, Any]:
    mean = paired_interval(found.late, found.early, mask=found.defined, level=PROTOCOL.level)
    interval = mean.interval
    return {
        "mean": mean.mean,
        "low": None if interval is None else interval.low,
        "high": None if interval is None else interval.high,
        "episodes": mean.episodes,
        "early": _mean(found.early, found.defined),
        "late": _mean(found.late, found.defined),
        "per_episode": [float(v) if d else None for v, d in zip(found.excess, found.defined)],
    }


def _mean(values: Tensor, defined: Tensor) -> float | None:
    return float(np.asarray(values[defined]).mean()) if defined.any() else None


def _shapes(video: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {camera: tuple(x.shape) for camera, x in video.items()}
