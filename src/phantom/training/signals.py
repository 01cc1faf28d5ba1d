"""SIGINT and SIGTERM as stop requests, which the training loop handles at the end of a step."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any


@dataclass
class StopRequest:
    """Set by SIGINT and SIGTERM."""

    is_set: bool = False


@contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """A context in which SIGINT and SIGTERM set the request instead of interrupting; handlers are restored after it."""
    request = StopRequest()

    def handle(*_: Any) -> None:
        request.is_set = True

    previous = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield request
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
