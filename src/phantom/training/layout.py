"""How the trainable parameters are distributed over the processes.

ddp: replicated. Gradients are summed once a step (`process_group.sum_over_processes`), after all of its backward
passes: until then the two losses' gradients stay separate (`gradient_norm`), which a wrapper that reduces during the
backward pass does not allow.

fsdp2: parameters, gradients and optimizer state are sharded by torch, one unit per block, over all processes or, by
`train.mesh`, over groups of them that hold the same shards (HSDP). Every backward pass reduces its own gradients into
DTensors, so the two losses' gradients stay separate as well. Frozen parameters are left out of the units: every process
has a full copy, and they are never communicated.

zero1, zero2, zero3: the same under DeepSpeed (`zero`).
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from phantom.model import PhantomTransformer3DModel


def distribute_model(model: PhantomTransformer3DModel, shape: tuple[int, int], half: bool = False) -> None:
    """Gives every process the first one's trainable parameters: all of them, or its shard.

    shape: (replicate, shard), processes along the two dimensions of the mesh. half: sharded weights are gathered, and
    computed with, in bfloat16, and their gradients reduced in float32. `model.keeps_float32` names those that are not:
    every process has them in full, as plain tensors.
    """
    if dist.is_initialized():
        for _, parameter in model.trainable_parameters():
            dist.broadcast(parameter.data, src=0)
    if shape[1] == 1:
        return
    device = next(model.parameters()).device.type
    if shape[0] == 1:
        mesh = init_device_mesh(device, shape[1:])
    else:
        mesh = init_device_mesh(device, shape, mesh_dim_names=("replicate", "shard"))
    policy, whole = MixedPrecisionPolicy(), {p for p in model.parameters() if not p.requires_grad}
    if half:
        # Inputs are cast where they enter the model: a timestep in bfloat16 would be another one.
        policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
        whole |= {p for name, p in model.named_parameters() if model.keeps_float32(name)}
        for name, parameter in model.named_parameters():
            if not (parameter.requires_grad or model.keeps_float32(name)):
                parameter.data = parameter.data.to(torch.bfloat16)
    for unit in (*model.blocks, model):
        fully_shard(unit, mesh=mesh, mp_policy=policy, ignored_params=whole & {*unit.parameters()})
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)  # each loss is already its share of a mean over the global batch
            module.set_force_sum_reduction_for_comms(True)


def gather(tensor: torch.Tensor) -> torch.Tensor:
    """The full tensor of a possibly sharded one. A collective: every process must call it."""
    # A copy: the gathered tensor may be a view into a larger, padded storage, which safetensors refuses.
    return tensor.full_tensor().clone() if isinstance(tensor, DTensor) else tensor
