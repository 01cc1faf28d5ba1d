"""Files that are whole or not there: digests, links, and folders that are replaced at once."""

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

NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)


def sha256(path: Path) -> str:
    """The digest of a file's contents, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def link(source: Path, target: Path) -> None:
    """Puts the file `source` at `target` too, without copying where the file system can."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        target.hardlink_to(source)
    except OSError:
        shutil.copyfile(source, target)


def settle(path: Path) -> None:
    """Waits until a file's contents are on the disk: what is renamed afterwards is never half there."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def lock_file(file: IO[Any], kind: int) -> None:
    """`fcntl.flock`, which raises BlockingIOError. Raises UserError where the file system has no locks.

    For NFS the file has to be open for writing where the lock is exclusive, for reading where it is shared.
    """
    try:
        fcntl.flock(file, kind)
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        raise UserError(
            f"{file.name}: its file system has no locks ({error.strerror}); mount it with them (NFS: with its lock "
            "service; Lustre: -o flock)"
        ) from None


@contextmanager
def alone(lock: Path, work: str) -> Iterator[None]:
    """Lets one process at a time do `work`, for as long as the context lasts. Raises UserError in any other."""
    lock.parent.mkdir(parents=True, exist_ok=True)
    while True:
        file = lock.open("w")
        try:
            lock_file(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            raise UserError(f"{lock}: another process {work} just now; run again when it has ended") from None
        if lock.exists() and os.path.samestat(os.fstat(file.fileno()), lock.stat()):
            break
        file.close()  # whoever held it before has removed it meanwhile
    try:
        yield
    finally:
        lock.unlink()
        file.close()


def fresh_folder(folder: Path) -> Path:
    """`folder`, empty, whatever an earlier run left there."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def replace_folder(new: Path, out: Path) -> None:
    """Puts the finished folder `new` in the place of `out`. Both lie beside each other."""
    old = out.with_name(out.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if out.exists():
        out.rename(old)
    new.rename(out)
    shutil.rmtree(old, ignore_errors=True)
