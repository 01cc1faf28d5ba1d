"""How training lies over processes: started by torchrun, joined by accelerate, in one of these layouts.

ddp: the trainable parameters are replicated, and their gradients summed here once a step, after every backward of it:
the two losses' gradients stay apart until then (`gradient_norm`); a wrapper that reduces during backward cannot do it.

fsdp2: parameters, gradients and optimiser state are sharded by torch, a unit for each block. Every backward sums its
gradients itself, into shards (`DTensor`), which are apart just as well. The frozen parameters are left out of the
units: they stay whole in every process, and nothing of them is ever sent.

zero1, zero2, zero3: the same under DeepSpeed (`zero`).
"""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Iterable
from datetime import timedelta
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from uuid import uuid4

import torch
import torch.distributed as dist
import yaml
from accelerate import Accelerator, DeepSpeedPlugin, InitProcessGroupKwargs
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException, Std
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.launcher.api import LaunchConfig, elastic_launch
from torch.distributed.tensor import DTensor, distribute_tensor

from phantom.config import Params, Train
from phantom.cores import cores
from phantom.errors import OUTCOME, Interrupted, StageFailed, UserError
from phantom.model import PhantomTransformer3DModel

BUCKET = 2**26  # elements that travel together
PATIENCE = timedelta(hours=1)  # of processes that wait while one writes or fetches a checkpoint; NCCL's own: 10 minutes
SAVING_SECONDS = 90  # that processes have between a request to stop and being killed


def in_torchrun() -> bool:
    """Whether this process is one of torchrun's."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def launch(params: Params, command: list[str]) -> None:
    """Runs `phantom <command>` in `train.processes` processes on this machine. Raises what their first one raised."""
    with TemporaryDirectory() as folder:
        file, outcome = Path(folder) / "params.yaml", Path(folder) / "outcome.json"
        file.write_text(yaml.safe_dump(params.model_dump(mode="json", by_alias=True)), encoding="utf-8")
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=params.train.processes,
            run_id=uuid4().hex,
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0",
            max_restarts=0,
            shutdown_timeout=SAVING_SECONDS,
            logs_specs=DefaultLogsSpecs(folder, redirects=Std.OUT),  # the result is ours to print
        )
        threads = max(1, cores() // params.train.processes)
        ours = {OUTCOME: str(outcome), "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(threads))}
        before = dict(os.environ)
        os.environ.update(ours)
        logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # what failed is said below
        failed = ""
        try:
            elastic_launch(config, sys.executable)("-m", "phantom.cli", *command, "--params", str(file))
        except (ChildFailedError, SignalException, KeyboardInterrupt) as error:
            failed = type(error).__name__
        finally:
            os.environ.clear()
            os.environ.update(before)
        left = json.loads(outcome.read_text(encoding="utf-8")) if outcome.is_file() else None
    if left and left["code"]:
        raise {2: UserError, 75: Interrupted}.get(left["code"], StageFailed)(left["error"])
    if failed:
        raise StageFailed("train: a process was killed (out of memory?); run again to go on from the last checkpoint")


def join(settings: Train) -> Accelerator:
    """Joins this process to its group, if torchrun started it. Raises UserError where DeepSpeed is not installed."""
    has_gpu = torch.cuda.is_available()
    # accelerate chooses no backend for DeepSpeed on a CPU: it has to be named.
    group = InitProcessGroupKwargs(backend="nccl" if has_gpu else "gloo", timeout=PATIENCE)
    if not settings.strategy.startswith("zero"):
        alone = int(os.environ.get("WORLD_SIZE", 1)) == 1  # then a named backend would be looked for in vain
        return Accelerator(cpu=not has_gpu, kwargs_handlers=[] if alone else [group])
    if find_spec("deepspeed") is None:
        raise UserError(
            f"train.strategy: found {settings.strategy!r}, but DeepSpeed is not installed; accepted without it: ddp, "
            "fsdp2; pip install '.[deepspeed]' adds it"
        )
    if not has_gpu:
        os.environ |= {"DS_ACCELERATOR": "cpu", "ACCELERATE_TORCH_DEVICE": "cpu"}
        from deepspeed import ops

        ops.__compatible_ops__["deepspeed_shm_comm"] = False  # else a compiler is run at the first start
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    config = {
        "train_micro_batch_size_per_gpu": settings.batch_size // settings.accumulation // settings.processes,
        "gradient_accumulation_steps": 1,  # the learner says which backward is a step's last
        "gradient_clipping": settings.optimizer.clip_norm,
        "zero_optimization": {"stage": int(settings.strategy[-1]), "overlap_comm": has_gpu},
        "steps_per_print": sys.maxsize,
    }
    # A second run of this process, the control's, takes up what accelerate holds of the first.
    plugin = None if dist.is_initialized() else DeepSpeedPlugin(hf_ds_config=config)
    return Accelerator(deepspeed_plugin=plugin, kwargs_handlers=[group])


def lay_out(model: PhantomTransformer3DModel, strategy: str) -> None:
    """Gives every process the first one's trainable parameters, whole (ddp) or its shard of them (fsdp2)."""
    if dist.is_initialized():
        for _, parameter in model.trainable_parameters():
            dist.broadcast(parameter.data, src=0)
    if strategy == "fsdp2":
        if not dist.is_initialized():
            raise UserError("train.strategy: fsdp2 needs several processes; found train.processes: 1; accepted: ddp")
        for unit in (*model.blocks, model):
            fully_shard(unit, ignored_params={p for p in unit.parameters() if not p.requires_grad})
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.set_gradient_divide_factor(1.0)  # the losses are shares of global means already
                module.set_force_sum_reduction_for_comms(True)


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """All of a tensor that may be sharded. Every process must ask."""
    # A copy: what torch puts together may lie within a larger, padded storage, which safetensors refuses.
    return tensor.full_tensor().clone() if isinstance(tensor, DTensor) else tensor


def like(tensor: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """`tensor`, whole in every process, laid out as `other` is."""
    if not isinstance(other, DTensor):
        return tensor.to(other.device)
    return distribute_tensor(tensor.to(other.device), other.device_mesh, other.placements)


def sum_over_processes(tensors: list[torch.Tensor | None]) -> None:
    """Sums each tensor over the processes, in place; shards are summed already. The same ones are None everywhere."""
    if not dist.is_initialized():
        return
    for bucket in _buckets([t for t in tensors if t is not None and not isinstance(t, DTensor)]):
        flat = _flatten_dense_tensors(bucket)
        dist.all_reduce(flat)
        for tensor, summed in zip(bucket, _unflatten_dense_tensors(flat, bucket), strict=True):
            tensor.copy_(summed)


def any_process(flag: bool) -> bool:
    """Whether `flag` is set in some process: the same answer in all of them. The hosts ask each other, not the GPUs."""
    if not dist.is_initialized():
        return flag
    found = torch.tensor(float(flag))
    dist.all_reduce(found, op=dist.ReduceOp.MAX, group=_hosts())
    return bool(found)


def from_first(value: str | None) -> str | None:
    """What the first process says, in all of them."""
    if not dist.is_initialized():
        return value
    said = [value]
    dist.broadcast_object_list(said, src=0, group=_hosts())
    return said[0]


@cache
def _hosts() -> dist.ProcessGroup:
    return dist.new_group(backend="gloo", timeout=PATIENCE)


def _buckets(tensors: list[torch.Tensor]) -> Iterable[list[torch.Tensor]]:
    bucket: list[torch.Tensor] = []
    for tensor in tensors:
        if bucket and sum(t.numel() for t in bucket) + tensor.numel() > BUCKET:
            yield bucket
            bucket = []
        bucket.append(tensor)
    if bucket:
        yield bucket
