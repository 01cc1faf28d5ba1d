"""The gradients of the two losses, kept apart, so that the norm of L_z's alone is known exactly.

Each loss has its own backward through the one graph, into its own set of buffers; the training gradient is their
weighted sum. Nothing is measured by `autograd.grad` or between synchronised backwards of a wrapper: under data
parallelism those give the norms of local gradients, miss parameters, or lose the other term without an error. Here the
buffers themselves are summed over processes before any norm is taken.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn

from phantom.training.parallel import whole

Gradients = list[torch.Tensor | None]


class SplitGradients:
    """Accumulates dL_v/dtheta and dL_z/dtheta of a step apart. The losses are shares of global means."""

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self.parameters = parameters
        self.video: Gradients = [None] * len(parameters)
        self.physics: Gradients = [None] * len(parameters)

    def backward(self, loss_video: torch.Tensor, loss_physics: torch.Tensor) -> None:
        """Adds the gradients of one micro-batch."""
        self.physics = self._into(self.physics, loss_physics, retain_graph=True)
        self.video = self._into(self.video, loss_video)

    def _into(self, buffers: Gradients, loss: torch.Tensor, retain_graph: bool = False) -> Gradients:
        for parameter, gradient in zip(self.parameters, buffers, strict=True):
            parameter.grad = gradient
        loss.backward(retain_graph=retain_graph)
        return [parameter.grad for parameter in self.parameters]

    def reduce(self, reduce: Callable[[Gradients], None]) -> None:
        """Sums both over the processes."""
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


def total_norm(gradients: Gradients) -> torch.Tensor:
    """The 2-norm of all of them as one vector, float32."""
    return whole(torch.nn.utils.get_total_norm([g.float() for g in gradients if g is not None]))
