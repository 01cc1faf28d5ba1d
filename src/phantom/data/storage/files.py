"""What local and remote folders have in common: directory entries, path checks, and a file made of several parts."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

import numpy as np

from phantom.errors import UserError

CHUNK_BYTES = 2**20
Ranges = Sequence[tuple[int, int]]  # (start, stop)
Arrays = list[np.ndarray]


class NotFound(UserError):
    """The folder does not exist, or has no files; or the file in a bucket does not exist."""


class Refused(UserError):
    """The store refuses access, or a file has changed meanwhile: the same request may succeed later."""


class Changed(Refused):
    """The file has changed since its version was looked up."""


@dataclass(frozen=True)
class Entry:
    """A file in a folder. `version` changes whenever its contents do."""

    name: str  # relative to the folder, with slashes
    size: int
    version: str


def escapes_folder(name: str) -> bool:
    """Whether a relative path would lead out of its folder."""
    return PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts


def read_file_ranges(path: Path, ranges: Ranges) -> Arrays:
    """Bytes (start, stop) of a local file as uint8; fewer if the file ends earlier."""
    found = []
    with path.open("rb", buffering=0) as file:
        for start, stop in ranges:
            raw, at = np.empty(stop - start, np.uint8), 0
            file.seek(start)
            # In chunks, so that the disk reads the next one while this one is copied.
            while at < len(raw) and (count := file.readinto(raw[at : at + CHUNK_BYTES].data)):
                at += count
            found.append(raw[:at])
    return found


def coalesce(ranges: Ranges, gap: int) -> list[tuple[int, int]]:
    """The fewest ranges that have these, (start, stop), in them, if at most `gap` bytes between two are read along."""
    found: list[tuple[int, int]] = []
    for start, stop in sorted(ranges):
        if found and start - found[-1][1] <= gap:
            found[-1] = found[-1][0], max(stop, found[-1][1])
        else:
            found.append((start, stop))
    return found


class SeekableReader(io.RawIOBase):
    """A binary file of known size with a position; a subclass reads from there in `readinto`."""

    def __init__(self, size: int) -> None:
        self._size, self._position = size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._position = max(0, offset + (0, self._position, self._size)[whence])
        return self._position


class ConcatenatedFile(SeekableReader):
    """Several files read as one, in the given order."""

    def __init__(self, parts: list[BinaryIO]) -> None:
        self._parts = parts
        sizes = [part.seek(0, io.SEEK_END) for part in parts]
        self._starts = [sum(sizes[:i]) for i in range(len(sizes) + 1)]
        super().__init__(self._starts[-1])

    def readinto(self, buffer: Any) -> int:
        for part, start, stop in zip(self._parts, self._starts, self._starts[1:], strict=False):
            if start <= self._position < stop:
                part.seek(self._position - start)
                count = part.readinto(memoryview(buffer)[: stop - self._position])  # type: ignore[attr-defined]
                self._position += count
                return count
        return 0

    def close(self) -> None:
        for part in self._parts:
            part.close()
        super().close()
