"""Flow matching in both branches: x_sigma = (1 - sigma) x + sigma noise, velocity dx/dsigma = noise - x."""

from __future__ import annotations

from typing import TypeVar

import numpy as np
import torch

TIMESTEPS = 1000  # t = 1000 sigma, as in Wan

Sigma = TypeVar("Sigma", torch.Tensor, float)


def shift_noise(sigma: Sigma, shift: float) -> Sigma:
    """s sigma / (1 + (s - 1) sigma): Wan's flow shift, towards more noise for s > 1, towards less for s < 1.

    Applied to uniform numbers, with s = `train.flow_shift`, it gives the noise levels of training. Applied to the noise
    level of the video, with r = `physics.noise_shift`, it gives that of z: where a sampler has flow shift s for the
    video, it has r s for z.
    """
    return shift * sigma / (1 + (shift - 1) * sigma)


def noised(x: torch.Tensor, noise: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """x_sigma. `sigma` broadcasts against `x`; where it is 0, x is unchanged."""
    return (1 - sigma) * x + sigma * noise


def velocity(x: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """The velocity, the target of training; the same at every sigma."""
    return noise - x


def velocity_of(clean: torch.Tensor, states: torch.Tensor, sigma_BT: torch.Tensor, sigma_min: float) -> torch.Tensor:
    """v = (z_sigma - z_hat) / max(sigma, sigma_min) of predicted clean states, float32; 0 where sigma is 0.

    clean, states: z_hat and z_sigma (B, C_z, T, h, w). sigma_BT: (B, T), or (B, 1) for all tubelets.
    """
    sigma = sigma_BT.float()[:, None, :, None, None]
    return (states.float() - clean.float()) / sigma.clamp_min(sigma_min) * (sigma > 0)


def sample_generator(seed: int, number: int) -> torch.Generator:
    """The random generator of sample or video `number` of a run: the same in every batch and process."""
    state = np.random.SeedSequence([seed, number]).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state >> np.uint64(1)))
