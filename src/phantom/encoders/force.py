"""A force prompt as a control tensor on the grid of latents that a branch has.

Legend: B videos, T time slots of a grid (latent frames of the video, or tubelets), h x w its cells.

Four channels, in each cell (t, i, j) with its centre at ((j + .5) / w, (i + .5) / h) of the picture:

    c_0, c_1 = sum_p F_p (cos a_p, sin a_p) exp(-((j + .5 - w x_p)^2 + (i + .5 - h y_p)^2) / 2) [t >= slot(time_p)]
    c_2, c_3 = F (cos a, sin a)     of the wind

A push is a Gaussian with a standard deviation of one cell: at the paper's size 16 pixels of 832, where Force Prompting
(arXiv 2505.19386) has 20 of 720. That one moves its Gaussian along the angle, farther for stronger forces; here
direction and strength are the values themselves, and stay from the push on, so that each frame after it can read them.
No force is a tensor of zeros.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from phantom.force.prompt import ForcePrompt, PointForce

CHANNELS = 4
FRAMES_PER_LATENT = 4  # of the video; the first latent has one


def encode_forces(
    forces: Sequence[ForcePrompt | None], grid: tuple[int, int, int], latent_frames: int, fps: float
) -> torch.Tensor:
    """Control tensor (B, 4, T, h, w), float32, of the prompts of B videos; zeros for None.

    grid: (T, h, w) of the branch that is conditioned. latent_frames: those of the video, of which T = 1 + n (F - 1).
    """
    slots, rows, columns = grid
    frames_per_slot = FRAMES_PER_LATENT * (latent_frames - 1) / (slots - 1) if slots > 1 else FRAMES_PER_LATENT
    x_w, y_h = torch.arange(columns) + 0.5, torch.arange(rows) + 0.5
    control = torch.zeros(len(forces), CHANNELS, *grid)
    for into, prompt in zip(control, forces, strict=True):
        if prompt is None:
            continue
        for point in prompt.points:
            near_h = torch.exp(-0.5 * (y_h - rows * point.y).square())
            near_w = torch.exp(-0.5 * (x_w - columns * point.x).square())
            first = slot(point, fps, frames_per_slot)
            into[:2, first:] += _vector(point.angle, point.magnitude) * (near_h[:, None] * near_w)
        if prompt.wind:
            into[2:] += _vector(prompt.wind.angle, prompt.wind.magnitude)
    return control


def slot(point: PointForce, fps: float, frames_per_slot: float) -> int:
    """The first time slot whose frames are not all before the push: slot k > 0 has frames s (k - 1) + 1 to s k."""
    return math.ceil(round(point.time * fps, 6) / frames_per_slot)


def _vector(angle: float, magnitude: float) -> torch.Tensor:
    """(2, 1, 1, 1): to the right and up."""
    radians = math.radians(angle)
    return magnitude * torch.tensor([math.cos(radians), math.sin(radians)]).view(2, 1, 1, 1)
