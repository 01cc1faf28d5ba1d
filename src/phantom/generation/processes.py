"""The processes that torchrun started, where videos are generated: which part of the work each does, on its GPU."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist

from phantom.data.part import Part
from phantom.errors import StageFailed, UserError

SLOWEST = timedelta(days=7)  # processes wait for the one that generates longest
POLL_SECONDS = 0.1


@contextmanager
def joined(part: Part | None = None) -> Iterator[Part]:
    """Context of the processes that torchrun started: gives each its part of `part`; all of `part` without torchrun.

    Leaving it waits for all of them. Raises UserError for more processes than GPUs, and StageFailed if another process
    has failed.
    """
    whole = part or Part()
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        yield whole
        return
    take_gpu()
    dist.init_process_group("gloo", timeout=SLOWEST)  # carries no tensors
    try:
        rank, processes = dist.get_rank(), dist.get_world_size()
        yield Part(whole.index * processes + rank, whole.of * processes)
        _wait_for_all()
    finally:
        dist.destroy_process_group()


def is_first() -> bool:
    """Whether this is the first of the processes that torchrun started, or the only one."""
    return os.environ.get("RANK", "0") == "0"


def take_gpu() -> None:
    """Makes `cuda` this process's own GPU. Raises UserError if there are fewer GPUs than processes."""
    if not torch.cuda.is_available():
        return
    processes, gpus = int(os.environ["LOCAL_WORLD_SIZE"]), torch.cuda.device_count()
    if processes > gpus:
        raise UserError(f"torchrun --nproc-per-node: found {processes}, accepted on this machine: at most {gpus}, GPUs")
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))


def _wait_for_all() -> None:
    try:
        everyone = dist.barrier(async_op=True)
        while not everyone.is_completed():  # `wait` would not let signals through
            time.sleep(POLL_SECONDS)
        everyone.wait()
    except RuntimeError as error:
        raise StageFailed(
            f"another process has ended before its part was done ({str(error).splitlines()[0]})"
        ) from None
