"""Video files: decoding by timestamp to a given frame rate and size, and deterministic H.264 encoding."""

from __future__ import annotations

import io
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.container import InputContainer
from av.stream import Disposition
from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc, Interpolation, VideoReformatter
from av.video.stream import VideoStream

from phantom.data.manifest import Probe

# Containers of a single movie. Playlists (hls, concat, image2) would open other files, or the network.
CONTAINERS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,mpeg,flv,asf,ogg,gif,apng"
MAX_PIXELS = 8192 * 8192  # 8K in either orientation; more is a decompression bomb
TIMESTAMP_SLACK_SECONDS = 0.002  # containers with millisecond timestamps round them
MAX_REPEATED_SHARE = 0.5  # of the output frames that may repeat the previous one, in a file of low frame rate
MIN_KEPT_SHARE = 0.25  # of the picture that the crop must keep
MIN_SIDE = 16  # pixels
AVCOL_SPC_UNSPECIFIED, AVCOL_SPC_SMPTE170M = 2, 6  # of AVColorSpace; the latter is the BT.601 matrix
HD_WIDTH, SD_HEIGHT = 1280, 576  # high definition starts at this width, or above this height
SWSCALE_FLAGS = (
    Interpolation.BICUBIC | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT | Interpolation.BITEXACT
)


class BadClip(Exception):
    """The file cannot be used as a clip. The message is the reason, as recorded in quarantine.jsonl."""


@dataclass(frozen=True)
class FittedClip:
    """A decoded clip: uint8 RGB `frames` (F, H, W, 3), and the share of the file's `pixels` that it keeps."""

    frames: np.ndarray
    pixels: float  # of the displayed picture, times the file's frames at the clip's frame rate
    kept: float


def probe(path: str | Path | bytes) -> Probe:
    """Measures a file, given by path or contents. Decodes one frame and counts packets for the rest. Raises BadClip."""
    with open_video(path) as (container, stream):
        first = next(timed_frames(container, stream), None)
        if first is None:
            raise BadClip("no video frame in it")
        try:
            container.seek(0)
            shown = [
                (p.pts, p.pts + (p.duration or 0)) for p in container.demux(stream) if p.size and p.pts is not None
            ]
        except (av.FFmpegError, OSError) as error:
            raise BadClip(f"cannot be read: {_reason(error)}") from None
        starts, ends = [start for start, _ in shown], [end for _, end in shown]
        seconds = float((max(ends) - min(starts)) * Fraction(stream.time_base or 1)) if shown else 0.0
        if stream.average_rate and (not seconds or max(ends) == max(starts)):
            seconds = float(len(shown) / stream.average_rate)
        width, height = round(first[2].width * _pixel_aspect(stream)), first[2].height
        if _orientation(first[2])[0]:
            width, height = height, width
        context = stream.codec_context
        return Probe(
            codec=context.name,
            frames=len(shown),
            fps=len(shown) / seconds if seconds else 0.0,
            seconds=seconds,
            height=height,
            width=width,
            colour_primaries=int(context.color_primaries),
            colour_transfer=int(context.color_trc),
            colour_matrix=int(context.colorspace),
            is_full_range=int(context.color_range) == ColorRange.JPEG,
        )


def read_clip(
    path: str | Path | bytes, fps: float, height: int, width: int, max_frames: int, min_frames: int = 1
) -> np.ndarray:
    """The frames of `fit_clip` at a single size, `height` x `width`."""
    return fit_clip(path, fps, [(height, width)], max_frames, min_frames).frames


def fit_clip(
    path: str | Path | bytes, fps: float, sizes: Sequence[tuple[int, int]], max_frames: int, min_frames: int = 1
) -> FittedClip:
    """Decodes a clip at `fps` frames per second, in whichever of `sizes` (H, W) keeps most of the picture.

    Frame i is the one displayed i / fps seconds after the first, whether or not the file's frame rate is constant. F is
    the largest 4m + 1 up to `max_frames`, where decoding stops. The picture is rotated upright, converted to square
    pixels, resized with antialiasing to cover H x W, and centre-cropped, without stretching. Ties between sizes go to
    the first. `path` is the file's path, or its contents.
    Raises BadClip with the reason.
    """
    frames: list[np.ndarray] = []
    distinct = 0
    size: tuple[int, int] | None = None
    to_rgb = RgbConverter()
    with open_video(path) as (container, stream):
        for repeats, frame in _frames_at(container, stream, fps, max_frames):
            if size is None:
                shown = displayed_size(frame, stream)
                size = max(sizes, key=lambda one: kept_share(shown, one))
            frames += [fit_frame(frame, stream, *size, to_rgb)] * repeats
            distinct += 1
        seconds = _stated_seconds(container, stream) if len(frames) == max_frames else 0.0
    if size is None or len(frames) < min_frames:
        raise BadClip(f"{len(frames)} frame(s) at {fps:g} per second, at least {min_frames} are needed")
    if distinct < (1 - MAX_REPEATED_SHARE) * len(frames):
        raise BadClip(
            f"too few frames: {len(frames) - distinct} of {len(frames)} would be repeats at {fps:g} per second"
        )
    count = (len(frames) - 1) // 4 * 4 + 1
    available = max(len(frames), seconds * fps)
    return FittedClip(
        np.stack(frames[:count]), shown[0] * shown[1] * available, kept_share(shown, size) * count / available
    )


def read_span(path: str | Path | bytes, fps: float, size: tuple[int, int], first: int, count: int) -> np.ndarray:
    """`count` frames of `fit_clip`'s from number `first` on, at `size`: uint8 RGB (count, H, W, 3). Raises BadClip."""
    frames: list[np.ndarray] = []
    passed, to_rgb = 0, RgbConverter()
    with open_video(path) as (container, stream):
        for repeats, frame in _frames_at(container, stream, fps, first + count):
            wanted = min(repeats, passed + repeats - first)
            if wanted > 0:
                frames += [fit_frame(frame, stream, *size, to_rgb)] * wanted
            passed += repeats
    if len(frames) != count:
        raise BadClip(f"{passed} frame(s) at {fps:g} per second, {first + count} are needed")
    return np.stack(frames)


def _frames_at(
    container: InputContainer, stream: VideoStream, fps: float, count: int
) -> Iterator[tuple[int, av.VideoFrame]]:
    """The file's frames, each with how many of the first `count` frames at `fps` show it: one or more."""
    passed = 0
    for _, end, frame in timed_frames(container, stream):
        repeats = max(0, min(frames_before(end, fps), count) - passed)  # of the times before the file's next frame
        if repeats:
            yield repeats, frame
            passed += repeats
        if passed == count:
            return


def read_frames(path: str | Path) -> tuple[np.ndarray, float]:
    """All frames of `path` at their own size, upright: uint8 RGB (F, H, W, 3), and their mean rate. Raises BadClip."""
    to_rgb = RgbConverter()
    with open_video(path) as (container, stream):
        frames, end = [], Fraction(0)
        for _, end, frame in timed_frames(container, stream):  # noqa: B007
            frames.append(_rotate(to_rgb(frame, frame.width, frame.height), _orientation(frame)))
    if not frames:
        raise BadClip("no video frame in it")
    if any(frame.shape != frames[0].shape for frame in frames):
        raise BadClip("frames of several sizes")
    return np.stack(frames), float(len(frames) / end) if end else 1.0


def write_mp4(
    path: str | Path, frames: np.ndarray, fps: float | Fraction, metadata: dict[str, str] | None = None, crf: int = 14
) -> None:
    """Writes uint8 RGB `frames` (F, H, W, 3), H and W even, as H.264 yuv420p mp4 with the index in front (faststart).

    Deterministic: one thread, no dates or versions in the container. `metadata` is written as tags.
    """
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[3] != 3 or not len(frames):
        raise ValueError(f"frames must be uint8 (F, H, W, 3), found {frames.dtype} {frames.shape}")
    height, width = frames.shape[1:3]
    if height % 2 or width % 2:
        raise ValueError(f"H.264 with 4:2:0 colour needs even sizes, found {width}x{height}")
    options = {"movflags": "+faststart+use_metadata_tags", "fflags": "+bitexact"}
    with av.open(str(path), "w", format="mp4", options=options) as container:
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001))
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        # Macroblock trees make x264's output nondeterministic.
        stream.options = {"crf": str(crf), "threads": "1", "x264-params": "mbtree=0", "flags": "+bitexact"}
        # Tagged, because players guess the colour matrix of an untagged video from its size.
        context = stream.codec_context
        context.colorspace, context.color_range = AVCOL_SPC_SMPTE170M, ColorRange.MPEG
        context.color_primaries, context.color_trc = ColorPrimaries.SMPTE170M, ColorTrc.SMPTE170M
        container.metadata.update(metadata or {})
        reformatter = VideoReformatter()
        for array in frames:
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(array), format="rgb24")
            frame = reformatter.reformat(
                frame,
                format="yuv420p",
                dst_colorspace=Colorspace.SMPTE170M,
                dst_color_range=ColorRange.MPEG,
                interpolation=SWSCALE_FLAGS,
                threads=1,
            )
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


@contextmanager
def open_video(path: str | Path | bytes) -> Iterator[tuple[InputContainer, VideoStream]]:
    """Opens a file, given by path or contents: yields its container and first video stream. Raises BadClip."""
    if isinstance(path, bytes):
        where: Any = io.BytesIO(path)
        size = len(path)
    else:
        file = Path(path).absolute()  # so that no name is parsed as a protocol
        if not file.is_file():
            raise BadClip("no such file")
        where, size = str(file), file.stat().st_size
    if not size:
        raise BadClip("empty file")
    options = {"format_whitelist": CONTAINERS, "protocol_whitelist": "file"}
    try:
        container = av.open(where, options=options, metadata_errors="replace")
    except (av.FFmpegError, OSError, ValueError) as error:
        raise BadClip(f"not a video: {_reason(error)}") from None
    with container:
        streams = [s for s in container.streams.video if not s.disposition & Disposition.attached_pic]
        if not streams:
            raise BadClip("no video in it")
        stream = streams[0]
        context = stream.codec_context
        if context is None:
            raise BadClip("no decoder for its codec")
        if context.width * context.height > MAX_PIXELS:
            raise BadClip(f"{context.width}x{context.height} is more than {MAX_PIXELS} pixels")
        context.thread_count = 1  # several clips are decoded in parallel instead
        # Corrupt data is an error rather than concealed, and a picture that grows midway is no way around the bound.
        context.options = {"err_detect": "explode", "max_pixels": str(MAX_PIXELS)}
        yield container, stream


def timed_frames(container: InputContainer, stream: VideoStream) -> Iterator[tuple[Fraction, Fraction, av.VideoFrame]]:
    """(start, end, frame) in display order, in seconds from the first frame; a frame ends where the next starts."""
    origin: Fraction | None = None
    start, step, shown = Fraction(0), Fraction(0), None
    try:
        for frame in container.decode(stream):
            if frame.pts is None:
                raise BadClip("frames without timestamps")
            if frame.is_corrupt:
                raise BadClip(f"damaged frame at {float(start):.2f} s")
            if frame.color_trc in (ColorTrc.SMPTE2084, ColorTrc.ARIB_STD_B67):
                raise BadClip("high dynamic range (PQ or HLG), which needs tone mapping")
            if frame.interlaced_frame:
                raise BadClip("interlaced: each frame holds two moments")
            now = frame.pts * Fraction(frame.time_base or 1)
            origin = now if origin is None else origin
            if shown is not None:
                step = now - origin - start
                if step <= 0:
                    raise BadClip(f"timestamps do not increase at {float(start):.2f} s")
                yield start, now - origin, shown
            start, shown = now - origin, frame
    except (av.FFmpegError, OSError, ValueError) as error:
        raise BadClip(f"does not decode at {float(start):.2f} s: {_reason(error)}") from None
    if shown is not None:
        own = shown.duration * Fraction(shown.time_base or 1)
        yield start, start + (own or step or 1 / Fraction(stream.average_rate or 1)), shown


def _stated_seconds(container: InputContainer, stream: VideoStream) -> float:
    """The duration in the file's metadata; 0 if missing."""
    if stream.duration:
        return float(stream.duration * Fraction(stream.time_base or 1))
    return (container.duration or 0) / av.time_base


def frames_before(end: Fraction, fps: float) -> int:
    """How many of the times 0, 1/fps, 2/fps, ... are before `end`: at least one."""
    return max(1, math.ceil((float(end) - TIMESTAMP_SLACK_SECONDS) * fps))


def displayed_size(frame: av.VideoFrame, stream: VideoStream) -> tuple[float, float]:
    """(height, width) of the picture, upright and in square pixels."""
    size = frame.height, frame.width * _pixel_aspect(stream)
    return size[::-1] if _orientation(frame)[0] else size


def kept_share(shown: tuple[float, float], size: tuple[int, int]) -> float:
    """The share of a picture of (height, width) `shown` that remains after resizing it to cover `size` and cropping."""
    scale = max(side / whole for side, whole in zip(size, shown, strict=True))
    return size[0] * size[1] / (shown[0] * shown[1] * scale * scale)


def fit_frame(frame: av.VideoFrame, stream: VideoStream, height: int, width: int, to_rgb: RgbConverter) -> np.ndarray:
    """One frame as uint8 RGB (`height`, `width`, 3); see `fit_clip`. Raises BadClip if too little of it is kept."""
    kept = kept_share(displayed_size(frame, stream), (height, width))
    rotation = _orientation(frame)
    if rotation[0]:
        height, width = width, height
    shown = frame.width * _pixel_aspect(stream)
    scale = max(width / shown, height / frame.height)
    if min(shown, frame.height) < MIN_SIDE:
        raise BadClip(f"{frame.width}x{frame.height} is too small, at least {MIN_SIDE} pixels a side are needed")
    if kept < MIN_KEPT_SHARE:
        raise BadClip(f"a crop of {width}x{height} would keep {kept:.0%} of its picture of {shown:.0f}x{frame.height}")
    scaled_w, scaled_h = max(width, round(shown * scale)), max(height, round(frame.height * scale))
    top, left = (scaled_h - height) // 2, (scaled_w - width) // 2
    rgb = to_rgb(frame, scaled_w, scaled_h)
    return _rotate(rgb[top : top + height, left : left + width], rotation)


class RgbConverter:
    """Converts frames to uint8 RGB of a given size. Reuse one for many frames: it caches the scaler's setup."""

    def __init__(self) -> None:
        self._scale, self._pack = VideoReformatter(), VideoReformatter()

    def __call__(self, frame: av.VideoFrame, width: int, height: int) -> np.ndarray:
        whole, matrix = frame, _assumed_matrix(frame)
        alpha = any(component.is_alpha for component in frame.format.components)

        def reformat(with_: VideoReformatter, frame: av.VideoFrame, kind: str) -> av.VideoFrame:
            # swscale widens the filter when downscaling, so bicubic antialiases here.
            return with_.reformat(
                frame,
                width,
                height,
                kind,
                src_colorspace=matrix if frame is whole else None,
                dst_color_range=ColorRange.JPEG,
                interpolation=SWSCALE_FLAGS,
                threads=1,
            )

        if not alpha:  # planar first: the same values as direct conversion to packed RGB, in a third of the time
            return reformat(self._pack, reformat(self._scale, frame, "gbrp"), "rgb24").to_ndarray()
        rgba = reformat(self._scale, frame, "rgba").to_ndarray()
        return (rgba[..., :3].astype(np.uint16) * rgba[..., 3:] // 255).astype(
            np.uint8
        )  # composited over black, as players do


def _assumed_matrix(frame: av.VideoFrame) -> Colorspace | None:
    """The colour matrix of a frame that states none: BT.709 for high definition, as players assume; None: as stated.

    swscale takes an unstated one for BT.601.
    """
    is_high_definition = frame.width >= HD_WIDTH or frame.height > SD_HEIGHT
    is_unstated = frame.colorspace == AVCOL_SPC_UNSPECIFIED and not frame.format.is_rgb
    return Colorspace.ITU709 if is_unstated and is_high_definition else None


def _pixel_aspect(stream: VideoStream) -> float:
    aspect = float(stream.sample_aspect_ratio or 1)
    return aspect if 0.1 < aspect < 10 else 1.0  # anything more extreme is corrupt metadata


def _orientation(frame: av.VideoFrame) -> tuple[bool, bool, bool]:
    """(transpose, then flip columns, then flip rows): how to rotate the stored picture upright."""
    data: Any = frame.side_data.get("DISPLAYMATRIX")
    if data is None:
        return False, False, False
    a, b, _, c, d = np.frombuffer(bytes(data), np.int32)[:5] / 65536  # x' = a x + c y, y' = b x + d y
    if abs(b) < 1e-3 and abs(c) < 1e-3:
        return False, a < 0, d < 0
    if abs(a) < 1e-3 and abs(d) < 1e-3:
        return True, c < 0, b < 0
    raise BadClip("rotated by other than a right angle")


def _rotate(rgb: np.ndarray, rotation: tuple[bool, bool, bool]) -> np.ndarray:
    transpose, columns, rows = rotation
    rgb = rgb.swapaxes(0, 1) if transpose else rgb
    return np.ascontiguousarray(rgb[:: -1 if rows else 1, :: -1 if columns else 1])


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error).splitlines()[0]
