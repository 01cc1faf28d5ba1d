"""Exceptions with exit codes, and the outcome file that reports them to the parent process.

`phantom run`, the torchrun launcher and jobs on a cluster run a stage in a separate process. They name a file in the
environment variable `PHANTOM_OUTCOME`, to which the stage writes its exit code and its error line.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

OUTCOME_ENV = "PHANTOM_OUTCOME"  # path of the outcome file
MAX_ERROR = 4000  # characters of an error line that is read; the kubelet keeps 4096 bytes of a termination message


class UserError(Exception):
    """The user's input is wrong. One line: which file, field or argument, what was found, what is accepted."""

    exit_code = 2


class Interrupted(Exception):
    """Stopped after saving; the same command resumes the work."""

    exit_code = 75


class Terminated(KeyboardInterrupt):
    """SIGTERM: as on Ctrl-C save and end, but leave a job on a cluster running, for the next run to adopt."""


class StageFailed(Exception):
    """A stage failed for a reason other than the user's input. One line."""

    exit_code = 1


class InvalidData(StageFailed):
    """A part of the work cannot be done for what it is given; other parts can. One line."""

    exit_code = 65  # EX_DATAERR of sysexits.h


@dataclass(frozen=True)
class Outcome:
    """How a stage ended: its exit code, its error in one line, and the GPU-hours that its process counted."""

    code: int
    error: str
    gpu_hours: float = 0.0

    def exception(self, prefix: str = "") -> Exception:
        """What the stage raised."""
        kinds: dict[int, type[Exception]] = {2: UserError, 75: Interrupted}
        return kinds.get(self.code, StageFailed)(f"{prefix}{self.error}")


def raise_terminated(number: int, frame: object) -> None:
    """The handler for SIGTERM."""
    raise Terminated


def listed(names: Sequence[object], most: int = 6) -> str:
    """The first `most` of `names`, comma-separated, and how many more, for a one-line message."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(str(name) for name in names[:most]) + more


def write_outcome(code: int, error: str = "", gpu_hours: float = 0.0) -> bool:
    """Writes exit code, error line and cost to the outcome file. Returns False if the parent process named none.

    If a stage has several processes, the first to exit writes it: the others exit because that one did.
    """
    path = os.environ.get(OUTCOME_ENV)
    if path and not (Path(path).exists() and Path(path).stat().st_size):  # in a pod it exists, empty
        cost = {"gpu_hours": round(gpu_hours, 4)} if gpu_hours else {}
        Path(path).write_text(json.dumps({"code": code, "error": error, **cost}), encoding="utf-8")
    return bool(path)


def read_outcome(text: str | None) -> Outcome | None:
    """What `write_outcome` wrote, None if it is something else.

    Whatever runs in a pod can write it: the error becomes one line without control characters, which a terminal would
    obey. It explains a failure, and never makes one a success.
    """
    try:
        found = json.loads(text or "null")
    except (ValueError, RecursionError):
        return None
    code, error = (found.get("code"), found.get("error")) if isinstance(found, dict) else (None, None)
    if type(code) is not int or not isinstance(error, str):
        return None
    hours = found.get("gpu_hours", 0.0)
    counted = hours if isinstance(hours, float) and 0 <= hours < math.inf else 0.0
    line = "".join(letter if letter.isprintable() else " " for letter in error[:MAX_ERROR])
    return Outcome(code, " ".join(line.split()), counted)
