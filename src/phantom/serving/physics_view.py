"""The generated latent physical states as colours: their three principal components, as a video."""

from __future__ import annotations

import numpy as np
import torch

CLIPPED_SHARE = 0.01  # of the values at each end of a component, so that outliers do not leave the rest grey


def physics_colours(z: torch.Tensor, frames: int, height: int, width: int) -> np.ndarray:
    """States z (1, C_z, T, h, w) -> uint8 RGB (frames, height, width, 3).

    The first three principal components over all tokens of the video are red, green and blue. The sign of each is such
    that its largest weight is positive, so that the same states have the same colours.
    """
    _, channels, times, rows, columns = z.shape
    tokens = z[0].double().reshape(channels, -1).T
    tokens = tokens - tokens.mean(0)
    _, vectors = torch.linalg.eigh(tokens.T @ tokens)  # ascending
    axes = vectors[:, -3:].flip(1)
    largest = axes.gather(0, axes.abs().argmax(0, keepdim=True))
    values = tokens @ (axes * largest.sign())
    low, high = (values.quantile(q, 0) for q in (CLIPPED_SHARE, 1 - CLIPPED_SHARE))
    colours = ((values - low) / (high - low).clamp(min=1e-9)).clamp(0, 1)
    volume = colours.T.reshape(1, 3, times, rows, columns).float()
    whole = torch.nn.functional.interpolate(volume, (frames, height, width), mode="trilinear", align_corners=False)
    return (whole[0] * 255).round().to(torch.uint8).permute(1, 2, 3, 0).numpy()
