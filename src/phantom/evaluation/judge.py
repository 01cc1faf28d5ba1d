"""A judge of others: a command from the settings, run in its own environment, whose files are read here.

What it has judged stays in a folder named by the contents of the videos, and is not judged again. Where there is no
judge everything else is done, and the error says which files to take to one.
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

from phantom.config import Judge
from phantom.errors import StageFailed, UserError
from phantom.progress import say

WORK = Path("checkpoints/judged")


def place(work: Path, name: str, videos: Sequence[Path], *made_of: Any) -> Path:
    """A folder of `work` for what is judged of `videos`: another one where a video, or `made_of`, is another."""
    digests = []
    for path in videos:
        with path.open("rb") as file:
            digests.append([path.name, hashlib.file_digest(file, "sha256").hexdigest()])
    text = json.dumps([digests, *made_of], default=str)
    return work / f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:16]}"


def run(judge: Judge, setting: str, out: Path, check: Callable[[Path], object], **places: Any) -> Path:
    """`out`, a file or folder that the judge's command makes, unless it is there.

    setting: the judge's section in the settings. check: raises UserError if what the judge has made is not whole.
    places: what the command's {input}, {task} and others stand for. Raises UserError, and StageFailed if it fails.
    """
    if out.exists():
        return out
    if judge.command is None:
        raise UserError(f"{setting}.command: null, so that nothing judges here")
    part = out.with_name(f"part-{out.name}")
    _remove(part)  # some judges append to what is there
    told = {"output": part.resolve(), "weights": _weights(judge.weights)}
    told |= {key: value.resolve() if isinstance(value, Path) else value for key, value in places.items()}
    log = out.with_name(f"{out.stem}.log")
    try:
        # Split before anything is filled in: a path with a space in it stays one argument.
        command = [word.format(**told) for word in shlex.split(judge.command)]
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
    """A judge that gives all videos the same has probably not seen them."""
    if len(scores) > 9 and len(set(scores.values())) == 1:
        value = next(iter(scores.values()))
        say(f"{name}: every score is {value:g}; try the judge on its shipped examples before trusting it")


def _weights(weights: str | None) -> str:
    """A folder by its whole path, an id as it is."""
    return str(Path(weights).resolve()) if weights and Path(weights).exists() else weights or ""


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
