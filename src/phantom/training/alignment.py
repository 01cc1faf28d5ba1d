"""Token relation distillation (VideoREPA, 2505.23656), the second term of `train.method: alignment`.

    L = L_v + weight L_TRD
    L_TRD = mean over i, j of max(0, |S_y[i, j] - S_t[i, j]| - margin),   S_x[i, j] = cos(x_i, x_j)

over all pairs of tokens of a clip, in one frame and in two. y: the projected output of a block of the video branch
(`model.alignment`). t: the features of the frozen V-JEPA 2, which are the stored physics latents.

Legend: B samples, F video latents, T tubelets, N tokens on the common grid.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from phantom.config import Params
from phantom.data.physics_statistics import Statistics
from phantom.errors import UserError


@dataclass(frozen=True)
class AlignmentLoss:
    """weight L_TRD. statistics: by which the teacher's features were standardised, which is undone."""

    weight: float
    margin: float
    statistics: Statistics | None = None

    @classmethod
    def of(cls, params: Params, statistics: Statistics | None) -> AlignmentLoss | None:
        """As the settings say; None for other methods. Raises UserError where clips may have a single latent frame."""
        if params.train.method != "alignment":
            return None
        if params.data.min_frames < 5:
            raise UserError(
                f"data.min_frames: found {params.data.min_frames}, accepted with train.method alignment: 5 and more, "
                "since the first latent frame is not aligned"
            )
        return cls(params.train.alignment.weight, params.train.alignment.margin, statistics)

    def __call__(self, features: torch.Tensor, physics: torch.Tensor) -> torch.Tensor:
        """(B,) float32, of features y (B, C_z, F, r, c) of the video branch and physics latents t (B, C_z, T, h, w)."""
        with torch.autocast(features.device.type, enabled=False):
            teacher = self.statistics.undo(physics) if self.statistics else physics
            y, t = on_one_grid(features.float(), teacher.float())
            rows = len(t[0]) // (physics.shape[2] - 1)  # the tokens of a tubelet
            return self.weight * relation_loss(F.normalize(y, dim=-1), F.normalize(t, dim=-1), self.margin, rows)


def on_one_grid(student: torch.Tensor, teacher: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(B, C, F, r, c) and (B, C, T, h, w) as tokens (B, N, C) at the same places, N = (T - 1) min(r, h) min(c, w).

    As published, the first latent frame is left out, with its tubelet, and the others are interpolated to the teacher's
    rate. Rows and columns are averaged to the coarser of both.
    """
    rows, columns = map(min, student.shape[3:], teacher.shape[3:])
    y, t = (F.adaptive_avg_pool3d(x[:, :, 1:], (None, rows, columns)) for x in (student, teacher))
    if y.shape[2] != t.shape[2]:
        y = F.interpolate(y, t.shape[2:], mode="trilinear")
    return y.flatten(2).mT, t.flatten(2).mT


def relation_loss(y: torch.Tensor, t: torch.Tensor, margin: float, rows: int) -> torch.Tensor:
    """L_TRD (B,) of unit vectors y and t (B, N, C), float32, with `rows` of the N x N matrices in memory at a time."""
    return _RelationLoss.apply(y, t, margin, rows)


class _RelationLoss(torch.autograd.Function):
    """Computes the gradient with the loss: a backward pass would need the matrices again, or all of them at once.

    S_y is symmetric, so that y_k gets as much through its row as through its column:
    dL/dy_k = 2 / N^2 sum over j of sign(S_y[k, j] - S_t[k, j]) [|S_y[k, j] - S_t[k, j]| > margin] y_j
    """

    @staticmethod
    def forward(ctx: Any, y: torch.Tensor, t: torch.Tensor, margin: float, rows: int) -> torch.Tensor:
        count = y.shape[1]
        total, gradient = y.new_zeros(len(y)), torch.zeros_like(y) if ctx.needs_input_grad[0] else None
        for start in range(0, count, rows):
            own = slice(start, start + rows)
            difference = y[:, own] @ y.mT - t[:, own] @ t.mT
            excess = (difference.abs() - margin).clamp_min_(0)
            total += excess.sum(dim=(1, 2))
            if gradient is not None:
                gradient[:, own] = (difference.sign_() * (excess > 0)) @ y * (2 / count**2)
        ctx.save_for_backward(gradient)
        return total / count**2

    @staticmethod
    def backward(ctx: Any, *outer: Any) -> tuple[torch.Tensor, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * outer[0][:, None, None], None, None, None
