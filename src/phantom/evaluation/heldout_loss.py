"""Paired losses on held-out clips: the same clips, noise levels and noises for every model, stored clip by clip.

The difference between two models on one clip has little of the noise that either loss has: most of it is the clip's.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import torch

from phantom.config import Params, StateSource
from phantom.data.latent_set import LatentSet
from phantom.model.noise import sample_generator
from phantom.training.conditioning import Batch, heldout_sample
from phantom.training.objective import PhysicsLoss, losses
from phantom.training.validation import best_constant, clean_error, guess_error

SEED = 0  # of the noises: the same for all models, whatever seed they were trained from
BATCH = 8
CONDITIONS = ("text", "prefix")  # from the caption alone, and after the longest condition prefix


@dataclass(frozen=True)
class Heldout:
    """What is measured: up to `clips` held-out clips at each noise level of `sigmas`."""

    clips: int
    sigmas: tuple[float, ...]


@torch.no_grad()
def heldout_losses(
    model: Any,
    latents: LatentSet,
    params: Params,
    heldout: Heldout,
    device: torch.device,
    physics: bool = True,
    replaced: StateSource | None = None,
) -> dict[str, Any]:
    """Figures of `model` on the clips of `latents`, JSON-able: `ids`; `clips`, name -> a value per clip; `by_sigma`.

    Of each clip: L_v over all noise levels and both conditions, L_v from text and after a prefix, L_v with another
    clip's z and with noise as z, and the share of z that is explained, 1 - |z_hat - z|^2 / |z - mean|^2. A clip
    without condition prefixes, or without another clip of its shape, has null there. by_sigma: mean L_v and explained
    share at each noise level. physics=False: the frozen base, which has L_v alone, as adapters do. replaced: what z is
    in all of them (`oracle`: the clip's own, as ever); the model then has L_v alone, too.
    """
    of_physics, mean = PhysicsLoss(params.physics.prediction, "clean", params.physics.sigma_min), best_constant(latents)
    count, half = min(heldout.clips, len(latents)), params.train.precision == "bfloat16"
    shape = (count, len(heldout.sigmas), len(CONDITIONS))
    own, other, noise, error, variance = (torch.full(shape, torch.nan) for _ in range(5))
    model.eval()

    by_z = physics and model.has_physics and replaced is None

    def loss(batch: Batch) -> Any:
        with torch.autocast(device.type, torch.bfloat16, enabled=half):
            found = losses(model, batch.to(device), physics, of_physics)
        return type(found)(found.video.cpu(), found.physics.cpu())

    for group in _groups(latents, count):
        for (level, sigma), (column, condition) in product(enumerate(heldout.sigmas), enumerate(CONDITIONS)):
            samples = _samples(latents, group, params, sigma, condition)
            for numbers, batch, rolled in _batches(samples):
                if replaced == "other" and len(samples) == 1:
                    continue
                given = {"other": rolled, "noise": batch.noise_physics}.get(replaced or "", batch.physics)
                found = loss(replace(batch, physics=given))
                own[numbers, level, column] = found.video
                if by_z:
                    error[numbers, level, column] = clean_error(batch, found.physics, of_physics)
                    variance[numbers, level, column] = guess_error(batch, mean)
                    noise[numbers, level, column] = loss(replace(batch, physics=batch.noise_physics)).video
                    if len(samples) > 1:
                        other[numbers, level, column] = loss(replace(batch, physics=rolled)).video

    by_clip = {
        "heldout_loss_video": own.nanmean(dim=(1, 2)),
        **{f"heldout_loss_video_{name}": own[:, :, i].nanmean(dim=1) for i, name in enumerate(CONDITIONS)},
    }
    by_sigma = {"heldout_loss_video": own.nanmean(dim=(0, 2))}
    if by_z:
        by_clip |= {
            "heldout_loss_video_other_z": other.nanmean(dim=(1, 2)),
            "heldout_loss_video_noise_z": noise.nanmean(dim=(1, 2)),
            "heldout_physics_explained": 1 - error.nansum(dim=(1, 2)) / variance.nansum(dim=(1, 2)),
        }
        by_sigma["heldout_physics_explained"] = 1 - error.nansum(dim=(0, 2)) / variance.nansum(dim=(0, 2))
    return {
        "ids": latents.ids[:count],
        "clips": {name: _rounded(values) for name, values in by_clip.items()},
        "by_sigma": {name: _rounded(values) for name, values in by_sigma.items()},
    }


def _groups(latents: LatentSet, count: int) -> list[list[int]]:
    """The first `count` clips, grouped by their shape."""
    found: dict[tuple, list[int]] = defaultdict(list)
    for index in range(count):
        found[latents.shapes[index]].append(index)
    return list(found.values())


def _samples(
    latents: LatentSet, clips: Sequence[int], params: Params, sigma: float, condition: str
) -> list[tuple[int, Batch]]:
    """Clip and sample of each clip that has the condition."""
    made = []
    for index in clips:
        clip = latents[index]
        if condition == "prefix" and not clip.prefixes:
            continue
        prefix_frames = max(clip.prefixes) if condition == "prefix" else None
        made.append((index, heldout_sample(clip, params, sigma, sample_generator(SEED, index), prefix_frames)))
    return made


def _batches(samples: list[tuple[int, Batch]]) -> Iterator[tuple[list[int], Batch, torch.Tensor]]:
    """Clips, batch, and the physics states of the next clip for each: the last one's is the first."""
    for start in range(0, len(samples), BATCH):
        part = samples[start : start + BATCH]
        following = [samples[(start + i + 1) % len(samples)][1].physics for i in range(len(part))]
        yield [index for index, _ in part], Batch.collate([one for _, one in part]), torch.cat(following)


def _rounded(values: torch.Tensor) -> list[float | None]:
    """Six significant digits; null for NaN."""
    return [None if value != value else float(f"{value:.6g}") for value in values.tolist()]
