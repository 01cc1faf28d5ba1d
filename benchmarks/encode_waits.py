"""How long encoding waits for decoding and for writing, and what it costs beside a plain loop.

    python benchmarks/encode_waits.py [--clips 48 --repeats 3]

Simulated clips of the mini preset, one thread for tensors in each process. Waits: the share of the time of the loop
that encodes, at one process and at two at once, that it stands for frames, or for the shard before to be written. The
plain loop decodes a batch, encodes it and saves it, with the same encoders. Medians over interleaved runs.
"""

from __future__ import annotations

import argparse
import multiprocessing
import shutil
import statistics
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from phantom.config import Params, load_params, preset_path
from phantom.data import encode as stage
from phantom.data.clip_frames import ClipReader
from phantom.data.encode_job import describe_job
from phantom.data.latent_keys import KeyedClip
from phantom.data.part import Part
from phantom.data.prepare import prepare
from phantom.data.shards import ShardWriter
from phantom.encoders import load_encoders


def encode(params: Params, root: Path, part: Part) -> tuple[float, float, float]:
    """Encodes a part: seconds of the loop, and of these for frames and for the shard before."""
    torch.set_num_threads(1)
    spent, prefetch, flush = {"loop": 0.0, "frames": 0.0, "writing": 0.0}, stage.prefetch, ShardWriter.flush

    def timed(*arguments: Any) -> Iterator[Any]:
        items, first = prefetch(*arguments), time.perf_counter()
        while True:
            began = time.perf_counter()
            item = next(items, None)
            spent["frames"] += time.perf_counter() - began
            if item is None:
                spent["loop"] = time.perf_counter() - first
                return
            yield item

    def timed_flush(writer: ShardWriter) -> None:
        began = time.perf_counter()
        flush(writer)
        spent["writing"] += time.perf_counter() - began

    stage.prefetch, ShardWriter.flush = timed, timed_flush  # type: ignore[method-assign,assignment]
    try:
        stage.encode_part(params, part, root)
    finally:
        stage.prefetch, ShardWriter.flush = prefetch, flush  # type: ignore[method-assign]
    return spent["loop"], spent["frames"], spent["writing"]


def plain(params: Params, root: Path) -> float:
    """CPU seconds of a plain loop over the same batches, loading the encoders included."""
    began = time.process_time()
    job = describe_job(params, root)
    encoders, reader = load_encoders(params, "cpu"), ClipReader(job.folder, params)
    size = params.encode.batch_size
    batches: list[list[KeyedClip]] = [job.clips[i : i + size] for i in range(0, len(job.clips), size)]
    for number, batch in enumerate(batches):
        found = stage._encode_batch(batch, stage._read_batch(reader, batch), encoders, job.physics_storage)
        tensors = {
            f"{one.key}/{name}": tensor.to(job.dtype).contiguous()
            for one in found
            for name, tensor in {"video": one.video, "physics": one.physics, "text": one.text, **one.prefixes}.items()
        }
        save_file(tensors, root / f"plain-{number}.safetensors")
    return time.process_time() - began


def ours(params: Params, root: Path) -> float:
    """CPU seconds of `phantom encode`, without starting Python."""
    began = time.process_time()
    stage.encode(params, root)
    return time.process_time() - began


def in_processes(params: Params, root: Path, count: int) -> list[tuple[float, float, float]]:
    with ProcessPoolExecutor(count, multiprocessing.get_context("fork")) as pool:
        return [*pool.map(partial(encode, params, root), [Part(i, count) for i in range(count)])]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for option, default in (("clips", 48), ("repeats", 3)):
        parser.add_argument(f"--{option}", type=int, default=default)
    options = parser.parse_args()
    torch.set_num_threads(1)
    sizes = [f"data.worlds.train_clips={options.clips}", "data.worlds.heldout_clips=0", "data.worlds.scenarios=1"]
    params = load_params(preset_path("mini"), [*sizes, "encode.shard_mb=1"])
    shares: dict[int, list[tuple[float, float]]] = {1: [], 2: []}
    seconds: dict[str, list[float]] = {"plain": [], "ours": []}
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        prepare(params, root)
        for _ in range(options.repeats):
            for count, found in shares.items():
                for loop, frames, writing in in_processes(params, root, count):
                    found.append((frames / loop, writing / loop))
                shutil.rmtree(root / "checkpoints")
            seconds["plain"].append(plain(params, root))
            seconds["ours"].append(ours(params, root))
            shutil.rmtree(root / "data/latents")
    for count, found in shares.items():
        frames, writing = (statistics.median(column) for column in zip(*found, strict=True))
        print(f"{count} at once: {frames:.1%} of the loop's time for frames, {writing:.1%} for the shard before")
    one, other = (statistics.median(found) for found in seconds.values())
    print(f"from mp4 to latents: {other / one:.2f} of the CPU time of a plain loop")


if __name__ == "__main__":
    main()
