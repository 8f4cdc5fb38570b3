"""Videos people can look at: real and imagined side by side, labelled, as H.264 that every browser plays.

Frames are enlarged by whole pixels (nearest neighbour), so that what is seen is what the model made, not a resampler.
"""

import io
from collections.abc import Mapping, Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import torch
from av.video.reformatter import ColorRange, Colorspace
from av.video.stream import VideoStream
from jaxtyping import UInt8
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from worldline.checkpoint import write_atomic
from worldline.errors import WorldlineError

VISIBLE = 256  # pixels: smaller videos are enlarged to about this
SEPARATOR = 4
BACKGROUND = (24, 28, 36)
INK = (226, 232, 240)

Video = UInt8[Tensor, "_t _c _h _w"] | Mapping[str, UInt8[Tensor, "_t _c _h _w"]]


def side_by_side(
    real: Video,
    imagined: Video,
    *,
    labels: tuple[str, str] = ("real", "imagined"),
    cell: int = VISIBLE,
) -> UInt8[Tensor, "t 3 h2 w2"]:
    """Real left, imagined right, one row a camera, each under its label. See `video_grid`."""
    return video_grid({labels[0]: real, labels[1]: imagined}, cell=cell)


def video_grid(columns: Mapping[str, Video], *, cell: int = VISIBLE) -> UInt8[Tensor, "t 3 h2 w2"]:
    """Any number of labelled videos side by side (real, imagined, shuffled actions, ...), one row a camera.

    Args:
        columns: label -> frames of one camera, or camera -> frames; the same cameras and number of frames in each.
        cell: height in pixels that each video is enlarged to, by the whole factor that comes nearest from below.

    Raises:
        WorldlineError: nothing to show, or cameras or lengths that differ between columns.
    """
    videos = {label: dict(video) if isinstance(video, Mapping) else {"": video} for label, video in columns.items()}
    cameras = list(next(iter(videos.values()), {}))
    if not cameras:
        raise WorldlineError("video_grid: at least one video with one camera required, got none.")
    for label, video in videos.items():
        if list(video) != cameras:
            raise WorldlineError(f"video_grid: {label!r} must show the cameras {cameras}, got {list(video)}.")
    lengths = {f"{label} {camera}".strip(): len(v[camera]) for label, v in videos.items() for camera in cameras}
    if len(set(lengths.values())) != 1 or 0 in lengths.values():
        raise WorldlineError(f"video_grid: the same number of frames (at least one) required, got {lengths}.")
    rows = [
        _row(
            [_cell(video[camera], f"{label} · {camera}" if camera else label, cell) for label, video in videos.items()]
        )
        for camera in cameras
    ]
    width = max(row.shape[2] for row in rows)
    rows = [np.pad(row, ((0, 0), (0, 0), (0, width - row.shape[2]), (0, 0))) for row in rows]
    grid = np.concatenate([part for row in rows for part in (row, _bar(row, axis=1))][:-1], axis=1)
    return torch.from_numpy(np.ascontiguousarray(grid.transpose(0, 3, 1, 2)))


def _row(cells: Sequence[np.ndarray]) -> np.ndarray:
    height = max(cell.shape[1] for cell in cells)
    padded = [np.pad(cell, ((0, 0), (0, height - cell.shape[1]), (0, 0), (0, 0))) for cell in cells]
    return np.concatenate([part for cell in padded for part in (cell, _bar(cell, axis=2))][:-1], axis=2)


def _bar(video: np.ndarray, *, axis: int) -> np.ndarray:
    shape = list(video.shape)
    shape[axis] = SEPARATOR
    return np.broadcast_to(np.array(BACKGROUND, np.uint8), shape)


def _cell(frames: Tensor, label: str, height: int) -> np.ndarray:
    """Frames "t h w c", enlarged, under a strip with the label, in letters small enough for it to fit (8 at the least)."""
    video = _enlarge(_rgb(frames), height)
    t, _, width, _ = video.shape
    size = max(11, min(16, width // 14))
    strip = Image.new("RGB", (width, size + 10), BACKGROUND)
    drawing = ImageDraw.Draw(strip)
    fonts = [ImageFont.load_default(letters) for letters in range(size, 7, -1)]
    font = next((f for f in fonts if drawing.textlength(label, font=f) <= width - 12), fonts[-1])
    drawing.text((6, 4), label, fill=INK, font=font)
    header = np.broadcast_to(np.asarray(strip), (t, *np.asarray(strip).shape))
    return np.concatenate([header, video], axis=1)


def _rgb(frames: Tensor) -> np.ndarray:
    """Frames "t h w 3" from one (grey) or three channels."""
    if frames.ndim != 4 or frames.shape[1] not in (1, 3) or frames.dtype != torch.uint8 or not len(frames):
        raise WorldlineError(
            f"a video must be uint8 't c h w' with 1 or 3 channels, got {frames.dtype} {tuple(frames.shape)}."
        )
    return frames.detach().cpu().expand(-1, 3, -1, -1).permute(0, 2, 3, 1).numpy()


def _enlarge(video: np.ndarray, height: int) -> np.ndarray:
    factor = max(1, height // video.shape[1])
    return video.repeat(factor, axis=1).repeat(factor, axis=2)


def encode_mp4(frames: UInt8[Tensor, "t c h w"], fps: float | int, *, quality: int = 18) -> bytes:
    """H.264 (yuv420p, BT.709) that browsers play; small frames are enlarged, odd sides padded by a pixel.

    Args:
        fps: frames per second, any positive number.
        quality: x264's constant rate factor; lower is better and larger.
    """
    if fps <= 0:
        raise WorldlineError(f"fps: a positive number required, got {fps}.")
    video = _rgb(frames)
    video = _enlarge(video, VISIBLE) if min(video.shape[1:3]) < VISIBLE else video
    video = np.pad(video, ((0, 0), (0, video.shape[1] % 2), (0, video.shape[2] % 2), (0, 0)), mode="edge")
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1000))
        assert isinstance(stream, VideoStream)
        stream.width, stream.height, stream.pix_fmt = video.shape[2], video.shape[1], "yuv420p"
        stream.options = {"crf": str(quality), "preset": "veryfast"}
        context = stream.codec_context
        # Without these tags players guess the colour matrix, and guess differently by size.
        context.colorspace, context.color_range = 1, 1
        context.color_primaries, context.color_trc = 1, 1
        for image in video:
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24").reformat(
                format="yuv420p",
                dst_colorspace=Colorspace.ITU709,
                src_color_range=ColorRange.JPEG,
                dst_color_range=ColorRange.MPEG,
            )
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return buffer.getvalue()


def write_mp4(path: str | Path, frames: UInt8[Tensor, "t c h w"], fps: float | int, *, quality: int = 18) -> None:
    """`encode_mp4` to a file, written atomically."""
    write_atomic(Path(path), encode_mp4(frames, fps, quality=quality))
