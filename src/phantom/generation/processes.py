"""The processes that torchrun started, where videos are generated: each makes some, or all of them one together."""

from __future__ import annotations

import atexit
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from diffusers import ContextParallelConfig

from phantom.data.part import Part
from phantom.errors import StageFailed, UserError
from phantom.model import PhantomTransformer3DModel
from phantom.progress import is_first_process, say

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


def takes_part() -> bool:
    """Whether this process has a part in one video: with GPUs each has, without the first alone, which says so."""
    processes = int(os.environ.get("WORLD_SIZE", 1))
    if processes == 1 or torch.accelerator.device_count():
        return True
    if is_first_process():
        say(f"generate: on CPUs one of the {processes} processes works; `phantom sample` divides videos among them")
    return is_first_process()


def join_for_one_video() -> int:
    """The number of processes that generate each video together, each on its GPU. Raises UserError as `joined`."""
    processes = int(os.environ.get("WORLD_SIZE", 1))
    if processes == 1 or not torch.accelerator.device_count():
        return 1
    if not dist.is_initialized():
        take_gpu()
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
        atexit.register(dist.destroy_process_group)
    return processes


def divide_tokens(transformer: PhantomTransformer3DModel, processes: int) -> None:
    """Divides the model's tokens over all processes. Raises UserError if their number does not divide its heads."""
    try:
        transformer.enable_parallelism(config=ContextParallelConfig(ulysses_degree=processes, ulysses_anything=True))
    except ValueError as error:
        raise UserError(f"torchrun: {error}") from None


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
