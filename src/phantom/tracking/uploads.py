"""Copies checkpoints to S3 while training continues, and downloads them to resume where the local ones are lost.

They go to S3 directly: an MLflow server in between would have to relay gigabytes. A queued checkpoint is a folder
of hard links, which outlives both the original and this process: what one process leaves in the outbox, the next one
uploads. Of several queued checkpoints only the newest is uploaded.
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
from phantom.data.storage import Folder, NotFound, open_folder
from phantom.errors import StageFailed, UserError
from phantom.progress import say

OUTBOX = Path("checkpoints/uploads")  # queued checkpoints, by run
COMPLETION_MARKER = "state.json"  # uploaded last: a copy that has this file is complete
RETRY_SECONDS = 60.0

Checkpoint = TypeVar("Checkpoint")


@dataclass(frozen=True)
class UploadedCheckpoint:
    """A complete copy: its name, URI, and the sha256 of each of its files."""

    name: str  # step-0000100
    uri: str
    sha256: dict[str, str]


class CheckpointUploader:
    """Uploads the checkpoints of one run to `target` in a background thread, which calls `on_uploaded` for each.

    outbox: the folder for queued checkpoints; those of an earlier process are uploaded too.
    """

    def __init__(self, target: Folder, outbox: Path, on_uploaded: Callable[[UploadedCheckpoint], None]) -> None:
        self._target, self._outbox, self._on_uploaded = target, outbox, on_uploaded
        self._closing, self._wake = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._work, daemon=True, name="uploads")
        self._thread.start()

    def submit(self, path: Path) -> None:
        """Queues the checkpoint at `path`, which may be deleted as soon as this returns."""
        new = fresh_folder(self._outbox / f".{path.name}.new")
        for file in path.iterdir():
            link(file, new / file.name)
        shutil.rmtree(self._outbox / path.name, ignore_errors=True)
        new.rename(self._outbox / path.name)
        self._wake.set()

    def close(self, wait: bool) -> None:
        """Stops the thread: with `wait`, only once the queue is empty or an upload has failed."""
        self._closing.set()
        self._wake.set()
        if wait:
            self._thread.join()

    def _work(self) -> None:
        while True:
            self._wake.clear()
            closing = self._closing.is_set()  # read before the queue: nothing is submitted after it is set
            queued = sorted(self._outbox.glob("step-*"))
            if queued:
                for superseded in queued[:-1]:
                    shutil.rmtree(superseded, ignore_errors=True)
                try:
                    self._upload(queued[-1])
                    continue
                except (UserError, StageFailed) as error:
                    say(f"checkpoints: {queued[-1].name} was not uploaded: {error}; it stays in {self._outbox}")
            if closing:
                return
            self._wake.wait(RETRY_SECONDS if queued else None)

    def _upload(self, path: Path) -> None:
        files = sorted(path.iterdir(), key=lambda file: (file.name == COMPLETION_MARKER, file.name))
        digests = {}
        for file in files:
            digests[file.name] = sha256(file)
            self._target.upload(file, f"{self._outbox.name}/{path.name}/{file.name}")
        self._on_uploaded(UploadedCheckpoint(path.name, f"{self._target}/{self._outbox.name}/{path.name}", digests))
        shutil.rmtree(path, ignore_errors=True)


def download_newest(
    checkpoints: Path, settings: Storage, root: Path, newest: Callable[[Path], Checkpoint | None]
) -> Checkpoint | None:
    """Downloads the newest intact copy of a run's checkpoints into the folder `checkpoints`, which has none.

    newest: loads the newest checkpoint of a folder, None if it is damaged; then the copy before it is tried. Returns
    None if `storage.checkpoints` is not set or has no copies of this run. Raises UserError or StageFailed if it cannot
    be read, since the run would otherwise start from scratch although it has copies.
    """
    if not settings.checkpoints:
        return None
    copies = open_folder(f"{settings.checkpoints.rstrip('/')}/{checkpoints.name}", root, settings)
    try:
        names = [entry.name for entry in copies.list()]
    except NotFound:
        return None
    for marker in sorted((name for name in names if name.endswith(f"/{COMPLETION_MARKER}")), reverse=True):
        step = marker.removesuffix(f"/{COMPLETION_MARKER}")
        say(f"checkpoints: none in {checkpoints}; downloading {copies}/{step}")
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
