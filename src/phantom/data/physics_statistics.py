"""Mean and standard deviation of each channel of z over the training clips: with them z is standardised.

`phantom encode` measures them on a sample of clips as it writes them; they are in data/latents/index.json.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from phantom.model.physics import standardize

if TYPE_CHECKING:
    from phantom.data.latent_set import LatentSet

STATISTICS_CLIPS = 256  # in the sample: 8 GB of ViT-L features of 121 frames


@dataclass(frozen=True)
class Statistics:
    """Mean and standard deviation of each channel of z, (C_z,), over a sample of the training clips."""

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def apply(self, z: torch.Tensor) -> torch.Tensor:
        """(z - mean) / std for z (C_z, T, h, w); empty tensors stay empty."""
        return standardize(z, self.mean, self.std) if z.numel() else z

    def undo(self, z: torch.Tensor) -> torch.Tensor:
        """The inverse of `apply`, for z (B, C_z, T, h, w)."""
        mean, std = (torch.tensor(value, device=z.device).view(-1, 1, 1, 1) for value in (self.mean, self.std))
        return z * std + mean


def statistics_sample(ids: Sequence[str]) -> list[str]:
    """The `STATISTICS_CLIPS` of the training clips `ids` that come first by a hash: independent of order and shards."""
    return sorted(ids, key=lambda id_: hashlib.sha256(id_.encode()).digest())[:STATISTICS_CLIPS]


def channel_sums(z: torch.Tensor) -> list[Any]:
    """Of z (C_z, T, h, w): the number of values per channel, and per channel their sum and the sum of their squares."""
    z = z.double()
    return [z[0].numel(), z.sum(dim=(1, 2, 3)).tolist(), z.square().sum(dim=(1, 2, 3)).tolist()]


def combine_sums(sums: Sequence[Sequence[Any]]) -> Statistics | None:
    """Mean and standard deviation, to six significant digits, of clips with these `channel_sums`; None without any."""
    if not sums:
        return None
    count = sum(of[0] for of in sums)
    total, squares = (torch.tensor([of[part] for of in sums], dtype=torch.float64).sum(dim=0) for part in (1, 2))
    mean = total / count
    std = (squares / count - mean.square()).clamp_min(1e-8).sqrt()
    return Statistics(*(tuple(float(f"{x:.6g}") for x in value.tolist()) for value in (mean, std)))


def measure_statistics(latents: LatentSet) -> Statistics | None:
    """Statistics of a set of training clips, read for this; None where there are none with physics latents."""
    index = {id_: number for number, id_ in enumerate(latents.ids)}
    states = (latents[index[id_]].physics for id_ in statistics_sample(latents.ids))
    return combine_sums([channel_sums(z) for z in states if z.numel()])
