"""Flow matching: x_sigma = (1 - sigma) x + sigma noise, and the velocity dx/dsigma = noise - x, the training target."""

from __future__ import annotations

import torch


def noised(x: torch.Tensor, noise: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """x_sigma. `sigma` broadcasts against `x`; where it is 0, x is unchanged."""
    return (1 - sigma) * x + sigma * noise


def velocity(x: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """The velocity target; the same at every sigma."""
    return noise - x
