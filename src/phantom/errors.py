"""The ways a command ends early on purpose, and the exit codes they carry."""

from __future__ import annotations

from collections.abc import Sequence


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
