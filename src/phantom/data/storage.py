"""The files of a folder, here or under s3://: listed, opened anywhere in their middle, fetched, put.

Endpoint, region, addressing style and credentials are what boto3 and the AWS tools find in the environment and in
~/.aws. Requests are repeated as boto3 does it (AWS_MAX_ATTEMPTS); a body that breaks off is read on from that byte.
"""

from __future__ import annotations

import hashlib
import io
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

import numpy as np

from phantom.config import Storage
from phantom.data.cache import Cache
from phantom.errors import StageFailed, UserError

S3 = "s3://"
PAUSES = (0.5, 1, 2, 4, 8)  # s before a body that broke off is asked for again, while nothing of it arrives
PIECE = 2**20

# What S3's error codes mean to who has to mend them.
MEANINGS = {
    "NoSuchBucket": "no such bucket",
    "NoSuchKey": "no such key",
    "ExpiredToken": "the credentials have expired; renew them and run again",
    "ExpiredTokenException": "the credentials have expired; renew them and run again",
    "InvalidAccessKeyId": "the server does not know the access key",
    "InvalidToken": "the server does not know the session token",
    "SignatureDoesNotMatch": "the secret key does not fit the access key",
    "AccessDenied": "the credentials do not allow it",
    "403": "the credentials do not allow it",
    "404": "no such key",
    "PreconditionFailed": "changed while it was read; run again",
    "RequestTimeTooSkewed": "the clock of this machine is wrong",
    "PermanentRedirect": "the bucket is in another region; set AWS_DEFAULT_REGION",
    "AuthorizationHeaderMalformed": "the bucket is in another region; set AWS_DEFAULT_REGION",
}


class Nothing(UserError):
    """A folder has no file."""


@dataclass(frozen=True)
class Entry:
    """A file of a folder. Its version changes when its contents do."""

    name: str  # relative to the folder, with slashes
    size: int
    version: str


class LocalFolder:
    """A folder of this machine."""

    is_remote = False

    def __init__(self, path: Path) -> None:
        self.path = path

    def __str__(self) -> str:
        return str(self.path)

    def list(self) -> list[Entry]:
        """Every file, by name; hidden ones are not looked at. Raises Nothing if there is no such folder."""
        if not self.path.is_dir():
            raise Nothing(f"{self.path}: no such folder")
        found = []
        for path in self.path.rglob("*"):
            name = path.relative_to(self.path)
            if any(part.startswith(".") for part in name.parts) or (path.is_dir() and not path.is_symlink()):
                continue
            stat = path.stat() if path.exists() else path.lstat()
            found.append(Entry(name.as_posix(), stat.st_size, str(stat.st_mtime_ns)))
        return sorted(found, key=lambda entry: entry.name)

    def refusal(self, name: str) -> str | None:
        """Why the file `name` may not be read, or cannot; None if it can. What lies elsewhere is not of this folder."""
        if leaves(name):
            return "its path leaves the folder"
        try:
            real = (self.path / name).resolve(strict=True)
        except (OSError, RuntimeError, ValueError):
            return "no such file"
        if not real.is_relative_to(self.path.resolve()):
            return "a link that leaves the folder"
        return None if real.is_file() else "not a file"

    def open(self, name: str) -> BinaryIO:
        """The file `name`, to read and seek in."""
        return (self.path / name).open("rb")

    def local(self, name: str) -> AbstractContextManager[Path]:
        """A path of this machine at which the file is, for as long as the context lasts."""
        return nullcontext(self.path / name)

    def size(self, name: str) -> int | None:
        """The size of the file `name`; None if there is none."""
        path = self.path / name
        return path.stat().st_size if path.is_file() else None

    def version(self, name: str) -> str | None:
        """What changes when the file `name` does; None if there is none."""
        try:
            stat = (self.path / name).stat()
        except FileNotFoundError:
            return None
        return f"{stat.st_ino} {stat.st_mtime_ns} {stat.st_size}"

    def range(self, name: str, start: int, stop: int) -> np.ndarray:
        """The bytes from `start` to `stop` of the file `name`, uint8; fewer where it ends before."""
        return _range(self.path / name, start, stop)

    def forget(self, name: str) -> None:
        """Nothing of a file is kept elsewhere."""

    def upload(self, source: Path, name: str) -> None:
        """Puts the file `source` at `name`, whole or not at all."""
        target = self.path / name
        target.parent.mkdir(parents=True, exist_ok=True)
        part = target.with_name(f".{target.name}.part")
        shutil.copyfile(source, part)
        part.replace(target)

    def download(self, name: str, target: Path) -> None:
        """Copies the file `name` to `target`."""
        shutil.copyfile(self.path / name, target)


class S3Folder:
    """What lies under s3://bucket/prefix/. Every fault becomes one line; those that may pass are tried again first."""

    is_remote = True

    def __init__(self, url: str, cache: Cache) -> None:
        bucket, _, prefix = url.removeprefix(S3).partition("/")
        self.bucket, self.prefix = bucket, prefix.strip("/") + "/" if prefix.strip("/") else ""
        self.cache = cache
        try:
            with self._explained(""):
                self._client = _client()
        except ValueError as error:
            raise UserError(f"{self}: the settings of the AWS tools: {error}") from None
        self._entries: dict[str, Entry] | None = None

    def __str__(self) -> str:
        return f"{S3}{self.bucket}/{self.prefix}".rstrip("/")

    def list(self) -> list[Entry]:
        """Every file, by name; hidden ones are not looked at. Raises Nothing if there is none."""
        if self._entries is None:
            with self._explained(""):
                pages = self._client.get_paginator("list_objects_v2").paginate(Bucket=self.bucket, Prefix=self.prefix)
                objects = [found for page in pages for found in page.get("Contents", [])]
            entries = [Entry(o["Key"][len(self.prefix) :], o["Size"], o["ETag"]) for o in objects]
            entries = [e for e in entries if e.name and not e.name.endswith("/") and not _is_hidden(e.name)]
            if not entries:
                raise Nothing(f"{self}: nothing there")
            self._entries = {entry.name: entry for entry in sorted(entries, key=lambda entry: entry.name)}
        return [*self._entries.values()]

    def refusal(self, name: str) -> str | None:
        """Why the file `name` cannot be read; None if it can."""
        if leaves(name):
            return "its path leaves the folder"
        return None if self._entry(name) else "no such file"

    def open(self, name: str) -> BinaryIO:
        """The file `name`, to read and seek in; what is read is fetched, and nothing else."""
        return io.BufferedReader(_Ranges(self, self._known(name)), PIECE)

    @contextmanager
    def local(self, name: str) -> Iterator[Path]:
        """A path of this machine at which the file is, for as long as the context lasts."""
        entry = self._known(name)
        with self.cache.file(self._key(entry), entry.size, f"{self}/{name}", self.pieces(entry, 0, entry.size)) as path:
            yield path

    def size(self, name: str) -> int | None:
        """The size of the file `name`; None if there is none. Asks for it, unlike `list`, each time."""
        from botocore.exceptions import ClientError

        with self._explained(name):
            try:
                return self._client.head_object(Bucket=self.bucket, Key=self.prefix + name)["ContentLength"]
            except ClientError as error:
                if error.response["Error"].get("Code") in ("404", "NoSuchKey"):
                    return None
                raise

    def version(self, name: str) -> str | None:
        """What changes when the file `name` does; None if there is none."""
        entry = self._entry(name)
        return entry.version if entry else None

    def range(self, name: str, start: int, stop: int) -> np.ndarray:
        """The bytes from `start` to `stop` of the file `name`, uint8. They are kept in the cache, and nothing else."""
        entry = self._known(name)
        while True:
            key, pieces = f"{self._key(entry)}-{start}-{stop}", self.pieces(entry, start, stop)
            with self.cache.file(key, stop - start, f"{self}/{name}", pieces) as path:
                try:
                    return _range(path, 0, stop - start)
                except FileNotFoundError:  # another has just found it damaged
                    continue

    def forget(self, name: str) -> None:
        """Has what is read of the file `name` next fetched anew."""
        self.cache.forget(self._key(self._known(name)))

    def _key(self, entry: Entry) -> str:
        return hashlib.sha256(f"{self}/{entry.name}\0{entry.version}".encode()).hexdigest()

    def upload(self, source: Path, name: str) -> None:
        """Puts the file `source` at `name`, whole or not at all."""
        with self._explained(name):
            self._client.upload_file(str(source), self.bucket, self.prefix + name)

    def download(self, name: str, target: Path) -> None:
        """Copies the file `name` to `target`, past the cache: of any size, several pieces at a time."""
        with self._explained(name):
            self._client.download_file(self.bucket, self.prefix + name, str(target))

    def pieces(self, entry: Entry, start: int, stop: int) -> Iterator[bytes]:
        """The bytes from `start` to `stop` of a file, a piece at a time."""
        from botocore.exceptions import IncompleteReadError, ReadTimeoutError, ResponseStreamingError

        failures, said = 0, ""
        while start < stop:
            before = start
            with self._explained(entry.name):
                answer = self._client.get_object(
                    Bucket=self.bucket,
                    Key=self.prefix + entry.name,
                    Range=f"bytes={start}-{stop - 1}",
                    IfMatch=entry.version,  # bytes of two files would make neither
                )
            try:
                for piece in answer["Body"].iter_chunks(PIECE):
                    start += len(piece)
                    yield piece
            except (IncompleteReadError, ReadTimeoutError, ResponseStreamingError, OSError) as error:
                said = _one_line(error)
            finally:
                answer["Body"].close()
            failures = failures + 1 if start == before else 0
            if failures > len(PAUSES):
                where = f"{self}/{entry.name}"
                raise StageFailed(f"{where}: broke off {failures} times at byte {start} ({said}); run again to go on")
            if failures:
                time.sleep(PAUSES[failures - 1])

    def _entry(self, name: str) -> Entry | None:
        self.list()
        return (self._entries or {}).get(PurePosixPath(name).as_posix())

    def _known(self, name: str) -> Entry:
        entry = self._entry(name)
        if entry is None:
            raise UserError(f"{self}/{name}: no such key")
        return entry

    @contextmanager
    def _explained(self, name: str) -> Iterator[None]:
        from boto3.exceptions import Boto3Error
        from botocore.exceptions import BotoCoreError, ClientError

        try:
            yield
        except (ClientError, BotoCoreError, Boto3Error) as error:
            where = f"{self}/{name}" if name else str(self)
            raise _explanation(where.translate({10: "\\n", 13: "\\r"}), error) from None


class _Ranges(io.RawIOBase):
    """A file of S3 as a file: a read is a request for that range."""

    def __init__(self, folder: S3Folder, entry: Entry) -> None:
        self._folder, self._file, self._at = folder, entry, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = max(0, offset + (0, self._at, self._file.size)[whence])
        return self._at

    def readinto(self, buffer: Any) -> int:
        view, first = memoryview(buffer).cast("B"), self._at
        for piece in self._folder.pieces(self._file, first, min(first + len(view), self._file.size)):
            view[self._at - first : self._at - first + len(piece)] = piece
            self._at += len(piece)
        return self._at - first


class Joined(io.RawIOBase):
    """Files that are the pieces of one, one behind the other, as that one."""

    def __init__(self, pieces: list[BinaryIO]) -> None:
        self._pieces, self._at = pieces, 0
        sizes = [piece.seek(0, io.SEEK_END) for piece in pieces]
        self._starts = [sum(sizes[:i]) for i in range(len(sizes) + 1)]

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = max(0, offset + (0, self._at, self._starts[-1])[whence])
        return self._at

    def readinto(self, buffer: Any) -> int:
        for piece, start, stop in zip(self._pieces, self._starts, self._starts[1:], strict=False):
            if start <= self._at < stop:
                piece.seek(self._at - start)
                count = piece.readinto(memoryview(buffer)[: stop - self._at])  # type: ignore[attr-defined]
                self._at += count
                return count
        return 0

    def close(self) -> None:
        for piece in self._pieces:
            piece.close()
        super().close()


Folder = LocalFolder | S3Folder


def open_folder(where: str, root: Path, settings: Storage) -> Folder:
    """The folder that a setting names: a path, relative to `root`, or s3://bucket/prefix, cached as `settings` say."""
    if not where.startswith(S3):
        return LocalFolder(root / where)
    if not where.removeprefix(S3).partition("/")[0]:
        raise UserError(f"{where}: no bucket named, expected s3://bucket or s3://bucket/folder")
    return S3Folder(where, Cache(root / settings.cache, int(settings.cache_gb * 2**30)))


def fingerprint(folder: Folder) -> str:
    """A digest of which files are there, in which version."""
    digest = hashlib.sha256(str(folder).encode())
    for entry in folder.list():
        digest.update(f"{entry.name}\0{entry.size}\0{entry.version}\n".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


def leaves(name: str) -> bool:
    """Whether a relative path would lead out of its folder."""
    return PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts


def _range(path: Path, start: int, stop: int) -> np.ndarray:
    raw, at = np.empty(stop - start, np.uint8), 0
    with path.open("rb", buffering=0) as file:
        file.seek(start)
        # Piece by piece: the disk reads the next ones while one is copied.
        while at < len(raw) and (count := file.readinto(raw[at : at + PIECE].data)):
            at += count
    return raw[:at]


def _is_hidden(name: str) -> bool:
    return any(part.startswith(".") and part not in (".", "..") for part in name.split("/"))


def _client() -> Any:
    import boto3
    from botocore.config import Config

    # The AWS tools read AWS_REGION too; boto3 does not.
    region = None if "AWS_DEFAULT_REGION" in os.environ else os.environ.get("AWS_REGION")
    config = Config(max_pool_connections=64, connect_timeout=20, tcp_keepalive=True)
    return boto3.Session(region_name=region).client("s3", config=config)


def _explanation(where: str, error: Exception) -> UserError | StageFailed:
    """One line for what boto3 raised: wrong input, or work that failed and may be tried again."""
    from botocore.exceptions import (
        ClientError,
        EndpointConnectionError,
        HTTPClientError,
        NoCredentialsError,
        PartialCredentialsError,
    )

    cause = error if isinstance(error, ClientError) else error.__context__  # uploads wrap theirs
    if isinstance(cause, ClientError):
        code, about = cause.response["Error"].get("Code", "?"), cause.response["ResponseMetadata"]
        status = about.get("HTTPStatusCode", 0)
        if code in MEANINGS:
            return UserError(f"{where}: {MEANINGS[code]}")
        if status >= 500 or status == 429 or code in ("SlowDown", "InternalError", "RequestTimeout"):
            times = about.get("RetryAttempts", 0) + 1
            return StageFailed(f"{where}: the server answered {status} ({code}) {times} times; run again to go on")
        return UserError(f"{where}: {code}: {_one_line(cause)}")
    if isinstance(error, NoCredentialsError | PartialCredentialsError):
        return UserError(f"{where}: no credentials; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or ~/.aws")
    if isinstance(error, HTTPClientError | EndpointConnectionError):
        return StageFailed(f"{where}: the server cannot be reached: {_one_line(error)}; run again to go on")
    return UserError(f"{where}: {_one_line(error)}")


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())
