"""`train.offload: optimizer`: AdamW and the moving average on the host, for weights that are trained on a GPU.

torchao's `CPUOffloadOptimizer` does not serve here: it takes each gradient as a backward pass leaves it, and the
gradient of a step is made of two backward passes only afterwards (`gradient_norm`).
"""

from __future__ import annotations

import torch
from torch import nn


class HostWeights:
    """Float32 copies of `parameters` in host memory, pinned for a GPU, with memory for their gradients."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        self.parameters, pinned = parameters, parameters[0].is_cuda
        shapes = [parameter.shape for parameter in parameters]
        self.copies = [nn.Parameter(torch.empty(shape, device="cpu", pin_memory=pinned)) for shape in shapes]
        self._gradients = [torch.empty(shape, device="cpu", pin_memory=pinned) for shape in shapes]
        self.take_weights()

    @torch.no_grad()
    def take_weights(self) -> None:
        """Copies the weights to the host."""
        for copy, parameter in zip(self.copies, self.parameters, strict=True):
            copy.copy_(parameter, non_blocking=True)
        self._wait()

    @torch.no_grad()
    def take_gradients(self) -> None:
        """Copies the gradients to the host."""
        for copy, gradient, parameter in zip(self.copies, self._gradients, self.parameters, strict=True):
            copy.grad = gradient.copy_(parameter.grad, non_blocking=True)  # type: ignore[arg-type]
        self._wait()

    @torch.no_grad()
    def return_weights(self) -> None:
        """Copies the weights back."""
        for copy, parameter in zip(self.copies, self.parameters, strict=True):
            parameter.copy_(copy, non_blocking=True)
        self._wait()  # the next step may change the copies

    def _wait(self) -> None:
        if self.parameters[0].is_cuda:
            torch.cuda.synchronize()
