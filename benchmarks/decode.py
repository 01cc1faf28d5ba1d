"""Decoding clips, compared with a plain PyAV loop that decodes every frame, in CPU time on one core.

    python benchmarks/decode.py [--width 1280 --height 720 --frames 480 --repeats 5]

The plain loop decodes the file, converts each frame to RGB at the clip's size with swscale, and keeps those wanted; it
ignores frame rates, pixel aspect ratios, rotation and corruption. Both fit a video made here to 480 x 832. Ratios are
of medians over interleaved runs.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import av
import numpy as np

from phantom.data.video import read_clip, write_mp4

HEIGHT, WIDTH, FPS = 480, 832, 24


def plain(path: Path, wanted: range) -> np.ndarray:
    """The frames `wanted`; every frame is decoded and resized."""
    kept = []
    with av.open(str(path)) as container:
        container.streams.video[0].codec_context.thread_count = 1
        for number, frame in enumerate(container.decode(video=0)):
            rgb = frame.reformat(WIDTH, HEIGHT, "rgb24").to_ndarray()
            if number in wanted:
                kept.append(rgb)
    return np.stack(kept)


def video(path: Path, count: int, height: int, width: int) -> None:
    """Writes a square moving over a noisy background at 24 frames per second."""
    rng = np.random.default_rng(0)
    picture = rng.integers(60, 180, (height // 8, width // 8, 3), np.uint8).repeat(8, 0).repeat(8, 1)

    def frames() -> np.ndarray:
        made = np.broadcast_to(picture, (count, height, width, 3)).copy()
        for i, frame in enumerate(made):
            left = i * (width - 200) // count
            frame[100:300, left : left + 200] = (240, 220, 60)
        return made

    write_mp4(path, frames(), FPS, crf=23)


def seconds(function: Callable[[], np.ndarray]) -> float:
    began = time.process_time()
    function()
    return time.process_time() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("width", 1280), ("height", 720), ("frames", 480), ("repeats", 5)):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    count = options.frames
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.mp4"
        video(path, count, options.height, options.width)
        whole = (count - 1) // 4 * 4 + 1
        cases = {
            f"{whole} of {count} frames": (FPS, whole, range(whole)),
            f"the first 49 of {count} frames": (FPS, 49, range(49)),
            f"49 frames spread over {count}": (FPS * 49 / count, 49, range(0, count, count // 49)),
        }
        for name, (fps, most, wanted) in cases.items():
            theirs, ours = [], []
            for _ in range(options.repeats):
                theirs.append(seconds(lambda wanted=wanted: plain(path, wanted)))  # type: ignore[misc]
                ours.append(seconds(lambda fps=fps, most=most: read_clip(path, fps, HEIGHT, WIDTH, most)))  # type: ignore[misc]
            a, b = statistics.median(theirs), statistics.median(ours)
            print(f"{name}: plain {count / a:.0f} frames of the file/s, ours {count / b:.0f}: {a / b:.2f} x as fast")


if __name__ == "__main__":
    main()
