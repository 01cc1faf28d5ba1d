"""Held-out losses at fixed quantiles of sigma with fixed noise, beside the frozen base's, and what z contributes."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace

import torch
from torch import nn

from phantom.config import Params
from phantom.data.shards import LatentSet
from phantom.model.noise import sample_generator, shift_noise
from phantom.training.conditioning import Batch, heldout_sample
from phantom.training.objective import PhysicsLoss, losses

QUANTILES = (0.125, 0.375, 0.625, 0.875)  # of u, before the shift
MAX_CLIPS = 32


class Validation:
    """A fixed set of held-out samples: every clip at every quantile, every other clip with its longest prefix."""

    def __init__(self, latents: LatentSet, params: Params, batch_size: int) -> None:
        self.of_physics = PhysicsLoss.of(params)
        by_shape: dict[tuple, list[Batch]] = defaultdict(list)
        for quantile in QUANTILES:  # outside: neighbours in a batch are different clips at one noise level
            sigma = float(shift_noise(torch.tensor(quantile), params.train.flow_shift))
            for index in range(min(MAX_CLIPS, len(latents))):
                clip = latents[index]
                prefix_frames = max(clip.prefixes) if clip.prefixes and index % 2 else None
                generator = sample_generator(params.train.seed, index)
                made = heldout_sample(clip, params, sigma, generator, prefix_frames)
                by_shape[clip.video.shape].append(made)
        self.batches = [
            Batch.collate(samples[start : start + batch_size])
            for samples in by_shape.values()
            for start in range(0, len(samples), batch_size)
        ]
        self._mean = best_constant(latents)
        self._base_loss: float | None = None

    def __call__(self, model: nn.Module, device: torch.device) -> dict[str, float]:
        """Means over all samples.

        val_loss_video, val_loss_physics. val_loss_video_base: L_v of the frozen base alone; the video branch is frozen,
        so L_v can fall only slightly below it. val_physics_explained: 1 - |z_hat - z|^2 / |z - mean|^2, which is 0 for
        the best constant and 1 for the truth.
        """
        if not self.batches:
            return {}
        video, physics, explained = self._run(model, device, self.batches)
        if self._base_loss is None:
            self._base_loss = self._run(model, device, self.batches, physics=False)[0]
        return {
            "val_loss_video": video,
            "val_loss_physics": physics,
            "val_loss_video_base": self._base_loss,
            "val_physics_explained": explained,
        }

    def probe(self, model: nn.Module, device: torch.device) -> dict[str, float]:
        """L_v where the physics states are another clip's, and where they are noise alone.

        If these do not differ from val_loss_video, the video branch does not read z, whatever the loss says.
        """
        if not self.batches:
            return {}
        other = [replace(batch, physics=batch.physics.roll(1, 0)) for batch in self.batches]
        noise = [replace(batch, physics=batch.noise_physics) for batch in self.batches]  # z_sigma of it is noise alone
        return {
            "val_loss_video_other_z": self._run(model, device, other)[0],
            "val_loss_video_noise_z": self._run(model, device, noise)[0],
        }

    @torch.no_grad()
    def _run(
        self, model: nn.Module, device: torch.device, batches: list[Batch], physics: bool = True
    ) -> tuple[float, float, float]:
        """Means of L_v and L_z, and the explained share of z."""
        model.eval()
        found = [losses(model, batch.to(device), physics, self.of_physics) for batch in batches]
        model.train()
        video, loss_z = (torch.cat([getattr(each, name) for each in found]).cpu() for name in ("video", "physics"))
        pairs = zip(batches, found, strict=True)
        squared = torch.cat([clean_error(batch, each.physics.cpu(), self.of_physics) for batch, each in pairs])
        variance = torch.cat([variance_of_z(batch, self._mean) for batch in batches])
        return float(video.mean()), float(loss_z.mean()), 1 - float(squared.sum() / variance.sum())


def best_constant(latents: LatentSet) -> torch.Tensor:
    """The best constant prediction of z, (1, C_z or 1, 1, 1, 1): its mean over the training set."""
    mean = latents.statistics.mean if latents.statistics and not latents.standardized_by else (0.0,)
    return torch.tensor(mean).view(1, -1, 1, 1, 1)


def clean_error(batch: Batch, loss_z: torch.Tensor, of_physics: PhysicsLoss) -> torch.Tensor:
    """(B,) |z_hat - z|^2 of the samples whose `loss_z` (B,) was measured as `of_physics` says."""
    sigma = batch.sigma_physics.amax(dim=1, keepdim=True)  # of all free tubelets
    return loss_z / of_physics.weight(sigma)[:, 0] * of_physics.divisor(sigma).flatten().square()


def variance_of_z(batch: Batch, mean: torch.Tensor) -> torch.Tensor:
    """(B,) mean of |z - mean|^2 over what is to be predicted."""
    free = (batch.sigma_physics > 0).float()
    error = (batch.physics - mean).square().mean(dim=(1, 3, 4))
    return (error * free).sum(dim=1) / free.sum(dim=1)
