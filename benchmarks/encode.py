"""Encoding with one process and with two: clips per second of `phantom encode --worker i --of n`.

    python benchmarks/encode.py [--clips 96 --repeats 3]

Simulated clips as in the mini preset, encoded by its models on one thread a process. Imports are not counted, loading
the models is. Ratios are of medians, of runs that take turns.
"""

from __future__ import annotations

import argparse
import multiprocessing
import shutil
import statistics
import tempfile
import time
from pathlib import Path

import torch

from phantom.config import load_params, preset_path
from phantom.data.encode import encode
from phantom.data.prepare import prepare
from phantom.data.shards import LATENTS
from phantom.data.shares import Share


def work(params, root: Path, share: Share) -> None:
    torch.set_num_threads(1)
    encode(params, root, share)


def clips_per_second(params, root: Path, clips: int, processes: int) -> float:
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=work, args=(params, root, Share(i, processes))) for i in range(processes)]
    began = time.perf_counter()
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    seconds = time.perf_counter() - began
    if any(worker.exitcode for worker in workers):
        raise SystemExit("a worker failed")
    encode(params, root, merge=True)
    shutil.rmtree(root / LATENTS)  # else the next workers find nothing to do
    return clips / seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=int, default=96)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    sizes = [f"data.worlds.train_clips={options.clips}", "data.worlds.heldout_clips=0", "data.worlds.scenarios=1"]
    params = load_params(preset_path("mini"), sizes)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        prepare(params, root)
        rates: dict[int, list[float]] = {1: [], 2: []}
        for _ in range(options.repeats):
            for processes, found in rates.items():
                found.append(clips_per_second(params, root, options.clips, processes))
        one, two = (statistics.median(found) for found in rates.values())
        print(f"clips/s: 1 process {one:.1f}, 2 processes {two:.1f}: {two / one:.2f} x as fast")


if __name__ == "__main__":
    main()
