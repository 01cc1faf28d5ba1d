"""What the checks of `phantom doctor` share: their result, one-line errors, package versions."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

INSTALL = "make install"


@dataclass(frozen=True)
class Check:
    """Result of one check. `fix` says what to do if it failed; a check that cannot fail has none."""

    name: str
    ok: bool
    finding: str
    fix: str = ""

    def as_json(self) -> dict[str, str | bool]:
        """Keys of `phantom doctor --json`, where `fix` is called `mend`."""
        return {"name": self.name, "ok": self.ok, "finding": self.finding, "mend": self.fix}


def attempt(name: str, check: Callable[[str], Check], fix: str = INSTALL) -> Check:
    """Runs `check`. An exception of any kind is a failure, with its first line as the finding."""
    try:
        return check(name)
    except Exception as error:
        return Check(name, False, first_line(error), fix)


def first_line(error: Exception) -> str:
    """An exception of any library in one line: its type and the first line of its message."""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0]}" if text else type(error).__name__


def check_packages(name: str, packages: tuple[str, ...], root: Path) -> Check:
    """Checks that `packages` are installed, in the versions of `root`/constraints.txt if that file exists."""
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
