"""SIGINT and SIGTERM as requests that the training loop answers at the end of a step."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any


@dataclass
class Stop:
    """Set by SIGINT and SIGTERM."""

    is_set: bool = False


@contextmanager
def stop_requests() -> Iterator[Stop]:
    """Within it SIGINT and SIGTERM only ask for a stop, which the loop answers at the end of a step."""
    stop = Stop()

    def ask(*_: Any) -> None:
        stop.is_set = True

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
