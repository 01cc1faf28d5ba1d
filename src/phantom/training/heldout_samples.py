"""The samples of validation: split over the processes, and made anew at every pass."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch

from phantom.config import Params
from phantom.data.latent_set import Latents, LatentSet
from phantom.model.noise import sample_generator, shift_noise
from phantom.training import process_group
from phantom.training.conditioning import Batch, heldout_sample
from phantom.training.sampler import Shape

QUANTILES = (0.125, 0.375, 0.625, 0.875)  # of u, before the shift
MAX_CLIPS = 32


class Sample(NamedTuple):
    """A held-out clip, by its index, at the noise level of a quantile."""

    clip: int
    quantile: float


class HeldoutSamples:
    """Every clip at every quantile, every other clip with its longest prefix; a clip's noise is the same every time.

    Each process has a share of the samples, or `train.mesh.context` processes have one together. It keeps their clips,
    without noise, which is a function of the seed.
    """

    def __init__(self, clips: LatentSet, params: Params, batch_size: int) -> None:
        self.clips, self.params, self.ids = clips, params, clips.ids[:MAX_CLIPS]
        shapes = clips.shapes[:MAX_CLIPS]
        process, processes = process_group.data_place(params.train.mesh.context)
        every = [Sample(clip, quantile) for clip in range(len(shapes)) for quantile in QUANTILES]
        ends = [len(every) * i // processes for i in range(processes + 1)]
        shares = [_batches(every[ends[i] : ends[i + 1]], shapes, batch_size) for i in range(processes)]
        self.all = [sample for batch in _batches(every, shapes, batch_size) for sample in batch]
        listed = [sample for share in shares for batch in share for sample in batch]
        self._order = [listed.index(sample) for sample in self.all]
        self.batches = shares[process]
        self.own = [sample for batch in self.batches for sample in batch]
        # A sharded model needs all processes in every forward pass: one that has done its share repeats a sample.
        idle = max(map(len, shares)) - len(self.batches)
        self.rounds = self.batches + [(self.own or self.all)[:1]] * idle
        same_shape = {shape: [i for i, other in enumerate(shapes) if other == shape] for shape in set(shapes)}
        self.is_alone = [len(same_shape[shapes[sample.clip]]) == 1 for sample in self.all]
        self._following = {i: of[(of.index(i) + 1) % len(of)] for of in same_shape.values() for i in of}
        self._kept = {i: self._read(i) for i in sorted({sample.clip for sample in self.own})}

    def make(self, samples: list[Sample]) -> Batch:
        """The batch of `samples`, on the CPU."""
        return Batch.collate([self._make(sample) for sample in samples])

    def physics_of_others(self, samples: list[Sample]) -> torch.Tensor:
        """Physics states (B, C_z, T, h, w) of the next clip of the same shape for each of `samples`."""
        others = (Sample(self._following[sample.clip], sample.quantile) for sample in samples)
        return torch.cat([self._make(sample).physics for sample in others])

    def gather(self, values: torch.Tensor) -> torch.Tensor:
        """Values of each process's own samples, (n, ...) on the CPU, to those of `all`, in its order. A collective."""
        every = process_group.gather_all(values)[:: self.params.train.mesh.context]
        return torch.cat(every)[self._order]

    def clip(self, index: int) -> Latents:
        """The clip, with no prefix but the one of its samples."""
        return self._kept.get(index) or self._read(index)

    def _read(self, index: int) -> Latents:
        clip = self.clips[index]
        longest = max(clip.prefixes) if clip.prefixes and index % 2 else None
        return replace(clip, prefixes={} if longest is None else {longest: clip.prefixes[longest]})

    def _make(self, sample: Sample) -> Batch:
        clip, train = self.clip(sample.clip), self.params.train
        sigma = float(shift_noise(torch.tensor(sample.quantile), train.flow_shift))
        generator = sample_generator(train.seed, sample.clip)
        return heldout_sample(clip, self.params, sigma, generator, next(iter(clip.prefixes), None))


def _batches(samples: Sequence[Sample], shapes: Sequence[Shape], batch_size: int) -> list[list[Sample]]:
    """Batches of different clips of one shape at one noise level."""
    groups: dict[tuple[Shape, float], list[Sample]] = defaultdict(list)
    for sample in samples:
        groups[shapes[sample.clip], sample.quantile].append(sample)
    return [of[start : start + batch_size] for of in groups.values() for start in range(0, len(of), batch_size)]
