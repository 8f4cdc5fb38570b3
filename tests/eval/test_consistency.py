"""Do views agree: with probes that read exactly, disagreement is the distance the dot moved between the two moments."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.oracles import SPEC, dot_clip, locate
from worldline.data.normalization import RobustNormalizer
from worldline.errors import SpecMismatch, WorldlineError
from worldline.eval.consistency import (
    by_camera,
    multi_view_results,
    pose_errors,
    read_dimensions,
    view_consistency,
    view_distance,
)
from worldline.eval.probes import Probe, ProbeConfig
from worldline.policies import EncoderConfig
from worldline.types import CameraSpec

CAMERAS = ("front", "side")


def probe(camera: str, *, names: tuple[str, ...] = ("x", "y"), target: str = "pose") -> Probe:
    cameras = tuple(CameraSpec(name=c, height=16, width=16) for c in camera.split("+"))
    config = ProbeConfig(target=target, names=names, encoder=EncoderConfig(channels=(8,), features=8, shift=0))
    normalizer = RobustNormalizer(low=(0.0,) * len(names), high=(1.0,) * len(names))
    return Probe(config, replace(SPEC, cameras=cameras), normalizer)


class Eye(Probe):
    """Reads the dot's place off the pixels of its camera, without learning."""

    def read_video(self, video: Mapping[str, Tensor], *, batch: int = 256) -> Tensor:
        (frames,) = video.values()
        return locate(frames)


@pytest.fixture
def eyes() -> dict[str, Probe]:
    out: dict[str, Probe] = {}
    for camera in CAMERAS:
        plain = probe(camera)
        out[camera] = Eye(plain.config, plain.spec, plain.normalizer)
    return out


def views(frames: int = 24) -> tuple[dict[str, Tensor], Tensor]:
    """Two cameras that see the same dot, and where it is."""
    clip = dot_clip(8, frames, 0)
    return dict.fromkeys(CAMERAS, clip.frames["top"]), clip.poses


def late(video: Tensor, by: int) -> Tensor:
    """The video `by` frames late, its first frame repeated."""
    return torch.cat([video[:, :1]] * by + [video[:, : video.shape[1] - by]], 1)


def rows(found: dict[str, Any], key: str, predictor: str) -> dict[int, dict[str, Any]]:
    return {r["horizon"]: r for r in found[key] if r["predictor"] == predictor}


def test_views_that_agree_are_at_the_floor_and_a_late_one_is_not(eyes: dict[str, Probe]) -> None:
    real, poses = views()
    excess = []
    for by in (0, 1, 3):
        dreams = {"true": {"front": real["front"], "side": late(real["side"], by)}}
        found = multi_view_results(eyes, real, dreams, poses)
        at = rows(found, "consistency", "true")
        assert set(at) == {1, 2, 5, 10, 20} and at[1]["cameras"] == ["front", "side"] and at[1]["episodes"] == 8
        excess.append([at[h]["excess"] for h in (5, 10)])
        expected = (poses[:, 10] - poses[:, 10 - by]).norm(dim=-1).mean()
        assert at[10]["distance"] == pytest.approx(float(expected), abs=0.03), "how far the dot went in that time"
    assert excess[0] == [0, 0] and excess[0] < excess[1] < excess[2]


def test_the_late_view_and_not_the_other_is_off_the_recorded_pose(eyes: dict[str, Probe]) -> None:
    real, poses = views()
    found = multi_view_results(eyes, real, {"true": {"front": real["front"], "side": late(real["side"], 3)}}, poses)
    error = {(r["predictor"], r["camera"]): r["error"] for r in found["pose_error"] if r["horizon"] == 10}
    assert error["true", "front"] == error["real", "front"] == error["real", "side"]
    assert error["true", "side"] > 2 * error["real", "side"]


def test_the_floor_is_taken_off_pair_by_pair() -> None:
    """Probes that disagree by 3 on real frames of one episode and by 1 of another; imagination adds 2 to both."""
    a = torch.zeros(2, 3, 1)
    floor = torch.tensor([3.0, 1.0])[:, None, None].expand(2, 3, 1)
    (first, _) = view_consistency({"a": a, "b": floor + 2}, {"a": a, "b": floor})
    assert (first["distance"], first["real"], first["excess"]) == (4, 2, 2)
    assert (first["low"], first["high"]) == (2, 2), "the spread between episodes is in the floor alone"


def test_three_cameras_are_compared_in_pairs() -> None:
    readings = {name: torch.full((2, 2, 2), value) for name, value in (("a", 0.0), ("b", 3.0), ("c", 1.0))}
    found = {pair: float(x.mean()) / 2**0.5 for pair, x in view_distance(readings).items()}
    assert found == pytest.approx({("a", "b"): 3, ("a", "c"): 1, ("b", "c"): 2})
    assert [r["error"] for r in pose_errors({"c": readings["c"]}, readings["a"])] == pytest.approx([2**0.5])


def test_one_view_has_a_pose_but_no_agreement(eyes: dict[str, Probe]) -> None:
    real, poses = views()
    found = multi_view_results({"front": eyes["front"]}, real, {"true": real}, poses)
    assert found["consistency"] == [] and "two cameras are required" in found["reason"] and found["pose_error"]
    with pytest.raises(WorldlineError, match="from two cameras or more required"):
        view_distance({"a": poses})


def test_probes_must_read_one_pose_from_one_camera_each() -> None:
    good = by_camera({"p": probe("front"), "q": probe("side")})
    assert list(good) == ["front", "side"]
    for wrong, reason in (
        (
            {"p": probe("front+side")},
            r"p: a probe of the pose from one camera required, got pose from \['front', 'side'\]",
        ),
        ({"p": probe("front", target="action")}, "got action from"),
        ({"p": probe("front"), "q": probe("front")}, "q: one probe a camera required, got a second one of front"),
        ({"p": probe("front"), "q": probe("side", names=("x",))}, "must read the same dimensions"),
    ):
        with pytest.raises(SpecMismatch, match=reason):
            by_camera(wrong)


def test_a_probe_of_some_dimensions_is_held_against_those() -> None:
    poses = torch.arange(6.0).reshape(1, 2, 3)
    assert read_dimensions(poses, ("x", "y", "grip"), probe("a", names=("grip", "x"))).tolist() == [[[2, 0], [5, 3]]]
    with pytest.raises(SpecMismatch, match=r"the data lacks \['z'\]"):
        read_dimensions(poses, ("x", "y", "grip"), probe("a", names=("x", "z")))
