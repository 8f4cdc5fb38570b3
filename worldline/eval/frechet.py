"""Frechet distances between real and imagined clips: of all imagined clips together, are they like real ones?

`latent_frechet_distance` needs no weights beyond the tokenizer's. **It is not FVD** and its values compare only with its
own, at the same number of clips and dimensions on the same episodes. Its features are a fixed map, never fitted:

1. every camera's latents are whitened by the tokenizer's statistics and averaged over a 2x2 grid (`pooled_latents`);
2. a clip of 16 such frames is projected by a fixed random matrix, and so are its 15 frame-to-frame differences, times 4:
   without that, motion would be lost beside appearance (in a random walk frames 16 apart differ sqrt(16) times as much).
   Features alternate between the two, so that the first 8, 16, 32 of the 64 are a feature map of the same kind.

A covariance needs more clips than dimensions, and with two clips a dimension the bias of the distance still hides a blur
that four let through. So the largest of 64, 32, 16 and 8 dimensions is used that leaves four clips each (8 for fewer
clips); under two clips a dimension the note says that the value is not to be trusted.

`distance` is between all real and all imagined clips. They share starts and actions, so a perfect model reaches 0. The
floor is the distance between disjoint halves of the *real* clips; half as many clips make it large (the bias of a Frechet
distance falls with their number), so it is no measure for `distance`. `unpaired` is: the distance between the imagined
clips of one half and the real clips of the other, over the same splits. For a perfect model it equals the floor.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from scipy import stats
from torch import Tensor

from worldline.errors import WorldlineError
from worldline.eval.intervals import Interval
from worldline.eval.protocol import PROTOCOL
from worldline.tokenizers.whitening import whiten
from worldline.types import LatentSpec

GRID = 2
MOTION_GAIN = PROTOCOL.clip_frames**0.5
SPLITS = 10  # of the episodes into halves, over which floor and `unpaired` are means
GROUPS = 50  # of episodes left out by the jackknife: one episode each up to this many


@dataclass(frozen=True, slots=True, kw_only=True)
class FrechetDistance:
    """A distance with its jackknife interval over episodes; between halves, imagined to real and real to real."""

    distance: float
    unpaired: float
    floor: float
    interval: Interval
    clips: int
    dims: int
    note: str = ""


def frechet_distance(
    mean1: Float[np.ndarray, " d"],
    cov1: Float[np.ndarray, "d d"],
    mean2: Float[np.ndarray, " d"],
    cov2: Float[np.ndarray, "d d"],
) -> float:
    """|mean1 - mean2|^2 + tr(cov1 + cov2 - 2 (cov1 cov2)^(1/2)), the squared 2-Wasserstein distance of two Gaussians.

    Heusel et al. (1706.08500), equation 6. The trace of the root is taken from the eigenvalues of the symmetric
    cov1^(1/2) cov2 cov1^(1/2), which are those of cov1 cov2 and stay real when a covariance is singular.

    Raises:
        WorldlineError: NaN, infinities, or a covariance with a negative eigenvalue beyond rounding.
    """
    if not all(np.isfinite(x).all() for x in (mean1, cov1, mean2, cov2)):
        raise WorldlineError("frechet_distance: finite means and covariances required, got NaN or infinity.")
    values, vectors = np.linalg.eigh((cov1 + cov1.T) / 2)
    root = (vectors * np.sqrt(_nonnegative(values))) @ vectors.T
    product = root @ ((cov2 + cov2.T) / 2) @ root
    overlap = np.sqrt(_nonnegative(np.linalg.eigvalsh((product + product.T) / 2))).sum()
    distance = np.square(mean1 - mean2).sum() + np.trace(cov1) + np.trace(cov2) - 2 * overlap
    return max(0.0, float(distance))


def _nonnegative(eigenvalues: np.ndarray) -> np.ndarray:
    """Rounding below zero is cut; more than rounding is no covariance."""
    if eigenvalues.min() < -1e-6 * max(1e-12, eigenvalues.max()):
        raise WorldlineError(
            f"frechet_distance: covariances required, got one with the eigenvalue {eigenvalues.min():.3g}."
        )
    return eigenvalues.clip(min=0)


def pooled_latents(latents: Mapping[str, Float[Tensor, "n t _c _h _w"]], spec: LatentSpec) -> Float[Tensor, "n t f"]:
    """Whitened latents of every camera, by name, averaged over a 2x2 grid: f = sum of 4 c."""
    white = whiten(latents, spec)
    pooled = [
        F.adaptive_avg_pool2d(z.flatten(0, 1), GRID).flatten(1).unflatten(0, z.shape[:2])
        for _, z in sorted(white.items())
    ]
    return torch.cat(pooled, dim=-1).float().cpu()


def clip_features(
    frames: Float[Tensor, "n t f"], *, dims: int = max(PROTOCOL.feature_dims), seed: int = PROTOCOL.feature_seed
) -> Float[np.ndarray, "n d"]:
    """`dims` features of clips of pooled latents: see the top of this module. Raises `WorldlineError` unless t is 16."""
    n, t = frames.shape[:2]
    if t != PROTOCOL.clip_frames:
        raise WorldlineError(f"clip features: clips of {PROTOCOL.clip_frames} frames required, got {t}.")
    clips = frames.double().numpy()
    motion = MOTION_GAIN * np.diff(clips, axis=1)
    most = max(PROTOCOL.feature_dims)
    frozen = np.random.RandomState(seed)  # the one generator whose numbers numpy promises never to change
    parts = [
        x.reshape(n, -1) @ frozen.standard_normal((x[0].size, most // 2)) / x[0].size ** 0.5 for x in (clips, motion)
    ]
    return np.stack(parts, axis=-1).reshape(n, most)[:, :dims]


def latent_frechet_distance(real: Float[Tensor, "n t f"], imagined: Float[Tensor, "_n _t _f"]) -> FrechetDistance:
    """Frechet distance of clips of 16 frames of `pooled_latents`, row i of both being the same episode.

    Raises:
        WorldlineError: clips of another length, of different shape, or fewer than four.
    """
    if real.shape != imagined.shape:
        raise WorldlineError(
            f"latent Frechet distance: clips 'n t f' of one shape required, got {tuple(real.shape)} and "
            f"{tuple(imagined.shape)}."
        )
    dims = next(
        (d for d in PROTOCOL.feature_dims if len(real) >= PROTOCOL.feature_clips * d), min(PROTOCOL.feature_dims)
    )
    return distance_of_features(clip_features(real, dims=dims), clip_features(imagined, dims=dims))


def distance_of_features(
    real: Float[np.ndarray, "n d"], imagined: Float[np.ndarray, "n d"], *, level: float = PROTOCOL.level
) -> FrechetDistance:
    """Distance, floor and jackknife interval of features, row i of both being the same episode.

    The interval is Student's t over a delete-one-episode jackknife (groups of episodes where there are more than 50),
    cut at zero. A bootstrap would repeat clips, which shrinks covariances and so moves the distance itself.

    Raises:
        WorldlineError: fewer than four clips.
    """
    n, dims = real.shape
    if n < 4:
        raise WorldlineError(f"Frechet distance: at least 4 clips required, got {n}. Evaluate more episodes.")
    distance = _between(real, imagined)
    groups = np.array_split(np.arange(n), min(n, GROUPS))
    without = np.array([_between(np.delete(real, g, 0), np.delete(imagined, g, 0)) for g in groups])
    count = len(groups)
    error = np.sqrt((count - 1) / count * np.square(without - without.mean()).sum())
    half = float(stats.t.ppf((1 + level) / 2, count - 1) * error)
    interval = Interval(
        low=max(0.0, distance - half), high=distance + half, level=level, method=f"jackknife over {count} groups"
    )
    note = f"{n} clips for {dims} dimensions: at least {2 * dims} required to trust the value" if n < 2 * dims else ""
    unpaired, floor = _between_halves(imagined, real), _between_halves(real, real)
    return FrechetDistance(
        distance=distance, unpaired=unpaired, floor=floor, interval=interval, clips=n, dims=dims, note=note
    )


def _between(a: np.ndarray, b: np.ndarray) -> float:
    cov_a, cov_b = (np.atleast_2d(np.cov(x, rowvar=False)) for x in (a, b))
    return frechet_distance(a.mean(0), cov_a, b.mean(0), cov_b)


def _between_halves(a: np.ndarray, b: np.ndarray) -> float:
    """Mean distance between half of the rows of `a` and the other rows of `b`."""
    generator, half = np.random.RandomState(0), len(a) // 2
    orders = [generator.permutation(len(a)) for _ in range(SPLITS)]
    return float(np.mean([_between(a[o[:half]], b[o[half : 2 * half]]) for o in orders]))
