"""A source video to its clips, in one call: what a worker process does for each file."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np

from phantom.config import Data
from phantom.data.curation import Measured, measure, reduced
from phantom.data.files import fsync, sha256
from phantom.data.manifest import Probe
from phantom.data.shots import find_cuts
from phantom.data.video import BadClip, fit_clip, probe, write_mp4

# Raised when a change of the code changes the clip of a file, or what is measured on it: clips of before are made anew.
VERSION = 2


@dataclass(frozen=True)
class ClipFile:
    """A finished clip of `frames` frames from number `first_frame` of the video on, and what they show."""

    first_frame: int
    frames: int
    sha256: str  # of the mp4 or, where none is written, of the pixels
    measured: Measured


@dataclass(frozen=True)
class VideoClips:
    """The clips of a video: one, or one for each of its `shots` that is long enough, or none.

    pixels and kept as in `video.FittedClip`.
    """

    clips: tuple[ClipFile, ...]
    shots: int
    size: tuple[int, int]  # height, width
    pixels: float
    kept: float
    probe: Probe | None  # None where the rest of the file cannot be read


def make_clips(source: Path | bytes, path: Path, data: Data) -> VideoClips:
    """Decodes the clips of `source`, a file or its contents; see `video.fit_clip`. Raises BadClip.

    With `data.clips: files` they are written to the paths that `clip_path` names.
    """
    fitted = fit_clip(source, data.fps, data.sizes, data.frames, data.min_frames)
    total, height, width, _ = fitted.frames.shape
    cuts = find_cuts(reduced(fitted.frames)) if data.shots != "keep" else []
    spans = list(pairwise([0, *cuts, total]))
    wanted = [] if data.shots == "drop" and cuts else [_whole(start, stop) for start, stop in spans]
    clips = []
    for start, stop in wanted:
        if stop - start < data.min_frames:
            continue
        frames = fitted.frames[start:stop]
        file = clip_path(path, start)
        if data.clips == "files":
            write_mp4(file, frames, data.fps)
            fsync(file)
        digest = sha256(file) if data.clips == "files" else _digest(frames)
        clips.append(ClipFile(start, len(frames), digest, measure(frames)))
    return VideoClips(
        clips=tuple(clips),
        shots=len(spans),
        size=(height, width),
        pixels=fitted.pixels,
        kept=fitted.kept * sum(clip.frames for clip in clips) / total,
        probe=_probe(source),
    )


def clip_path(path: Path, first_frame: int) -> Path:
    """Where the clip that begins with this frame is, of a video whose clips are named after `path`."""
    return path.with_name(f"{path.name}.{first_frame}.mp4")


def _whole(start: int, stop: int) -> tuple[int, int]:
    """The largest 4m + 1 frames from `start` on that end before `stop`."""
    return start, start + (stop - start - 1) // 4 * 4 + 1


def _probe(source: Path | bytes) -> Probe | None:
    try:
        return probe(source)
    except BadClip:
        return None


def _digest(frames: np.ndarray) -> str:
    digest = hashlib.sha256(str(frames.shape).encode())
    digest.update(np.ascontiguousarray(frames).data)
    return digest.hexdigest()
