"""Checkpoints are copied to S3 while training goes on: directly, for a server in between would hold gigabytes.

A checkpoint that waits is a folder of links, so that it outlives both its original and this process: what one process
leaves behind the next one sends. Of several that wait only the newest is sent. Where the checkpoints themselves are
lost, with a disk or on another machine, a run goes on from its newest copy.
"""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from phantom.config import Storage
from phantom.data.files import fresh_folder, link, sha256
from phantom.data.storage import Folder, Nothing, open_folder
from phantom.errors import StageFailed, UserError
from phantom.progress import say

OUTBOX = Path("checkpoints/uploads")
LAST = "state.json"  # of a checkpoint's files: where it is, the copy is whole
RETRY_AFTER = 60.0  # s

Found = TypeVar("Found")


@dataclass(frozen=True)
class Uploaded:
    """A checkpoint that is there: its name, its address, and the digest of each of its files."""

    name: str  # step-0000100
    uri: str
    sha256: dict[str, str]


class Uploads:
    """Sends the checkpoints of one run to `to`, from a thread of its own; `done` is called there for each."""

    def __init__(self, to: Folder, outbox: Path, done: Callable[[Uploaded], None]) -> None:
        self._to, self._outbox, self._done = to, outbox, done
        self._over, self._wake = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._work, daemon=True, name="uploads")
        self._thread.start()

    def put(self, path: Path) -> None:
        """Lets the checkpoint at `path` be sent. It may be removed there as soon as this returns."""
        new = fresh_folder(self._outbox / f".{path.name}.new")
        for file in path.iterdir():
            link(file, new / file.name)
        shutil.rmtree(self._outbox / path.name, ignore_errors=True)
        new.rename(self._outbox / path.name)
        self._wake.set()

    def close(self, wait: bool) -> None:
        """Ends the sending, at once or, with `wait`, when nothing waits any more or cannot be sent."""
        self._over.set()
        self._wake.set()
        if wait:
            self._thread.join()

    def _work(self) -> None:
        while True:
            self._wake.clear()
            over = self._over.is_set()  # asked before looking: nothing is put after it
            waiting = sorted(self._outbox.glob("step-*"))
            if waiting:
                for passed_over in waiting[:-1]:
                    shutil.rmtree(passed_over, ignore_errors=True)
                try:
                    self._send(waiting[-1])
                    continue
                except (UserError, StageFailed) as error:
                    say(f"checkpoints: {waiting[-1].name} is not copied: {error}; it is kept in {self._outbox}")
            if over:
                return
            self._wake.wait(RETRY_AFTER if waiting else None)

    def _send(self, path: Path) -> None:
        files = sorted(path.iterdir(), key=lambda file: (file.name == LAST, file.name))
        digests = {}
        for file in files:
            digests[file.name] = sha256(file)
            self._to.upload(file, f"{self._outbox.name}/{path.name}/{file.name}")
        self._done(Uploaded(path.name, f"{self._to}/{self._outbox.name}/{path.name}", digests))
        shutil.rmtree(path, ignore_errors=True)


def bring_back(
    checkpoints: Path, settings: Storage, root: Path, newest: Callable[[Path], Found | None]
) -> Found | None:
    """The newest whole checkpoint of a run that has none here: of its copies, put into the folder `checkpoints`.

    newest: finds it there, unless it is damaged; then the copy before it is taken. None if no copies are made, or none
    are there. Raises UserError or StageFailed if that cannot be seen: the run would begin anew, beside its copies.
    """
    if not settings.checkpoints:
        return None
    copies = open_folder(f"{settings.checkpoints.rstrip('/')}/{checkpoints.name}", root, settings)
    try:
        names = [entry.name for entry in copies.list()]
    except Nothing:
        return None
    for last in sorted((name for name in names if name.endswith(f"/{LAST}")), reverse=True):
        step = last.removesuffix(f"/{LAST}")
        say(f"checkpoints: there is none in {checkpoints}: {copies}/{step} is brought back")
        new = fresh_folder(checkpoints / f".{step}.new")
        for name in names:
            if name.startswith(f"{step}/"):
                copies.download(name, new / name.removeprefix(f"{step}/"))
        shutil.rmtree(checkpoints / step, ignore_errors=True)
        new.rename(checkpoints / step)
        if found := newest(checkpoints):
            return found
        shutil.rmtree(checkpoints / step)
    return None
