"""Host memory of a process while a run starts under fsdp2: its peak over the frozen branch, as a share of all weights.

    python benchmarks/start.py [--processes N] [--json]

The trained weights are drawn in each of N processes (gloo, on the CPU, where a shard is in host memory as well) and
sharded: as a whole at the end, or block by block as they are drawn, which is what training does. 1.0 is all trained
weights in float32.
"""

from __future__ import annotations

import argparse
import json
import resource
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from diffusers import WanTransformer3DModel

from phantom.model import PhantomTransformer3DModel, PhysicsConfig
from phantom.training.layout import distribute_model, distribute_unit

WIDTH, BLOCKS = 640, 12
HOW = ("as a whole", "block by block")


def measure(rank: int, ranks: int, how: str, folder: str) -> None:
    """Runs in each process, which writes its peak over the memory that it had with the frozen branch."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=ranks)
    wan = WanTransformer3DModel(
        num_attention_heads=WIDTH // 64,
        attention_head_dim=64,
        in_channels=48,
        out_channels=48,
        text_dim=128,
        ffn_dim=WIDTH * 14 // 3,
        num_layers=BLOCKS,
    ).requires_grad_(False)
    shape = (1, ranks)
    before = resident_bytes()
    model = PhantomTransformer3DModel.from_video_transformer(
        wan,
        PhysicsConfig(in_channels=64),
        on_block=(lambda model, block: distribute_unit(model, block, shape)) if how == HOW[1] else None,
    )
    trained = sum(p.numel() * 4 for _, p in model.trainable_parameters())
    distribute_model(model, shape)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    (Path(folder) / f"{rank}.json").write_text(json.dumps({"peak": (peak - before) / trained, "bytes": trained}))
    dist.destroy_process_group()


def resident_bytes() -> int:
    """Memory of this process now (Linux)."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def main() -> None:
    """Runs both ways and prints the largest process of each."""
    parser = argparse.ArgumentParser(description="host memory of a process at the start under fsdp2")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    found, size = dict[str, float](), 0
    for how in HOW:
        with TemporaryDirectory() as folder:
            mp.spawn(measure, (options.processes, how, folder), nprocs=options.processes)
            results = [json.loads(path.read_text()) for path in Path(folder).glob("*.json")]
        found[how], size = max(result["peak"] for result in results), results[0]["bytes"]
    if options.json:
        print(json.dumps({"processes": options.processes, "trained_bytes": size, "peak": found}, indent=2))
        return
    share = 1 / options.processes
    print(f"{options.processes} processes, {size / 2**20:.0f} MiB of trained weights; a shard is {share:.2f} of them")
    for how, peak in found.items():
        print(f"sharded {how:16} {peak:.2f}")


if __name__ == "__main__":
    main()
