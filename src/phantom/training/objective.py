"""The two terms of L = L_v + alpha_z L_z: flow matching on each branch's velocity, condition frames excluded.

Without a physics branch there is L_v alone, or L_v and the term of `training.alignment`.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch

from phantom.config import Params
from phantom.model import PhantomTransformerOutput
from phantom.model.noise import TIMESTEPS, noised, velocity
from phantom.training.alignment import AlignmentLoss
from phantom.training.conditioning import Batch


class Losses(NamedTuple):
    """Per sample, (B,) float32, unreduced: the caller weights, averages and buckets them by sigma."""

    video: torch.Tensor  # L_v; zero without the video branch
    physics: torch.Tensor  # L_z; likewise
    alignment: torch.Tensor | None = None  # weight L_TRD (`AlignmentLoss`); None: no such term

    def share(self, size: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The contribution of these samples to the means L_v and L_z over a global batch of `size` samples.

        L_v comes with the alignment's term.
        """
        video = self.video if self.alignment is None else self.video + self.alignment
        return video.sum() / size, self.physics.sum() / size

    def detach(self) -> Losses:
        """The same losses, detached from the graph."""
        return Losses(*(None if term is None else term.detach() for term in self))  # type: ignore[arg-type]


@dataclass(frozen=True)
class PhysicsLoss:
    """How L_z is measured: w |v_hat - v|^2, with v = (z_sigma - z) / m and m = max(sigma, sigma_min).

    velocity: w = 1. clean: w = m^2, which makes it |z_hat - z|^2 where the head predicts z_hat: low noise levels, whose
    velocities are differences divided by a small m, do not dominate the loss and its gradient. A head that predicts
    velocities has m = sigma, so that v = noise - z.
    """

    prediction: Literal["clean", "velocity"] = "velocity"
    unit: Literal["clean", "velocity"] = "velocity"
    sigma_min: float = 0.05

    @classmethod
    def of(cls, params: Params) -> PhysicsLoss:
        """As the settings say."""
        return cls(params.physics.prediction, params.train.physics_loss, params.physics.sigma_min)

    def divisor(self, sigma_BT: torch.Tensor) -> torch.Tensor:
        """m, shaped (B, 1, T, 1, 1)."""
        sigma = sigma_BT[:, None, :, None, None]
        return sigma.clamp_min(self.sigma_min) if self.prediction == "clean" else sigma

    def target(self, batch: Batch) -> torch.Tensor:
        """v (B, C_z, T, h, w)."""
        v = velocity(batch.physics, batch.noise_physics)
        if self.prediction == "velocity":
            return v
        return v * (batch.sigma_physics[:, None, :, None, None] / self.divisor(batch.sigma_physics))

    def clean(self, batch: Batch, v: torch.Tensor) -> torch.Tensor:
        """z_hat of the velocities `v` (B, C_z, T, h, w) that the branch predicts for `batch`: z_sigma - m v."""
        states = noised(batch.physics, batch.noise_physics, batch.sigma_physics[:, None, :, None, None])
        return states - self.divisor(batch.sigma_physics) * v

    def weight(self, sigma_BT: torch.Tensor) -> torch.Tensor:
        """w (B, T)."""
        if self.unit == "velocity":
            return torch.ones_like(sigma_BT)
        return self.divisor(sigma_BT).flatten(1).square()


def losses(
    model: Any,
    batch: Batch,
    physics: bool = True,
    of_physics: PhysicsLoss = PhysicsLoss(),
    video: bool = True,
    alignment: AlignmentLoss | None = None,
) -> Losses:
    """One forward pass of `model`. `physics=False`: the loss of the frozen base; `video=False`: of the twin alone."""
    predicted = predict(model, batch, physics, video)
    found = losses_of(predicted, batch, of_physics)
    if alignment is None:
        return found
    assert predicted.features is not None  # in training mode, with a projector
    return found._replace(alignment=alignment(predicted.features, batch.physics))


def predict(model: Any, batch: Batch, physics: bool = True, video: bool = True) -> PhantomTransformerOutput:
    """The velocities that `model` predicts for `batch`: of both branches, coupled, or of one of them alone.

    Without `physics` those of the frozen base. A model without a physics branch is given the video alone.
    """
    sigma_v, sigma_z = (s[:, None, :, None, None] for s in (batch.sigma, batch.sigma_physics))
    with_z = physics and getattr(model, "has_physics", True)  # DDP's wrapper hides the model's attributes
    with nullcontext() if physics else model.base_alone():
        return model(
            noised(batch.video, batch.noise_video, sigma_v),
            noised(batch.physics, batch.noise_physics, sigma_z) if with_z else None,
            batch.sigma * TIMESTEPS,
            batch.text,
            coupling=batch.coupled,
            video=video,
            **(batch.optional_inputs if physics and getattr(model, "takes_force", True) else {}),
        )


def losses_of(predicted: PhantomTransformerOutput, batch: Batch, of_physics: PhysicsLoss) -> Losses:
    """The losses of predicted velocities; zero for a branch that was not run."""
    loss_v = loss_z = torch.zeros(len(batch.video), device=batch.video.device)
    if predicted.sample is not None:
        loss_v = _mean_over_free(predicted.sample, velocity(batch.video, batch.noise_video), batch.sigma > 0)
    if predicted.physics is not None:
        weight_z, free_z = of_physics.weight(batch.sigma_physics), batch.sigma_physics > 0
        loss_z = _mean_over_free(predicted.physics, of_physics.target(batch), free_z, weight_z)
    return Losses(loss_v, loss_z)


def _mean_over_free(
    predicted: torch.Tensor, target: torch.Tensor, free: torch.Tensor, weight: torch.Tensor | None = None
) -> torch.Tensor:
    """Mean of weight x squared error of (B, C, F, h, w) over the frames to be predicted, `free` (B, F): (B,)."""
    error = (predicted.float() - target).square().mean(dim=(1, 3, 4))
    if weight is not None:
        error = error * weight
    return (error * free).sum(dim=1) / free.sum(dim=1)
