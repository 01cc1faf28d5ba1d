"""A share of a data set's shards in a remote folder, which stays on a local disk once it is read."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

import numpy as np

from phantom.data.storage.files import Arrays, Entry, Ranges, read_file_ranges
from phantom.data.storage.s3 import S3Folder


class PinnedFolder:
    """`store`, of whose files those that `pin` names are kept in `place`, range by range, within `limit` bytes.

    Any number of processes may share `place`: which files these are is a function of the names, and nothing is evicted
    but files of others. Names that are hashes make it a random share.
    """

    is_remote = True

    def __init__(self, store: S3Folder, place: Path, limit: int) -> None:
        self.store, self.place, self.limit = store, place, limit
        self._pinned: set[str] = set()

    def __str__(self) -> str:
        return str(self.store)

    def pin(self, names: Iterable[str]) -> None:
        """Keeps the first of these files, by name, that fit; what else is kept is deleted."""
        sizes = {entry.name: entry.size for entry in self.store.list()}
        left, self._pinned = self.limit, set()
        for name in sorted({*names} & sizes.keys()):
            if (left := left - sizes[name]) < 0:
                break
            self._pinned.add(name)
        for path in self.place.glob("*"):
            if path.name not in self._pinned:
                shutil.rmtree(path, ignore_errors=True)

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
        shutil.rmtree(self.place / name, ignore_errors=True)

    def _read(self, name: str, start: int, stop: int) -> np.ndarray | None:
        try:
            (raw,) = read_file_ranges(self.place / name / f"{start}-{stop}", [(0, stop - start)])
        except FileNotFoundError:
            return None
        return raw if len(raw) == stop - start else None

    def _write(self, name: str, start: int, stop: int, raw: np.ndarray) -> None:
        path = self.place / name / f"{start}-{stop}"
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f"{path.name}.{os.urandom(4).hex()}.part")
        try:
            with suppress(FileNotFoundError):  # another process has just dropped the shard
                part.write_bytes(raw.data)
                part.replace(path)
        finally:
            part.unlink(missing_ok=True)
