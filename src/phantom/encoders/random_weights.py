"""Random weights for a frozen encoder: the control that tells what its training is worth from what any features are."""

from __future__ import annotations

import hashlib
import math

import torch
from torch import nn


@torch.no_grad()
def randomize(model: nn.Module, seed: int) -> None:
    """Replaces all weights: matrices and kernels by Xavier-uniform ones, biases by 0, gains of norms by 1.

    A weight is a function of `seed`, its name and its shape, the same bytes on every machine: floats of 24 random bits,
    which are only shifted and scaled. What a library draws itself may change with its version, the order of the layers
    or the instructions of a CPU.
    """
    for name, parameter in model.named_parameters():
        if parameter.ndim < 2:
            parameter.fill_(0.0 if name.endswith("bias") else 1.0)
            continue
        digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
        draw = torch.rand(parameter.shape, generator=torch.Generator().manual_seed(int.from_bytes(digest[:7])))
        outputs, inputs = parameter.shape[0], parameter[0].numel()
        parameter.copy_((draw - 0.5) * (2 * math.sqrt(6 / (inputs + outputs))))
