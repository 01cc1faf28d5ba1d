"""Held-out losses at fixed quantiles of sigma with fixed noise, beside the frozen base's, and what z contributes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import nn

from phantom.config import Params
from phantom.data.latent_set import LatentSet
from phantom.data.state_probe import r2_scores
from phantom.training.conditioning import Batch
from phantom.training.coupling_ratio import CouplingRatio
from phantom.training.heldout_samples import QUANTILES, HeldoutSamples, Sample
from phantom.training.objective import PhysicsLoss, losses_of, predict
from phantom.training.paired import Gap, gap
from phantom.training.process_group import gather_all
from phantom.training.state_reader import StateReader, States


class Measured(NamedTuple):
    """L_v, L_z and |z_hat - z|^2 of every sample, (S,) float32 on the CPU.

    z_hat: (C_z, T, h, w) of this process's samples whose states are known.
    """

    video: torch.Tensor
    physics: torch.Tensor
    error: torch.Tensor
    z_hat: list[torch.Tensor]


class Validation:
    """A fixed set of held-out samples (`HeldoutSamples`). Calls are collectives: each process runs a share of them.

    training: the clips on which the linear probe of z is fitted. After the last call `by_clip` has `ids` and, under the
    names of the losses, their means over a clip's samples.
    """

    def __init__(self, heldout: LatentSet, training: LatentSet, params: Params, batch_size: int) -> None:
        self.of_physics = PhysicsLoss.of(params)
        self.reader = StateReader(training, params) if params.train.method == "phantom" else None
        self.samples = samples = HeldoutSamples(heldout, params, batch_size)
        self.is_alone = torch.tensor(samples.is_alone)
        # Of this process's samples. z is read at the highest noise level, from the tubelets to be predicted.
        self.states: dict[Sample, States] = {}
        mean, errors = best_constant(heldout), [torch.zeros(0, 2)]
        for made in samples.batches:
            batch = samples.make(made)
            errors.append(torch.stack([guess_error(batch, guess) for guess in (mean, last_given(batch))], dim=1))
            for sample, sigma in zip(made, batch.sigma_physics, strict=True):
                if sample.quantile == QUANTILES[-1] and (found := self._states(sample)):
                    self.states[sample] = found[0], found[1] & (sigma[1:] > 0)
        self.error_of_constant, self.error_of_copy = samples.gather(torch.cat(errors)).T.contiguous()
        self.by_clip: dict[str, list[Any]] = {}
        self._base: torch.Tensor | None = None

    def __call__(self, model: nn.Module, device: torch.device, last: bool = False) -> dict[str, float]:
        """Means over all samples; docs/training.md has their names. last: also those that take further passes."""
        if not self.samples.all:
            return {}
        ratio = CouplingRatio(model)
        with ratio.watching():
            own = self._run(model, device)
        if self._base is None:
            self._base = self._run(model, device, physics=False).video
        figures = {"val_loss_video": float(own.video.mean()), "val_loss_video_base": float(self._base.mean())}
        videos = {"": own.video, "_base": self._base}
        if model.has_physics:
            figures |= {"val_loss_physics": float(own.physics.mean())}
            figures |= {**self._explained(own), **self._read(own.z_hat), **ratio.means(self._gather)}
            if last:
                figures |= self._interventions(model, device, videos)
        return figures | (self._gaps(videos) if last else {})

    def _interventions(
        self, model: nn.Module, device: torch.device, videos: dict[str, torch.Tensor]
    ) -> dict[str, float]:
        """What another clip's z, noise in its place and the coupling switched off change. Adds L_v to `videos`."""
        other = self._run(model, device, self._with_z_of_others).video.where(~self.is_alone, torch.nan)
        noise = self._run(model, device, lambda batch, _: replace(batch, physics=batch.noise_physics)).video
        uncoupled = self._run(model, device, lambda batch, _: batch.uncoupled())
        videos |= {"_other_z": other, "_noise_z": noise}
        figures = {f"val_loss_video{name}": float(videos[name].nanmean()) for name in ("_other_z", "_noise_z")}
        figures |= {f"{name}_uncoupled": value for name, value in self._explained(uncoupled).items()}
        return figures | {f"{name}_true_z": value for name, value in self._read(self._true_z()).items()}

    def _with_z_of_others(self, batch: Batch, samples: list[Sample]) -> Batch:
        return replace(batch, physics=self.samples.physics_of_others(samples))

    def _gaps(self, videos: dict[str, torch.Tensor]) -> dict[str, float]:
        """Paired gaps of the other L_v of each sample to the model's own, which is named ""; sets `by_clip`."""
        losses = {f"loss_video{name}": self._over_clips(values) for name, values in videos.items()}
        self.by_clip = {"ids": self.samples.ids, **losses}
        figures: dict[str, float] = {}
        for name in filter(None, videos):
            figures |= gap_figures(name[1:], gap(losses[f"loss_video{name}"], losses["loss_video"]))
        return figures

    @torch.no_grad()
    def _run(
        self,
        model: nn.Module,
        device: torch.device,
        change: Callable[[Batch, list[Sample]], Batch] = lambda batch, _: batch,
        physics: bool = True,
    ) -> Measured:
        """Runs the samples, of which `change` makes others."""
        model.eval()
        parts: list[tuple[torch.Tensor, ...]] = []
        z_hat: list[torch.Tensor] = []
        for samples in self.samples.rounds:
            batch = change(self.samples.make(samples), samples).to(device)
            predicted = predict(model, batch, physics)
            loss = losses_of(predicted, batch, self.of_physics)
            parts.append((loss.video, loss.physics, clean_error(batch, loss.physics, self.of_physics)))
            known = torch.tensor([sample in self.states for sample in samples])
            if predicted.physics is not None and known.any():
                z_hat += self.of_physics.clean(batch, predicted.physics.float())[known].cpu()
        model.train()
        video, loss_z, error = (self._gather(torch.cat(column)) for column in zip(*parts, strict=True))
        return Measured(video, loss_z, error, z_hat[: len(self.states)])

    def _gather(self, of_rounds: torch.Tensor) -> torch.Tensor:
        """Values of each sample that this process has run, to those of all samples, (S,) on the CPU."""
        return self.samples.gather(of_rounds[: len(self.samples.own)].cpu())

    def _explained(self, measured: Measured) -> dict[str, float]:
        """1 - |z_hat - z|^2 / |guess - z|^2, for two guesses: the best constant and the last tubelet that is given."""
        conditioned = ~self.error_of_copy.isnan()
        found = {"val_physics_explained": float(1 - measured.error.sum() / self.error_of_constant.sum())}
        if conditioned.any():
            share = 1 - measured.error[conditioned].sum() / self.error_of_copy[conditioned].sum()
            found["val_physics_explained_over_copy"] = float(share)
        return found

    def _states(self, sample: Sample) -> States | None:
        return self.reader.states(self.samples.clip(sample.clip)) if self.reader and self.reader.probe else None

    def _read(self, z: list[torch.Tensor]) -> dict[str, float]:
        """R2 of position and velocity, read from `z` of this process's samples with known states, and the others'."""
        if self.reader is None or self.reader.probe is None:
            return {}
        own = self.reader.read(z, [*self.states.values()])
        every = gather_all(own)[:: self.samples.params.train.mesh.context]
        read, true = map(torch.cat, zip(*every, strict=True))
        if not len(true):
            return {}
        scores = r2_scores(read, true)
        return {"val_r2_position": float(scores[:2].mean()), "val_r2_velocity": float(scores[2:].mean())}

    def _true_z(self) -> list[torch.Tensor]:
        return [self.samples.make([sample]).physics[0] for sample in self.states]

    def _over_clips(self, values: torch.Tensor) -> list[float | None]:
        """Means over each clip's samples; None where a value is missing."""
        sums = torch.zeros(len(self.samples.ids), dtype=torch.float64)
        sums.index_add_(0, torch.tensor([sample.clip for sample in self.samples.all]), values.double())
        return [float(f"{x:.6g}") if x == x else None for x in (sums / len(QUANTILES)).tolist()]


def gap_figures(name: str, found: Gap | None) -> dict[str, float]:
    """`val_gap_<name>`, `..._low` and `..._high`."""
    return {f"val_gap_{name}{end}": x for end, x in zip(("", "_low", "_high"), found, strict=True)} if found else {}


def best_constant(latents: LatentSet) -> torch.Tensor:
    """The best constant prediction of z, (1, C_z or 1, 1, 1, 1): its mean over the training set."""
    mean = latents.statistics.mean if latents.statistics and not latents.standardized_by else (0.0,)
    return torch.tensor(mean).view(1, -1, 1, 1, 1)


def last_given(batch: Batch) -> torch.Tensor:
    """The states of the last tubelet of the condition prefix, (B, C_z, 1, h, w); NaN without a prefix."""
    given = (batch.sigma_physics == 0).sum(dim=1)
    last = batch.physics[torch.arange(len(given)), :, given.clamp_min(1) - 1].unsqueeze(2)
    return last.where((given > 0).view(-1, 1, 1, 1, 1), torch.nan)


def clean_error(batch: Batch, loss_z: torch.Tensor, of_physics: PhysicsLoss) -> torch.Tensor:
    """(B,) |z_hat - z|^2 of the samples whose `loss_z` (B,) was measured as `of_physics` says."""
    sigma = batch.sigma_physics.amax(dim=1, keepdim=True)  # of all free tubelets
    return loss_z / of_physics.weight(sigma)[:, 0] * of_physics.divisor(sigma).flatten().square()


def guess_error(batch: Batch, guess: torch.Tensor) -> torch.Tensor:
    """(B,) mean of |z - guess|^2 over what is to be predicted; `guess` as `batch.physics`, or 1 along its axes."""
    free = (batch.sigma_physics > 0).float()
    error = (batch.physics - guess).square().mean(dim=(1, 3, 4))
    return (error * free).sum(dim=1) / free.sum(dim=1)
