"""Video metrics against hand-computed values."""

import sys
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from worldline.errors import WorldlineError
from worldline.eval import compare_videos, copy_context, lpips_distance, moved_pixels
from worldline.eval.video_metrics import PSNR_CAP


def moving_square(n: int = 2, t: int = 4) -> tuple[Tensor, Tensor]:
    """Context and real frames: a bright 4x4 square that goes right by two pixels a frame in every episode but the last."""
    frames = torch.full((n, t + 1, 3, 16, 16), 50, dtype=torch.uint8)
    for row in range(n):
        for i in range(t + 1):
            x = 2 * i if row < n - 1 else 0
            frames[row, i, :, 4:8, x : x + 4] = 200
    return frames[:, 0], frames[:, 1:]


def test_psnr_is_that_of_a_constant_error() -> None:
    context, real = moving_square()
    found = compare_videos(real, real + 10, context)
    expected = 20 * torch.log10(torch.tensor(25.5))
    torch.testing.assert_close(found.psnr, expected.expand(2, 4), atol=1e-3, rtol=0)
    torch.testing.assert_close(found.moved_psnr[0], expected.expand(4), atol=1e-3, rtol=0)
    assert bool((found.ssim < 1).all())
    torch.testing.assert_close(found.mse, torch.full((2, 4), 100.0))  # ten grey levels, squared
    torch.testing.assert_close(found.moved_mse[0], torch.full((4,), 100.0))
    assert torch.isnan(found.moved_mse[1]).all()


def test_identical_video_reaches_the_cap() -> None:
    context, real = moving_square()
    found = compare_videos(real, real.clone(), context)
    assert found.psnr.min() == found.psnr.max() == pytest.approx(PSNR_CAP)
    torch.testing.assert_close(found.ssim, torch.ones(2, 4))
    assert float(found.moved_ssim[0].min()) == pytest.approx(1)


def test_copying_the_context_looks_good_only_where_nothing_moved() -> None:
    context, real = moving_square()
    found = compare_videos(real, copy_context(context, 4), context)
    assert bool((found.moved_psnr[0] < found.psnr[0] - 5).all())
    expected = 20 * torch.log10(torch.tensor(255 / 150))  # every moved pixel is off by 200 - 50
    torch.testing.assert_close(found.moved_psnr[0], expected.expand(4), atol=1e-3, rtol=0)
    assert float(found.moved_ssim[0].max()) < float(found.ssim[0].min())


def test_frames_without_motion_are_masked_not_averaged() -> None:
    context, real = moving_square()
    found = compare_videos(real, real, context)
    assert found.moved_mask[0].all() and not found.moved_mask[1].any()
    assert torch.isnan(found.moved_psnr[1]).all() and torch.isnan(found.moved_ssim[1]).all()
    mean, defined = found.over_frames("moved_psnr")
    assert defined.tolist() == [True, False] and float(mean[0]) == pytest.approx(PSNR_CAP) and bool(mean[1].isnan())
    assert found.over_frames("psnr")[1].all()


def test_moved_pixels_against_context_and_previous() -> None:
    context, real = moving_square()
    against_context = moved_pixels(real, context)
    against_previous = moved_pixels(real, context, moved_against="previous")
    # frame 4 is 8 pixels right of the context, so both squares moved; of frame 3, two columns left and two arrived
    assert int(against_context[0, 3].sum()) == 32 and int(against_previous[0, 3].sum()) == 16
    assert not moved_pixels(real, context, threshold=150).any() and moved_pixels(real, context, threshold=149).any()


def test_batches_do_not_change_values() -> None:
    context, real = moving_square(n=40, t=4)
    imagined = torch.randint(0, 255, real.shape, dtype=torch.uint8)
    whole = compare_videos(real, imagined, context)
    part = compare_videos(real[30:], imagined[30:], context[30:])
    torch.testing.assert_close(whole.ssim[30:], part.ssim)
    torch.testing.assert_close(whole.moved_psnr[30:], part.moved_psnr, equal_nan=True)


def test_sizes_must_agree() -> None:
    context, real = moving_square()
    with pytest.raises(WorldlineError, match="same horizon"):
        compare_videos(real, real[:, :3], context)


def test_lpips_absence_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    _, real = moving_square()
    monkeypatch.setitem(sys.modules, "lpips", None)
    found = lpips_distance(real, real)
    assert found.distance is None and "worldline[lpips]" in found.reason

    def offline(**_: object) -> None:
        raise OSError("no route to host")

    monkeypatch.setitem(sys.modules, "lpips", SimpleNamespace(LPIPS=offline))
    found = lpips_distance(real, real)
    assert found.distance is None and "no route to host" in found.reason


def test_lpips_gets_frames_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    class Network(torch.nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            assert float(x.min()) >= -1 and float(x.max()) <= 1
            return (x - y).abs().mean((1, 2, 3), keepdim=True)

    monkeypatch.setitem(sys.modules, "lpips", SimpleNamespace(LPIPS=lambda **_: Network()))
    _, real = moving_square(n=20, t=4)
    imagined = real.clone()
    imagined[17, 2] += 51
    distance = lpips_distance(real, imagined).distance
    assert distance is not None and distance.shape == (20, 4)
    assert distance.nonzero().tolist() == [[17, 2]] and float(distance[17, 2]) == pytest.approx(0.4)


def test_lpips_on_moved_pixels_reads_the_map_there_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    class Map(torch.nn.Module):
        def __init__(self, spatial: bool) -> None:
            super().__init__()
            self.spatial = spatial

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            error = (x - y).abs().mean(1, keepdim=True)
            return error if self.spatial else error.mean((2, 3), keepdim=True)

    monkeypatch.setitem(sys.modules, "lpips", SimpleNamespace(LPIPS=lambda spatial=False, **_: Map(spatial)))
    context, real = moving_square()
    moved = moved_pixels(real, context)
    imagined = torch.where(moved[:, :, None], real + 51, real)  # wrong by 0.4 of [-1, 1] where it moved, else right
    found = lpips_distance(real, imagined, moved=moved)
    assert found.distance is not None and found.moved_distance is not None
    torch.testing.assert_close(found.moved_distance[0], torch.full((4,), 0.4))
    torch.testing.assert_close(found.distance, 0.4 * moved.float().mean((2, 3)))
    assert torch.isnan(found.moved_distance[1]).all(), "nothing moved"
