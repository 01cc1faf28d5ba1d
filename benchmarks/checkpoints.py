"""How long training waits for a checkpoint, relative to the time that writing it takes, on the CPU.

    python benchmarks/checkpoints.py [--repeats N] [--mib N] [--json]

One and two processes (gloo) save tensors of --mib MiB by `CheckpointWriter`: whole in one process, sharded over two.
Saved are weights, two moments and an average, as in training. Times are medians of wall-clock seconds, of the slower
process, after one warm-up save, which allocates the copy. Interleaved with each save: a plain copy of the same tensors,
and work of a fixed size, alone and while a checkpoint is being written.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from phantom.data.storage import LocalFolder
from phantom.training import process_group
from phantom.training.checkpoint_writer import CheckpointWriter

GROUPS = ("model", "exp_avg", "exp_avg_sq", "average")
TENSORS = 16  # of each group


def seconds(run: Callable[[], object]) -> float:
    """Wall-clock seconds that `run` takes in the slower process, all of which start together."""
    process_group.gather_all(None)
    began = time.perf_counter()
    run()
    return max(process_group.gather_all(time.perf_counter() - began))


def make_tensors(mib: int, ranks: int) -> dict[str, torch.Tensor]:
    """`mib` MiB in all, float32, sharded if there are several processes."""
    rows = mib * 2**20 // (4 * 1024 * TENSORS * len(GROUPS))
    found = {f"{group}.{i}": torch.randn(rows, 1024) for group in GROUPS for i in range(TENSORS)}
    if ranks == 1:
        return found
    mesh = init_device_mesh("cpu", (ranks,))
    return {key: distribute_tensor(tensor, mesh, [Shard(0)]) for key, tensor in found.items()}


def measure(rank: int, ranks: int, port: int, options: argparse.Namespace, folder: str) -> None:
    """Runs in each process; the first writes medians, by name, to `folder`/times.json."""
    torch.set_num_threads(1)
    if ranks > 1:
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        dist.init_process_group("gloo", rank=rank, world_size=ranks)
    tensors = make_tensors(options.mib, ranks)
    locals_ = [t.to_local() if ranks > 1 else t for t in tensors.values()]  # type: ignore[attr-defined]
    copies = [torch.empty_like(tensor) for tensor in locals_]
    factor = torch.randn(512, 512)
    writer = CheckpointWriter(LocalFolder(Path(folder)), 1, torch.device("cpu"))
    times: dict[str, list[float]] = {}

    def copy() -> None:
        for target, tensor in zip(copies, locals_, strict=True):
            target.copy_(tensor)

    def work() -> None:
        for _ in range(20):
            factor @ factor

    for step in range(options.repeats + 1):
        made = {"copy": seconds(copy), "work": seconds(work)}
        began = time.perf_counter()
        made["stall"] = seconds(lambda step=step: writer.save(step, tensors, {}))  # type: ignore[misc]
        made["work meanwhile"] = seconds(work)
        writer.wait()
        made["writing"] = max(process_group.gather_all(time.perf_counter() - began))
        for name, value in made.items() if step else ():
            times.setdefault(name, []).append(value)
    writer.close()
    if rank == 0:
        medians = {name: statistics.median(values) for name, values in times.items()}
        (Path(folder) / "times.json").write_text(json.dumps(medians))
    if ranks > 1:
        dist.destroy_process_group()


def run(ranks: int, options: argparse.Namespace) -> dict[str, float]:
    """Medians over the saves of `ranks` processes."""
    with TemporaryDirectory(dir=options.folder) as folder, socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        torch.multiprocessing.spawn(measure, (ranks, port, options, folder), nprocs=ranks)
        return json.loads((Path(folder) / "times.json").read_text())


def main() -> None:
    """Runs everything and prints the ratios."""
    parser = argparse.ArgumentParser(description="how long training waits for a checkpoint")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--mib", type=int, default=256)
    parser.add_argument("--folder", help="on the disk to measure; by default that of temporary files")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    ratios, seconds_taken = dict[str, float](), dict[str, Any]()
    for ranks in (1, 2):
        took = run(ranks, options)
        of = f"{ranks} {'process' if ranks == 1 else 'processes'}"
        seconds_taken[of] = took
        ratios |= {
            f"stall over writing, {of}": took["stall"] / took["writing"],
            f"stall over a plain copy, {of}": took["stall"] / took["copy"],
            f"work while writing over work alone, {of}": took["work meanwhile"] / took["work"],
        }
    if options.json:
        print(json.dumps({"ratios": ratios, "seconds": seconds_taken}, indent=2))
    else:
        for name, ratio in ratios.items():
            print(f"{name:56} {ratio:.3f}")


if __name__ == "__main__":
    main()
