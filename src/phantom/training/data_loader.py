"""Reads latents into batches, with samples prefetched."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain, islice
from pathlib import Path

import torch

from phantom.config import ClipFilter, Params
from phantom.data.latent_set import LatentSet
from phantom.data.online import OnlineLatents
from phantom.data.physics_statistics import measure_statistics
from phantom.data.prefetch import prefetch
from phantom.data.recipe import check_recipe
from phantom.data.shards import LATENTS
from phantom.data.storage import open_latent_store
from phantom.encoders.weights import weight_fingerprints
from phantom.training.conditioning import Batch, TrainingSet
from phantom.training.sampler import DistributedBatchSampler


def open_latents(params: Params, root: Path, split: str, device: torch.device) -> LatentSet:
    """The latents of one split, stored locally or in `storage.latents`, or with physics latents computed online.

    z is standardised if `physics.standardize` is set, by statistics of the training split: those in the index or, where
    there are none, measured now: of all clips, whatever `data.filter` leaves of them for training. Raises UserError if
    they were encoded with settings other than `params`, or the filter leaves none.
    """
    store = open_latent_store(root, params.storage)
    stored = LatentSet(root / LATENTS, split, store)
    check_recipe(stored.recipe, params, weight_fingerprints(params.models, fetch=False))
    latents = stored
    if params.train.physics_latents == "online":
        latents = OnlineLatents(root, split, params, device, store)
    if params.physics.standardize:
        training = latents if split == "train" else open_latents(params, root, "train", device)
        latents.standardized_by = training.standardized_by or training.statistics or measure_statistics(training)
    if split == "train" and params.data.filter is not None:
        latents.keep(ClipFilter.parse(params.data.filter))
    return latents


def read_batches(clips: TrainingSet, sampler: DistributedBatchSampler, samples_ahead: int) -> Iterator[Batch]:
    """The micro-batches of `sampler`, with up to `samples_ahead` further samples prefetched."""
    samples = prefetch(clips.__getitem__, chain.from_iterable(sampler), samples_ahead)
    while batch := list(islice(samples, sampler.share)):
        yield Batch.collate(batch)
