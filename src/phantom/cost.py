"""GPU-hours of this process, for which it has held its GPU, busy or not, and of what it has started elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

HOUR = 3600.0  # s

_started = time.monotonic()
_elsewhere = 0.0


def add_gpu_hours(hours: float) -> None:
    """Counts GPU-hours of other processes, or of a job on a cluster, that worked for this one."""
    global _elsewhere
    _elsewhere += hours


def gpu_hours() -> float:
    """GPU-hours so far. A process holds one GPU from its start if it has used one."""
    torch = sys.modules.get("torch")
    holds_gpu = torch is not None and torch.cuda.is_initialized()
    return _elsewhere + holds_gpu * (time.monotonic() - _started) / HOUR


@contextmanager
def processes_with_gpus(count: int) -> Iterator[None]:
    """A context in which `count` other processes, each with a GPU, work for this one."""
    began = time.monotonic()
    try:
        yield
    finally:
        add_gpu_hours(count * (time.monotonic() - began) / HOUR)
