"""How the trainable parameters are distributed over the processes.

ddp: replicated. Gradients are summed once a step (`process_group.sum_over_processes`), after all of its backward
passes: until then the two losses' gradients stay separate (`gradient_norm`), which a wrapper that reduces during the
backward pass does not allow.

fsdp2: parameters, gradients and optimizer state are sharded by torch, one unit per block. Every backward pass
reduce-scatters its own gradients into DTensors, so the two losses' gradients stay separate as well. Frozen parameters
are left out of the units: every process has a full copy, and they are never communicated.

zero1, zero2, zero3: the same under DeepSpeed (`zero`).
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from phantom.errors import UserError
from phantom.model import PhantomTransformer3DModel


def distribute_model(model: PhantomTransformer3DModel, strategy: str) -> None:
    """Gives every process the first one's trainable parameters: all of them (ddp) or its shard (fsdp2).

    Raises UserError for fsdp2 in a single process.
    """
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
                module.set_gradient_divide_factor(1.0)  # each loss is already its share of a mean over the global batch
                module.set_force_sum_reduction_for_comms(True)


def gather(tensor: torch.Tensor) -> torch.Tensor:
    """The full tensor of a possibly sharded one. A collective: every process must call it."""
    # A copy: the gathered tensor may be a view into a larger, padded storage, which safetensors refuses.
    return tensor.full_tensor().clone() if isinstance(tensor, DTensor) else tensor
