"""Flow matching: x_sigma = (1 - sigma) x + sigma noise, and the velocity dx/dsigma = noise - x that a model learns."""

from __future__ import annotations

import torch

TIMESTEPS = 1000  # what Wan calls t is sigma times this


def shifted(u: torch.Tensor, shift: float) -> torch.Tensor:
    """sigma = s u / (1 + (s - 1) u): u uniform in [0, 1] moved towards noise, as the base was trained."""
    return shift * u / (1 + (shift - 1) * u)


def noised(x: torch.Tensor, noise: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """x_sigma. `sigma` broadcasts against `x`; where it is 0, x stays as it is."""
    return (1 - sigma) * x + sigma * noise


def velocity(x: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """The target, at every sigma."""
    return noise - x
