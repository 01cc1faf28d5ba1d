"""Held-out losses at fixed quantiles of sigma with fixed noise, beside the frozen base's, and what z contributes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import nn

from phantom.config import Params
from phantom.data.latent_set import LatentSet
from phantom.model.noise import sample_generator, shift_noise
from phantom.training.conditioning import Batch, heldout_sample
from phantom.training.coupling_ratio import CouplingRatio
from phantom.training.objective import PhysicsLoss, losses_of, predict
from phantom.training.paired import Gap, gap
from phantom.training.state_reader import StateReader, States

QUANTILES = (0.125, 0.375, 0.625, 0.875)  # of u, before the shift
MAX_CLIPS = 32


class Measured(NamedTuple):
    """Of each sample, (S,) float32 on the CPU: L_v, L_z, |z_hat - z|^2; z_hat (C_z, T, h, w) where states are known."""

    video: torch.Tensor
    physics: torch.Tensor
    error: torch.Tensor
    z_hat: list[torch.Tensor]


class Validation:
    """A fixed set of held-out samples: every clip at every quantile, every other clip with its longest prefix.

    training: the clips on which the linear probe of z is fitted. After the last call `by_clip` has `ids` and, under the
    names of the losses, their means over a clip's samples.
    """

    def __init__(self, heldout: LatentSet, training: LatentSet, params: Params, batch_size: int) -> None:
        self.of_physics = PhysicsLoss.of(params)
        self.reader = StateReader(training, params) if params.train.method == "phantom" else None
        self.ids = heldout.ids[:MAX_CLIPS]
        groups: dict[tuple, list[tuple[int, Batch]]] = defaultdict(list)
        states: dict[int, States] = {}  # of clips in which a body's states are known
        for index in range(len(self.ids)):
            clip = heldout[index]
            prefix_frames = max(clip.prefixes) if clip.prefixes and index % 2 else None
            if self.reader and self.reader.probe and (found := self.reader.states(clip)):
                states[index] = found
            for quantile in QUANTILES:
                sigma = float(shift_noise(torch.tensor(quantile), params.train.flow_shift))
                generator = sample_generator(params.train.seed, index)
                made = heldout_sample(clip, params, sigma, generator, prefix_frames)
                groups[clip.video.shape, quantile].append((index, made))
        self.groups = [  # of different clips of one shape at one noise level
            [
                Batch.collate([made for _, made in of[start : start + batch_size]])
                for start in range(0, len(of), batch_size)
            ]
            for of in groups.values()
        ]
        self.clips = [index for of in groups.values() for index, _ in of]  # of the samples
        self.is_alone = torch.tensor([len(of) == 1 for of in groups.values() for _ in of])
        # z is read at the highest noise level, from the tubelets to be predicted.
        self.states = [
            (states[index][0], states[index][1] & (made.sigma_physics[0, 1:] > 0))
            if quantile == QUANTILES[-1] and index in states
            else None
            for (_, quantile), of in groups.items()
            for index, made in of
        ]
        mean = best_constant(heldout)
        self.error_of_constant, self.error_of_copy = (
            torch.cat([guess_error(batch, guess(batch)) for batch in self.batches] or [torch.zeros(0)])
            for guess in (lambda _: mean, last_given)
        )
        self.by_clip: dict[str, list[Any]] = {}
        self._base: torch.Tensor | None = None

    @property
    def batches(self) -> list[Batch]:
        """All samples."""
        return [batch for group in self.groups for batch in group]

    def __call__(self, model: nn.Module, device: torch.device, last: bool = False) -> dict[str, float]:
        """Means over all samples; docs/training.md has their names. last: also those that take further passes."""
        if not self.groups:
            return {}
        ratio = CouplingRatio(model)
        with ratio.watching():
            own = self._run(model, device, self.batches)
        if self._base is None:
            self._base = self._run(model, device, self.batches, physics=False).video
        figures = {"val_loss_video": float(own.video.mean()), "val_loss_video_base": float(self._base.mean())}
        videos = {"": own.video, "_base": self._base}
        if model.has_physics:
            figures |= {"val_loss_physics": float(own.physics.mean())}
            figures |= {**self._explained(own), **self._read(own.z_hat), **ratio.means()}
            if last:
                figures |= self._interventions(model, device, videos)
        return figures | (self._gaps(videos) if last else {})

    def _interventions(
        self, model: nn.Module, device: torch.device, videos: dict[str, torch.Tensor]
    ) -> dict[str, float]:
        """What another clip's z, noise in its place and the coupling switched off change. Adds L_v to `videos`."""
        rolled = (
            replace(batch, physics=physics)
            for group in self.groups
            for batch, physics in zip(group, _following(group), strict=True)
        )
        other = self._run(model, device, rolled).video.where(~self.is_alone, torch.nan)
        noise = self._run(model, device, (replace(b, physics=b.noise_physics) for b in self.batches)).video
        uncoupled = self._run(model, device, (batch.uncoupled() for batch in self.batches))
        videos |= {"_other_z": other, "_noise_z": noise}
        figures = {f"val_loss_video{name}": float(videos[name].nanmean()) for name in ("_other_z", "_noise_z")}
        figures |= {f"{name}_uncoupled": value for name, value in self._explained(uncoupled).items()}
        return figures | {f"{name}_true_z": value for name, value in self._read(self._true_z()).items()}

    def _gaps(self, videos: dict[str, torch.Tensor]) -> dict[str, float]:
        """Paired gaps of the other L_v of each sample to the model's own, which is named ""; sets `by_clip`."""
        losses = {f"loss_video{name}": self._over_clips(values) for name, values in videos.items()}
        self.by_clip = {"ids": self.ids, **losses}
        figures: dict[str, float] = {}
        for name in filter(None, videos):
            figures |= gap_figures(name[1:], gap(losses[f"loss_video{name}"], losses["loss_video"]))
        return figures

    @torch.no_grad()
    def _run(self, model: nn.Module, device: torch.device, batches: Iterable[Batch], physics: bool = True) -> Measured:
        model.eval()
        parts: list[tuple[torch.Tensor, ...]] = []
        z_hat: list[torch.Tensor] = []
        states = iter(self.states)
        for batch in (given.to(device) for given in batches):
            predicted = predict(model, batch, physics)
            loss = losses_of(predicted, batch, self.of_physics)
            parts.append((*loss, clean_error(batch, loss.physics, self.of_physics)))
            known = [next(states) is not None for _ in range(len(batch.video))]
            if predicted.physics is not None and any(known):
                z_hat += self.of_physics.clean(batch, predicted.physics.float())[torch.tensor(known)].cpu()
        model.train()
        video, loss_z, error = (torch.cat(column).cpu() for column in zip(*parts, strict=True))
        return Measured(video, loss_z, error, z_hat)

    def _explained(self, measured: Measured) -> dict[str, float]:
        """1 - |z_hat - z|^2 / |guess - z|^2, for two guesses: the best constant and the last tubelet that is given."""
        conditioned = ~self.error_of_copy.isnan()
        found = {"val_physics_explained": float(1 - measured.error.sum() / self.error_of_constant.sum())}
        if conditioned.any():
            share = 1 - measured.error[conditioned].sum() / self.error_of_copy[conditioned].sum()
            found["val_physics_explained_over_copy"] = float(share)
        return found

    def _read(self, z: list[torch.Tensor]) -> dict[str, float]:
        """R2 of position and velocity, read from `z` of the samples with known states."""
        states = [found for found in self.states if found]
        if not states or self.reader is None:
            return {}
        return dict(zip(("val_r2_position", "val_r2_velocity"), self.reader.r2(z, states), strict=True))

    def _true_z(self) -> list[torch.Tensor]:
        samples = (z for batch in self.batches for z in batch.physics)
        return [z for z, states in zip(samples, self.states, strict=True) if states]

    def _over_clips(self, values: torch.Tensor) -> list[float | None]:
        """Means over each clip's samples; None where a value is missing."""
        sums = torch.zeros(len(self.ids), dtype=torch.float64)
        sums.index_add_(0, torch.tensor(self.clips), values.double())
        return [float(f"{x:.6g}") if x == x else None for x in (sums / len(QUANTILES)).tolist()]


def gap_figures(name: str, found: Gap | None) -> dict[str, float]:
    """`val_gap_<name>`, `..._low` and `..._high`."""
    return {f"val_gap_{name}{end}": x for end, x in zip(("", "_low", "_high"), found, strict=True)} if found else {}


def _following(group: list[Batch]) -> Iterable[torch.Tensor]:
    """Physics states of the next sample for each of a group: the last one's are the first's."""
    return torch.cat([batch.physics for batch in group]).roll(-1, 0).split([len(batch.physics) for batch in group])


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
