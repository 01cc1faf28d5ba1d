"""The two terms of L = L_v + alpha_z L_z: flow matching on each branch's velocity, condition frames excluded."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn

from phantom.training.conditioning import Batch
from phantom.training.flow import TIMESTEPS, noised, velocity


class Losses(NamedTuple):
    """Per sample, (B,) float32, unreduced: the caller weights, averages and buckets them by sigma."""

    video: torch.Tensor  # L_v
    physics: torch.Tensor  # L_z; zero without physics

    def share(self, size: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The contribution of these samples to the means L_v and L_z over a global batch of `size` samples."""
        return self.video.sum() / size, self.physics.sum() / size

    def detach(self) -> Losses:
        """The same losses, detached from the graph."""
        return Losses(self.video.detach(), self.physics.detach())


def losses(model: nn.Module, batch: Batch, physics: bool = True) -> Losses:
    """One forward pass of `model`. `physics=False` leaves the physics branch out: the loss of the frozen base."""
    sigma_v, sigma_z = (s[:, None, :, None, None] for s in (batch.sigma, batch.sigma_physics))
    out = model(
        noised(batch.video, batch.noise_video, sigma_v),
        noised(batch.physics, batch.noise_physics, sigma_z) if physics else None,
        batch.sigma * TIMESTEPS,
        batch.text,
        coupling=batch.coupled,
    )
    loss_v = _mean_over_free(out.sample, velocity(batch.video, batch.noise_video), batch.sigma > 0)
    if not physics:
        return Losses(loss_v, torch.zeros_like(loss_v))
    target_z = velocity(batch.physics, batch.noise_physics)
    return Losses(loss_v, _mean_over_free(out.physics, target_z, batch.sigma_physics > 0))


def _mean_over_free(predicted: torch.Tensor, target: torch.Tensor, free: torch.Tensor) -> torch.Tensor:
    """Mean squared error of (B, C, F, h, w) over the frames to be predicted, `free` (B, F): (B,)."""
    error = (predicted.float() - target).square().mean(dim=(1, 3, 4))
    return (error * free).sum(dim=1) / free.sum(dim=1)
