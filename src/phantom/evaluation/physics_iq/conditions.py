"""The condition frames of a Physics-IQ video, and the recording that follows, read from the benchmark's files."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np

from phantom.data.physics_iq import layout, video
from phantom.errors import UserError
from phantom.evaluation.sampling_spec import Settings


def find_condition(root: Path, name: layout.Name, settings: Settings) -> tuple[Path, int]:
    """The file with the condition of `name`, and its frames per second (0 for an image).

    The switch frame in mode single, the conditioning video in mode multi. Raises UserError if there is none.
    """
    if settings.mode == "single":
        candidates = [(layout.switch_frame(root, name), 0)]
    else:
        rates = (settings.fps, layout.PUBLISHED_FPS)
        candidates = [(layout.conditioning_video(root, name, rate), rate) for rate in rates]
    found = next((candidate for candidate in candidates if candidate[0].is_file()), None)
    if not found:
        raise UserError(f"{candidates[0][0]}: no such file; it is the condition of {name.generated}")
    return found


def read_condition(condition: tuple[Path, int], settings: Settings) -> np.ndarray:
    """The condition frames, uint8 RGB (k, H, W, 3); the last one is the frame before the 5 s to generate.

    Frames are resized without cropping, since the scorer compares whole frames whatever their aspect ratio. Raises
    UserError.
    """
    path, rate = condition
    size = (settings.width, settings.height)
    if settings.mode == "single":
        image = cv2.imread(str(path))
        if image is None:
            raise UserError(f"{path}: not an image that can be decoded")
        frames = [image]
    else:
        frames = [_resize(frame, size) for frame in video.frames(path)]
        picks = [len(frames) - 1 - round(i * rate / settings.fps) for i in reversed(range(settings.prefix_frames))]
        if picks[0] < 0:
            raise UserError(
                f"{path}: {len(frames)} frames at {rate} per second, too few for {settings.prefix_frames} condition "
                f"frames at {settings.fps}"
            )
        frames = [frames[i] for i in picks]
    return np.stack([cv2.cvtColor(_resize(frame, size), cv2.COLOR_BGR2RGB) for frame in frames])


def find_truth(root: Path, name: layout.Name, settings: Settings) -> tuple[Path, int] | None:
    """The file with the 5 s to predict, and its frames per second; None if there is none."""
    rate = layout.source_rate(root, name, settings.fps)
    return (layout.testing_video(root, name, rate), rate) if rate else None


def read_truth(truth: tuple[Path, int], settings: Settings) -> np.ndarray:
    """The frames after the condition, uint8 RGB (generated_frames - k, H, W, 3); the last one fills up the rest."""
    path, rate = truth
    size = (settings.width, settings.height)
    frames = [_resize(frame, size) for frame in video.frames(path)]
    # Times count from the last condition frame, which is one frame of the source before the first one here.
    count = settings.generated_frames - settings.prefix_frames
    picks = [round((i + 1) * rate / settings.fps) - 1 for i in range(count)]
    return np.stack([cv2.cvtColor(frames[min(pick, len(frames) - 1)], cv2.COLOR_BGR2RGB) for pick in picks])


def _resize(frame: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    return frame if frame.shape[1::-1] == size else cv2.resize(frame, size, interpolation=cv2.INTER_AREA)
