"""External judges: a command from the settings, run in its own environment, whose output files are read here.

Ratings are cached in a folder named by the contents of the videos. Without a judge, everything up to the judge is done,
and the error names the input files to run a judge on elsewhere.
"""

from __future__ import annotations

import hashlib
import json
import shlex
import shutil
import subprocess
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from phantom.config import NATIVE, Judge
from phantom.errors import StageFailed, UserError
from phantom.progress import say


def work_folder(work: Path, name: str, videos: Sequence[Path], *inputs: Any) -> Path:
    """The cache folder in `work` for the ratings of `videos`, named by their contents and by `inputs`."""
    digests = []
    for path in videos:
        with path.open("rb") as file:
            digests.append([path.name, hashlib.file_digest(file, "sha256").hexdigest()])
    text = json.dumps([digests, *inputs], default=str)
    return work / f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:16]}"


def run(
    judge: Judge,
    setting: str,
    out: Path,
    check: Callable[[Path], object],
    native: Sequence[str] = (),
    **placeholders: Any,
) -> Path:
    """Runs the judge's command to create `out`, a file or folder, unless it exists. Returns `out`.

    setting: the judge's section in the settings. check: raises UserError if the output is incomplete. native: the words
    of our own command, for `command: native`, if there is one. placeholders: values of {input}, {task} and others in
    the command. Raises UserError, and StageFailed if the command fails.
    """
    if out.exists():
        return out
    if judge.command is None:
        raise UserError(f"{setting}.command: null, so that nothing judges here")
    if judge.command == NATIVE and not native:
        raise UserError(
            f"{setting}.command: found {NATIVE}, which this benchmark has not; accepted: a command, or null"
        )
    part = out.with_name(f"part-{out.name}")
    _remove(part)  # some judges append to an existing file
    values = {"output": part.resolve(), "weights": _weights(judge.weights)}
    values |= {key: value.resolve() if isinstance(value, Path) else value for key, value in placeholders.items()}
    log = out.with_name(f"{out.stem}.log")
    try:
        # Split before the placeholders are filled in, so that a path with spaces stays one argument.
        words = native if judge.command == NATIVE else shlex.split(judge.command)
        command = [word.format(**values) for word in words]
    except KeyError as error:
        raise UserError(f"{setting}.command: {{{error.args[0]}}} is nothing that this benchmark has") from None
    except ValueError as error:
        raise UserError(f"{setting}.command: found {judge.command!r}, {error}") from None
    say(f"{setting}: judging; what it says goes to {log}")
    with log.open("wb") as file:
        try:
            code = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=file, stderr=file, check=False).returncode
        except OSError as error:
            raise UserError(f"{setting}.command: {command[0]!r} cannot be started: {error.strerror}") from None
    if code or not part.exists():
        said = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        why = f"ended with code {code}" if code else f"wrote no {part.name}"
        raise StageFailed(f"{setting}.command: {why}; its last words: {said[-1] if said else 'none'} ({log})")
    check(part)
    part.replace(out)
    return out


def warn_if_constant(name: str, scores: Mapping[str, float]) -> None:
    """Warns if all videos have the same score: the judge has probably not seen them."""
    if len(scores) > 9 and len(set(scores.values())) == 1:
        value = next(iter(scores.values()))
        say(f"{name}: every score is {value:g}; try the judge on its shipped examples before trusting it")


def _weights(weights: str | None) -> str:
    """An existing folder as an absolute path, a hub id unchanged."""
    return str(Path(weights).resolve()) if weights and Path(weights).exists() else weights or ""


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
