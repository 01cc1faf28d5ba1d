"""The last frames of a video, from which generation continues."""

from __future__ import annotations

from collections import deque
from itertools import groupby
from pathlib import Path

import av
import numpy as np

from phantom.data.video import (
    MAX_REPEATED_SHARE,
    BadClip,
    RgbConverter,
    fit_frame,
    frames_before,
    open_video,
    timed_frames,
)


def read_last_frames(path: str | Path, fps: float, height: int, width: int, longest: int) -> tuple[np.ndarray, int]:
    """The last 4m + 1 frames of `path`, at most `longest`, and the total number of frames at `fps`.

    Resampled to `fps` and fitted as in `read_clip`: uint8 RGB (4m + 1, `height`, `width`, 3). Memory is bounded by
    `longest` frames, whatever the length of the video. Raises BadClip with the reason.
    """
    kept: deque[av.VideoFrame] = deque(maxlen=longest)
    count = 0
    to_rgb = RgbConverter()
    with open_video(path) as (container, stream):
        for _, end, frame in timed_frames(container, stream):
            repeats = max(0, frames_before(end, fps) - count)
            kept.extend([frame] * repeats)
            count += repeats
        if not kept:
            raise BadClip("no video frame in it")
        taken = list(kept)[-((len(kept) - 1) // 4 * 4 + 1) :]
        runs = [list(run) for _, run in groupby(taken, key=id)]
        if len(runs) < (1 - MAX_REPEATED_SHARE) * len(taken):
            raise BadClip(
                f"too few frames: {len(taken) - len(runs)} of {len(taken)} would be repeats at {fps:g} per second"
            )
        frames = [f for run in runs for f in [fit_frame(run[0], stream, height, width, to_rgb)] * len(run)]
    return np.stack(frames), count
