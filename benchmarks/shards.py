"""Reading latents: beside a plain read of the same bytes, and memory over many clips.

    python benchmarks/shards.py [--clips 64 --many 10000 --repeats 5 --folder DIR]

Clips of 10 MB, bfloat16 as at full size, in shards of 256 MB made here. Sequential: every clip in order through
`LatentSet`, checked and as float32, two ahead, against a plain read of the files. Random: single clips in a drawn
order, against reading as many bytes from the places where they are. From the disk: the kernel is asked to forget the
files before each run. Memory: what is resident while `--many` small clips are read. Ratios are of medians, of runs that
take turns.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import tempfile
import time
from pathlib import Path

import torch

from phantom.data.ahead import ahead
from phantom.data.shards import FORMAT, INDEX, Latents, LatentSet, ShardWriter, describe, write_tensors

CHUNK = 2**24


def write(folder: Path, count: int, channels: int, megabytes: int) -> None:
    """`count` clips of 17 tubelets of 16 x 16 places, as many of them as `channels` ask for."""
    generator = torch.Generator().manual_seed(0)
    writer = ShardWriter(folder, megabytes, torch.bfloat16)
    for number in range(count):
        video, states, text = (
            torch.randn(shape, generator=generator) for shape in ((48, 1, 30, 52), (channels, 17, 16, 16), (64, 128))
        )
        writer.add([Latents(f"clip-{number}", "A caption.", video, states, {}, text)])
    writer.close()
    write_tensors(folder / "empty_text.safetensors", {"text": torch.zeros(1, 128)})
    clips = [{**c, "split": "train", "caption": "", "shard": s["file"]} for s in writer.finished for c in s["clips"]]
    index = {"format": FORMAT, "recipe": {}, "shards": writer.finished, "clips": clips}
    index["empty_text"] = describe(folder / "empty_text.safetensors")
    (folder / INDEX).write_text(json.dumps(index), encoding="utf-8")


def forget(folder: Path) -> None:
    """Has the kernel drop what it holds of the files."""
    for path in folder.glob("shard-*.safetensors"):
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read_files(folder: Path) -> None:
    buffer = bytearray(CHUNK)
    for path in sorted(folder.glob("shard-*.safetensors")):
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def read_ranges(folder: Path, latents: LatentSet, order: list[int], size: int) -> None:
    """As many bytes as a clip has, from the place in its shard where it is."""
    places: dict[str, list[str]] = {}
    for clip in latents._clips:
        places.setdefault(clip["shard"], []).append(clip["id"])
    for number in order:
        clip = latents._clips[number]
        path, mates = folder / clip["shard"], places[clip["shard"]]
        with path.open("rb", buffering=0) as file:
            file.seek(mates.index(clip["id"]) * (path.stat().st_size - size) // max(1, len(mates)))
            file.readinto(bytearray(size))


def resident() -> float:
    """MB now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 1e6


def timed(function) -> float:
    began = time.perf_counter()
    function()
    return time.perf_counter() - began


def compare(name: str, folder: Path, plain, ours, repeats: int, cold: bool) -> None:
    a, b = [], []
    for _ in range(repeats):
        for times, function in ((a, plain), (b, ours)):
            if cold:
                forget(folder)
            times.append(timed(function))
    x, y = statistics.median(a), statistics.median(b)
    where = "from the disk" if cold else "from memory"
    print(f"{name}, {where}: plain {x:.2f} s, ours {y:.2f} s: {x / y:.2f} x as fast")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for option, default in (("clips", 64), ("many", 10_000), ("repeats", 5)):
        parser.add_argument(f"--{option}", type=int, default=default)
    parser.add_argument("--folder", default=None, help="where the files are made")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        large, small = Path(folder) / "large", Path(folder) / "small"
        write(large, options.clips, 1024, 256)
        os.sync()
        latents = LatentSet(large, "train")
        size = sum(path.stat().st_size for path in large.glob("shard-*.safetensors")) // options.clips
        order = torch.randperm(options.clips, generator=torch.Generator().manual_seed(1))[: options.clips // 2].tolist()
        for cold in (True, False):
            compare(
                "all in order",
                large,
                lambda: read_files(large),
                lambda: [None for _ in ahead(latents.__getitem__, range(len(latents)), 2)],
                options.repeats,
                cold,
            )
            compare(
                f"{len(order)} at random",
                large,
                lambda: read_ranges(large, latents, order, size),
                lambda: [None for i in order if latents[i] is None],
                options.repeats,
                cold,
            )
        write(small, options.many, 4, 64)
        latents = LatentSet(small, "train")
        seen = []
        for number, _ in enumerate(ahead(latents.__getitem__, range(len(latents)), 4)):
            if number % max(1, options.many // 10) == 0:
                seen.append(resident())
        print(f"resident memory over {options.many} clips, every tenth of the way, MB: {[round(mb) for mb in seen]}")


if __name__ == "__main__":
    main()
