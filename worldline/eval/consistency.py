"""Do the cameras of one imagined frame show the same moment? And is it the moment that was recorded?

A pose probe of each camera reads the pose off that camera alone. What two cameras say of the same frame differs by what
the probes get wrong, on real frames too: that difference is the floor. What imagination adds to it is views that drifted
apart. The distance of each camera's reading to the recorded pose says the same of every view alone.

Distances are Euclidean, in the units of the pose, over the dimensions that the probes read.
"""

from collections.abc import Mapping
from itertools import combinations
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from worldline.errors import SpecMismatch, WorldlineError
from worldline.eval.intervals import PairedDifference, paired_interval
from worldline.eval.probes import Probe
from worldline.eval.protocol import HORIZONS, PROTOCOL

Readings = Mapping[str, Float[Tensor, "n t d"]]  # camera -> what its probe says of every frame
PREDICTORS = ("true", "tokenizer", "action-free", "copy-first")


def view_distance(readings: Readings) -> dict[tuple[str, str], Float[Tensor, "n t"]]:
    """Distance between what two cameras say, frame by frame, for every pair of cameras.

    Raises `WorldlineError` for fewer than two cameras, or readings of different shape.
    """
    if len(readings) < 2 or len({tuple(x.shape) for x in readings.values()}) > 1:
        shapes = {camera: tuple(x.shape) for camera, x in readings.items()}
        raise WorldlineError(f"view_distance: readings of one shape from two cameras or more required, got {shapes}.")
    return {(a, b): (readings[a] - readings[b]).norm(dim=-1) for a, b in combinations(readings, 2)}


def view_consistency(imagined: Readings, real: Readings) -> list[dict[str, Any]]:
    """How far the views of imagined frames disagree beyond those of real ones, by pair of cameras and horizon.

    Args:
        imagined, real: readings of frames 0 to t - 1, frame 0 being the context.

    Returns:
        Rows `{cameras, horizon, distance, real, excess, low, high, episodes}`: `excess` is `distance` minus `real`, paired
        over episodes; `low` and `high` are None for a single episode.
    """
    ours, floor = view_distance(imagined), view_distance(real)
    rows = []
    for pair, distance in ours.items():
        for h in (h for h in HORIZONS if h < distance.shape[1]):
            found = paired_interval(distance[:, h], floor[pair][:, h], level=PROTOCOL.level)
            means = {"distance": float(distance[:, h].mean()), "real": float(floor[pair][:, h].mean())}
            rows.append({"cameras": list(pair), "horizon": h, **means, "excess": found.mean, **_ends(found)})
    return rows


def pose_errors(readings: Readings, poses: Float[Tensor, "n t d"]) -> list[dict[str, Any]]:
    """Distance between what each camera shows and the recorded pose: rows `{camera, horizon, error, low, high, episodes}`."""
    rows = []
    for camera, read in readings.items():
        error = (read - poses).norm(dim=-1)
        for h in (h for h in HORIZONS if h < error.shape[1]):
            found = paired_interval(error[:, h], torch.zeros(len(error)), level=PROTOCOL.level)
            rows.append({"camera": camera, "horizon": h, "error": found.mean, **_ends(found)})
    return rows


def multi_view_results(
    probes: Mapping[str, Probe],
    real: Mapping[str, Tensor],
    dreams: Mapping[str, Mapping[str, Tensor]],
    poses: Float[Tensor, "n t d"],
) -> dict[str, Any]:
    """What `report.json` holds under `multi_view`; its keys are in docs/reports.md.

    Args:
        probes: camera -> the probe that reads the pose off it (`by_camera`).
        real, dreams: videos "n t c h w" by camera, and by predictor and camera, the context frame first.
        poses: the recorded poses, in the dimensions that the probes read (`read_dimensions`).
    """
    videos = {"real": real} | {p: dreams[p] for p in PREDICTORS if p in dreams}
    readings = {
        predictor: {camera: probe.read_video({camera: video[camera]}) for camera, probe in probes.items()}
        for predictor, video in videos.items()
    }
    consistency, errors = [], []
    for predictor, found in readings.items():
        errors += [{"predictor": predictor, **row} for row in pose_errors(found, poses)]
        if predictor != "real" and len(probes) > 1:
            consistency += [{"predictor": predictor, **row} for row in view_consistency(found, readings["real"])]
    names = next(iter(probes.values())).config.names
    reason = "" if len(probes) > 1 else "the probes of two cameras are required to compare views"
    return {
        "cameras": list(probes),
        "names": list(names),
        "consistency": consistency,
        "reason": reason,
        "pose_error": errors,
    }


def by_camera(probes: Mapping[str, Probe]) -> dict[str, Probe]:
    """Pose probes by the camera each looks at.

    Args:
        probes: where it came from (for messages) -> probe.

    Raises:
        SpecMismatch: a probe of something else, of several cameras, two of one camera, or of different pose dimensions.
    """
    out: dict[str, Probe] = {}
    for source, probe in probes.items():
        seen = [c.name for c in probe.spec.cameras]
        if probe.config.target != "pose" or len(seen) != 1 or probe.config.encoder.window != 1:
            raise SpecMismatch(
                f"{source}: a probe of the pose from one camera required, got {probe.config.target} from {seen}. "
                "Train it with `worldline train probe --target pose --camera NAME`."
            )
        if seen[0] in out:
            raise SpecMismatch(f"{source}: one probe a camera required, got a second one of {seen[0]}.")
        out[seen[0]] = probe
    read = {camera: probe.config.names for camera, probe in out.items()}
    if len(set(read.values())) > 1:
        raise SpecMismatch(
            f"pose probes must read the same dimensions, got {read}. Train them with the same --columns."
        )
    return out


def read_dimensions(poses: Float[Tensor, "n t p"], names: tuple[str, ...], probe: Probe) -> Float[Tensor, "n t d"]:
    """The dimensions of `poses` (named `names`) that a probe reads. Raises `SpecMismatch` if one is missing."""
    if missing := [name for name in probe.config.names if name not in names]:
        raise SpecMismatch(f"pose probe: poses named {list(probe.config.names)} required, the data lacks {missing}.")
    return poses[..., [names.index(name) for name in probe.config.names]]


def _ends(found: PairedDifference) -> dict[str, Any]:
    interval = found.interval
    low, high = (None, None) if interval is None else (interval.low, interval.high)
    return {"low": low, "high": high, "episodes": found.episodes}
