"""Drift and excess error on worlds whose error is known, and ratios against numbers worked out by hand."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.oracles import ExactDotWorldModel, dot_clip, dot_tokenizer
from worldline.errors import WorldlineError
from worldline.eval.drift import drift_curve, drift_results, moving_frames
from worldline.eval.excess import bands_within, excess_error, excess_ratio, excess_ratio_of_reports
from worldline.eval.protocol import PROTOCOL
from worldline.eval.replays import Replays
from worldline.eval.video_metrics import compare_videos
from worldline.eval.world_model import WorldModelEvaluation, evaluate_world_model
from worldline.rl_in_imagination.dream import Dream


def walking_square(n: int, t: int, still_from: int | None = None) -> Tensor:
    """Frames "n t 3 16 16": a bright square that jumps every frame; from `still_from` on it stays where it is."""
    frames = torch.full((n, t, 3, 16, 16), 50, dtype=torch.uint8)
    for i in range(t):
        x = 3 * ((i if still_from is None else min(i, still_from)) % 4)
        frames[:, i, :, 4:8, x : x + 4] = 150
    return frames


def test_a_frame_moves_when_any_camera_changes_and_not_when_all_stand_still() -> None:
    first, second = walking_square(2, 8, still_from=3), walking_square(2, 8, still_from=0)
    second[1] = walking_square(1, 8, still_from=5)[0]
    found = moving_frames({"a": first, "b": second})
    assert found.tolist() == [[True] * 3 + [False] * 4, [True] * 5 + [False] * 2]
    faint = first.clone()
    faint[:, 1::2] += 10  # flicker below the threshold is no motion
    assert torch.equal(moving_frames({"a": faint}), moving_frames({"a": first}))
    with pytest.raises(WorldlineError, match="two frames of some camera"):
        moving_frames({"a": first[:, :1]})


def test_a_curve_has_the_mean_and_the_t_interval_of_the_episodes_that_move() -> None:
    values = torch.tensor([[1.0, 1.0, torch.nan], [3.0, 9.0, torch.nan], [torch.nan, 5.0, 7.0]])
    counts = torch.tensor([[True, False, False], [True, False, False], [False, True, True]])
    found = drift_curve(values, counts)
    assert found["mean"] == [2.0, 5.0, 7.0] and found["episodes"] == [2, 1, 1]
    assert found["low"][0] == pytest.approx(2 - 12.7062, abs=1e-3), "t of one degree of freedom, standard error 1"
    assert found["high"][1:] == [None, None]


def growing(n: int, t: int, slope: float) -> tuple[Tensor, Tensor]:
    """A real video and one that is off by `slope` * frame grey levels at every pixel."""
    real = walking_square(n, t)
    offset = (slope * torch.arange(t)).round().to(torch.uint8)[None, :, None, None, None]
    return real, real + offset


@pytest.mark.parametrize("slope", [0.0, 1.0])
def test_excess_of_an_error_that_grows_evenly_is_the_difference_of_its_squares(slope: float) -> None:
    real, dream = growing(3, 106, slope)
    metrics = {"true": {"a": compare_videos(real[:, 1:], dream[:, 1:], real[:, 0])}}
    found = drift_results({"a": real}, metrics, episodes=(4, 7, 9))["excess"]
    cell = found["predictors"]["true"]["a"]
    assert found["bands"] == [[5, 15], [95, 105]] and found["episodes"] == [4, 7, 9]
    # the mean of h^2 over 11 frames around c is c^2 + 10. Frame 0, 4, ... show no moved pixels, so some frames are out
    early = np.mean([h * h for h in range(5, 16) if h % 4])
    late = np.mean([h * h for h in range(95, 106) if h % 4])
    assert cell["early"] == pytest.approx(slope * early, rel=1e-4)
    assert cell["per_episode"] == pytest.approx([slope * (late - early)] * 3, rel=1e-4)
    assert found["predictors"]["true"]["all"]["mean"] == pytest.approx(cell["mean"])


def test_episodes_that_stopped_have_no_late_error() -> None:
    error = torch.arange(1.0, 106).expand(3, -1)
    counts = torch.ones(3, 105, dtype=torch.bool)
    counts[1, 60:] = False
    counts[2, 97:] = False  # three frames are left of the late band: 95, 96 and 97
    found = excess_error(error, counts)
    assert found.defined.tolist() == [True, False, True]
    assert found.excess[0] == pytest.approx(90) and found.excess[2] == pytest.approx(96 - 10)
    assert bool(found.excess[1].isnan())


def test_bands_end_where_the_frames_end_and_need_their_middle() -> None:
    assert bands_within(100) == ((5, 15), (95, 100))
    with pytest.raises(WorldlineError, match=r"imagined frame 100 required, the rollouts reach frame 99.*--frames 106"):
        bands_within(99)


def test_the_ratio_is_that_of_means_and_pairs_are_resampled_together() -> None:
    base = np.array([10.0, 20.0, 30.0, 60.0])
    found = excess_ratio(0.5 * base, base)
    assert found.ratio == pytest.approx(0.5) and found.episodes == 4
    assert found.interval is not None and found.interval.width == pytest.approx(0, abs=1e-12), "pairs, not two samples"
    found = excess_ratio(np.array([0.0, 40.0]), np.array([10.0, 10.0]))  # resamples: both, 1st twice, 2nd twice
    assert found.ratio == pytest.approx(2) and found.interval is not None
    assert (found.interval.low, found.interval.high) == pytest.approx((0, 4))
    assert found.ours == 20 and found.base == 10


def test_undefined_episodes_leave_the_pair_out() -> None:
    found = excess_ratio(np.array([1.0, np.nan, 3.0, 50.0]), np.array([2.0, 5.0, 6.0, np.nan]))
    assert found.episodes == 2 and found.ratio == pytest.approx(0.5)
    with pytest.raises(WorldlineError, match="at least two episodes with finite values"):
        excess_ratio(np.array([1.0, np.nan]), np.array([2.0, 5.0]))
    with pytest.raises(WorldlineError, match="same episodes required"):
        excess_ratio(np.ones(3), np.ones(2))


@pytest.mark.parametrize("base", [[-1.0, 1.0, -1.0, 1.2], [0.0] * 4, [-5.0, -6.0, -5.5, -7.0]])
def test_no_ratio_over_a_base_that_does_not_drift(base: list[float]) -> None:
    found = excess_ratio(np.array([1.0, 2.0, 3.0, 4.0]), np.array(base))
    assert found.ratio is None and found.interval is None
    assert "not told from zero" in found.note and found.ours == 2.5


def dots(frames: int, episodes: int = 6) -> Replays:
    clip = dot_clip(episodes, frames, 0)
    return Replays(
        episodes=tuple(range(episodes)),
        frames=clip.frames,
        poses=clip.poses,
        actions=clip.actions,
        instruction=clip.instruction,
        frame_success=None,
        states=torch.zeros(episodes, frames, 0),
        causes=("random",) * episodes,
    )


@pytest.fixture(scope="module")
def perfect() -> WorldModelEvaluation:
    tokenizer = dot_tokenizer()
    return evaluate_world_model(Dream(ExactDotWorldModel(tokenizer), tokenizer), dots(107), progress=False)


def test_a_perfect_world_does_not_drift_over_a_hundred_frames(perfect: WorldModelEvaluation) -> None:
    assert perfect.results["frames"] == 107
    assert {60, 80, 100} <= {row["horizon"] for row in perfect.results["horizons"]}
    drift = perfect.results["drift"]
    curves = {(r["predictor"], r["measure"]): r for r in drift["curves"]}
    assert len(curves["true", "mse"]["mean"]) == len(drift["moving"]["share"]) == 106
    told = [v for v in curves["true", "moved_mse"]["mean"] if v is not None]
    assert len(told) > 20 and max(told) < 1e-3
    assert max(v for v in curves["copy-first", "moved_mse"]["mean"] if v is not None) > 100


def test_a_perfect_world_is_at_zero_latent_distance_and_a_still_one_is_not(perfect: WorldModelEvaluation) -> None:
    rows = perfect.results["latent_frechet"]["rows"]
    assert [(r["first"], r["last"]) for r in rows if r["predictor"] == "true"] == list(PROTOCOL.clip_windows)
    for ours, still in zip(*([r for r in rows if r["predictor"] == p] for p in ("true", "copy-first"))):
        assert ours["distance"] < 1e-3 < ours["floor"] and still["distance"] > 0.1
        assert "at least 16 required" in ours["note"]
    assert perfect.results["fvd"]["rows"] == []
    assert perfect.results["fvd"]["reason"] == "not measured, because no I3D weights were given (--i3d)"


def report(path: Path, values: dict[int, float | None], *, version: str = "a", data: str = "b") -> Path:
    cell = {"per_episode": list(values.values())}
    bands = [[5, 15], [95, 105]]
    excess = {"episodes": list(values), "bands": bands, "reason": "", "predictors": {"true": {"all": cell}}}
    results = {"protocol": {"version": version}, "drift": {"excess": excess}}
    path.write_text(json.dumps({"provenance": {"data_fingerprint": data}, "results": results}))
    return path


def test_two_reports_are_paired_by_episode_number(tmp_path: Path) -> None:
    ours = report(tmp_path / "ours.json", {3: 4.0, 1: 1.0, 5: None, 8: 99.0})
    base = report(tmp_path / "base.json", {1: 2.0, 3: 8.0, 5: 7.0})
    found = excess_ratio_of_reports(ours, base)
    assert found.episodes == 2 and found.ratio == pytest.approx(0.5)
    assert found.interval is not None and found.interval.width == pytest.approx(0, abs=1e-12)
    with pytest.raises(WorldlineError, match="predictor 'true' of camera 'wrist' required"):
        excess_ratio_of_reports(ours, base, camera="wrist")
    for other in ({"version": "other"}, {"data": "other"}):  # the same numbers, but not the same episodes
        with pytest.raises(WorldlineError, match="one protocol, the same bands and the same data required"):
            excess_ratio_of_reports(ours, report(tmp_path / "old.json", {1: 2.0, 3: 8.0}, **other))
    (tmp_path / "none.json").write_text('{"results": {}}')
    with pytest.raises(WorldlineError, match="with drift required"):
        excess_ratio_of_reports(ours, tmp_path / "none.json")
