"""The process group of a run, joined through accelerate, and the few collectives that training needs besides FSDP's."""

from __future__ import annotations

import logging
import math
import os
import sys
from collections.abc import Iterable
from datetime import timedelta
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate import Accelerator, DeepSpeedPlugin, InitProcessGroupKwargs
from torch._C import _distributed_c10d
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors
from torch.distributed import distributed_c10d
from torch.distributed.tensor import DTensor

from phantom.config import Train
from phantom.errors import UserError

T = TypeVar("T")
BUCKET_ELEMENTS = 2**26  # of one all-reduce
# Processes wait for the slowest to write or read its part of a checkpoint; in training `watchdog` has a shorter limit.
COLLECTIVE_TIMEOUT = timedelta(hours=1)
FLIGHT_RECORDER_COLLECTIVES = 2000  # the last ones that torch remembers


def join(settings: Train) -> Accelerator:
    """Joins the process group, if torchrun started this process.

    Raises UserError where DeepSpeed is not installed, for fsdp2 in a single process, and for offloading without a GPU.
    """
    if settings.strategy == "fsdp2" and settings.processes == 1:
        raise UserError("train.strategy: fsdp2 needs several processes; found train.processes: 1; accepted: ddp")
    has_gpu = torch.cuda.is_available()
    if settings.offload != "none" and not has_gpu:
        raise UserError(f"train.offload: found {settings.offload}, and no GPU to make room on; accepted: none")
    os.environ.setdefault("TORCH_FR_BUFFER_SIZE", str(FLIGHT_RECORDER_COLLECTIVES))
    # accelerate chooses no backend for DeepSpeed on a CPU: it must be named.
    group = InitProcessGroupKwargs(backend="nccl" if has_gpu else "gloo", timeout=COLLECTIVE_TIMEOUT)
    if not settings.strategy.startswith("zero"):
        single = int(os.environ.get("WORLD_SIZE", 1)) == 1  # accelerate fails there if a backend is named
        return Accelerator(cpu=not has_gpu, kwargs_handlers=[] if single else [group])
    if find_spec("deepspeed") is None:
        raise UserError(
            f"train.strategy: found {settings.strategy!r}, but DeepSpeed is not installed; accepted without it: ddp, "
            "fsdp2; pip install '.[deepspeed]' adds it"
        )
    if not has_gpu:
        os.environ |= {"DS_ACCELERATOR": "cpu", "ACCELERATE_TORCH_DEVICE": "cpu"}
        from deepspeed import ops

        ops.__compatible_ops__["deepspeed_shm_comm"] = False  # building it would need a compiler at the first start
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    config = {
        "train_micro_batch_size_per_gpu": settings.micro_batch,
        "gradient_accumulation_steps": 1,  # the learner marks the last backward pass of a step
        "gradient_clipping": settings.optimizer.clip_norm,
        "zero_optimization": {"stage": int(settings.strategy[-1]), "overlap_comm": has_gpu},
        "steps_per_print": sys.maxsize,
    }
    # The control, a second run in this process, reuses accelerate's state of the first.
    plugin = None if dist.is_initialized() else DeepSpeedPlugin(hf_ds_config=config)
    return Accelerator(deepspeed_plugin=plugin, kwargs_handlers=[group])


def memory_of(device: torch.device) -> float:
    """Bytes of memory of a GPU; of a CPU no limit."""
    return torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else math.inf


def sum_over_processes(tensors: list[torch.Tensor | None]) -> None:
    """All-reduces (sums) each tensor in place, in buckets. DTensors are skipped: FSDP has reduced them already.

    The same entries must be None in every process.
    """
    if not dist.is_initialized():
        return
    for bucket in _buckets([t for t in tensors if t is not None and not isinstance(t, DTensor)]):
        flat = _flatten_dense_tensors(bucket)
        dist.all_reduce(flat)
        for tensor, summed in zip(bucket, _unflatten_dense_tensors(flat, bucket), strict=True):
            tensor.copy_(summed)


def sum_over_samples(tensors: list[torch.Tensor | None], context: int) -> None:
    """The same for what each process has of its samples, of which `context` processes in a row have the same ones."""
    for tensor in tensors if place()[0] % context else ():
        if tensor is not None:
            tensor.zero_()
    sum_over_processes(tensors)


def any_process(flag: bool) -> bool:
    """Whether `flag` is set in any process; every process gets the same answer. Uses gloo on the CPU: no GPU sync."""
    if not dist.is_initialized():
        return flag
    found = torch.tensor(float(flag))
    dist.all_reduce(found, op=dist.ReduceOp.MAX, group=_cpu_group())
    return bool(found)


def place() -> tuple[int, int]:
    """The number of this process and that of all processes."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def data_place(context: int) -> tuple[int, int]:
    """The same, where `context` processes in a row share samples and have one number."""
    process, processes = place()
    return process // context, processes // context


def broadcast_from_first(value: T) -> T:
    """The first process's `value`, in every process. It must be picklable."""
    if not dist.is_initialized():
        return value
    values = [value]
    dist.broadcast_object_list(values, src=0, group=_cpu_group())
    return values[0]


def gather_all(value: T) -> list[T]:
    """Each process's `value`, in every process."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value, group=_cpu_group())
    return values


def new_cpu_group() -> dist.ProcessGroup | None:
    """A further group of all processes, over gloo, for the collectives of a thread; None for a single process."""
    if not dist.is_initialized():
        return None
    group = dist.new_group(backend="gloo", timeout=COLLECTIVE_TIMEOUT)
    _of_threads.append(group)
    return group


def set_timeout(seconds: float) -> None:
    """Sets the time-out of the collectives that training starts from now on, in groups of its main threads."""
    for group in _of_training():
        distributed_c10d._set_pg_timeout(timedelta(seconds=seconds), group)


def collectives() -> int:
    """How many collectives the main thread of this process has entered, in all groups."""
    return sum(group._get_sequence_number_for_group() for group in _of_training())  # type: ignore[attr-defined]


def new_store_client() -> dist.Store:
    """A connection of its own, for a thread, to the key-value store of the process group."""
    return distributed_c10d._get_default_store().clone()  # type: ignore[attr-defined]


def write_flight_record(path: Path) -> None:
    """Writes what torch remembers of this process's last collectives, as `torchfrtrace` reads it."""
    dump = getattr(_distributed_c10d, "_dump_nccl_trace", None) if torch.cuda.is_available() else None
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes((dump or _distributed_c10d._dump_fr_trace)())  # type: ignore[attr-defined]


def _of_training() -> list[dist.ProcessGroup]:
    # A copy, made at once: the watchdog's thread reads while training may add a group.
    return [group for group in [*distributed_c10d._world.pg_map] if group not in _of_threads]


_of_threads: list[dist.ProcessGroup] = []  # from `new_cpu_group`


@cache
def _cpu_group() -> dist.ProcessGroup:
    return dist.new_group(backend="gloo", timeout=COLLECTIVE_TIMEOUT)


def _buckets(tensors: list[torch.Tensor]) -> Iterable[list[torch.Tensor]]:
    bucket: list[torch.Tensor] = []
    for tensor in tensors:
        if bucket and sum(t.numel() for t in bucket) + tensor.numel() > BUCKET_ELEMENTS:
            yield bucket
            bucket = []
        bucket.append(tensor)
    if bucket:
        yield bucket
