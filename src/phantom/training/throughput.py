"""Throughput since the last log line: samples, tokens and FLOPs per second, MFU, share of time waiting, memory.

Only host clocks are read, and rates are computed only at log lines, which sync with the device anyway to show losses.
"""

from __future__ import annotations

import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from phantom.model import PhantomTransformer3DModel
from phantom.model.flops import Costs, Shape, costs, token_count
from phantom.planning.gpus import GIB, peak_flops
from phantom.training.conditioning import Batch

FIGURES = ("samples_per_second", "tokens_per_second", "tflops_per_second", "mfu", "data_wait", "memory_gib")


class Throughput:
    """Counts samples, tokens and FLOPs of `model` over all processes."""

    def __init__(self, model: PhantomTransformer3DModel, device: torch.device, processes: int) -> None:
        config, projector = model.config, model.alignment
        self.parts, self.device = (config.video, config.physics, config.coupling), device
        self.further = config.lora, projector.config if projector else None, config.force
        self.peak = processes * peak_flops(torch.cuda.get_device_name(device)) if device.type == "cuda" else 0.0
        self._costs: dict[Shape, Costs] = {}
        self._tokens_of: dict[Shape, tuple[int, int]] = {}  # of the video and the physics branch
        self.start()

    def start(self) -> None:
        """Resets all counters."""
        self._began, self._waited = time.monotonic(), 0.0
        self._samples = self._tokens = self._operations = 0

    def count(self, batch: Batch, samples: int, twin_alone: bool = False) -> None:
        """Counts a step over `samples` samples shaped like those of `batch`, of the whole model or its twin alone."""
        video, physics = ((x.shape[2], x.shape[3], x.shape[4]) for x in (batch.video, batch.physics))
        shape = Shape(video, physics, batch.text.shape[1], batch.sigma.shape[1])
        if shape not in self._costs:
            self._costs[shape] = costs(*self.parts, shape, *self.further)
            of_video, of_physics, _ = self.parts
            tokens = token_count(of_video, video), token_count(of_physics, physics) if of_physics else 0
            self._tokens_of[shape] = tokens
        cost = self._costs[shape].physics if twin_alone else self._costs[shape].total
        self._samples += samples
        self._tokens += samples * sum(self._tokens_of[shape][1:] if twin_alone else self._tokens_of[shape])
        self._operations += samples * cost.training

    @contextmanager
    def waiting_for_data(self) -> Iterator[None]:
        """A context for time spent waiting for data."""
        began = time.monotonic()
        yield
        self._waited += time.monotonic() - began

    @contextmanager
    def excluded(self) -> Iterator[None]:
        """A context for time to leave out: validation, sample videos, checkpoints."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)  # work still queued belongs to training
        began = time.monotonic()
        yield
        self._began += time.monotonic() - began

    def figures(self) -> dict[str, float]:
        """The metrics in `FIGURES`; `mfu`, a fraction of the bfloat16 peak, only for GPUs that `planning` knows."""
        seconds = max(time.monotonic() - self._began, 1e-9)
        operations = self._operations / seconds
        if self.device.type == "cuda":
            memory = torch.cuda.max_memory_allocated(self.device)
        else:
            memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        found = {"samples_per_second": self._samples / seconds, "tokens_per_second": self._tokens / seconds}
        found |= {"tflops_per_second": operations / 1e12}
        found |= {"mfu": operations / self.peak} if self.peak else {}
        return found | {"data_wait": self._waited / seconds, "memory_gib": memory / GIB}
