"""Lines on stderr: text, or with PHANTOM_LOG=json one JSON object each, for what collects a cluster's logs.

An object has `time` (UTC), `level` (info, warning, error) and `message`, and, null where there is none, `run` (name of
the pipeline run, else id of the MLflow run), `stage` (the command), `step` (of training) and `rank` (of the process).
"""

from __future__ import annotations

import io
import json
import logging
import os
import re
import sys
import threading
from datetime import UTC, datetime
from typing import Any, TextIO

from phantom.errors import UserError

LOG_ENV = "PHANTOM_LOG"
FORMATS = ("text", "json")
KEYS = ("time", "level", "message", "run", "stage", "step", "rank")

context: dict[str, Any] = {"run": None, "stage": None, "step": None}  # of the lines to come
_stream: TextIO | None = None  # the real stderr, while lines are JSON


def configure() -> None:
    """Makes the lines of this process JSON if PHANTOM_LOG says so, also those of libraries. Raises UserError."""
    global _stream
    form = os.environ.get(LOG_ENV) or "text"
    if form not in FORMATS:
        raise UserError(f"{LOG_ENV}: found {form}, accepted: {', '.join(FORMATS)}")
    if form == "json" and _stream is None:
        _stream = sys.stderr
        sys.stderr = _Lines()
        logging.basicConfig(handlers=[_Handler()], format="%(name)s: %(message)s")
        logging.captureWarnings(True)


def is_json() -> bool:
    """Whether lines are JSON."""
    return _stream is not None


def write(message: str, level: str = "info") -> None:
    """Writes one line to stderr, in one piece."""
    if _stream is None:
        print(message, file=sys.stderr, flush=True)
        return
    rank = os.environ.get("RANK", "")
    now = datetime.now(UTC).isoformat(timespec="milliseconds")
    made = {"time": now, "level": level, "message": message, **context, "rank": int(rank) if rank.isdigit() else None}
    _write(json.dumps(made))


def relay(line: str) -> None:
    """Writes a line that another process has written: as it is, or its message where lines are text."""
    if _stream is not None and text_of(line) != line:
        _write(line)
    else:
        write(text_of(line))


def text_of(line: str) -> str:
    """The message of a line that is JSON as above; any other line as it is."""
    if not line.startswith('{"time"'):
        return line
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):  # cut off, or no line of ours, as anything in a pod may write
        return line
    is_ours = found.keys() >= {"level", "message"} and isinstance(found["message"], str)
    return found["message"] if is_ours else line


def _write(line: str) -> None:
    assert _stream is not None
    _stream.write(line + "\n")
    _stream.flush()


class _Lines(io.TextIOBase):
    """Stands for stderr: what libraries write there becomes a JSON object for each line."""

    def __init__(self) -> None:
        self._pending, self._lock = "", threading.Lock()

    def write(self, text: str) -> int:
        with self._lock:
            *lines, self._pending = re.split(r"[\r\n]", self._pending + text)
        for line in filter(str.strip, lines):
            write(line)
        return len(text)

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        assert _stream is not None
        return _stream.fileno()


class _Handler(logging.Handler):
    """Messages of `logging` and of `warnings`, with their levels."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            message = self.format(record).rstrip()
        except Exception:  # wrong arguments in a library's message, which must not stop its work
            self.handleError(record)
            return
        write(message, "error" if record.levelno >= logging.ERROR else record.levelname.lower())
