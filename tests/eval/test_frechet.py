"""Frechet distances against closed forms, on clips whose difference is known, and FVD's plumbing with a stand-in network."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.oracles import dot_clip, dot_tokenizer
from worldline.errors import WorldlineError
from worldline.eval.frechet import clip_features, frechet_distance, latent_frechet_distance
from worldline.eval.frechet_results import latent_results, pooled_video, video_results
from worldline.eval.video_frechet import frechet_video_distance, i3d_features, load_i3d


def covariance(d: int, seed: int) -> np.ndarray:
    root = np.random.default_rng(seed).normal(size=(d, d))
    return root @ root.T


def test_equal_gaussians_are_at_distance_zero() -> None:
    mean, cov = np.arange(5.0), covariance(5, 0)
    assert frechet_distance(mean, cov, mean, cov) == pytest.approx(0, abs=1e-9)
    flat = np.diag([2.0, 0.0, 1.0, 0.0, 0.0])  # singular, as covariances of few clips are
    assert frechet_distance(mean, flat, mean, flat) == pytest.approx(0, abs=1e-9)


def test_a_shifted_mean_counts_squared_and_a_scaled_covariance_by_its_root() -> None:
    mean, cov = np.zeros(4), covariance(4, 1)
    assert frechet_distance(mean, cov, np.array([3.0, 0, 4, 0]), cov) == pytest.approx(25)
    # tr(C + s^2 C - 2 s C) = (s - 1)^2 tr C
    assert frechet_distance(mean, cov, mean, 9 * cov) == pytest.approx(4 * np.trace(cov))
    # commuting covariances: the sum of squared differences of the standard deviations
    a, b = np.diag([1.0, 4.0, 9.0, 0.0]), np.diag([4.0, 4.0, 0.0, 16.0])
    assert frechet_distance(mean, a, mean, b) == pytest.approx(1 + 0 + 9 + 16)


def test_the_distance_does_not_turn_with_the_axes_and_is_symmetric() -> None:
    a, b, mean = covariance(4, 2), covariance(4, 3), np.arange(4.0)
    turn = np.linalg.qr(covariance(4, 4))[0]
    straight = frechet_distance(np.zeros(4), a, mean, b)
    assert frechet_distance(np.zeros(4), turn @ a @ turn.T, turn @ mean, turn @ b @ turn.T) == pytest.approx(straight)
    assert frechet_distance(mean, b, np.zeros(4), a) == pytest.approx(straight)


def test_what_is_no_gaussian_is_refused() -> None:
    with pytest.raises(WorldlineError, match="covariances required"):
        frechet_distance(np.zeros(2), np.diag([1.0, -1.0]), np.zeros(2), np.eye(2))
    with pytest.raises(WorldlineError, match="finite"):
        frechet_distance(np.array([0, np.nan]), np.eye(2), np.zeros(2), np.eye(2))


def test_other_samples_of_the_same_clips_are_at_the_floor_and_wrong_ones_are_not() -> None:
    """The floor is what halves show: an imagination that is right in distribution, of other actions, is at it, too."""
    tokenizer = dot_tokenizer()
    real, other = (dot_clip(64, 16, seed).frames["top"] for seed in (0, 1))
    pooled = lambda video: pooled_video({"top": video}, tokenizer)  # noqa: E731
    alike = latent_frechet_distance(pooled(real), pooled(other))
    assert alike.dims == 16 and alike.clips == 64 and not alike.note
    assert abs(alike.unpaired / alike.floor - 1) < 0.2
    blurred = nn.functional.avg_pool2d(other.flatten(0, 1).float(), 7, 1, 3).to(torch.uint8).unflatten(0, (64, 16))
    still = other[:, :1].expand_as(other).contiguous()
    for wrong, times in ((blurred, 1.5), (still, 2.5)):
        found = latent_frechet_distance(pooled(real), pooled(wrong))
        assert found.unpaired > times * found.floor and found.floor == alike.floor
        assert found.interval.low > alike.interval.high and found.distance in found.interval


def test_a_paired_perfect_imagination_is_at_zero_and_its_halves_at_the_floor() -> None:
    pooled = pooled_video(dot_clip(16, 16, 0).frames, dot_tokenizer())
    found = latent_frechet_distance(pooled, pooled)
    assert found.distance == pytest.approx(0, abs=1e-6) and found.unpaired == pytest.approx(found.floor)


def test_the_distance_grows_with_the_blur() -> None:
    tokenizer, real = dot_tokenizer(), dot_clip(32, 16, 0).frames["top"]
    distances = []
    for width in (1, 3, 5, 9):
        made = nn.functional.avg_pool2d(real.flatten(0, 1).float(), width, 1, width // 2).to(torch.uint8)
        video = made.unflatten(0, (32, 16))
        distances.append(
            latent_frechet_distance(*(pooled_video({"top": x}, tokenizer) for x in (real, video))).distance
        )
    assert distances[0] == pytest.approx(0, abs=1e-6) and distances == sorted(distances)


def test_features_see_motion_beside_appearance() -> None:
    """The same frames in reverse order: what shows is the same, the differences change their sign."""
    frames = torch.randn(8, 16, 12, generator=torch.Generator().manual_seed(0)).cumsum(1)
    ahead, back = clip_features(frames), clip_features(frames.flip(1))
    assert ahead.shape == (8, 64) and np.array_equal(clip_features(frames, dims=16), ahead[:, :16])
    shift = clip_features(frames + 5.0)
    assert np.allclose(shift[:, 1::2], ahead[:, 1::2], atol=1e-4) and not np.allclose(shift[:, ::2], ahead[:, ::2])
    assert not np.allclose(back[:, 1::2], ahead[:, 1::2])
    with pytest.raises(WorldlineError, match="clips of 16 frames required, got 9"):
        clip_features(frames[:, :9])


def test_too_few_clips_or_frames_are_said() -> None:
    few = torch.randn(3, 16, 8)
    with pytest.raises(WorldlineError, match="at least 4 clips required, got 3"):
        latent_frechet_distance(few, few)
    with pytest.raises(WorldlineError, match="one shape"):
        latent_frechet_distance(few, few[:, :8])
    tokenizer, video = dot_tokenizer(), dot_clip(4, 12, 0).frames
    assert "16 imagined frames required, got 4 of 11" in latent_results(video, {}, tokenizer)["reason"]
    assert "16 imagined frames are required" in video_results(video, {}, stand_in_path(400))["reason"]


class StandIn(nn.Module):
    """Called as I3D is; its features are the mean of each of 20 x 20 squares over the clip."""

    def __init__(self, side: int) -> None:
        super().__init__()
        self.side = side

    def forward(self, x: Tensor, rescale: bool, resize: bool, return_features: bool) -> Tensor:
        assert not rescale and not resize and return_features
        assert x.shape[1] == 3 and x.shape[2] == 16 and x.shape[3] == 224 and x.shape[4] == 224
        assert bool(x.abs().max() < 1.001)
        return nn.functional.adaptive_avg_pool2d(x.mean(2).mean(1, keepdim=True), [self.side, self.side]).flatten(1)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def stand_in_path(features: int) -> Path:
    path = Path(f"i3d_{features}.pt").absolute()
    torch.jit.script(StandIn(int(features**0.5))).save(str(path))
    return path


def test_fvd_shows_the_network_what_the_protocol_says_and_takes_its_features() -> None:
    network = load_i3d(stand_in_path(400))
    real = dot_clip(6, 16, 0).frames["top"]
    assert i3d_features(network, real).shape == (6, 400)
    same = frechet_video_distance(real, real, network)
    assert same.distance == pytest.approx(0, abs=1e-6) and same.dims == 400
    assert "at least 800 required" in same.note
    shifted = frechet_video_distance(real // 2, real // 2 + 51, network)  # every feature by 51 / 127.5, nothing else
    assert shifted.distance == pytest.approx(400 * 0.4**2, rel=1e-4)


def test_fvd_is_not_measured_without_its_network_and_says_why(tmp_path: Path) -> None:
    real = dot_clip(4, 18, 0).frames
    dreams = {"true": real, "tokenizer": real}
    (tmp_path / "text.pt").write_text("not a network")
    for path, reason in (
        (None, r"not measured, because no I3D weights were given"),
        (tmp_path / "absent.pt", r"not measured, because I3D weights: a TorchScript file required, there is none at"),
        (tmp_path / "text.pt", r"is not a TorchScript file"),
        (stand_in_path(100), r"I3D gives 400 features a clip, this file gives \(100,\)"),
    ):
        found = video_results(real, dreams, path)
        assert found["rows"] == []
        with pytest.raises(AssertionError, match=reason):
            raise AssertionError(found["reason"])
    rows = video_results(real, dreams, stand_in_path(400))["rows"]
    assert [(r["camera"], r["predictor"], r["first"], r["last"]) for r in rows] == [
        ("top", "true", 1, 16),
        ("top", "tokenizer", 1, 16),
    ]
