"""Squared error, PSNR and SSIM of imagined video by horizon, on all pixels and on those that moved.

Most pixels of a robot video never change, so a model that copies its context scores well on all pixels. *Moved* pixels
are those of the **real** video that differ, in any channel, by more than `threshold` grey levels from the last context
frame (`moved_against="context"`; where something left and where it arrived) or from the previous real frame
(`"previous"`; motion from frame to frame). What imagination alone invents is not moved: the all-pixel numbers show it.

Everything comes back per episode and frame, so that differences can be paired over episodes; frames without moved pixels
are False in `moved_mask`, hold NaN, and are for the caller to leave out (`VideoMetrics.over_frames` does).

PSNR is capped at 58.9 dB, that of uint8 rounding noise (1/12 grey level squared), so that identical frames can be averaged.
LPIPS is optional: it needs the extra `lpips` and a downloaded trunk.
"""

import importlib
from dataclasses import dataclass
from math import log10
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, UInt8
from torch import Tensor

from worldline.errors import WorldlineError

PSNR_CAP = 10 * log10(12 * 255**2)
MOVED_THRESHOLD = 16  # grey levels: above video compression noise, below the contrast of a robot arm
BATCH = 64  # frames whose SSIM maps are held at once


@dataclass(frozen=True, slots=True, kw_only=True)
class VideoMetrics:
    """PSNR in dB, SSIM in [-1, 1], mean squared error in squared grey levels; `moved_*` are NaN where `moved_mask` is False."""

    psnr: Float[Tensor, "n t"]
    ssim: Float[Tensor, "n t"]
    moved_psnr: Float[Tensor, "n t"]
    moved_ssim: Float[Tensor, "n t"]
    mse: Float[Tensor, "n t"]
    moved_mse: Float[Tensor, "n t"]
    moved_mask: Bool[Tensor, "n t"]
    moved_fraction: Float[Tensor, "n t"]

    def over_frames(
        self, name: Literal["psnr", "ssim", "mse", "moved_psnr", "moved_ssim", "moved_mse"]
    ) -> tuple[Float[Tensor, " n"], Bool[Tensor, " n"]]:
        """Each episode's mean over its defined frames, and which episodes have any (the others hold NaN)."""
        values: Tensor = getattr(self, name)
        mask = self.moved_mask if name.startswith("moved") else torch.ones_like(self.moved_mask)
        counts = mask.sum(1)
        mean = torch.where(mask, values, torch.zeros_like(values)).sum(1) / counts.clamp(min=1)
        return mean.masked_fill(counts == 0, torch.nan), counts > 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Lpips:
    """`distance` is None where LPIPS cannot be computed here; `reason` says why, for the report.

    `moved_distance` is the mean of LPIPS's map over moved pixels, NaN where there are none; None if they were not given.
    """

    distance: Float[Tensor, "n t"] | None
    moved_distance: Float[Tensor, "n t"] | None = None
    reason: str = ""


def compare_videos(
    real: UInt8[Tensor, "n t c h w"],
    imagined: UInt8[Tensor, "_n _t _c _h _w"],
    context: UInt8[Tensor, "_n _c _h _w"],
    *,
    moved_against: Literal["context", "previous"] = "context",
    threshold: int = MOVED_THRESHOLD,
) -> VideoMetrics:
    """Compare imagined with real frames that follow `context`, the last frame both start from.

    Raises:
        WorldlineError: shapes differ, no frames, or frames under 6 pixels (SSIM's window does not fit).
    """
    if real.shape != imagined.shape or real.shape[:1] + real.shape[2:] != context.shape:
        raise WorldlineError(
            "video metrics: real and imagined 'n t c h w' and context 'n c h w' of one size required, got "
            f"{tuple(real.shape)}, {tuple(imagined.shape)}, {tuple(context.shape)}. Cut both to the same horizon."
        )
    n, t, _, height, width = real.shape
    if n == 0 or t == 0 or min(height, width) < 6:
        raise WorldlineError(f"video metrics: frames of at least 6x6 pixels required, got {tuple(real.shape)}.")
    moved = moved_pixels(real, context, moved_against=moved_against, threshold=threshold)
    maps = [_frame_metrics(*part) for part in zip(*(x.flatten(0, 1).split(BATCH) for x in (real, imagined, moved)))]
    psnr, ssim, moved_psnr, moved_ssim, mse, moved_mse = (torch.cat(values).reshape(n, t) for values in zip(*maps))
    return VideoMetrics(
        psnr=psnr,
        ssim=ssim,
        moved_psnr=moved_psnr,
        moved_ssim=moved_ssim,
        mse=mse,
        moved_mse=moved_mse,
        moved_mask=moved.flatten(2).any(-1),
        moved_fraction=moved.flatten(2).float().mean(-1),
    )


def moved_pixels(
    real: UInt8[Tensor, "n t c h w"],
    context: UInt8[Tensor, "n c h w"],
    *,
    moved_against: Literal["context", "previous"] = "context",
    threshold: int = MOVED_THRESHOLD,
) -> Bool[Tensor, "n t h w"]:
    """Pixels of the real video that differ from the reference by more than `threshold` in some channel."""
    first = context[:, None]
    reference = first if moved_against == "context" else torch.cat([first, real[:, :-1]], dim=1)
    return ((real.int() - reference.int()).abs() > threshold).any(dim=2)


def copy_context(context: UInt8[Tensor, "n c h w"], frames: int) -> UInt8[Tensor, "n {frames} c h w"]:
    """The baseline that predicts no change: the context frame, `frames` times."""
    return context[:, None].repeat(1, frames, 1, 1, 1)


def _frame_metrics(
    real: UInt8[Tensor, "b c h w"], imagined: UInt8[Tensor, "b c h w"], moved: Bool[Tensor, "b h w"]
) -> tuple[Tensor, ...]:
    from torchmetrics.functional.image import (  # seconds to import, so only where it is used
        peak_signal_noise_ratio,
        structural_similarity_index_measure,
    )

    x, y = imagined.float() / 255, real.float() / 255
    psnr = peak_signal_noise_ratio(x, y, data_range=1.0, dim=(1, 2, 3), reduction="none").clamp(max=PSNR_CAP)
    ssim, ssim_map = structural_similarity_index_measure(x, y, data_range=1.0, reduction="none", return_full_image=True)
    pixels = moved.flatten(1).sum(1).float()  # 0 / 0 below is the NaN that moved_mask announces
    squared = ((x - y) ** 2).mean(1)
    error = (squared * moved).flatten(1).sum(1) / pixels
    moved_psnr = (-10 * torch.log10(error)).clamp(max=PSNR_CAP)
    moved_ssim = (ssim_map.mean(1) * moved).flatten(1).sum(1) / pixels
    return psnr, ssim, moved_psnr, moved_ssim, squared.flatten(1).mean(1) * 255**2, error * 255**2


def lpips_distance(
    real: UInt8[Tensor, "n t c h w"],
    imagined: UInt8[Tensor, "n t c h w"],
    *,
    moved: Bool[Tensor, "n t h w"] | None = None,
    trunk: Literal["alex", "vgg"] = "alex",
) -> Lpips:
    """LPIPS (Zhang et al. 1801.03924) of every frame, 0 for identical ones; or the reason why it cannot be had here.

    With `moved`, also over those pixels alone, from LPIPS's map at the frames' own size.
    """
    try:
        module: Any = importlib.import_module("lpips")
        network = module.LPIPS(net=trunk, verbose=False).eval()
        mapper = None if moved is None else module.LPIPS(net=trunk, verbose=False, spatial=True).eval()
    except ImportError as error:
        return Lpips(distance=None, reason=f"LPIPS left out: `pip install worldline[lpips]` needed ({error})")
    except RuntimeError as error:  # torchvision built for another torch
        return Lpips(distance=None, reason=f"LPIPS left out: torchvision does not fit this torch ({error})")
    except OSError as error:
        return Lpips(distance=None, reason=f"LPIPS left out: its {trunk} trunk could not be downloaded ({error})")
    n, t = real.shape[:2]
    masks = torch.ones(n * t, 1, 1, dtype=torch.bool) if moved is None else moved.flatten(0, 1)
    whole, on_moved = [], []
    with torch.inference_mode():
        for x, y, mask in zip(*(v.split(BATCH) for v in (imagined.flatten(0, 1), real.flatten(0, 1), masks))):
            pair = x.float() / 127.5 - 1, y.float() / 127.5 - 1
            whole.append(network(*pair).flatten())
            if mapper is not None:  # 0 / 0 is the NaN of a frame without moved pixels
                on_moved.append((mapper(*pair)[:, 0] * mask).flatten(1).sum(1) / mask.flatten(1).sum(1))
    moved_distance = torch.cat(on_moved).reshape(n, t).clone() if on_moved else None
    return Lpips(distance=torch.cat(whole).reshape(n, t).clone(), moved_distance=moved_distance)
