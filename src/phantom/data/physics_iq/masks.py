"""The binary motion masks of Physics-IQ, at a video's own resolution."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import cv2
import numpy as np

from phantom.data.physics_iq.video import Frames, first_channel

Codec = Literal["mp4v", "none"]
CODECS: tuple[Codec, ...] = ("mp4v", "none")

THRESHOLD = 10  # grey levels of difference from the running average, exclusive
AVERAGE_RATE = 0.3  # of the running average: a pixel moves when 0.7 |change| > 10
KERNEL = np.ones((5, 5), np.uint8)  # removes regions smaller than 5 pixels


def motion_masks(video: Frames) -> Iterator[np.ndarray]:
    """Masks uint8 (H, W) of 0 and 255, one per BGR frame; the first is empty.

    The grey, blurred frame is compared with its exponential moving average, which already includes the frame itself.
    """
    average: np.ndarray | None = None
    for frame in video:
        grey = cv2.GaussianBlur(cv2.cvtColor(frame, cv2.COLOR_BGR2GRAY), (5, 5), 0)
        if average is None:
            average = grey.astype(np.float64)
            yield np.zeros_like(grey)
            continue
        cv2.accumulateWeighted(grey, average, AVERAGE_RATE)
        difference = cv2.absdiff(grey, cv2.convertScaleAbs(average))
        _, mask = cv2.threshold(difference, THRESHOLD, 255, cv2.THRESH_BINARY)
        mask = cv2.morphologyEx(mask, cv2.MORPH_OPEN, KERNEL)
        yield cv2.morphologyEx(mask, cv2.MORPH_CLOSE, KERNEL)


def codec_round_trip(masks: Frames, fps: int, codec: Codec) -> Iterator[np.ndarray]:
    """The masks after encoding and decoding: uint8 (H, W), cropped to even sizes.

    `mp4v` is the lossy codec in which the benchmark stores its own masks; `none` is lossless.
    """
    even = (mask[: mask.shape[0] // 2 * 2, : mask.shape[1] // 2 * 2] for mask in masks)
    if codec == "none":
        yield from even
        return
    with tempfile.TemporaryDirectory(prefix="phantom-masks-") as folder:
        path = Path(folder) / "masks.mp4"
        write_masks(path, even, fps)
        yield from read_masks(path)


def write_masks(path: Path, masks: Frames, fps: int) -> None:
    """Writes masks (H, W), H and W even, as the benchmark does: grey MPEG-4 part 2 in mp4."""
    writer = None
    try:
        for mask in masks:
            if writer is None:
                fourcc = cv2.VideoWriter.fourcc(*"mp4v")
                writer = cv2.VideoWriter(str(path), fourcc, float(fps), mask.shape[::-1], isColor=False)
                if not writer.isOpened():
                    raise OSError(f"{path}: this OpenCV cannot write mp4v; use the mask codec none")
            writer.write(mask)
    finally:
        if writer is not None:
            writer.release()


def read_masks(path: Path) -> Iterator[np.ndarray]:
    """The grey levels (H, W) of a mask video: its first channel, not yet thresholded."""
    yield from first_channel(path)


def binary(masks: Frames, size: tuple[int, int]) -> Iterator[np.ndarray]:
    """Masks resized to `size` = (width, height) and thresholded: bool (height, width), as the scorer compares them."""
    for mask in masks:
        yield cv2.resize(mask, size) > 127
