"""`train.profile`: torch's profiler, and on a GPU the allocator's history, over a window of steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, record_function

MEMORY_EVENTS = 200_000  # allocations and frees that a snapshot keeps, the newest


class StepProfiler:
    """Writes `trace.json.gz` of the steps `window` (first and last, from 1), and `memory.pickle` on a GPU.

    window: None traces nothing. folder: of the files. publish: called with each of them, once it is written.
    """

    def __init__(
        self, window: tuple[int, int] | None, folder: Path, device: torch.device, publish: Callable[[Path], None]
    ) -> None:
        self.window, self.folder, self.publish = window, folder, publish
        self.on_gpu = device.type == "cuda"
        self._profile: profile | None = None

    @contextmanager
    def step(self, number: int) -> Iterator[None]:
        """A context for step `number`."""
        if self.window is None or not self.window[0] <= number <= self.window[1]:
            yield
            return
        if self._profile is None:
            self._start()
        with record_function(f"step {number}"):
            yield
        if number == self.window[1]:
            self._write()

    def close(self) -> None:
        """Stops, and writes nothing, if a step of the window is still to come."""
        if self._profile is not None:
            self._stop()

    def _start(self) -> None:
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self.on_gpu else [])]
        if self.on_gpu:
            torch.cuda.memory._record_memory_history(max_entries=MEMORY_EVENTS)
        self._profile = profile(activities=activities, record_shapes=True)
        self._profile.start()

    def _stop(self) -> profile:
        found, self._profile = self._profile, None
        assert found is not None
        found.stop()
        if self.on_gpu:
            torch.cuda.memory._record_memory_history(enabled=None)
        return found

    def _write(self) -> None:
        trace, memory = self.folder / "trace.json.gz", self.folder / "memory.pickle"
        self.folder.mkdir(parents=True, exist_ok=True)
        if self.on_gpu:
            torch.cuda.memory._dump_snapshot(str(memory))  # before the history is dropped
        self._stop().export_chrome_trace(str(trace))
        for path in (trace, *([memory] if self.on_gpu else [])):
            self.publish(path)
