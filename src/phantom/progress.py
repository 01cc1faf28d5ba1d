"""Progress on stderr: a rich bar on a terminal, otherwise a line every few seconds (`logs`)."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from phantom import logs

PLAIN_LINE_INTERVAL_SECONDS = 5.0


class Bar:
    """A progress bar: `advance` counts units; its `note` is a short text, such as the current loss."""

    def __init__(self, stage: str, total: int, unit: str, done: int, rich: Progress | None, shown: bool = True) -> None:
        self.stage, self.total, self.unit, self.done, self._shown = stage, total, unit, done, shown
        self._start_done, self._start, self._last, self._note = done, time.monotonic(), 0.0, ""
        self._rich = rich
        self._task: TaskID | None = (
            rich.add_task(stage, total=total, completed=done, unit=unit, note="") if rich else None
        )

    def advance(self, count: int = 1, note: str | None = None) -> None:
        """Adds `count` finished units."""
        self.done += count
        self._note = self._note if note is None else note
        if self._rich is not None and self._task is not None:
            self._rich.update(self._task, completed=self.done, note=self._note)
        elif self._shown and (time.monotonic() - self._last >= PLAIN_LINE_INTERVAL_SECONDS or self.done == self.total):
            self._last = time.monotonic()
            say(self._line())

    def _line(self) -> str:
        rate = (self.done - self._start_done) / max(time.monotonic() - self._start, 1e-9)
        left = (self.total - self.done) / rate if rate > 0 else float("inf")
        eta = f"{left:.0f} s left" if left < float("inf") else "time left unknown"
        note = f", {self._note}" if self._note else ""
        return f"{self.stage}: {self.done}/{self.total} {self.unit}, {rate:.1f} {self.unit}/s, {eta}{note}"


@contextmanager
def track(stage: str, total: int, unit: str, done: int = 0, shown: bool = True) -> Iterator[Bar]:
    """Shows progress over `total` units of `stage`, of which an earlier run finished `done`.

    shown: False counts without showing it, as do all but one of several processes.
    """
    console = Console(stderr=True)
    if not shown or logs.is_json() or not console.is_terminal:
        yield Bar(stage, total, unit, done, None, shown)
        return
    columns = (
        TextColumn("[bold]{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[unit]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=console) as rich:
        yield Bar(stage, total, unit, done, rich)


def is_first_process() -> bool:
    """Whether this process, of those that torchrun started, shows progress and prints the result."""
    return os.environ.get("RANK", "0") == "0"


def say(text: str, level: str = "info") -> None:
    """Prints one line to stderr. level: info, warning or error."""
    logs.write(text, level)


@contextmanager
def quiet_loading() -> Iterator[None]:
    """Hides the weight-loading bars of diffusers and transformers; the hub's download bars stay."""
    from diffusers.utils import logging as diffusers
    from huggingface_hub.utils import are_progress_bars_disabled, enable_progress_bars
    from transformers.utils import logging as transformers

    shown = [library for library in (diffusers, transformers) if library.is_progress_bar_enabled()]
    downloads = not are_progress_bars_disabled()
    for library in shown:
        library.disable_progress_bar()
    if downloads:  # transformers disables these together with its own
        enable_progress_bars()
    try:
        yield
    finally:
        for library in shown:
            library.enable_progress_bar()
