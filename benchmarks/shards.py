"""Reading latents, compared with a plain read of the same bytes, and memory over many clips.

    python benchmarks/shards.py [--clips 64 --many 10000 --repeats 15 --folder DIR]

Clips of 10 MB, bfloat16 as at full size, in shards of 256 MB made here. In order: every clip through `LatentSet`,
prefetching one (two as float32), against a plain read of the files. At random: single clips in random order, against
reading as many bytes at the same offsets. Two cases each, both with checksums: stored tensors, and float32 as in
training. From the disk: the page cache of the files is dropped before
each run. Memory: resident size while `--many` small clips are read. Ratios are of medians over interleaved runs; CPU
seconds of all threads show how much of a difference is waiting.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import tempfile
import time
from collections import deque
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from phantom.data.latent_index import write_index
from phantom.data.latent_set import LatentSet
from phantom.data.prefetch import prefetch
from phantom.data.shards import EMPTY_TEXT, EncodedClip, ShardWriter, write_tensors
from phantom.data.storage import LocalFolder

CHUNK = 2**24


def write(folder: Path, count: int, channels: int, megabytes: int) -> None:
    """Writes `count` clips with physics latents of `channels` channels, 17 tubelets and 16 x 16 patches."""
    generator = torch.Generator().manual_seed(0)
    shards, records = LocalFolder(folder), LocalFolder(folder.with_name(f"{folder.name}-records"))
    with ShardWriter(shards, records, "", megabytes, torch.bfloat16) as writer:
        for number in range(count):
            video, states, text = (
                torch.randn(shape, generator=generator)
                for shape in ((48, 1, 30, 52), (channels, 17, 16, 16), (64, 128))
            )
            writer.add([EncodedClip(f"clip-{number}", video, states, {}, f"text-{number}", text)])
    write_tensors(folder / EMPTY_TEXT, {"text": torch.zeros(1, 128)})
    rows = [
        {
            **clip,
            **text,
            "id": clip["key"],
            "is_heldout": False,
            "caption": "",
            "frames": 1,
            "shard": place,
            "text_shard": place,
        }
        for place, shard in enumerate(writer.finished)
        for clip, text in zip(shard.clips, shard.texts, strict=True)
    ]
    files = [{"file": one.file, "sha256": one.sha256, "bytes": one.bytes} for one in writer.finished]
    write_index(folder, [row | {"columns": None} for row in rows], {}, None, files, "")


def forget(folder: Path) -> None:
    """Drops the files from the page cache."""
    for path in folder.glob("*.safetensors"):
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read_files(folder: Path) -> None:
    buffer = bytearray(CHUNK)
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def read_ranges(folder: Path, latents: LatentSet, order: list[int], size: int) -> None:
    """Reads `size` bytes per clip, at the clip's offset in its shard."""
    rows = list(latents._table.rows())
    for number in order:
        shard, start = latents._files[rows[number]["shard"]], rows[number]["tensors"][0]["start"]
        with (folder / shard[1]).open("rb", buffering=0) as file:
            file.seek(start)
            file.readinto(bytearray(size))


def resident() -> float:
    """Resident memory of this process in MB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 1e6


def timed(function: Callable[[], Any]) -> tuple[float, float]:
    """Wall-clock seconds and CPU seconds of a call."""
    began, used = time.perf_counter(), time.process_time()
    function()
    return time.perf_counter() - began, time.process_time() - used


def compare(name: str, folder: Path, plain: Callable[[], Any], ours: dict[str, Any], repeats: int, cold: bool) -> None:
    """Prints the times of each of `ours` relative to `plain`."""
    runs = {"plain": plain, **ours}
    found: dict[str, list[tuple[float, float]]] = {each: [] for each in runs}
    for _ in range(repeats):
        for each, function in runs.items():
            if cold:
                forget(folder)
            found[each].append(timed(function))
    medians = {
        each: [statistics.median(column) for column in zip(*times, strict=True)] for each, times in found.items()
    }
    (seconds, used), where = medians.pop("plain"), "from the disk" if cold else "from memory"
    print(f"{name}, {where}: plain {seconds:.2f} s (CPU {used:.2f} s)")
    for each, (wall, cpu) in medians.items():
        print(f"  {each}: {wall:.2f} s (CPU {cpu:.2f} s): {seconds / wall:.2f} x as fast")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for option, default in (("clips", 64), ("many", 10_000), ("repeats", 15)):
        parser.add_argument(f"--{option}", type=int, default=default)
    parser.add_argument("--folder", default=None, help="where the files are made")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        large, small = Path(folder) / "large", Path(folder) / "small"
        write(large, options.clips, 1024, 256)
        os.sync()
        size = sum(path.stat().st_size for path in large.glob("*.safetensors")) // options.clips
        known = LatentSet(large, "train")
        order = torch.randperm(options.clips, generator=torch.Generator().manual_seed(1))[: options.clips // 2].tolist()

        def cases(read: Callable[[Callable[[int], Any], int], Any]) -> dict[str, Callable[[], Any]]:
            return {
                "stored": lambda: read(known.stored_tensors, 1),
                "float32": lambda: read(known.__getitem__, 2),
            }

        in_order = cases(lambda get, workers: deque(prefetch(get, range(options.clips), workers), 0))
        at_random = cases(lambda get, _: deque(map(get, order), 0))
        for cold in (True, False):
            compare("all in order", large, lambda: read_files(large), in_order, options.repeats, cold)
            plain = partial(read_ranges, large, known, order, size)
            compare(f"{len(order)} at random", large, plain, at_random, options.repeats, cold)
        write(small, options.many, 4, 64)
        latents = LatentSet(small, "train")
        seen = []
        for number, _ in enumerate(prefetch(latents.__getitem__, range(len(latents)), 4)):
            if number % max(1, options.many // 10) == 0:
                seen.append(resident())
        print(f"resident memory over {options.many} clips, every tenth of the way, MB: {[round(mb) for mb in seen]}")


if __name__ == "__main__":
    main()
