"""A source video to the mp4 of a clip, in one call: what a worker process does for each file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from phantom.data.curation import Measured, measure
from phantom.data.files import fsync, sha256
from phantom.data.video import fit_clip, probe, write_mp4

# Raised when a change of the code changes the clip of a file, or what is measured on it: clips of before are made anew.
VERSION = 1


@dataclass(frozen=True)
class ClipFile:
    """A finished clip of `frames` frames, and what they show; pixels and kept as in `video.FittedClip`."""

    frames: int
    size: tuple[int, int]  # height, width
    sha256: str
    pixels: float
    kept: float
    measured: Measured


def write_clip_file(
    source: Path | bytes, path: Path, fps: int, sizes: Sequence[tuple[int, int]], max_frames: int, min_frames: int
) -> ClipFile:
    """Writes the clip of `source`, a file or its contents, to `path`; see `video.fit_clip`. Raises BadClip."""
    fitted = fit_clip(source, fps, sizes, max_frames, min_frames)
    write_mp4(path, fitted.frames, fps)
    fsync(path)
    clip = probe(path)
    return ClipFile(
        frames=clip.frames,
        size=(clip.height, clip.width),
        sha256=sha256(path),
        pixels=fitted.pixels,
        kept=fitted.kept,
        measured=measure(fitted.frames),
    )
