"""Video files: encode an episode, join episodes by copying packets, decode a window and count what came out.

Encoding is AV1 (SVT-AV1) with a key frame every second frame by default: random access then costs at most one extra
frame. B-frames are never used, so that packets of several episodes can be joined by shifting their time stamps.
Colour is stored at half resolution (4:2:0); it is scaled through 4:4:4 both ways, because FFmpeg's direct conversions
repeat colour pixels, which costs up to 10 dB on small colourful frames.
Decoding counts frames, because seeking late in a truncated file yields nothing without an error.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import torch
from av.container import InputContainer
from av.error import FFmpegError
from av.video.reformatter import VideoReformatter
from av.video.stream import VideoStream
from jaxtyping import UInt8
from torch import Tensor

from worldline.errors import DatasetError

os.environ.setdefault("SVT_LOG", "1")  # the encoder prints its settings for every file unless told: errors only
_TASKS = "/proc/self/task"
BACK = 2  # frames that a window with something missing is first read from earlier
CODEC_NAMES = {"libsvtav1": "av1", "libaom-av1": "av1", "libx264": "h264", "libx265": "hevc"}


@dataclass(frozen=True, slots=True, kw_only=True)
class VideoFrames:
    """A `FrameSequence`: `length` frames of the file at `path`, from frame `first` of that file on, decoded on access."""

    path: Path
    first: int
    length: int
    fps: float
    height: int
    width: int

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, frames: slice) -> UInt8[Tensor, "t c h w"]:
        """The frames of the slice (any step). Raises `DatasetError` if the file is missing, damaged or too short."""
        wanted = range(*frames.indices(self.length))
        if not wanted:
            return torch.empty(0, 3, self.height, self.width, dtype=torch.uint8)
        low, high = min(wanted[0], wanted[-1]), max(wanted[0], wanted[-1])
        window = decode_window(self, low, high + 1)
        return window if wanted.step == 1 else window[[i - low for i in wanted]]


def frame_rate(fps: float) -> Fraction:
    """`fps` as the fraction a container stores."""
    return Fraction(fps).limit_denominator(10_000)


def encode_video(
    path: Path, frames: UInt8[Tensor, "t 3 h w"], *, fps: float, codec: str = "libsvtav1", crf: int = 18, gop: int = 2
) -> None:
    """Write `frames` as one mp4. Raises `DatasetError` for sizes or codecs that the encoder refuses."""
    _, _, height, width = frames.shape
    if height % 2 or width % 2:
        raise DatasetError(
            f"{path.name}: frame height and width must be even (4:2:0 colour), got {height}x{width}. "
            "Crop or resize the camera's frames by one pixel."
        )
    try:
        _encode(path, frames, frame_rate(fps), codec, crf, gop)
    except (FFmpegError, ValueError) as error:  # PyAV raises ValueError for an unknown codec
        raise DatasetError(
            f"{path.name}: codec {codec!r} could not encode {height}x{width} frames ({error}). "
            "Use codec='libx264', or frames of at least 64x64."
        ) from error


def _encode(path: Path, frames: Tensor, rate: Fraction, codec: str, crf: int, gop: int) -> None:
    options = {"crf": str(crf), "g": str(gop)}
    if codec == "libsvtav1":
        # One thread an encoder: recorders run one process a core. Presets above 8 show artefacts, by its own word.
        options |= {"preset": "8", "svtav1-params": "lp=1"}
    else:
        options |= {"bf": "0", "threads": "1"}
    with _usual_priority() as keep, av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate, options=options)
        assert isinstance(stream, VideoStream)
        stream.height, stream.width, stream.pix_fmt = frames.shape[2], frames.shape[3], "yuv420p"
        full, half = VideoReformatter(), VideoReformatter()
        for index, image in enumerate(frames.permute(0, 2, 3, 1).numpy()):
            frame = full.reformat(
                av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24"), format="yuv444p"
            )
            frame = half.reformat(frame, format="yuv420p", interpolation="AREA")
            frame.pts, frame.time_base = index, 1 / rate
            container.mux(stream.encode(frame))
            if index == 0:  # which has opened the encoder
                keep()
        container.mux(stream.encode())


@contextmanager
def _usual_priority() -> Iterator[Callable[[], None]]:
    """Threads are scheduled as this one was: from when what is given is called, and on leaving.

    As root SVT-AV1 makes one (SCHED_FIFO, 99) of the thread that opens it and of those it starts, for good: everything else on the machine
    would then wait for this process, and for those that it starts later.
    """
    linux = hasattr(os, "sched_getscheduler")
    before, others = (_scheduling(), _threads()) if linux else (None, set())

    def keep() -> None:
        if before is None or _scheduling() == before:
            return
        policy, priority = before
        os.sched_setscheduler(0, policy, os.sched_param(priority))
        for thread in _threads() - others:  # the encoder's; a control loop that was there may be a real-time one
            with suppress(ProcessLookupError):  # it has ended meanwhile
                os.sched_setscheduler(thread, policy, os.sched_param(priority))

    try:
        yield keep
    finally:
        keep()


def _scheduling() -> tuple[int, int]:
    """Policy and priority of this thread, on Linux."""
    return os.sched_getscheduler(0), os.sched_getparam(0).sched_priority


def _threads() -> set[int]:
    """Of this process, on Linux."""
    return set(map(int, os.listdir(_TASKS))) if os.path.isdir(_TASKS) else set()


def join_videos(paths: Sequence[Path], lengths: Sequence[int], target: Path, *, fps: float) -> None:
    """Concatenate files made by `encode_video` with equal settings, packet by packet, without encoding again."""
    rate = frame_rate(fps)
    first = 0
    with av.open(str(target), "w", options={"movflags": "faststart"}) as output:
        stream: VideoStream | None = None
        for path, length in zip(paths, lengths, strict=True):
            with av.open(str(path)) as source:
                video = source.streams.video[0]
                if stream is None:
                    stream = output.add_stream_from_template(video, opaque=True)  # no encoder is opened
                count = _copy_packets(source, video, output, stream, first, rate)
            if count != length:
                raise DatasetError(f"{path}: {length} frames required, got {count}. Stage this episode again.")
            first += length


def _copy_packets(source: InputContainer, video: VideoStream, output, stream, first: int, rate: Fraction) -> int:
    assert video.time_base is not None
    shift = round(first / rate / video.time_base)
    count = 0
    for packet in source.demux(video):
        if packet.dts is None or packet.pts is None:  # the flushing packet at the end
            continue
        packet.pts, packet.dts, packet.stream = packet.pts + shift, packet.dts + shift, stream
        output.mux(packet)
        count += 1
    return count


def same_stream(one: Path, other: Path) -> bool:
    """Whether two files can be joined by `join_videos`: same codec, size and codec header."""

    def header(path: Path) -> tuple:
        with av.open(str(path)) as source:
            context = source.streams.video[0].codec_context
            return context.name, context.height, context.width, context.extradata

    return header(one) == header(other)


def decode_window(video: VideoFrames, start: int, stop: int) -> UInt8[Tensor, "t 3 h w"]:
    """Frames `start` to `stop` - 1 of `video`, all of them or `DatasetError`."""
    if not video.path.is_file():
        raise DatasetError(
            f"{video.path}: video file required, but there is no such file. "
            "Download the dataset's videos, or leave this camera out with cameras=."
        )
    out = np.empty((stop - start, video.height, video.width, 3), dtype=np.uint8)
    got = np.zeros(stop - start, dtype=bool)
    cause, begin = "", video.first + start
    back = BACK
    while True:
        try:
            _decode_into(out, got, video, video.first + start, begin)
        except FFmpegError as error:
            cause = f" ({error.strerror})"
        if got.all() or begin == 0:
            break
        begin, back = max(0, begin - back), 8 * back
    if not got.all():
        raise DatasetError(
            f"{video.path}: {len(got)} frames required (from frame {video.first + start} of the file), "
            f"got {int(got.sum())}{cause}. The file is truncated or damaged: fetch it again, or leave the episode out."
        )
    return torch.from_numpy(out).permute(0, 3, 1, 2).contiguous()


def _decode_into(out: np.ndarray, got: np.ndarray, video: VideoFrames, first: int, begin: int) -> None:
    """Fill `out` with the frames from `first` on, decoding from the last key frame at or before `begin`. Of some streams (HEVC, open groups of
    pictures) the first frames behind a key frame cannot be decoded from there."""
    with av.open(str(video.path)) as container:
        if not container.streams.video:
            return
        stream = container.streams.video[0]
        stream.codec_context.thread_count = 1  # loaders run one process a core
        assert stream.time_base is not None
        if begin > 0:
            container.seek(int(begin / video.fps / stream.time_base), stream=stream, backward=True)
        full, rgb = VideoReformatter(), VideoReformatter()
        for frame in container.decode(stream):
            if frame.pts is None:
                continue
            index = round(float(frame.pts * stream.time_base) * video.fps) - first
            if index >= len(got):
                break
            if index < 0:
                continue
            colour = full.reformat(frame, format="yuv444p", interpolation="BICUBIC")
            image = rgb.reformat(colour, format="rgb24").to_ndarray()
            if image.shape != out.shape[1:]:
                raise DatasetError(
                    f"{video.path}: frames of {video.height}x{video.width} required (meta/info.json), "
                    f"got {image.shape[0]}x{image.shape[1]}. Correct the feature's shape or the video."
                )
            out[index], got[index] = image, True
            if got.all():
                break


def packet_indices(path: Path, fps: float) -> np.ndarray:
    """Sorted frame numbers of the packets that can be read from a file, without decoding. Raises `DatasetError`."""
    times: list[float] = []
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise DatasetError(f"{path}: a video stream required, got none. Fetch the file again.")
            stream = container.streams.video[0]
            assert stream.time_base is not None
            times += [float(p.pts * stream.time_base) for p in container.demux(stream) if p.pts is not None and p.size]
    except FFmpegError as error:
        if not times:
            raise DatasetError(f"{path}: not a readable video ({error.strerror}). Fetch the file again.") from error
    return np.unique(np.round(np.asarray(times) * fps).astype(int))
