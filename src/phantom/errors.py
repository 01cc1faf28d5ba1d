"""How a command ends: its exceptions, their exit codes, and the file by which a process tells its parent.

`phantom run`, torchrun's launcher and the watcher of a pod each start a stage in a process of its own. They name a file
in the environment variable `PHANTOM_OUTCOME`, into which the stage writes its exit code and its one line of error.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

OUTCOME_ENV = "PHANTOM_OUTCOME"  # names the file that takes the exit code and the error line


class UserError(Exception):
    """The user's input is wrong. One line: which file, field or argument, what was found, what is accepted."""

    exit_code = 2


class Interrupted(Exception):
    """The work was stopped after everything was saved; running the same command again goes on."""

    exit_code = 75


class StageFailed(Exception):
    """A stage of the pipeline failed for a reason that is not the user's input. One line."""

    exit_code = 1


def listed(names: Sequence[object], most: int = 6) -> str:
    """The first few of `names`, for a one-line message."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(str(name) for name in names[:most]) + more


def write_outcome(code: int, error: str = "") -> bool:
    """Writes exit code and error line for the process that started this one. False where none asked for them.

    Of several processes of a stage the first to end is heard: the others end because it did.
    """
    path = os.environ.get(OUTCOME_ENV)
    if path and not (Path(path).exists() and Path(path).stat().st_size):  # in a pod there is an empty one
        Path(path).write_text(json.dumps({"code": code, "error": error}), encoding="utf-8")
    return bool(path)
