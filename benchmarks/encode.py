"""Throughput of encoding with one and with two processes, and memory over many clips.

    python benchmarks/encode.py [--clips 96 --repeats 5 --many 10000]

Simulated clips of the mini preset, encoded by its models with one thread per process, as `phantom encode --index i
--of n` does. Timings include loading the models but not imports. Clips per wall-clock second measure this machine in
its present state; clips per CPU second of the busiest process predict one with a free core per process. Memory: the
peak resident size in each tenth of the time while `--many` clips of 5 frames go through `prepare`, from a folder, and
`encode`. Ratios are of medians over interleaved runs.
"""

from __future__ import annotations

import argparse
import csv
import multiprocessing
import shutil
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from shards import resident

from phantom.config import Params, load_params, preset_path
from phantom.data.encode import encode, encode_part, merge_parts
from phantom.data.part import Part
from phantom.data.prepare import prepare
from phantom.data.shards import LATENTS
from phantom.data.video import write_mp4


def run_part(params: Params, root: Path, part: Part) -> float:
    """Encodes one part; returns its CPU seconds."""
    torch.set_num_threads(1)
    encode_part(params, part, root)
    return time.process_time()


def seconds(params: Params, root: Path, processes: int) -> tuple[float, float]:
    """Time to encode all clips: wall-clock seconds, and CPU seconds of the busiest process."""
    began = time.perf_counter()
    with ProcessPoolExecutor(processes, multiprocessing.get_context("fork")) as pool:
        parts = [Part(i, processes) for i in range(processes)]
        busiest = max(pool.map(run_part, [params] * processes, [root] * processes, parts))
    took = time.perf_counter() - began
    merge_parts(params, root)
    shutil.rmtree(root / LATENTS)  # otherwise the next parts find nothing to do
    return took, busiest


def throughput(clips: int, repeats: int) -> None:
    sizes = [f"data.worlds.train_clips={clips}", "data.worlds.heldout_clips=0", "data.worlds.scenarios=1"]
    params = load_params(preset_path("mini"), sizes)
    with tempfile.TemporaryDirectory() as folder:
        prepare(params, Path(folder))
        found: dict[int, list[tuple[float, float]]] = {1: [], 2: []}
        for _ in range(repeats):
            for processes, times in found.items():
                times.append(seconds(params, Path(folder), processes))
    for what, column in (("second", 0), ("CPU second of the busiest process", 1)):
        one, two = (clips / statistics.median(times[column] for times in each) for each in found.values())
        print(f"clips a {what}: 1 process {one:.1f}, 2 processes {two:.1f}: {two / one:.2f} x as fast")


def write_folder(folder: Path, count: int) -> None:
    """Writes `count` videos of 5 frames in distinct colours, and their captions."""
    rng = np.random.default_rng(0)
    folder.mkdir()
    with (folder / "captions.csv").open("w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(["file", "caption"])
        for number in range(count):
            frames = rng.integers(0, 256, (5, 4, 4, 3), np.uint8).repeat(16, 1).repeat(16, 2)
            write_mp4(folder / f"{number}.mp4", frames, 4)
            rows.writerow([f"{number}.mp4", "Colours change."])


@contextmanager
def report_memory(name: str) -> Iterator[None]:
    """Prints the peak resident memory of this process in each tenth of the context's duration."""
    seen: list[float] = []
    ended = threading.Event()

    def look() -> None:
        while not ended.wait(0.05):
            seen.append(resident())

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
    most = [round(max(part)) for part in np.array_split(seen, 10) if len(part)]
    print(f"resident memory of {name}, in every tenth of its time, MB: {most}")


def memory(clips: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write_folder(root / "source", clips)
        settings = ["data.source=folder", f"data.path={root / 'source'}", "evaluate.physics_iq.benchmark=elsewhere"]
        params = load_params(preset_path("mini"), settings)
        for stage in (prepare, encode):
            with report_memory(f"{stage.__name__}, {clips} clips"):
                stage(params, root)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for option, default in (("clips", 96), ("repeats", 5), ("many", 10_000)):
        parser.add_argument(f"--{option}", type=int, default=default, help="0: not" if option != "repeats" else None)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.clips:
        throughput(options.clips, options.repeats)
    if options.many:
        memory(options.many)


if __name__ == "__main__":
    main()
