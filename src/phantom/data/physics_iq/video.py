"""Reading videos exactly as the official scorer does: decoded by OpenCV, resized bilinearly, resampled by blending."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import av
import cv2
import numpy as np
from av.video.reformatter import ColorRange

from phantom.errors import UserError

NEUTRAL = 128  # chroma of grey
BLACK: Any = 16  # of luma; Any, because cv2's type stubs do not accept scalars
GAIN = 9539 / 8192  # OpenCV's RGB of grey: floor((luma - 16) 9539 / 8192)

Frames = Iterable[np.ndarray]  # uint8 (H, W, 3) in BGR, or masks (H, W)


@dataclass(frozen=True)
class Probe:
    """The container's metadata: frames per second, length in seconds, frame count, size in pixels."""

    fps: float
    seconds: float
    frames: int
    width: int
    height: int


def probe(path: Path) -> Probe:
    """Reads the header of `path`. Raises UserError if it is not a video."""
    try:
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            rate = stream.guessed_rate or stream.average_rate
            seconds = (container.duration or 0) / av.time_base
            return Probe(float(rate or 0), seconds, stream.frames, stream.width, stream.height)
    except (av.FFmpegError, OSError, IndexError, ValueError):
        raise UserError(f"{path}: not a video that can be decoded") from None


def frames(path: Path) -> Iterator[np.ndarray]:
    """Every frame of `path`, uint8 (H, W, 3) in BGR. Holds one frame at a time; decodes in one thread."""
    capture = cv2.VideoCapture(str(path), cv2.CAP_FFMPEG, [cv2.CAP_PROP_N_THREADS, 1])
    try:
        if not capture.isOpened():
            raise UserError(f"{path}: not a video that can be decoded")
        while True:
            there, frame = capture.read()
            if not there:
                return
            yield frame
    finally:
        capture.release()


def first_channel(path: Path) -> Iterator[np.ndarray]:
    """The first channel of each of `frames`, uint8 (H, W). Skips colour conversion of grey frames: half the time."""
    done = 0
    try:
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            stream.codec_context.thread_count = 1
            for frame in container.decode(stream):
                if not _is_grey(frame):
                    break
                level = cv2.subtract(_plane(frame, 0), BLACK)
                yield cv2.convertScaleAbs(
                    level, dst=level, alpha=GAIN, beta=-0.499
                )  # it rounds, so subtracting a half gives the floor
                done += 1
            else:
                return
    except (av.FFmpegError, OSError, IndexError, ValueError):
        pass  # OpenCV may still be able to read it, or reports what is wrong
    for colour in islice(frames(path), done, None):
        yield colour[:, :, 0]


def _is_grey(frame: av.VideoFrame) -> bool:
    """Whether `frame` is grey and its luma alone gives what `first_channel` must return."""
    if frame.format.name != "yuv420p" or frame.color_range == ColorRange.JPEG or frame.rotation or frame.is_corrupt:
        return False
    return all(bool((_plane(frame, index) == NEUTRAL).all()) for index in (1, 2))


def _plane(frame: av.VideoFrame, index: int) -> np.ndarray:
    plane: Any = frame.planes[index]  # supports the buffer protocol, which its type omits
    return np.frombuffer(plane, np.uint8).reshape(-1, plane.line_size)[: plane.height, : plane.width]


def resized(video: Frames, size: tuple[int, int]) -> Iterator[np.ndarray]:
    """Each frame resized to `size` = (width, height): bilinear without antialiasing, aspect ratio not preserved."""
    for frame in video:
        yield cv2.resize(frame, size)


def resampled(video: Frames, count: int, wanted: int) -> Iterator[np.ndarray]:
    """`wanted` frames, linearly interpolated from the first `count` of `video`, truncated to uint8, of even size.

    Frame j is sampled at j (count - 1) / (wanted - 1), so that first and last frames coincide. Holds two source frames.
    Raises ValueError if `video` ends before `count`.
    """
    source = iter(video)
    first = second = _even(source)
    index = 0  # of `first`; `second` is its successor, or itself at the end
    if count > 1:
        second = _even(source)
    for j in range(wanted):
        position = j * (count - 1) / (wanted - 1) if wanted > 1 else 0.0
        while index < int(position):
            index += 1
            first, second = second, _even(source) if index + 1 < count else second
        share = position - index
        blend = (1 - share) * first.astype(np.float32) + share * second.astype(np.float32)
        yield blend.astype(np.uint8)


def resampled_counts(info: Probe, new_fps: float) -> tuple[int, int]:
    """How many frames the official tool reads of a video and resamples to: at most its first 5 seconds."""
    seconds = min(5, info.frames / info.fps)
    return int(seconds * info.fps), int(seconds * new_fps)


def _even(source: Iterator[np.ndarray]) -> np.ndarray:
    frame = next(source, None)
    if frame is None:
        raise ValueError("ends before the frame count in its header")
    return frame[: frame.shape[0] // 2 * 2, : frame.shape[1] // 2 * 2]
