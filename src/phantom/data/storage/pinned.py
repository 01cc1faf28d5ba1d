"""A share of a data set's shards in a remote folder, which stays on a local disk once it is read."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

import numpy as np

from phantom.data.files import NoLocks, lock_file
from phantom.data.storage.files import Arrays, Entry, Ranges, read_file_ranges
from phantom.data.storage.s3 import S3Folder

LOCK = ".lock"  # of the folder of a data set, held by each process that reads it


class PinnedFolder:
    """`store`, of whose files those that `pin` names are kept under `place`, range by range, within `limit` bytes.

    Any number of processes may share `place`: which files these are is a function of the names, and each set of names
    has a folder, deleted only when no process has it any more. Names that are hashes make it a random share.
    """

    is_remote = True

    def __init__(self, store: S3Folder, place: Path, limit: int) -> None:
        self.store, self.place, self.limit = store, place, limit
        self._pinned: set[str] = set()
        self._folder = place  # of the data set
        self._lock: IO[Any] | None = None

    def __str__(self) -> str:
        return str(self.store)

    def pin(self, names: Iterable[str]) -> None:
        """Keeps the first of these files, by name, that fit; what else is kept, and not used, is deleted."""
        sizes = {entry.name: entry.size for entry in self.store.list()}
        wanted = sorted({*names} & sizes.keys())
        left, self._pinned = self.limit, set()
        for name in wanted:
            if (left := left - sizes[name]) < 0:
                break
            self._pinned.add(name)
        key = hashlib.sha256("\n".join([str(self.store), *wanted]).encode()).hexdigest()[:12]
        self._folder = self.place / key
        self._folder.mkdir(parents=True, exist_ok=True)
        self._lock = _hold(self._folder, fcntl.LOCK_SH)
        for path in self._folder.iterdir():
            if path.name not in {*self._pinned, LOCK}:
                shutil.rmtree(path, ignore_errors=True)
        for folder in self.place.iterdir():
            if folder != self._folder and (lock := _hold(folder, fcntl.LOCK_EX)):
                shutil.rmtree(folder, ignore_errors=True)
                lock.close()

    def list(self) -> list[Entry]:
        """As `S3Folder.list`."""
        return self.store.list()

    def read_ranges(self, name: str, ranges: Ranges) -> Arrays:
        """As `S3Folder.read_ranges`."""
        if name not in self._pinned:
            return self.store.read_ranges(name, ranges)
        found = {one: raw for one in ranges if (raw := self._read(name, *one)) is not None}
        missing = [one for one in ranges if one not in found]
        for one, fetched in zip(missing, self.store.read_ranges(name, missing) if missing else [], strict=True):
            self._write(name, *one, fetched)
            found[one] = fetched
        return [found[one] for one in ranges]

    def invalidate(self, name: str) -> None:
        """Drops what is kept of the file `name`, so that it is fetched again."""
        shutil.rmtree(self._folder / name, ignore_errors=True)

    def _read(self, name: str, start: int, stop: int) -> np.ndarray | None:
        try:
            (raw,) = read_file_ranges(self._folder / name / f"{start}-{stop}", [(0, stop - start)])
        except FileNotFoundError:
            return None
        return raw if len(raw) == stop - start else None

    def _write(self, name: str, start: int, stop: int, raw: np.ndarray) -> None:
        path = self._folder / name / f"{start}-{stop}"
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f"{path.name}.{os.urandom(4).hex()}.part")
        try:
            with suppress(FileNotFoundError):  # another process has just dropped the shard
                part.write_bytes(raw.data)
                part.replace(path)
        finally:
            part.unlink(missing_ok=True)


def _hold(folder: Path, kind: int) -> IO[Any] | None:
    """The lock of a data set's folder, held until it is closed; None if another process has it, or it is gone."""
    try:
        file = (folder / LOCK).open("a+")
    except (FileNotFoundError, NotADirectoryError):
        return None
    try:
        with suppress(NoLocks):  # then the newest data set evicts the others
            lock_file(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        return None
    return file
