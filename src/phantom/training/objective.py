"""The two losses of L = L_v + alpha_z L_z: flow matching on the velocity of each branch, outside what is given."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn

from phantom.training.conditioning import Batch
from phantom.training.flow import TIMESTEPS, noised, velocity


class Losses(NamedTuple):
    """Per sample, (B,) float32, unreduced: weights, means and buckets of sigma are the caller's."""

    video: torch.Tensor  # L_v
    physics: torch.Tensor  # L_z; zero without physics


def losses(model: nn.Module, batch: Batch, physics: bool = True) -> Losses:
    """Runs `model` once. `physics=False` leaves the physics branch out: the loss of the frozen base."""
    sigma_v, sigma_z = (s[:, None, :, None, None] for s in (batch.sigma, batch.sigma_physics))
    out = model(
        noised(batch.video, batch.noise_video, sigma_v),
        noised(batch.physics, batch.noise_physics, sigma_z) if physics else None,
        batch.sigma * TIMESTEPS,
        batch.text,
        coupling=batch.coupled,
    )
    loss_v = _mean_outside(out.sample, velocity(batch.video, batch.noise_video), batch.sigma > 0)
    if not physics:
        return Losses(loss_v, torch.zeros_like(loss_v))
    target_z = velocity(batch.physics, batch.noise_physics)
    return Losses(loss_v, _mean_outside(out.physics, target_z, batch.sigma_physics > 0))


def _mean_outside(predicted: torch.Tensor, target: torch.Tensor, free: torch.Tensor) -> torch.Tensor:
    """Mean squared error of (B, C, F, h, w) over the frames that are `free` (B, F): (B,)."""
    error = (predicted.float() - target).square().mean(dim=(1, 3, 4))
    return (error * free).sum(dim=1) / free.sum(dim=1)
