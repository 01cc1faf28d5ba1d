"""A folder on this machine."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext, suppress
from pathlib import Path
from typing import BinaryIO

from phantom.data.files import fsync, fsync_folder
from phantom.data.storage.files import Arrays, Entry, NotFound, Ranges, escapes_folder, read_file_ranges


class LocalFolder:
    """A folder on this machine, with the interface of `S3Folder`."""

    is_remote = False

    def __init__(self, path: Path) -> None:
        self.path = path

    def __str__(self) -> str:
        return str(self.path)

    def list(self, hidden: bool = False) -> list[Entry]:
        """All files, sorted by name; hidden ones only if asked for. Raises NotFound if the folder does not exist."""
        if not self.path.is_dir():
            raise NotFound(f"{self.path}: no such folder")
        found = []
        for path in self.path.rglob("*"):
            name = path.relative_to(self.path)
            if not hidden and any(part.startswith(".") for part in name.parts):
                continue
            if path.is_dir() and not path.is_symlink():
                continue
            try:
                stat = path.stat() if path.exists() else path.lstat()
            except FileNotFoundError:  # another process has just deleted it
                continue
            found.append(Entry(name.as_posix(), stat.st_size, str(stat.st_mtime_ns)))
        return sorted(found, key=lambda entry: entry.name)

    def why_unreadable(self, name: str) -> str | None:
        """Why the file `name` is missing or off limits (it lies outside the folder); None if it can be read."""
        if escapes_folder(name):
            return "its path leaves the folder"
        try:
            real = (self.path / name).resolve(strict=True)
        except (OSError, RuntimeError, ValueError):
            return "no such file"
        if not real.is_relative_to(self.path.resolve()):
            return "a link that leaves the folder"
        return None if real.is_file() else "not a file"

    def open(self, name: str) -> BinaryIO:
        """Opens the file `name` for reading and seeking."""
        return (self.path / name).open("rb")

    def local_path(self, name: str) -> AbstractContextManager[Path]:
        """A path on this machine where the file can be read within the context."""
        return nullcontext(self.path / name)

    def size(self, name: str) -> int | None:
        """The size of the file `name` in bytes; None if it does not exist."""
        path = self.path / name
        return path.stat().st_size if path.is_file() else None

    def version(self, name: str) -> str | None:
        """A string that changes whenever the file `name` does; None if it does not exist."""
        try:
            stat = (self.path / name).stat()
        except FileNotFoundError:
            return None
        return f"{stat.st_ino} {stat.st_mtime_ns} {stat.st_size}"

    def read_ranges(self, name: str, ranges: Ranges) -> Arrays:
        """Bytes (start, stop) of the file `name`, as uint8; fewer if the file ends earlier."""
        return read_file_ranges(self.path / name, ranges)

    def read_range(self, entry: Entry, start: int, stop: int) -> bytes:
        """Bytes `start` to `stop` of a file that need not have been listed. Raises FileNotFoundError."""
        return read_file_ranges(self.path / entry.name, [(start, stop)])[0].tobytes()

    def invalidate(self, name: str) -> None:
        """Does nothing: local files are not cached."""

    def refresh(self) -> None:
        """Does nothing: local files are not listed ahead."""

    def read(self, name: str) -> bytes:
        """The contents of the file `name`. Raises FileNotFoundError."""
        return (self.path / name).read_bytes()

    def write(self, name: str, data: bytes) -> None:
        """Writes the file `name` atomically and flushes it and its folder to disk."""
        target = self.path / name
        target.parent.mkdir(parents=True, exist_ok=True)
        part = target.with_name(f".{target.name}.part")
        with part.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        part.replace(target)
        fsync_folder(target.parent)

    def write_new(self, name: str, data: bytes) -> bool:
        """Writes the file `name` atomically unless there is one already. Whether it did: of several, one does."""
        target = self.path / name
        target.parent.mkdir(parents=True, exist_ok=True)
        part = target.with_name(f".{target.name}.{os.urandom(4).hex()}.part")
        part.write_bytes(data)
        fsync(part)
        try:
            target.hardlink_to(part)
        except FileExistsError:
            return False
        finally:
            part.unlink()
        return True

    def create(self, name: str) -> BinaryIO:
        """Opens the file `name`, new and empty, for writing; as a context, which closes it."""
        target = self.path / name
        if not target.parent.is_dir():
            target.parent.mkdir(parents=True, exist_ok=True)
            fsync_folder(target.parent.parent)
        return target.open("wb")

    def rename(self, name: str, new: str) -> None:
        """Renames a file, replacing one that is called `new`."""
        (self.path / name).replace(self.path / new)

    def delete(self, names: Iterable[str]) -> None:
        """Deletes files in the given order, and folders that become empty. Missing ones are no error."""
        for name in names:
            path = self.path / name
            path.unlink(missing_ok=True)
            with suppress(OSError):  # not empty
                path.parent.rmdir()

    def upload(self, source: Path, name: str) -> None:
        """Copies the file `source` to `name`, atomically."""
        target = self.path / name
        target.parent.mkdir(parents=True, exist_ok=True)
        part = target.with_name(f".{target.name}.part")
        shutil.copyfile(source, part)
        part.replace(target)

    def take(self, source: Path, name: str) -> None:
        """Moves the file `source` here as `name`, atomically. It must be in this file system."""
        source.replace(self.path / name)

    def download(self, name: str, target: Path) -> None:
        """Copies the file `name` to `target`."""
        shutil.copyfile(self.path / name, target)
