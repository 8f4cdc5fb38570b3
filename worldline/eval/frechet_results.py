"""The Frechet distances of an evaluation: by predictor and by window of the rollout, as rows of `report.json`."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from worldline.errors import WorldlineError
from worldline.eval.frechet import FrechetDistance, latent_frechet_distance, pooled_latents
from worldline.eval.protocol import PROTOCOL
from worldline.eval.video_frechet import distance_of_features, i3d_features, load_i3d
from worldline.types import VideoTokenizer

EPISODES = 4  # encoded at once


def latent_results(
    real: Mapping[str, UInt8[Tensor, "n t c _h _w"]],
    dreams: Mapping[str, Mapping[str, UInt8[Tensor, "n t c _h _w"]]],
    tokenizer: VideoTokenizer,
) -> dict[str, Any]:
    """What `report.json` holds under `latent_frechet`: rows by predictor and window, or the reason why there are none.

    All videos, real and imagined, are encoded from the frames that were shown, so every predictor is measured alike;
    `tokenizer` (real frames reconstructed) is what a model without error would show.

    Args:
        real, dreams: by camera, and by predictor and camera, the context frame first.
    """
    n, t = next(iter(real.values())).shape[:2]
    windows = windows_within(t - 1)
    if not windows or n < 4:
        need = f"4 episodes of {PROTOCOL.clip_frames} imagined frames required, got {n} of {t - 1}"
        return {"rows": [], "reason": f"not measured: {need}"}
    truth = pooled_video(real, tokenizer)
    rows = []
    for predictor in (p for p in ("true", "action-free", "copy-first", "tokenizer") if p in dreams):
        made = pooled_video(dreams[predictor], tokenizer)
        for first, last in windows:
            clips = slice(first, last + 1)
            found = latent_frechet_distance(truth[:, clips], made[:, clips])
            rows.append({"predictor": predictor, "first": first, "last": last, **as_row(found)})
    return {"rows": rows, "reason": ""}


def pooled_video(
    video: Mapping[str, UInt8[Tensor, "n t c _h _w"]], tokenizer: VideoTokenizer
) -> Float[Tensor, "n t f"]:
    """`pooled_latents` of uint8 frames, encoded a few episodes at a time."""
    n = len(next(iter(video.values())))
    parts = [
        pooled_latents(tokenizer.encode({c: x[i : i + EPISODES] for c, x in video.items()}), tokenizer.latent_spec)
        for i in range(0, n, EPISODES)
    ]
    return torch.cat(parts)


def windows_within(frames: int) -> list[tuple[int, int]]:
    """First and last frame of the protocol's clips that lie within imagined frames 1 to `frames`."""
    return [window for window in PROTOCOL.clip_windows if window[1] <= frames]


def video_results(
    real: Mapping[str, UInt8[Tensor, "n t c _h _w"]],
    dreams: Mapping[str, Mapping[str, UInt8[Tensor, "n t c _h _w"]]],
    i3d: Path | None,
) -> dict[str, Any]:
    """What `report.json` holds under `fvd`: rows by camera, predictor and window, or the reason why there are none.

    Args:
        real, dreams: videos with the context frame first; of `dreams` the predictors `true` and `tokenizer`.
        i3d: the TorchScript file.
    """
    try:
        if i3d is None:
            raise WorldlineError("no I3D weights were given (--i3d)")
        network, windows = load_i3d(i3d), windows_within(next(iter(real.values())).shape[1] - 1)
        if not windows:
            raise WorldlineError(f"clips of {PROTOCOL.clip_frames} imagined frames are required")
        rows = []
        for camera, first, last in [(c, *w) for c in real for w in windows]:
            clips = i3d_features(network, real[camera][:, first : last + 1])
            for predictor in ("true", "tokenizer"):
                made = i3d_features(network, dreams[predictor][camera][:, first : last + 1])
                row = {"camera": camera, "predictor": predictor, "first": first, "last": last}
                rows.append({**row, **as_row(distance_of_features(clips, made))})
    except WorldlineError as error:
        return {"rows": [], "reason": f"not measured, because {error}"}
    return {"rows": rows, "reason": ""}


def as_row(found: FrechetDistance) -> dict[str, Any]:
    """A distance as one flat row of a report."""
    return {
        "distance": found.distance,
        "low": found.interval.low,
        "high": found.interval.high,
        "unpaired": found.unpaired,
        "floor": found.floor,
        "clips": found.clips,
        "dims": found.dims,
        "note": found.note,
    }
