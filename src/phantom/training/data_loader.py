"""Latents on their way into batches: opened where they lie, and read ahead of their use."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain, islice
from pathlib import Path

import torch

from phantom.config import Params
from phantom.data.online import OnlineLatents
from phantom.data.prefetch import ahead
from phantom.data.shards import LATENTS, LatentSet, refuse_other_recipe
from phantom.data.storage import open_folder
from phantom.encoders.weights import weights_of
from phantom.training.conditioning import Batch, TrainingSet
from phantom.training.sampler import ShareOfBatches


def open_latents(params: Params, root: Path, split: str, device: torch.device) -> LatentSet:
    """The latents of one split, here or in `storage.latents`. Raises UserError where `params` ask for others."""
    storage = params.storage
    store = open_folder(storage.latents, root, storage) if storage.latents else None
    stored = LatentSet(root / LATENTS, split, store)
    refuse_other_recipe(stored.recipe, params, weights_of(params.models, fetch=False))
    return stored if params.train.physics_latents == "stored" else OnlineLatents(root, split, params, device, store)


def read_batches(clips: TrainingSet, sampler: ShareOfBatches, prefetch: int) -> Iterator[Batch]:
    """The batches that `sampler` names, with `prefetch` samples being read beyond the one that is used."""
    samples = ahead(clips.__getitem__, chain.from_iterable(sampler), prefetch)
    while batch := list(islice(samples, sampler.share)):
        yield Batch.of(batch)
