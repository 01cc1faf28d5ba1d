"""How training lies over processes: started by torchrun, joined by accelerate, gradients summed here.

The trainable parameters are replicated. Their gradients are summed over the processes once a step, after every backward
of it: the two losses' gradients stay apart until then (`gradient_norm`), which a wrapper that reduces during backward
cannot do.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import torch.distributed as dist
import yaml
from accelerate import Accelerator
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors

from phantom.config import Params
from phantom.errors import Interrupted, StageFailed, UserError
from phantom.run import OUTCOME

BUCKET = 2**26  # elements that travel together


def in_torchrun() -> bool:
    """Whether this process is one of torchrun's."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def launch(params: Params, command: list[str]) -> None:
    """Runs `phantom <command>` in `train.processes` processes on this machine. Raises what their first one raised."""
    with TemporaryDirectory() as folder:
        file, outcome = Path(folder) / "params.yaml", Path(folder) / "outcome.json"
        file.write_text(yaml.safe_dump(params.model_dump(mode="json", by_alias=True)), encoding="utf-8")
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        torchrun += ["--nproc-per-node", str(params.train.processes)]
        phantom = ["-m", "phantom.cli", *command, "--params", str(file)]
        env = {**os.environ, OUTCOME: str(outcome), "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "90"}
        env.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // params.train.processes)))
        process = subprocess.Popen([*torchrun, *phantom], env=env, stdout=subprocess.DEVNULL)
        try:
            code = process.wait()
        except KeyboardInterrupt:  # torchrun has had the signal too if it came from the terminal
            process.terminate()
            code = process.wait()
        left = json.loads(outcome.read_text(encoding="utf-8")) if outcome.is_file() else None
    if code:
        if left and left["code"]:
            raise {2: UserError, 75: Interrupted}.get(left["code"], StageFailed)(left["error"])
        raise StageFailed(f"train: a process was killed (exit code {code} of torchrun); run again to go on")


def join(precision: str) -> Accelerator:
    """Joins this process to its group, if torchrun started it."""
    return Accelerator(cpu=not torch.cuda.is_available(), mixed_precision="bf16" if precision == "bfloat16" else "no")


def spread(parameters: Iterable[torch.Tensor]) -> None:
    """Every process takes the first one's values."""
    if dist.is_initialized():
        for parameter in parameters:
            dist.broadcast(parameter.data, src=0)


def sum_over_processes(tensors: list[torch.Tensor | None]) -> None:
    """Sums each tensor over the processes, in place. The same ones are None everywhere."""
    if not dist.is_initialized():
        return
    for bucket in _buckets([t for t in tensors if t is not None]):
        flat = _flatten_dense_tensors(bucket)
        dist.all_reduce(flat)
        for tensor, summed in zip(bucket, _unflatten_dense_tensors(flat, bucket), strict=True):
            tensor.copy_(summed)


def any_process(flag: bool, device: torch.device) -> bool:
    """Whether `flag` is set in some process: the same answer in all of them."""
    if not dist.is_initialized():
        return flag
    found = torch.tensor(float(flag), device=device)
    dist.all_reduce(found, op=dist.ReduceOp.MAX)
    return bool(found)


def _buckets(tensors: list[torch.Tensor]) -> Iterable[list[torch.Tensor]]:
    bucket: list[torch.Tensor] = []
    for tensor in tensors:
        if bucket and sum(t.numel() for t in bucket) + tensor.numel() > BUCKET:
            yield bucket
            bucket = []
        bucket.append(tensor)
    if bucket:
        yield bucket
