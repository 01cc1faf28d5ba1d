"""The manifest of hundreds of thousands of clips, compared with JSON lines; preparing references, with files.

    python benchmarks/manifest.py [--clips 433523 --repeats 3 --videos 6]

The rows are made up: references to members of zips, captions of 400 characters, every column stated. Each run is a
process of its own, which imports first, then writes all rows (`write_manifest`), or reads them (`read_manifest`), or
writes or reads the same as JSON lines, as `manifest.jsonl` was until version 0.2. Memory is the most that the process
had beyond what it had before. Then `phantom prepare` of a folder of noisy videos of 121 frames of 720p, to references
and to files of 480x832, in one worker process. CPU time, in ratios of medians over interleaved runs.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path

import numpy as np

from phantom.config import load_params, preset_path
from phantom.data.manifest import (
    FORMER_MANIFEST,
    MANIFEST,
    Clip,
    Curation,
    Probe,
    Reference,
    Scores,
    Segment,
    read_manifest,
    write_manifest,
)
from phantom.data.prepare import prepare
from phantom.data.sources import clips as sources
from phantom.data.video import write_mp4

FRAMES, HEIGHT, WIDTH = 121, 720, 1280


def made_up(count: int) -> Iterator[Clip]:
    draw = random.Random(0)
    probe = Probe("h264", 121, 24.0, 5.04, 1080, 1920, 1, 1, 1, False)
    for number in range(count):
        start = number % 5000 * 10_000_000
        zip_ = f"OpenVidHD/OpenVidHD_part_{number // 5000}.zip"
        segment = Segment(zip_, '"0123456789abcdef0123456789abcdef-100"', start, start + 9_000_000)
        yield Clip(
            id=f"{draw.getrandbits(60):012x}_{number}",
            path=f"{number}.mp4",  # which JSON lines had to state
            caption="".join(draw.choices("abcdefgh ", k=400)),
            frames=121,
            fps=24.0,
            sha256=f"{draw.getrandbits(256):064x}",
            split="heldout" if number % 847 == 0 else "train",
            curation=Curation(draw.randrange(2), draw.random(), False, 0.0),
            reference=Reference("s3://datasets/openvid", (segment,), f"{number}.mp4", "stored"),
            probe=probe,
            scores=Scores(draw.random(), draw.random(), draw.random(), "static"),
            caption_origin="OpenVidHD.csv",
            language="en",
        )


def write_lines(path: Path, clips: Iterable[Clip]) -> None:
    """As `manifest.jsonl` was written."""
    with path.open("w", encoding="utf-8", newline="\n") as file:
        for clip in clips:
            stated = {key: value for key, value in asdict(clip).items() if value is not None}
            file.write(json.dumps(stated, ensure_ascii=False) + "\n")


WORK = {
    "write": lambda folder, count: write_manifest(folder / MANIFEST, made_up(count)),
    "write lines": lambda folder, count: write_lines(folder / FORMER_MANIFEST, made_up(count)),
    "make up": lambda folder, count: sum(1 for _ in made_up(count)),
    "read": lambda folder, count: read_manifest(folder / MANIFEST),
    "read lines": lambda folder, count: read_manifest(folder / FORMER_MANIFEST),
}


def run(work: str, folder: Path, count: int) -> None:
    """Runs in a process of its own: prints CPU seconds and bytes."""
    import pyarrow.parquet  # noqa: F401  (its import is no part of reading or writing)

    before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    kept = WORK[work](folder, count)
    seconds = time.process_time() - began
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    print(json.dumps([seconds, grown]))
    del kept


def compare_manifests(folder: Path, count: int, repeats: int) -> None:
    results: dict[str, list[list[float]]] = {work: [] for work in WORK}
    for _ in range(repeats):
        for work in WORK:
            command = [sys.executable, __file__, "--work", work, "--folder", str(folder), "--clips", str(count)]
            answer = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            results[work].append(json.loads(answer.splitlines()[-1]))
    seconds, memory = (
        {work: statistics.median(row[i] for row in rows) for work, rows in results.items()} for i in (0, 1)
    )
    making = seconds["make up"]
    sizes = [(folder / name).stat().st_size for name in (MANIFEST, FORMER_MANIFEST)]
    print(f"{count} clips, Parquet relative to JSON lines:")
    print(f"  size: {sizes[0] / sizes[1]:.2f} ({sizes[0] / 1e6:.0f} MB)")
    print(f"  writing: {(seconds['write'] - making) / (seconds['write lines'] - making):.2f} of the CPU time")
    print(f"  reading: {seconds['read'] / seconds['read lines']:.2f} of the CPU time, {seconds['read']:.1f} s here")
    print(f"  memory: writing {memory['write'] / 1e6:.0f} MB, reading, with all clips, {memory['read'] / 1e6:.0f} MB")


def compare_preparing(folder: Path, videos: int, repeats: int) -> None:
    source = folder / "videos"
    source.mkdir()
    noise = np.random.default_rng(0)
    still = noise.integers(0, 255, (HEIGHT // 8, WIDTH // 8, 3), np.uint8).repeat(8, 0).repeat(8, 1)
    for number in range(videos):
        frames = np.stack([np.roll(still, (number + 2) * i, axis=1) for i in range(FRAMES)])
        write_mp4(source / f"{number}.mp4", frames, 24, crf=23)
        (source / f"{number}.txt").write_text(f"Blocks move, number {number}.", encoding="utf-8")
    sources.cores = lambda: 1
    sources.caption_languages = lambda captions, known: ["en"] * len(captions)  # the same for both
    seconds: dict[str, list[float]] = {"references": [], "files": []}
    for number in range(repeats):
        for kind, found in seconds.items():
            settings = [f"data.clips={kind}", "data.source=folder", f"data.path={source}", "data.heldout=0.5"]
            settings.append("evaluate.physics_iq.benchmark=elsewhere")
            params = load_params(preset_path("wan2.2-ti2v-5b"), settings)
            before = resource.getrusage(resource.RUSAGE_CHILDREN)
            prepare(params, folder / f"{kind}-{number}")
            time.sleep(1)  # the worker has been killed
            multiprocessing.active_children()  # waits for it, and so counts it
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            found.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    medians = {kind: statistics.median(found) for kind, found in seconds.items()}
    print(
        f"prepare of {videos} videos to references: {medians['references'] / medians['files']:.2f} of the CPU time "
        f"that files take, {medians['references'] / videos:.1f} s of a core per clip here"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clips", type=int, default=433_523)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--videos", type=int, default=6)
    parser.add_argument("--work", choices=WORK, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.work:
        run(given.work, given.folder, given.clips)
        return
    with tempfile.TemporaryDirectory() as folder:
        compare_preparing(Path(folder), given.videos, given.repeats)
        compare_manifests(Path(folder), given.clips, given.repeats)


if __name__ == "__main__":
    main()
