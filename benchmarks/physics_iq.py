"""Scoring one Physics-IQ comparison: ours beside a plain implementation, in CPU time and peak memory.

    python benchmarks/physics_iq.py [--width 3840 --height 2160 --fps 8 --repeats 3]

The plain one is written below as the formulas read, and laid out like the benchmark's own tool: whole videos in lists
of float64 frames, masks in three channels, one pass for each metric. Each run is a process of its own on files made
here, two takes with their masks and a generated video of 832 x 480; both must find the same metrics. Ratios are of
medians.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import cv2
import numpy as np

from phantom.data.physics_iq import masks
from phantom.data.physics_iq.layout import SECONDS
from phantom.evaluation.physics_iq.folder import Job, compare

GENERATED = (832, 480)
FILES = ("generated.mp4", "take-1.mp4", "take-2.mp4", "mask-1.mp4", "mask-2.mp4")


# --- the plain implementation ----------------------------------------------------------------------------------------


def plain(folder: Path, fps: int) -> dict[str, object]:
    """The metrics, every video loaded whole."""
    generated, take_1, take_2, mask_1, mask_2 = (folder / name for name in FILES)
    write_plain_masks(generated, folder / "mask-generated.mp4", fps)
    height, width = load(take_1, 1, None)[0].shape[:2]
    size = (width // 4, height // 4)
    count = SECONDS * fps
    real_1, real_2, fake = ([f / 255.0 for f in load(p, count, size)] for p in (take_1, take_2, generated))
    m1, m2, mg = (
        [(f > 127).astype(np.uint8) for f in load(p, count, size)]
        for p in (mask_1, mask_2, folder / "mask-generated.mp4")
    )

    def iou(a, b):
        union = np.logical_or(a, b).sum()
        return float(np.logical_and(a, b).sum() / union) if union else 1.0

    def ious(a, b):
        return [iou(x, y) for x, y in zip(a, b, strict=True)]

    def once(a, b):
        return iou(np.max(a, axis=0), np.max(b, axis=0))

    def weighted(a, b):
        a, b = (np.sum(m, axis=0, dtype=np.uint16) / len(m) for m in (a, b))
        union = np.maximum(a, b).sum()
        return float(np.minimum(a, b).sum() / union) if union else 1.0

    def mse(a, b):
        return [float(((x.astype(np.float32) - y.astype(np.float32)) ** 2).mean()) for x, y in zip(a, b, strict=True)]

    pairs = {"v1": (m1, mg, real_1, fake), "v2": (m2, mg, real_2, fake)}
    found: dict[str, object] = {}
    for key, (a, b, x, y) in pairs.items():
        found |= {f"spatiotemporal_iou_{key}": ious(a, b), f"spatial_iou_{key}": once(a, b)}
        found |= {f"weighted_spatial_iou_{key}": weighted(a, b), f"{key}_mse": mse(x, y)}
    found |= {"variance_spatiotemporal_iou": ious(m1, m2), "variance_spatial": once(m1, m2)}
    return found | {"variance_weighted_spatial": weighted(m1, m2), "variance_mse": mse(real_1, real_2)}


def load(path: Path, count: int, size: tuple[int, int] | None) -> list[np.ndarray]:
    """Up to `count` frames; like the tool it decodes the file to its end."""
    capture, found, there = cv2.VideoCapture(str(path)), [], True
    while there:
        there, frame = capture.read()
        if there and len(found) < count:
            found.append(cv2.resize(frame, size) if size else frame)
    return found


def write_plain_masks(source: Path, target: Path, fps: int) -> None:
    """Motion masks of a video, stored as the benchmark stores them."""
    greys = [cv2.GaussianBlur(cv2.cvtColor(f, cv2.COLOR_BGR2GRAY), (5, 5), 0) for f in load(source, 10**6, None)]
    writer = cv2.VideoWriter(str(target), cv2.VideoWriter.fourcc(*"mp4v"), fps, GENERATED, isColor=False)
    average, kernel = greys[0].astype(np.float64), np.ones((5, 5), np.uint8)
    writer.write(np.zeros_like(greys[0]))
    for grey in greys[1:]:
        cv2.accumulateWeighted(grey, average, 0.3)
        moving = (cv2.absdiff(grey, cv2.convertScaleAbs(average)) > 10).astype(np.uint8) * 255
        moving = cv2.morphologyEx(moving, cv2.MORPH_OPEN, kernel)
        writer.write(cv2.morphologyEx(moving, cv2.MORPH_CLOSE, kernel))
    writer.release()


# --- measuring -------------------------------------------------------------------------------------------------------


def ours(folder: Path, fps: int) -> dict[str, object]:
    """The same by the package."""
    generated, take_1, take_2, mask_1, mask_2 = (folder / name for name in FILES)
    return compare(Job(generated, (take_1, take_2), (fps, fps), (mask_1, mask_2), fps, "mp4v"))


def write_files(folder: Path, width: int, height: int, fps: int) -> None:
    """A bright square crosses a textured picture; in the second take, and in the generated video, a little off."""
    count = SECONDS * fps
    texture = np.random.default_rng(0).integers(30, 90, (height // 16, width // 16, 3), np.uint8)
    for name, (w, h), offset in zip(FILES, (GENERATED, (width, height), (width, height)), (2, 0, 1), strict=False):
        still = cv2.resize(texture, (w, h))
        side = h // 4
        writer = cv2.VideoWriter(str(folder / name), cv2.VideoWriter.fourcc(*"mp4v"), fps, (w, h))
        for t in range(count):
            frame = still.copy()
            x = (w - side) * t // count + offset * w // 100
            frame[side : 2 * side, x : x + side] = (220, 200, 240)
            writer.write(frame)
        writer.release()
    for number in (1, 2):
        moving = masks.motion_masks(masks.frames(folder / f"take-{number}.mp4"))
        masks.write_masks(folder / f"mask-{number}.mp4", moving, fps)


def measure(which: str, folder: Path, fps: int) -> None:
    """Prints the metrics, seconds and peak memory of one run in this process."""
    cv2.setNumThreads(1)
    before, start = time.process_time(), time.perf_counter()
    found = {"ours": ours, "plain": plain}[which](folder, fps)
    seconds = {"cpu": time.process_time() - before, "wall": time.perf_counter() - start}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({"metrics": found, "peak_mib": peak, **seconds}))


def main() -> None:
    """Measures both, and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--width", type=int, default=3840)
    parser.add_argument("--height", type=int, default=2160)
    parser.add_argument("--fps", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--measure", choices=("ours", "plain"), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.measure:
        measure(given.measure, given.folder, given.fps)
        return

    runs: dict[str, list[dict]] = {"plain": [], "ours": []}
    with tempfile.TemporaryDirectory(prefix="phantom-benchmark-") as folder:
        write_files(Path(folder), given.width, given.height, given.fps)
        for _ in range(given.repeats):
            for which, found in runs.items():  # in turns, so that both see the same machine
                arguments = [sys.executable, __file__, "--measure", which, "--folder", folder, "--fps", str(given.fps)]
                said = subprocess.run(arguments, check=True, capture_output=True, text=True).stdout
                found.append(json.loads(said))
    theirs, found = runs["plain"][0]["metrics"], runs["ours"][0]["metrics"]
    assert theirs.keys() == found.keys()
    for key, value in theirs.items():
        np.testing.assert_allclose(found[key], value, rtol=0, atol=1e-6, err_msg=key)

    print(
        f"One comparison: takes of {given.width}x{given.height}, {SECONDS} s at {given.fps} fps, {given.repeats} runs"
    )
    print(f"{'':8}{'CPU s':>10}{'wall s':>10}{'peak MiB':>10}{'a core, an hour':>18}")
    median = {
        which: {k: statistics.median(r[k] for r in of) for k in ("cpu", "wall", "peak_mib")}
        for which, of in runs.items()
    }
    for which, m in median.items():
        print(f"{which:8}{m['cpu']:10.2f}{m['wall']:10.2f}{m['peak_mib']:10.0f}{3600 / m['cpu']:11.0f} videos")
    p, o = median["plain"], median["ours"]
    faster, leaner = p["cpu"] / o["cpu"], p["peak_mib"] / o["peak_mib"]
    print(f"ours: {faster:.1f} times the throughput of a core, {leaner:.1f} times less memory")


if __name__ == "__main__":
    main()
