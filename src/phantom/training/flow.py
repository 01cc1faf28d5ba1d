"""Flow matching: x_sigma = (1 - sigma) x + sigma noise, and the velocity dx/dsigma = noise - x, the training target."""

from __future__ import annotations

import torch

TIMESTEPS = 1000  # Wan's timestep is sigma times this


def shifted(u: torch.Tensor, shift: float) -> torch.Tensor:
    """sigma = s u / (1 + (s - 1) u): shifts u, uniform in [0, 1], towards more noise, as in the base's training."""
    return shift * u / (1 + (shift - 1) * u)


def noised(x: torch.Tensor, noise: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """x_sigma. `sigma` broadcasts against `x`; where it is 0, x is unchanged."""
    return (1 - sigma) * x + sigma * noise


def velocity(x: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """The velocity target; the same at every sigma."""
    return noise - x
