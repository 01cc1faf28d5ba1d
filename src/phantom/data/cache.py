"""Files from elsewhere on the local disk: a bounded folder, from which the least recently used ones go first.

Any number of threads and processes may share it. Who uses a file holds a lock on it, and so does who writes one: what
can be locked by another is used by nobody, be it a file or what a killed process left behind.
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

POLL = 0.1  # s between looks for space, while every file is in use


class Cache:
    """At most `limit` bytes in `folder`, what is being fetched included."""

    def __init__(self, folder: Path, limit: int) -> None:
        self.folder, self.limit = folder, limit

    @contextmanager
    def file(self, key: str, size: int, name: str, pieces: Iterable[bytes]) -> Iterator[Path]:
        """The path of the file `key`, made of `pieces` unless it is there; it stays for as long as the context lasts.

        Raises UserError, about `name`, if it is too large to be held; StageFailed if the disk is full.
        """
        if size > self.limit:
            gigabytes = f"{size / 2**30:.3g} GiB"
            raise UserError(f"{name}: {gigabytes}, more than storage.cache_gb {self.limit / 2**30:.3g} can hold")
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / key
        held = self._hold(path) or self._fetch(path, size, name, pieces)
        try:
            os.utime(path, ns=(time.time_ns(),) * 2)  # the kernel's own idea of now is too coarse to order by
            yield path
        finally:
            held.close()

    def forget(self, key: str) -> None:
        """Removes the file `key`, and those whose keys begin so. Whoever has one open goes on with what it has."""
        for path in self.folder.glob(f"{key}*"):
            path.unlink(missing_ok=True)

    def _hold(self, path: Path) -> BinaryIO | None:
        """A lock on the file at `path`; None if there is none."""
        try:
            file = path.open("rb")
        except FileNotFoundError:
            return None
        lock_file(file, fcntl.LOCK_SH)
        try:  # between opening and locking it may have been removed, or replaced
            same = os.path.samestat(os.fstat(file.fileno()), path.stat())
        except FileNotFoundError:
            same = False
        if same:
            return file
        file.close()
        return self._hold(path)

    def _fetch(self, path: Path, size: int, name: str, pieces: Iterable[bytes]) -> BinaryIO:
        part = path.with_suffix(f".{os.urandom(4).hex()}.part")
        with self._reserve(part, size, name) as file:
            try:
                for piece in pieces:
                    file.write(piece)
                file.flush()
                with self._alone():  # who counts in between finds neither name, or both
                    while True:
                        with suppress(FileExistsError):  # another may have been faster, and be reading its file
                            path.hardlink_to(part)
                        if held := self._hold(path):  # before the writer's own lock ends
                            part.unlink()
                            return held
            finally:
                part.unlink(missing_ok=True)

    def _reserve(self, part: Path, size: int, name: str) -> BinaryIO:
        """A new file at `part`, locked, that takes up `size` bytes already: those who ask for space count it."""
        while True:
            with self._alone():
                if self._make_space(size):
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
            time.sleep(POLL)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Lets one at a time count what is there, or change it."""
        with (self.folder / "lock").open("w") as lock:
            lock_file(lock, fcntl.LOCK_EX)
            yield

    def _make_space(self, size: int) -> bool:
        """Removes what nobody uses, oldest first, until `size` more bytes fit."""
        found = []
        for path in self.folder.iterdir():
            with suppress(FileNotFoundError):  # what is damaged, or came to nothing, goes without asking
                found.append((path.stat(), path))
        total = sum(stat.st_size for stat, _ in found)
        for stat, path in sorted(found, key=lambda one: one[0].st_mtime_ns):
            if total + size <= self.limit:
                break
            # PermissionError: another user's file, which is left alone.
            with suppress(FileNotFoundError, BlockingIOError, PermissionError), path.open("r+b") as file:
                lock_file(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.unlink()
                total -= stat.st_size
        return total + size <= self.limit
