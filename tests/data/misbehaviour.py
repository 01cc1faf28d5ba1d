"""What calls of a worker process may do to it. Few imports: the process makes them too."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import numpy as np

from phantom.data.clip_file import make_clips


def own_id() -> int:
    return os.getpid()


def die(number: int) -> None:
    os.kill(os.getpid(), number)


def die_once(mark: Path) -> str:
    if not mark.exists():
        mark.touch()
        die(signal.SIGKILL)
    return "alive"


def spin() -> None:
    while True:
        pass


def swell(gib: float) -> int:
    return np.ones(int(gib * 2**30), np.uint8).size


def refuse(error: Exception) -> None:
    raise error


def crash_on_b(source: Path, *arguments):
    """As libav would, where a file is made for it."""
    if Path(source).name == "b.mp4":
        die(signal.SIGSEGV)
    return make_clips(source, *arguments)
