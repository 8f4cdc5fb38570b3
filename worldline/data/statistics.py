"""Per-column statistics as LeRobotDataset v3.0 stores them: min, max, mean, std, count and five quantiles.

Images are summarised by exact 256-bin histograms of the pixels looked at, so that statistics of many episodes are the
statistics of all their pixels rather than averages of averages.
"""

from collections.abc import Mapping

import numpy as np
from jaxtyping import Float, Int, UInt8
from torch import Tensor

QUANTILES = {"q01": 0.01, "q10": 0.10, "q50": 0.50, "q90": 0.90, "q99": 0.99}


def column_stats(values: Float[np.ndarray, "n d"]) -> dict[str, np.ndarray]:
    """Statistics over rows, each of shape (d,), and `count` of shape (1,). NaN are left out; n = 0 gives zeros."""
    values = np.asarray(values, dtype=np.float64)
    values = values[np.isfinite(values).all(axis=1)]
    if not len(values):
        values = np.zeros((1, values.shape[1]))
        return {**column_stats(values), "count": np.array([0])}
    quantiles = np.quantile(values, list(QUANTILES.values()), axis=0)
    return {
        "min": values.min(axis=0),
        "max": values.max(axis=0),
        "mean": values.mean(axis=0),
        "std": values.std(axis=0),
        "count": np.array([len(values)]),
        **dict(zip(QUANTILES, quantiles, strict=True)),
    }


def image_histogram(frames: UInt8[Tensor, "t c h w"], *, max_frames: int = 32) -> Int[np.ndarray, "c 256"]:
    """Pixel counts per channel over at most `max_frames` evenly spaced frames."""
    chosen = np.unique(np.linspace(0, len(frames) - 1, min(max_frames, len(frames))).astype(int))
    pixels = frames[chosen].numpy()
    return np.stack([np.bincount(pixels[:, c].ravel(), minlength=256) for c in range(pixels.shape[1])])


def image_stats(histogram: Int[np.ndarray, "c 256"]) -> dict[str, np.ndarray]:
    """Statistics of pixel values in [0, 1], each of shape (c, 1, 1), from a histogram per channel."""
    levels = np.arange(256) / 255
    total = histogram.sum(axis=1, keepdims=True)
    share = histogram / total
    mean = share @ levels
    cumulative = share.cumsum(axis=1)
    out = {
        "min": levels[(histogram > 0).argmax(axis=1)],
        "max": levels[255 - (histogram > 0)[:, ::-1].argmax(axis=1)],
        "mean": mean,
        "std": np.sqrt(np.maximum(share @ levels**2 - mean**2, 0)),
        **{name: levels[(cumulative >= q - 1e-12).argmax(axis=1)] for name, q in QUANTILES.items()},
    }
    return {name: value.reshape(-1, 1, 1) for name, value in out.items()} | {"count": np.array([int(total[0, 0])])}


def to_lists(stats: Mapping[str, Mapping[str, np.ndarray]]) -> dict[str, dict[str, list]]:
    """Statistics as nested lists, for JSON and parquet."""
    return {key: {name: value.tolist() for name, value in entry.items()} for key, entry in stats.items()}
