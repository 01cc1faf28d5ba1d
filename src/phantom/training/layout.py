"""How the trainable parameters are distributed over the processes.

ddp: replicated. Gradients are summed once a step (`process_group.sum_over_processes`), after all of its backward
passes: until then the two losses' gradients stay separate (`gradient_norm`), which a wrapper that reduces during the
backward pass does not allow.

fsdp2: parameters, gradients and optimizer state are sharded by torch, one unit per block, over all processes or, by
`train.mesh`, over groups of them that hold the same shards (HSDP). Every backward pass reduces its own gradients into
DTensors, so the two losses' gradients stay separate as well. Frozen parameters are left out of the units: every process
has a full copy, and they are never communicated.

`train.mesh.context` processes in a row share samples and divide their tokens (`divide_tokens`). Each computes the loss
of its samples in full, but a gradient by way of its own tokens alone, so gradients are summed over these processes as
over all others, and parameters are sharded over them too.

zero1, zero2, zero3: the same under DeepSpeed (`zero`).
"""

from __future__ import annotations

from functools import cache

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from phantom.config import Train
from phantom.errors import UserError
from phantom.model import PhantomTransformer3DModel
from phantom.model.context_parallel import check_degree
from phantom.model.ulysses import divide_attention


def distribute_model(model: PhantomTransformer3DModel, shape: tuple[int, int], half: bool = False) -> None:
    """Gives every process the first one's trainable parameters: all of them, or its shard.

    shape: (replicate, shard), processes along the two dimensions of the mesh. half: sharded weights are gathered, and
    computed with, in bfloat16, and their gradients reduced in float32. `model.keeps_float32` names those that are not:
    every process has them in full, as plain tensors. What `distribute_unit` has distributed stays as it is.
    """
    for unit in (*(model.blocks if shape[1] > 1 else ()), model):
        if not isinstance(unit, FSDPModule):
            distribute_unit(model, unit, shape, half)


def distribute_unit(
    model: PhantomTransformer3DModel, unit: nn.Module, shape: tuple[int, int], half: bool = False
) -> None:
    """The same for one block of `model`, or for the model but for its blocks, which must be distributed already.

    Called for each block as soon as its weights are drawn, it leaves a process with its shard and one block in full.
    """
    plain = {name: p for name, p in unit.named_parameters() if not isinstance(p, DTensor)}
    if dist.is_initialized():
        for parameter in plain.values():
            if parameter.requires_grad:
                dist.broadcast(parameter.data, src=0)
    if shape[1] == 1:
        return
    policy, whole = MixedPrecisionPolicy(), {p for p in plain.values() if not p.requires_grad}
    if half:
        # Inputs are cast where they enter the model: a timestep in bfloat16 would be another one.
        policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
        whole |= {p for name, p in plain.items() if model.keeps_float32(name)}
        for name, parameter in plain.items():
            if not (parameter.requires_grad or model.keeps_float32(name)):
                parameter.data = parameter.data.to(torch.bfloat16)
    mesh = _mesh(next(iter(plain.values())).device.type, shape)
    sharded: FSDPModule = fully_shard(unit, mesh=mesh, mp_policy=policy, ignored_params=whole)
    sharded.set_gradient_divide_factor(1.0)  # each loss is already its share of a mean over the global batch
    sharded.set_force_sum_reduction_for_comms(True)


def divide_tokens(model: PhantomTransformer3DModel, train: Train, device: str) -> None:
    """Divides the tokens of each sample over `train.mesh.context` processes. Raises UserError if heads do not divide.

    They are neighbours, on one machine where they can be: what they exchange is needed in every attention.
    """
    context = train.mesh.context
    if context == 1:
        return
    try:
        check_degree("train.mesh.context", context, model.divisible_heads, train.processes)
    except ValueError as error:
        raise UserError(str(error)) from None
    divide_attention(model, _context_mesh(device, context))


@cache
def _context_mesh(device: str, context: int) -> DeviceMesh:
    """Of the processes that share samples with this one."""
    names = ("data", "context")
    return init_device_mesh(device, (dist.get_world_size() // context, context), mesh_dim_names=names)["context"]


@cache
def _mesh(device: str, shape: tuple[int, int]) -> DeviceMesh:
    """One for all units: each mesh makes process groups of its own."""
    if shape[0] == 1:
        return init_device_mesh(device, shape[1:])
    return init_device_mesh(device, shape, mesh_dim_names=("replicate", "shard"))


def shard_like(tensor: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """What this process holds of a full `tensor` that is distributed as `parameter` is. Not a collective."""
    tensor = tensor.to(parameter.device, parameter.dtype)
    if not isinstance(parameter, DTensor):
        return tensor
    return distribute_tensor(tensor, parameter.device_mesh, parameter.placements, src_data_rank=None)


def gather(tensor: torch.Tensor) -> torch.Tensor:
    """The full tensor of a possibly sharded one. A collective: every process must call it."""
    # A copy: the gathered tensor may be a view into a larger, padded storage, which safetensors refuses.
    return tensor.full_tensor().clone() if isinstance(tensor, DTensor) else tensor
