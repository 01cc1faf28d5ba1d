"""What every check of `phantom doctor` is made of: its result, its errors in one line, versions of packages."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

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


def check_packages(name: str, packages: tuple[str, ...], root: Path) -> Check:
    """The installed versions are the tested ones: those of `constraints.txt` in `root`, where there is one."""
    file = root / "constraints.txt"
    tested = dict(re.findall(r"^([\w.-]+)==(\S+)", file.read_text(encoding="utf-8"), re.M)) if file.is_file() else {}
    found = {package: version(package) for package in packages}
    wrong = [
        f"{package} {here or 'is missing'}" + (f", tested is {tested[package]}" if package in tested else "")
        for package, here in found.items()
        if here is None or (package in tested and here.split("+")[0] != tested[package])
    ]
    if wrong:
        return Check(name, False, "; ".join(wrong), INSTALL)
    listed = ", ".join(f"{package} {found[package]}" for package in packages[:3])
    against = "" if tested else " (no constraints.txt here to compare with)"
    return Check(name, True, f"{listed}{' and others' * (len(packages) > 3)}{against}")


def version(package: str) -> str | None:
    """The installed version of a package; None if it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def numbers(version: str) -> tuple[int, ...]:
    """The numbers of a version, for comparison: "3.8.1" -> (3, 8, 1)."""
    return tuple(int(part) for part in re.findall(r"\d+", version))
