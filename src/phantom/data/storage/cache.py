"""A bounded LRU cache of downloaded files on the local disk.

Any number of threads and processes may share it. Readers and writers hold a shared lock on their file, so a file that
can be locked exclusively is unused and may be evicted, including what a killed process left behind.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from phantom.data.files import lock_file
from phantom.errors import StageFailed, UserError

POLL_SECONDS = 0.1  # between attempts to make space while every file is in use


class Cache:
    """At most `limit` bytes in `folder`, including downloads in progress."""

    def __init__(self, folder: Path, limit: int) -> None:
        self.folder, self.limit = folder, limit

    @contextmanager
    def fetch(self, key: str, size: int, name: str, chunks: Iterable[bytes]) -> Iterator[Path]:
        """Yields the path of the file `key`, writing it from `chunks` if absent; it is not evicted within the context.

        Raises UserError, naming `name`, if the file exceeds the cache; StageFailed if the disk is full.
        """
        if size > self.limit:
            gigabytes = f"{size / 2**30:.3g} GiB"
            raise UserError(f"{name}: {gigabytes}, more than storage.cache_gb {self.limit / 2**30:.3g} can hold")
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / key
        held = self._open_shared(path) or self._download(path, size, name, chunks)
        try:
            os.utime(path, ns=(time.time_ns(),) * 2)  # the kernel's timestamps are too coarse to order by
            yield path
        finally:
            held.close()

    def invalidate(self, key: str) -> None:
        """Removes every file whose key starts with `key`. Processes that have one open can keep reading it."""
        for path in self.folder.glob(f"{key}*"):
            path.unlink(missing_ok=True)

    def _open_shared(self, path: Path) -> BinaryIO | None:
        """Opens `path` with a shared lock; None if it does not exist."""
        try:
            file = path.open("rb")
        except FileNotFoundError:
            return None
        lock_file(file, fcntl.LOCK_SH)
        try:  # it may have been removed or replaced between open and lock
            same = os.path.samestat(os.fstat(file.fileno()), path.stat())
        except FileNotFoundError:
            same = False
        if same:
            return file
        file.close()
        return self._open_shared(path)

    def _download(self, path: Path, size: int, name: str, chunks: Iterable[bytes]) -> BinaryIO:
        part = path.with_suffix(f".{os.urandom(4).hex()}.part")
        with self._reserve(part, size, name) as file:
            try:
                for chunk in chunks:
                    file.write(chunk)
                file.flush()
                with self._exclusive():  # other processes count neither name, or both
                    while True:
                        with suppress(FileExistsError):  # another process may have been faster, and be reading its file
                            path.hardlink_to(part)
                        if held := self._open_shared(path):  # before the writer's own lock is released
                            part.unlink()
                            return held
            finally:
                part.unlink(missing_ok=True)

    def _reserve(self, part: Path, size: int, name: str) -> BinaryIO:
        """Creates `part`, locked and preallocated to `size` bytes, so that other processes count it."""
        while True:
            with self._exclusive():
                if self._evict(size):
                    file = part.open("w+b")
                    lock_file(file, fcntl.LOCK_SH)
                    try:
                        if size:
                            os.posix_fallocate(file.fileno(), 0, size)
                    except OSError as error:
                        file.close()
                        part.unlink()
                        raise StageFailed(
                            f"{self.folder}: {error.strerror} ({size / 2**20:.0f} MiB for {name}); "
                            "make some and run again to go on"
                        ) from None
                    return file
            time.sleep(POLL_SECONDS)

    @contextmanager
    def _exclusive(self) -> Iterator[None]:
        """Serializes counting and changing the contents of the folder."""
        with (self.folder / "lock").open("w") as lock:
            lock_file(lock, fcntl.LOCK_EX)
            yield

    def _evict(self, size: int) -> bool:
        """Evicts unused files, least recently used first. Whether `size` more bytes fit now."""
        found = []
        for path in self.folder.iterdir():
            with suppress(FileNotFoundError):  # corrupt or failed files are removed by others without the lock
                found.append((path.stat(), path))
        total = sum(stat.st_size for stat, _ in found)
        for stat, path in sorted(found, key=lambda one: one[0].st_mtime_ns):
            if total + size <= self.limit:
                break
            # PermissionError: another user's file, left in place.
            with suppress(FileNotFoundError, BlockingIOError, PermissionError), path.open("r+b") as file:
                lock_file(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.unlink()
                total -= stat.st_size
        return total + size <= self.limit
