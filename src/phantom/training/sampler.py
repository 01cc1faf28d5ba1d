"""Which clips form which batch: a function of (seed, epoch), independent of the number of processes and workers."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence

import numpy as np

Shape = tuple[int, ...]


def epoch_batches(shapes: Sequence[Shape], batch_size: int, seed: int, epoch: int) -> list[list[int]]:
    """Clip indices of an epoch's batches, in random order.

    A batch has clips of one shape. The last batch of a shape is filled up with clips from its first.
    shapes: of each clip's latents.
    """
    rng = np.random.default_rng([seed, epoch])
    batches: list[list[int]] = []
    buckets: dict[Shape, list[int]] = defaultdict(list)
    for index, shape in enumerate(shapes):
        buckets[shape].append(index)
    for _, bucket in sorted(buckets.items()):
        order = rng.permutation(bucket).tolist()
        count = -(-len(order) // batch_size)
        filled = np.resize(order, count * batch_size).tolist()
        batches += [filled[i * batch_size : (i + 1) * batch_size] for i in range(count)]
    return [batches[i] for i in rng.permutation(len(batches))]


class DistributedBatchSampler:
    """One process's share of every micro-batch in `steps`, as lists of keys (clip, number of the sample in the run).

    A step's global batch of `batch_size` is split into `accumulation` micro-batches, and each of those over `processes`
    processes.
    """

    def __init__(
        self,
        shapes: Sequence[Shape],
        batch_size: int,
        seed: int,
        steps: range,
        accumulation: int = 1,
        process: int = 0,
        processes: int = 1,
    ) -> None:
        self.shapes, self.batch_size, self.seed, self.steps = shapes, batch_size, seed, steps
        self.accumulation, self.process, self.processes = accumulation, process, processes

    @property
    def share(self) -> int:
        """Samples per process and micro-batch."""
        return self.batch_size // self.accumulation // self.processes

    def __len__(self) -> int:
        return len(self.steps) * self.accumulation

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        per_epoch = len(epoch_batches(self.shapes, self.batch_size, self.seed, 0))
        share = self.share
        epoch, batches = -1, []
        for step in self.steps:
            if step // per_epoch != epoch:
                epoch = step // per_epoch
                batches = epoch_batches(self.shapes, self.batch_size, self.seed, epoch)
            clips = batches[step % per_epoch]
            keys = [(clip, step * self.batch_size + i) for i, clip in enumerate(clips)]
            for micro in range(self.accumulation):
                start = (micro * self.processes + self.process) * share
                yield keys[start : start + share]
