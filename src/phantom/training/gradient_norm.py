"""The gradients of the two losses, kept separate to get the exact norm of L_z's gradient.

Each loss has its own backward pass through the shared graph, into its own buffers; the training gradient is their
weighted sum. The norm is not taken from `autograd.grad`, nor between synchronized backward passes of a wrapper: under
data parallelism those give norms of local gradients, miss parameters, or silently lose the other term. Here the buffers
themselves are summed over the processes before any norm is computed.

`HeadGradient` is a cheap proxy: the gradient of the physics branch's output head alone, in closed form.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from phantom.model.context_parallel import TokenSplit
from phantom.model.noise import velocity
from phantom.training.conditioning import Batch
from phantom.training.layout import gather
from phantom.training.objective import PhysicsLoss

Gradients = list[torch.Tensor | None]


class SplitGradients:
    """Accumulates dL_v/dtheta and dL_z/dtheta separately. Losses are this process's shares of global-batch means."""

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self.parameters = parameters
        self.video: Gradients = [None] * len(parameters)
        self.physics: Gradients = [None] * len(parameters)

    def backward(self, loss_video: torch.Tensor, loss_physics: torch.Tensor) -> None:
        """Adds the gradients of one micro-batch."""
        self.physics = self._accumulate(self.physics, loss_physics, retain_graph=loss_video.requires_grad)
        self.video = self._accumulate(self.video, loss_video)

    def _accumulate(self, buffers: Gradients, loss: torch.Tensor, retain_graph: bool = False) -> Gradients:
        if not loss.requires_grad:  # L_v, where the video branch reads nothing that is trained
            return buffers
        for parameter, gradient in zip(self.parameters, buffers, strict=True):
            parameter.grad = gradient
        loss.backward(retain_graph=retain_graph)
        return [parameter.grad for parameter in self.parameters]

    def reduce(self, reduce: Callable[[Gradients], None]) -> None:
        """Sums both over the processes with `reduce`."""
        reduce(self.physics)
        reduce(self.video)

    def norms(self) -> tuple[torch.Tensor, torch.Tensor]:
        """|dL_v/dtheta| and |dL_z/dtheta|, over all trainable parameters."""
        return total_norm(self.video), total_norm(self.physics)

    @torch.no_grad()
    def combine(self, alpha: float) -> None:
        """Sets every parameter's gradient to dL_v + alpha dL_z."""
        for parameter, video, physics in zip(self.parameters, self.video, self.physics, strict=True):
            if physics is not None:
                physics.mul_(alpha)
                parameter.grad = physics if video is None else video.add_(physics)
            else:
                parameter.grad = video


class HeadGradient:
    """dL_z/dW and dL_z/db of the physics branch's output head p = W h + b, without a backward pass.

    L_z is a weighted mean of (p - target)^2, so dL_z/dW is the sum over tokens of 2 w (p - target) h^T, where w is the
    weight of a value in the mean. Where the head predicts clean states, L_z is w / m^2 |p - z|^2 (`PhysicsLoss`). Only
    the head's inputs and outputs are read: no DDP or FSDP wrapper is involved.

    ends, split: `PhantomTransformer3DModel.physics_ends` and `physics_split`, which may have divided the tokens.
    """

    def __init__(
        self,
        ends: Any,
        of_physics: PhysicsLoss = PhysicsLoss(),  # noqa: B008
        split: TokenSplit = TokenSplit(),  # noqa: B008
    ) -> None:
        self.ends, self.of_physics, self.split = ends, of_physics, split
        self.weight = self.bias = torch.zeros(())
        self._inputs = self._predicted = torch.zeros(())  # head inputs and branch outputs of the last forward pass

    @contextmanager
    def watching(self) -> Iterator[None]:
        """A context that resets the sum and records the head's inputs and predictions in each forward pass."""
        self.weight = self.bias = torch.zeros((), device=self.ends.proj_out.bias.device)
        hooks = (
            self.ends.proj_out.register_forward_pre_hook(lambda _, given: setattr(self, "_inputs", given[0].detach())),
            self.ends.register_forward_hook(lambda _, __, out: setattr(self, "_predicted", out.detach())),
        )
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    @torch.no_grad()
    def add(self, batch: Batch, size: int) -> None:
        """Adds the gradient of the last forward pass's micro-batch, as a share of a global batch of `size` samples."""
        predicted, inputs = self._predicted.float(), self._inputs.float()
        free = (batch.sigma_physics > 0).float()
        share = free / free.sum(dim=1, keepdim=True) / (predicted[0, :, 0].numel() * size)  # (B, T)
        weight = self.of_physics.weight(batch.sigma_physics)[:, None, :, None, None] * share[:, None, :, None, None]
        if self.of_physics.prediction == "clean":
            target, weight = batch.physics, weight / self.of_physics.divisor(batch.sigma_physics).square()
        else:
            target = velocity(batch.physics, batch.noise_physics)
        error = 2 * (predicted - target) * weight
        for dim, patch in zip((4, 3, 2), reversed(self.ends.patch_size), strict=True):
            error = error.unflatten(dim, (-1, patch))
        tokens = error.permute(0, 2, 4, 6, 3, 5, 7, 1).flatten(4).flatten(1, 3)  # (B, L, patch values)
        tokens = self.split.own(tokens, 1).flatten(0, 1)
        self.weight = self.weight + tokens.T @ inputs.flatten(0, 1)
        self.bias = self.bias + tokens.sum(dim=0)

    def norm(self, reduce: Callable[[Gradients], None]) -> float:
        """|dL_z/d(W, b)| of the global batch."""
        gradient = torch.cat([self.weight.flatten(), self.bias])
        reduce([gradient])
        return float(gradient.norm())


def total_norm(gradients: Gradients) -> torch.Tensor:
    """The 2-norm of all gradients concatenated, in float32. Those that are no DTensors are the same everywhere."""
    found = [g.float() for g in gradients if g is not None]
    kinds = [[g for g in found if isinstance(g, DTensor) == sharded] for sharded in (True, False)]
    norms = [gather(torch.nn.utils.get_total_norm(kind)) for kind in kinds if kind or not found]
    return norms[0] if len(norms) == 1 else torch.linalg.vector_norm(torch.stack(norms))
