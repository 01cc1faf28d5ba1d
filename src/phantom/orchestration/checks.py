"""What `phantom doctor` says of one thing it has looked at."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

INSTALL = "make install"


@dataclass(frozen=True)
class Check:
    """One thing looked at. `mend` says what to do about it; empty where nothing is to be done."""

    name: str
    ok: bool
    finding: str
    mend: str = ""


def attempt(name: str, check: Callable[[str], Check], mend: str = INSTALL) -> Check:
    """The check's result; what it raises becomes its finding."""
    try:
        return check(name)
    except Exception as error:
        return Check(name, False, first_line(error), mend)


def first_line(error: Exception) -> str:
    """One line for an exception of any library."""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0]}" if text else type(error).__name__
