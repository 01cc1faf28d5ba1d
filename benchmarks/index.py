"""Opening the index of latents of hundreds of thousands of clips, compared with the same rows as JSON.

    python benchmarks/index.py [--clips 433523 --repeats 5]

The rows are made up: clips of 121 frames with two condition prefixes, captions of 400 characters, shards of 22 clips.
Each run is a process of its own, which imports first, then opens: the training clips, their shapes and ids of some,
100 random rows. Memory is what the process has more at its end than before it opened: all resident memory, in which
pages of the mapped file count that other processes share, and that of its own alone. Ratios are of medians over
interleaved runs.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from phantom.data.clip_table import CLIP_TABLE, ClipTable, write_clip_table

CLIPS_PER_SHARD = 22
TENSORS = {  # name -> shape, at 121 frames of 480 x 832
    "video": [48, 31, 30, 52],
    "physics": [1024, 61, 16, 16],
    "prefix/13": [1024, 7, 16, 16],
    "prefix/45": [1024, 23, 16, 16],
}


def rows(count: int) -> Iterator[dict[str, Any]]:
    """Made-up rows of the table."""
    draw = random.Random(0)
    for number in range(count):
        place, tensors = 4096 + (number % CLIPS_PER_SHARD) * 50_000_000, []
        for name, shape in TENSORS.items():
            size = 2 * int(np.prod(shape))
            stored = {"name": name, "dtype": "BF16", "shape": shape, "start": place, "stop": place + size}
            tensors.append(stored | {"xxh3": f"{draw.getrandbits(64):016x}"})
            place += size
        text = {"name": "text", "dtype": "BF16", "shape": [120, 4096], "start": place, "stop": place + 983_040}
        columns = {"cuts": draw.randrange(2), "motion": draw.random(), "static": False, "black_bars": 0.0}
        yield {
            "id": f"OpenVidHD_part_{number // 5000}/{number:07d}",
            "is_heldout": number % 847 == 0,
            "caption": "".join(draw.choices("abcdefgh ", k=400)),
            "frames": 121,
            "key": f"{draw.getrandbits(128):032x}",
            "video": TENSORS["video"],
            "prefixes": [13, 45],
            "xxh3": f"{draw.getrandbits(64):016x}",
            "physics_error": 0.0,
            "shard": number // CLIPS_PER_SHARD,
            "tensors": tensors,
            "text_key": f"{draw.getrandbits(128):032x}",
            "text_shard": number // CLIPS_PER_SHARD,
            "text": text | {"xxh3": f"{draw.getrandbits(64):016x}"},
            "columns": columns | {"duplicate": False, "caption_length": 400, "frames": 121},
        }


def open_arrow(folder: Path) -> Any:
    table = ClipTable(folder / CLIP_TABLE)
    numbers = table.numbers_of("train")
    shapes = table.shapes(numbers)
    draw = random.Random(1)
    return table, shapes, table.values("id", numbers[:512]), [table.row(draw.randrange(len(table))) for _ in range(100)]


def open_json(folder: Path) -> Any:
    table = json.loads((folder / "clips.json").read_text(encoding="utf-8"))
    training = [row for row in table if not row["is_heldout"]]
    return training, [tuple(row["video"]) for row in training], [row["id"] for row in training]


def memory() -> tuple[float, float]:
    """Resident memory of this process in MB, and of it what it shares with no file."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
    return tuple(int(status[key].split()[0]) / 1e3 for key in ("VmRSS", "RssAnon"))  # type: ignore[return-value]


def measure(kind: str, folder: Path) -> None:
    """Prints seconds, MB more, and of these its own, of opening the index here."""
    before, began = memory(), time.perf_counter()
    kept = {"arrow": open_arrow, "json": open_json}[kind](folder)
    seconds, after = time.perf_counter() - began, memory()
    print(seconds, after[0] - before[0], after[1] - before[1], len(kept))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=int, default=433_523)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--measure", nargs=2, metavar=("KIND", "FOLDER"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        measure(options.measure[0], Path(options.measure[1]))
        return
    with tempfile.TemporaryDirectory() as folder:
        write_clip_table(Path(folder) / CLIP_TABLE, rows(options.clips))
        with (Path(folder) / "clips.json").open("w", encoding="utf-8") as file:
            for number, row in enumerate(rows(options.clips)):
                file.write(("," if number else "[") + json.dumps(row))
            file.write("]")
        found: dict[str, list[list[float]]] = {"json": [], "arrow": []}
        for _ in range(options.repeats):
            for kind, runs in found.items():
                command = [sys.executable, __file__, "--measure", kind, folder]
                runs.append(
                    [*map(float, subprocess.run(command, check=True, capture_output=True, text=True).stdout.split())]
                )
        medians = {
            kind: [statistics.median(column) for column in zip(*runs, strict=True)] for kind, runs in found.items()
        }
        sizes = {"json": Path(folder) / "clips.json", "arrow": Path(folder) / CLIP_TABLE}
        for kind, (seconds, resident, own, _) in medians.items():
            size = sizes[kind].stat().st_size / 1e6
            print(f"{kind}: {seconds:.2f} s, {resident:.0f} MB more, {own:.0f} MB of its own; a file of {size:.0f} MB")
        ratios = [a / b for a, b in zip(medians["json"], medians["arrow"], strict=True)]
        print(f"arrow: {ratios[0]:.0f} x as fast, 1/{ratios[1]:.0f} of the memory, 1/{ratios[2]:.0f} of its own")


if __name__ == "__main__":
    main()
