"""A source video to a clip, in one call: what a worker process does for each file."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from phantom.data.curation import Measured, measure
from phantom.data.files import fsync, sha256
from phantom.data.manifest import Probe
from phantom.data.video import BadClip, fit_clip, probe, write_mp4

# Raised when a change of the code changes the clip of a file, or what is measured on it: clips of before are made anew.
VERSION = 2


@dataclass(frozen=True)
class ClipFile:
    """A finished clip of `frames` frames, what they show, and the probe of its video; pixels and kept as in
    `video.FittedClip`."""

    frames: int
    size: tuple[int, int]  # height, width
    sha256: str  # of the mp4 or, where none is written, of the pixels
    pixels: float
    kept: float
    measured: Measured
    probe: Probe | None  # None where the rest of the file cannot be read


def make_clip(
    source: Path | bytes,
    path: Path | None,
    fps: int,
    sizes: Sequence[tuple[int, int]],
    max_frames: int,
    min_frames: int,
) -> ClipFile:
    """Decodes the clip of `source`, a file or its contents, and writes it to `path` if there is one; see
    `video.fit_clip`. Raises BadClip."""
    fitted = fit_clip(source, fps, sizes, max_frames, min_frames)
    frames, height, width, _ = fitted.frames.shape
    if path is not None:
        write_mp4(path, fitted.frames, fps)
        fsync(path)
    return ClipFile(
        frames=frames,
        size=(height, width),
        sha256=_digest(fitted.frames) if path is None else sha256(path),
        pixels=fitted.pixels,
        kept=fitted.kept,
        measured=measure(fitted.frames),
        probe=_probe(source),
    )


def _probe(source: Path | bytes) -> Probe | None:
    try:
        return probe(source)
    except BadClip:
        return None


def _digest(frames: np.ndarray) -> str:
    digest = hashlib.sha256(str(frames.shape).encode())
    digest.update(np.ascontiguousarray(frames).data)
    return digest.hexdigest()
