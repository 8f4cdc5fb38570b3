"""The pinned protocol of `worldline eval`: one set of settings under one version, printed in every report.

Numbers of two reports may be compared when their `version` is the same, neither lists a deviation, and the episodes are
the same. A change of any field below, or of what a measure means, is a new version.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from types import MappingProxyType
from typing import Any

from worldline.eval.video_metrics import MOVED_THRESHOLD

HORIZONS = (1, 2, 5, 10, 20, 30, 40, *range(60, 1001, 20))  # imagined frames told in tables, as far as episodes reach


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationProtocol:
    """What is fixed. Frames are imagined frames: 1 is the first after the context."""

    version: str = "worldline-eval-2"
    context_frames: int = 1
    actions: str = "recorded"
    sampling: str = "the checkpoint's own"
    seed: int = 0  # the i-th episode's noise has the seed i + 1000003 * seed
    horizons: tuple[int, ...] = HORIZONS
    moved_threshold: int = MOVED_THRESHOLD  # grey levels from the first frame, in some channel
    moving_threshold: int = MOVED_THRESHOLD  # grey levels from the frame before, in some channel
    moving_share: float = 0.005  # of a camera's pixels: with more, the frame is one in which something still moves
    excess_frames: tuple[int, int] = (10, 100)
    excess_band: int = 5  # frames to either side of both that are averaged
    excess_least: int = 3  # frames in motion that a band must hold
    clip_frames: int = 16  # of a clip whose features Frechet distances compare
    clip_windows: tuple[tuple[int, int], ...] = ((1, 16), (33, 48), (85, 100))  # first and last frame
    feature_dims: tuple[int, ...] = (64, 32, 16, 8)  # the largest with enough clips a dimension is used, else the last
    feature_clips: int = 4  # clips a dimension that are enough
    feature_seed: int = 0
    level: float = 0.95  # of all intervals


PROTOCOL = EvaluationProtocol()


def protocol_results(
    *,
    frames: int,
    episodes: int,
    sampling: Mapping[str, Any],
    seed: int,
    overridden: tuple[str, ...] = (),
    hidden: tuple[str, ...] = (),
    noisy: Mapping[str, float] = MappingProxyType({}),
) -> dict[str, Any]:
    """The protocol, what this run used of what it leaves open, and where the run departs from it.

    Args:
        frames: of each rollout, the context included.
        sampling: the world model's settings, by name.
        overridden: sampling settings that were not the checkpoint's own.
        hidden, noisy: cameras kept from the dream, or shown to it through noise of this standard deviation.
    """
    deviations = [f"{name} is not the checkpoint's own" for name in overridden]
    if seed != PROTOCOL.seed:
        deviations.append(f"seed {seed} instead of {PROTOCOL.seed}")
    deviations += [f"camera {camera} is hidden from the dream" for camera in hidden]
    deviations += [f"camera {camera} is noisy at the start (std {std:g})" for camera, std in noisy.items()]
    if frames - 1 < PROTOCOL.excess_frames[1]:
        deviations.append(f"{frames - 1} imagined frames: drift and late clips ask for {PROTOCOL.excess_frames[1]}")
    used = {
        "frames": frames,
        "episodes": episodes,
        **sampling,
        "seed": seed,
    }
    return {**asdict(PROTOCOL), "used": used, "deviations": deviations}
