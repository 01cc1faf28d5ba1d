"""File primitives: checksums, hard links, fsync, file locks, and folders replaced by an atomic rename."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from phantom.errors import UserError

UNSUPPORTED_LOCK_ERRNOS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)


class Held(UserError):
    """Another process holds the lock."""


class NoLocks(UserError):
    """The file system has no locks."""


def sha256(path: Path) -> str:
    """SHA-256 of a file's contents, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def link(source: Path, target: Path) -> None:
    """Hard-links `source` to `target`, creating parent folders; copies where the file system cannot link."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        target.hardlink_to(source)
    except OSError:
        shutil.copyfile(source, target)


def fsync(path: Path) -> None:
    """Flushes a file to disk, so that a rename afterwards never exposes a partial file."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def fsync_folder(path: Path) -> None:
    """Flushes the entries of a folder to disk, so that a file renamed into it is found after a power loss."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def lock_file(file: IO[Any], kind: int) -> None:
    """`fcntl.flock`, with its BlockingIOError. Raises NoLocks where the file system does not support locks.

    NFS requires a file open for writing for an exclusive lock, and open for reading for a shared one.
    """
    try:
        fcntl.flock(file, kind)
    except OSError as error:
        if error.errno not in UNSUPPORTED_LOCK_ERRNOS:
            raise
        raise NoLocks(
            f"{file.name}: its file system has no locks ({error.strerror}); mount it with them (NFS: with its lock "
            "service; Lustre: -o flock)"
        ) from None


@contextmanager
def exclusive(lock: Path, work: str) -> Iterator[None]:
    """Holds the lock file `lock` within the context. Raises Held, naming `work`, if another process holds it, or
    NoLocks."""
    lock.parent.mkdir(parents=True, exist_ok=True)
    while True:
        file = lock.open("w")
        try:
            lock_file(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            raise Held(f"{lock}: another process {work} just now; run again when it has ended") from None
        except NoLocks:
            file.close()
            lock.unlink(missing_ok=True)
            raise
        if lock.exists() and os.path.samestat(os.fstat(file.fileno()), lock.stat()):
            break
        file.close()  # its previous holder removed it in between
    try:
        yield
    finally:
        lock.unlink()
        file.close()


def fresh_folder(folder: Path) -> Path:
    """Creates `folder` empty, removing what an earlier run left there."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def replace_folder(new: Path, out: Path) -> None:
    """Replaces `out` by the finished folder `new`, by renames. Both must have the same parent."""
    old = out.with_name(out.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if out.exists():
        out.rename(old)
    new.rename(out)
    shutil.rmtree(old, ignore_errors=True)
