"""A linear probe: how much of a body's position and velocity can be read from the physics latents of a tubelet.

Legend: M tubelets (of any clips), D values of a tubelet, B clips, F frames, T tubelets of a clip.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Self

import torch

STATE = ("x", "y", "vx", "vy")
RIDGES = (1e2, 1e3, 1e4)
HELD_OUT = 5  # every fifth clip chooses the penalty


@dataclass(frozen=True)
class StateProbe:
    """A ridge regression from the latents of a tubelet to the state of the body in it."""

    mean: torch.Tensor  # (D,)
    std: torch.Tensor  # (D,)
    weight: torch.Tensor  # (D, 4)
    bias: torch.Tensor  # (4,)

    @classmethod
    def fit(cls, z_MD: torch.Tensor, states_M4: torch.Tensor, clips_M: torch.Tensor) -> Self:
        """Fits the probe. The penalty is the best of `RIDGES` on every fifth clip; `clips_M`: the clip of a tubelet."""
        mean, std, bias = z_MD.mean(0), z_MD.std(0) + 1e-6, states_M4.mean(0)
        x, y, held = (z_MD - mean) / std, states_M4 - bias, clips_M % HELD_OUT == 0
        scores = [float(r2_scores(x[held] @ w, y[held]).mean()) for w in _ridge(x[~held], y[~held], RIDGES)]
        best = RIDGES[scores.index(max(scores))]
        return cls(mean, std, next(_ridge(x, y, [best])), bias)

    def read(self, z_MD: torch.Tensor) -> torch.Tensor:
        """The states (..., 4) read from latents (..., D)."""
        return ((z_MD - self.mean) / self.std) @ self.weight + self.bias


def _ridge(x: torch.Tensor, y: torch.Tensor, penalties: tuple[float, ...] | list[float]) -> Iterator[torch.Tensor]:
    """(x^T x + p)^-1 x^T y for each penalty p, by the smaller of the matrices x^T x and x x^T."""
    wide = x.shape[0] < x.shape[1]
    gram = x @ x.T if wide else x.T @ x
    for penalty in penalties:
        matrix = gram + penalty * torch.eye(len(gram))
        yield x.T @ torch.linalg.solve(matrix, y) if wide else torch.linalg.solve(matrix, x.T @ y)


def r2_scores(read: torch.Tensor, true: torch.Tensor) -> torch.Tensor:
    """R2 (4,) of states (M, 4): 1 - |read - true|^2 / |true - mean|^2."""
    return 1 - (read - true).square().sum(0) / (true - true.mean(0)).square().sum(0)


def tokens_of_tubelets(z: torch.Tensor) -> torch.Tensor:
    """(B, T - 1, D) of z (B, C_z, T, h, w). Tubelet 0 is left out: it holds the first frame twice, and no motion."""
    return z[:, :, 1:].permute(0, 2, 1, 3, 4).flatten(2)


def of_tubelets(states_BF4: torch.Tensor, visible_BF: torch.Tensor, tubelets: int) -> tuple[torch.Tensor, torch.Tensor]:
    """States and visibility per frame -> the mean state (B, T - 1, 4) and whether all frames show the body (B, T - 1).

    Two frames make a tubelet, consecutive ones or, with half as many tubelets, every second one (`PhysicsEncoder`).
    """
    stride = (states_BF4.shape[1] - 1) // (2 * (tubelets - 1))
    states, visible = (x[:, ::stride][:, 1:].unflatten(1, (-1, 2)) for x in (states_BF4, visible_BF))
    return states.mean(2), visible.all(2)
