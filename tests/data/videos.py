"""Small test videos in many formats, written with PyAV."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from fractions import Fraction
from itertools import pairwise
from pathlib import Path

import av
import numpy as np

RIGHT_ANGLES = {0: (1, 0, 0, 1), 90: (0, 1, -1, 0), 180: (-1, 0, 0, -1), 270: (0, -1, 1, 0)}


def grey(levels: Sequence[int], height: int = 32, width: int = 32) -> np.ndarray:
    """Uniform grey frames: uint8 RGB (F, H, W, 3). The level identifies the frame."""
    return np.stack([np.full((height, width, 3), level, np.uint8) for level in levels])


def moving(count: int, seed: int = 0, height: int = 64, width: int = 64) -> np.ndarray:
    """A bright square moving over a coloured background: uint8 RGB (F, H, W, 3)."""
    rng = np.random.default_rng(seed)
    background = rng.integers(20, 120, 3)
    frames = np.broadcast_to(background, (count, height, width, 3)).astype(np.uint8)
    top, left = (int(v) for v in rng.integers(4, 16, 2))
    for i, frame in enumerate(frames):
        frame[top : top + 16, left + i : left + i + 16] = (240, 220, 60)
    return frames


def write_video(
    path: Path,
    frames: np.ndarray,
    times: Sequence[float],
    *,
    codec: str = "libx264",
    pixels: str = "yuv420p",
    aspect: Fraction | None = None,
    rate: int = 1000,
    options: dict[str, str] | None = None,
    container: dict[str, str] | None = None,
) -> Path:
    """Writes `frames`, each displayed from its time in seconds; the last for as long as the one before.

    rate: the codec's nominal rate; options, container: FFmpeg options of the codec and of the container.
    """
    with av.open(str(path), "w", options=container or {}) as file:
        stream = file.add_stream(codec, rate=rate)
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], pixels
        stream.codec_context.time_base = Fraction(1, 1000)
        stream.options = options or {}
        if aspect:
            stream.codec_context.sample_aspect_ratio = aspect
        lengths = [*(b - a for a, b in pairwise(times)), times[-1] - times[-2] if len(times) > 1 else 0.25]
        until = {round(time * 1000): round(length * 1000) for time, length in zip(times, lengths, strict=True)}
        packets = []
        for array, pts in zip(frames, until, strict=True):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(array), format="rgb24")
            frame.pts, frame.time_base = pts, Fraction(1, 1000)
            packets += stream.encode(frame)
        for packet in [*packets, *stream.encode()]:
            packet.duration = until[packet.pts]
            file.mux(packet)
    return path


def turn(path: Path, matrix: tuple[float, float, float, float]) -> None:
    """Writes a display matrix (a, b, c, d) into an mp4, as phones do to record their orientation."""
    raw = bytearray(path.read_bytes())
    start = raw.index(b"tkhd") + 4 + 24 + 16  # after version, flags, times, id and length; layer, group and volume
    a, b, c, d = (round(value * 65536) for value in matrix)
    raw[start : start + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    path.write_bytes(raw)


def every(seconds: float, count: int, start: float = 0.0) -> list[float]:
    """`count` times, `seconds` apart."""
    return [start + seconds * i for i in range(count)]
