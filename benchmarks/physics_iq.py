"""CPU time and peak memory of one Physics-IQ comparison, ours against a plain implementation.

    python benchmarks/physics_iq.py [--width 3840 --height 2160 --fps 8 --repeats 3]

The plain implementation below follows the formulas literally, and is structured like the benchmark's own tool: whole
videos in lists of float64 frames, masks with three channels, one pass per metric, a pool of one thread. It decodes take
1 twice, as the tool does to get its size. The files are generated here: two noisy takes in H.264 with their masks, and
generated videos of 832 x 480. Each run is a separate process that compares one video as a warm-up and is measured on
the next, as in a run over 198 videos; all must give the same metrics. The tool decodes the recordings again for each
run of a model. Ours caches them at the size of the comparison: `first` starts without the cache and writes it, `later`
reads it, and the third starts without it and compares several runs of a model at once. `decoding alone` decodes the
recordings and masks once, without colour conversion: a lower bound for the first score. Ratios are of medians.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import av
import cv2
import numpy as np

from phantom.data.physics_iq import masks
from phantom.data.physics_iq.layout import SECONDS
from phantom.data.physics_iq.video import frames
from phantom.evaluation.physics_iq.compare import Job, compare_all

GENERATED = (832, 480)
RUNS = 4  # per model, as required by Physics-IQ Verified
TAKES, MASKS = ("take-1.mp4", "take-2.mp4"), ("mask-1.mp4", "mask-2.mp4")


# --- the plain implementation ----------------------------------------------------------------------------------------


def plain(folder: Path, fps: int, number: int) -> dict[str, object]:
    """The metrics of generated video `number`, with every video loaded as a whole."""
    generated = folder / f"generated-{number}.mp4"
    take_1, take_2, mask_1, mask_2 = (folder / name for name in TAKES + MASKS)
    write_plain_masks(generated, folder / "mask-generated.mp4", fps)
    height, width = load(take_1, 1, None)[0].shape[:2]
    size = (width // 4, height // 4)
    count = SECONDS * fps
    real_1, real_2, fake = (load(p, count, size, 255.0) for p in (take_1, take_2, generated))
    m1, m2, mg = (load(p, count, size) for p in (mask_1, mask_2, folder / "mask-generated.mp4"))
    m1, m2, mg = ([(f > 127).astype(np.uint8) for f in m] for m in (m1, m2, mg))

    def iou(a, b):
        union = np.logical_or(a, b).sum()
        return float(np.logical_and(a, b).sum() / union) if union else 1.0

    def ious(a, b):
        return [iou(x, y) for x, y in zip(a, b, strict=True)]

    def weighted(a, b):
        low, high = np.minimum(a, b), np.maximum(a, b)
        there = high > 0
        return float(low[there].sum() / high[there].sum()) if there.any() else 1.0

    def mse(a, b):
        return [float(((x.astype(np.float32) - y.astype(np.float32)) ** 2).mean()) for x, y in zip(a, b, strict=True)]

    s1, s2, sg = ((np.max(m, axis=0) > 0).astype(np.uint8) * 255 for m in (m1, m2, mg))
    w1, w2, wg = (np.sum(m, axis=0, dtype=np.uint16) / len(m) for m in (m1, m2, mg))
    return {
        "spatiotemporal_iou_v1": ious(m1, mg),
        "spatiotemporal_iou_v2": ious(m2, mg),
        "spatial_iou_v1": iou(s1, sg),
        "spatial_iou_v2": iou(s2, sg),
        "weighted_spatial_iou_v1": weighted(w1, wg),
        "weighted_spatial_iou_v2": weighted(w2, wg),
        "v1_mse": mse(real_1, fake),
        "v2_mse": mse(real_2, fake),
        "variance_spatiotemporal_iou": ious(m1, m2),
        "variance_spatial": iou(s1, s2),
        "variance_weighted_spatial": weighted(w1, w2),
        "variance_mse": mse(real_1, real_2),
    }


def load(path: Path, count: int, size: tuple[int, int] | None, scale: float = 0) -> list[np.ndarray]:
    """Up to `count` frames; decodes the file to its end, as the tool does."""
    capture, found, decoded = cv2.VideoCapture(str(path)), [], True
    while decoded:
        decoded, frame = capture.read()
        if decoded and len(found) < count:
            frame = cv2.resize(frame, size) if size else frame
            found.append(frame / scale if scale else frame)
    return found


def write_plain_masks(source: Path, target: Path, fps: int) -> None:
    """Writes the motion masks of a video in the benchmark's format."""
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


def first(folder: Path, fps: int, number: int, runs: int = 1) -> dict[str, object]:
    """Our metrics of generated video `number`, compared together with the next `runs` - 1 videos, without a cache."""
    with tempfile.TemporaryDirectory(prefix="phantom-benchmark-") as cache:
        return ours(folder, fps, number, runs, Path(cache))


def later(folder: Path, fps: int, number: int) -> dict[str, object]:
    """The same with the cached recordings of the warm-up."""
    return ours(folder, fps, number, 1, folder / "cache")


def together(folder: Path, fps: int, number: int) -> dict[str, object]:
    """The same for several runs of a model at once, without a cache."""
    return first(folder, fps, number, RUNS)


def decoding(folder: Path, fps: int, number: int) -> dict[str, object]:
    """Decodes what every first comparison has to decode; returns no metrics."""
    for name in (*TAKES, *MASKS):
        with av.open(str(folder / name)) as container:
            stream = container.streams.video[0]
            stream.codec_context.thread_count = 1
            for _ in container.decode(stream):
                pass
    return {}


def ours(folder: Path, fps: int, number: int, runs: int, cache: Path) -> dict[str, object]:
    """What `phantom score physics-iq` does for one view."""
    takes, ready = (tuple(folder / name for name in names) for names in (TAKES, MASKS))
    videos = [folder / f"generated-{number + i}.mp4" for i in range(runs)]
    jobs = [Job(video, takes, (fps, fps), ready, fps, "mp4v") for video in videos]
    return compare_all(jobs, 1, cache)[jobs[0]]


def write_files(folder: Path, width: int, height: int, fps: int) -> None:
    """A bright square crosses a textured background, slightly shifted in take 2 and in the generated videos."""
    count, rng = SECONDS * fps, np.random.default_rng(0)
    texture = rng.integers(30, 90, (height // 16, width // 16, 3), np.uint8)
    noise = rng.integers(0, 4, (height, width, 1), np.uint8)
    videos = [(name, (width, height), i) for i, name in enumerate(TAKES)]
    videos += [(f"generated-{i}.mp4", GENERATED, 2 + i) for i in range(RUNS + 1)]
    for name, (w, h), offset in videos:
        still, side = cv2.resize(texture, (w, h)), h // 4
        with av.open(str(folder / name), "w") as container:
            stream = container.add_stream("libx264", rate=fps)
            stream.width, stream.height, stream.pix_fmt = w, h, "yuv420p"
            stream.options = {"preset": "ultrafast", "crf": "23", "threads": "1"}
            for t in range(count):
                frame = still + np.roll(noise, t * 97, (0, 1))[:h, :w]
                x = (w - side) * t // count + offset * w // 100
                frame[side : 2 * side, x : x + side] = (220, 200, 240)
                container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="bgr24")))
            container.mux(stream.encode())
    for number in (1, 2):
        moving = masks.motion_masks(frames(folder / f"take-{number}.mp4"))
        masks.write_masks(folder / f"mask-{number}.mp4", moving, fps)


def measure(which: str, folder: Path, fps: int) -> None:
    """Prints metrics, seconds and peak memory of the second of two runs in this process."""
    cv2.setNumThreads(1)
    (folder / "cache").mkdir()
    try:
        with ThreadPoolExecutor(1) as pool:
            pool.submit(VARIANTS[which][0], folder, fps, 0).result()
            before, start = time.process_time(), time.perf_counter()
            found = pool.submit(VARIANTS[which][0], folder, fps, 1).result()
            seconds = {"cpu": time.process_time() - before, "wall": time.perf_counter() - start}
        kept = sum(path.stat().st_size for path in (folder / "cache").rglob("*.zip")) / 2**20
    finally:
        shutil.rmtree(folder / "cache")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({"metrics": found, "peak_mib": peak, "kept_mib": kept, **seconds}))


VARIANTS = {  # function, and the number of videos it compares
    "plain": (plain, 1),
    "ours, first": (first, 1),
    "ours, later": (later, 1),
    f"ours, {RUNS} runs": (together, RUNS),
    "decoding alone": (decoding, 1),
}


def main() -> None:
    """Measures all variants, and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--width", type=int, default=3840)
    parser.add_argument("--height", type=int, default=2160)
    parser.add_argument("--fps", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--measure", choices=tuple(VARIANTS), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.measure:
        measure(given.measure, given.folder, given.fps)
        return

    runs: dict[str, list[dict]] = {which: [] for which in VARIANTS}
    with tempfile.TemporaryDirectory(prefix="phantom-benchmark-") as folder:
        write_files(Path(folder), given.width, given.height, given.fps)
        for _ in range(given.repeats):
            for which, found in runs.items():  # alternating, so that all see the same machine load
                arguments = [sys.executable, __file__, "--measure", which, "--folder", folder, "--fps", str(given.fps)]
                said = subprocess.run(arguments, check=True, capture_output=True, text=True).stdout
                found.append(json.loads(said))
    theirs = runs["plain"][0]["metrics"]
    for which in VARIANTS.keys() - {"decoding alone"}:
        found = runs[which][0]["metrics"]
        assert theirs.keys() == found.keys()
        for key, value in theirs.items():
            np.testing.assert_allclose(found[key], value, rtol=0, atol=1e-6, err_msg=key)

    print(f"Comparisons: takes of {given.width}x{given.height}, {SECONDS} s at {given.fps} fps, {given.repeats} runs")
    print(f"{'':16}{'CPU s':>12}{'wall s':>10}{'peak MiB':>10}{'a core, an hour':>18}{'times plain':>13}")
    plain_cpu = 0.0
    for which, (_, videos) in VARIANTS.items():
        m = {k: statistics.median(r[k] for r in runs[which]) for k in ("cpu", "wall", "peak_mib")}
        cpu, wall = m["cpu"] / videos, m["wall"] / videos
        plain_cpu = plain_cpu or cpu
        print(f"{which:16}{cpu:12.2f}{wall:10.2f}{m['peak_mib']:10.0f}{3600 / cpu:11.0f} videos{plain_cpu / cpu:13.1f}")
    kept = max(run["kept_mib"] for run in runs["ours, later"])
    print(f"Seconds and throughput are of one generated video. Of the recordings of a view {kept:.1f} MiB are kept.")


if __name__ == "__main__":
    main()
