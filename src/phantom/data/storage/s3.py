"""A folder in an S3 bucket: list, random access, download, upload, streamed writing.

Endpoint, region, addressing style and credentials come from where boto3 and the AWS CLI look: the environment and
~/.aws. boto3 retries failed requests (AWS_MAX_ATTEMPTS); a response body that breaks off is resumed at that byte.
"""

from __future__ import annotations

import io
import os
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from tempfile import NamedTemporaryFile
from typing import Any, BinaryIO

import numpy as np

from phantom.data.storage.files import (
    CHUNK_BYTES,
    Arrays,
    Changed,
    Entry,
    NotFound,
    Ranges,
    Refused,
    SeekableReader,
    coalesce,
    escapes_folder,
)
from phantom.errors import StageFailed, UserError

S3 = "s3://"
GAP_BYTES = 2**20  # between ranges, read along rather than asked for apart
PART_BYTES = 2**25  # of a file that is written as a stream; S3 takes 10,000 parts
RETRY_DELAYS_SECONDS = (0.5, 1, 2, 4, 8)  # before a broken-off body is requested again without progress

# S3 error codes, in words that say what to fix.
ERROR_MESSAGES = {
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
# Of these, what says nothing about the settings: credentials are renewed, clocks set, files written again.
MAY_PASS = (
    "AccessDenied",
    "403",
    "PreconditionFailed",
    "ExpiredToken",
    "ExpiredTokenException",
    "RequestTimeTooSkewed",
)
MISSING = ("NoSuchKey", "404")


class S3Folder:
    """The files under s3://bucket/prefix/. Transient errors are retried; those that remain become one-line errors."""

    is_remote = True

    def __init__(self, url: str, scratch: Path) -> None:
        """scratch: a folder on this machine for files that have to be here while they are used."""
        bucket, _, prefix = url.removeprefix(S3).partition("/")
        self.bucket, self.prefix = bucket, prefix.strip("/") + "/" if prefix.strip("/") else ""
        self.scratch = scratch
        try:
            with self._translate_errors(""):
                self._client = _client()
        except ValueError as error:
            raise UserError(f"{self}: the settings of the AWS tools: {error}") from None
        self._entries: dict[str, Entry] | None = None

    def __str__(self) -> str:
        return f"{S3}{self.bucket}/{self.prefix}".rstrip("/")

    def list(self, hidden: bool = False) -> list[Entry]:
        """All files, sorted by name; hidden ones only if asked for. Raises NotFound if there are none. Listed once."""
        if self._entries is None:
            with self._translate_errors(""):
                pages = self._client.get_paginator("list_objects_v2").paginate(Bucket=self.bucket, Prefix=self.prefix)
                objects = [found for page in pages for found in page.get("Contents", [])]
            entries = [Entry(o["Key"][len(self.prefix) :], o["Size"], o["ETag"]) for o in objects]
            entries = [e for e in entries if e.name and not e.name.endswith("/")]
            self._entries = {entry.name: entry for entry in sorted(entries, key=lambda entry: entry.name)}
        found = [entry for entry in self._entries.values() if hidden or not _is_hidden(entry.name)]
        if not found:
            self.refresh()
            raise NotFound(f"{self}: nothing there")
        return found

    def refresh(self) -> None:
        """Lists the files again when they are needed next."""
        self._entries = None

    def why_unreadable(self, name: str) -> str | None:
        """Why the file `name` is missing or off limits; None if it can be read."""
        if escapes_folder(name):
            return "its path leaves the folder"
        return None if self._entry(name) else "no such file"

    def open(self, name: str) -> BinaryIO:
        """Opens the file `name` for reading and seeking; only the ranges that are read are fetched."""
        return io.BufferedReader(_RangeReader(self, self._require(name)), CHUNK_BYTES)

    @contextmanager
    def local_path(self, name: str) -> Iterator[Path]:
        """Downloads the file to `scratch`, where it can be read within the context."""
        entry = self._require(name)
        self.scratch.mkdir(parents=True, exist_ok=True)
        with NamedTemporaryFile(dir=self.scratch) as file:
            for chunk in self.stream_range(entry, 0, entry.size):
                file.write(chunk)
            file.flush()
            yield Path(file.name)

    def size(self, name: str) -> int | None:
        """The size of the file `name` in bytes; None if it does not exist. Unlike `list`, asks the server each time."""
        from botocore.exceptions import ClientError

        with self._translate_errors(name):
            try:
                return self._client.head_object(Bucket=self.bucket, Key=self.prefix + name)["ContentLength"]
            except ClientError as error:
                if error.response["Error"].get("Code") in MISSING:
                    return None
                raise

    def version(self, name: str) -> str | None:
        """A string that changes whenever the file `name` does; None if it does not exist."""
        entry = self._entry(name)
        return entry.version if entry else None

    def read_ranges(self, name: str, ranges: Ranges) -> Arrays:
        """Bytes (start, stop) of the file `name`, as uint8, straight to memory. Near ones are read in one request."""
        entry = self._require(name)
        found: dict[tuple[int, int], np.ndarray] = {}
        for first, last in coalesce(ranges, GAP_BYTES):
            raw, at = np.empty(last - first, np.uint8), 0
            for chunk in self.stream_range(entry, first, last):
                raw[at : at + len(chunk)] = np.frombuffer(chunk, np.uint8)
                at += len(chunk)
            inside = [(start, stop) for start, stop in ranges if first <= start and stop <= last]
            found |= {(start, stop): raw[start - first : stop - first] for start, stop in inside}
        return [found[one] for one in ranges]

    def read_range(self, entry: Entry, start: int, stop: int) -> bytes:
        """Bytes `start` to `stop` of a file that need not have been listed. Raises Changed for another version."""
        return b"".join(self.stream_range(entry, start, stop))

    def invalidate(self, name: str) -> None:
        """Does nothing: files are not cached."""

    def upload(self, source: Path, name: str) -> None:
        """Uploads the file `source` as `name`, atomically."""
        with self._translate_errors(name):
            self._client.upload_file(str(source), self.bucket, self.prefix + name)

    def take(self, source: Path, name: str) -> None:
        """Uploads the file `source` as `name`, atomically, and deletes it here."""
        self.upload(source, name)
        source.unlink()

    def download(self, name: str, target: Path) -> None:
        """Downloads the file `name` to `target`, any size, several parts in parallel."""
        with self._translate_errors(name):
            self._client.download_file(self.bucket, self.prefix + name, str(target))

    def read(self, name: str) -> bytes:
        """The contents of the file `name`, not listed. Raises UserError if it does not exist."""
        with self._translate_errors(name):
            return self._client.get_object(Bucket=self.bucket, Key=self.prefix + name)["Body"].read()

    def write(self, name: str, data: bytes) -> None:
        """Writes the file `name`, atomically."""
        with self._translate_errors(name):
            self._client.put_object(Bucket=self.bucket, Key=self.prefix + name, Body=data)

    def write_new(self, name: str, data: bytes) -> bool:
        """Writes the file `name` unless there is one already. Whether it did: of several, one does; all do in a store
        that knows no conditional requests."""
        for delay in (*RETRY_DELAYS_SECONDS, 0):
            if (is_written := self._put_new(name, data)) is not None:
                return is_written
            time.sleep(delay)
        raise StageFailed(f"{self}/{name}: other requests for it do not end; run again")

    def _put_new(self, name: str, data: bytes) -> bool | None:
        """One attempt of `write_new`; None where another request for the name is under way."""
        from botocore.exceptions import ClientError

        with self._translate_errors(name):
            try:
                self._client.put_object(Bucket=self.bucket, Key=self.prefix + name, Body=data, IfNoneMatch="*")
            except ClientError as error:
                code = error.response["Error"].get("Code")
                if code in ("PreconditionFailed", "ConditionalRequestConflict"):
                    return False if code == "PreconditionFailed" else None
                if code not in ("NotImplemented", "InvalidArgument"):
                    raise
                self.write(name, data)
        return True

    @contextmanager
    def create(self, name: str) -> Iterator[BinaryIO]:
        """A file to write, whose parts are uploaded on the way. The file `name` exists when the context has ended."""
        from boto3.s3.transfer import TransferConfig

        config = TransferConfig(multipart_chunksize=PART_BYTES, multipart_threshold=PART_BYTES)
        ends = os.pipe()
        with ThreadPoolExecutor(1) as thread, self._translate_errors(name):
            source, target = os.fdopen(ends[0], "rb"), os.fdopen(ends[1], "wb")
            upload = thread.submit(self._client.upload_fileobj, source, self.bucket, self.prefix + name, Config=config)
            upload.add_done_callback(lambda _: source.close())  # so that writing on after a failure fails too
            try:
                with target:
                    yield target
            except BrokenPipeError:
                upload.result()
                raise
            upload.result()

    def rename(self, name: str, new: str) -> None:
        """Renames a file, replacing one that is called `new`."""
        with self._translate_errors(name):
            source = {"Bucket": self.bucket, "Key": self.prefix + name}
            self._client.copy_object(Bucket=self.bucket, Key=self.prefix + new, CopySource=source)
        self.delete([name])

    def delete(self, names: Iterable[str]) -> None:
        """Deletes files in the given order. Missing ones are no error."""
        for name in names:
            with self._translate_errors(name):
                self._client.delete_object(Bucket=self.bucket, Key=self.prefix + name)

    def stream_range(self, entry: Entry, start: int, stop: int) -> Iterator[bytes]:
        """Yields bytes `start` to `stop` of a file in chunks, resuming where a response breaks off."""
        from botocore.exceptions import IncompleteReadError, ReadTimeoutError, ResponseStreamingError

        failures, problem = 0, ""
        while start < stop:
            resumed_at = start
            with self._translate_errors(entry.name):
                answer = self._client.get_object(
                    Bucket=self.bucket,
                    Key=self.prefix + entry.name,
                    Range=f"bytes={start}-{stop - 1}",
                    IfMatch=entry.version,  # never mix bytes of two versions
                )
            try:
                for chunk in answer["Body"].iter_chunks(CHUNK_BYTES):
                    start += len(chunk)
                    yield chunk
            except (IncompleteReadError, ReadTimeoutError, ResponseStreamingError, OSError) as error:
                problem = _one_line(error)
            finally:
                answer["Body"].close()
            failures = failures + 1 if start == resumed_at else 0
            if failures > len(RETRY_DELAYS_SECONDS):
                where = f"{self}/{entry.name}"
                raise StageFailed(
                    f"{where}: broke off {failures} times at byte {start} ({problem}); run again to go on"
                )
            if failures:
                time.sleep(RETRY_DELAYS_SECONDS[failures - 1])

    def _entry(self, name: str) -> Entry | None:
        if self._entries is None:
            self.list()
        return (self._entries or {}).get(PurePosixPath(name).as_posix())

    def _require(self, name: str) -> Entry:
        entry = self._entry(name)
        if entry is None:
            raise UserError(f"{self}/{name}: no such key")
        return entry

    @contextmanager
    def _translate_errors(self, name: str) -> Iterator[None]:
        from boto3.exceptions import Boto3Error
        from botocore.exceptions import BotoCoreError, ClientError

        try:
            yield
        except (ClientError, BotoCoreError, Boto3Error) as error:
            where = f"{self}/{name}" if name else str(self)
            raise _translate(where.translate({10: "\\n", 13: "\\r"}), error) from None


class _RangeReader(SeekableReader):
    """A seekable file object over an S3 object: each read is a range request."""

    def __init__(self, folder: S3Folder, entry: Entry) -> None:
        super().__init__(entry.size)
        self._folder, self._entry = folder, entry

    def readinto(self, buffer: Any) -> int:
        view, first = memoryview(buffer).cast("B"), self._position
        for chunk in self._folder.stream_range(self._entry, first, min(first + len(view), self._entry.size)):
            view[self._position - first : self._position - first + len(chunk)] = chunk
            self._position += len(chunk)
        return self._position - first


def _is_hidden(name: str) -> bool:
    return any(part.startswith(".") and part not in (".", "..") for part in name.split("/"))


def _client() -> Any:
    import boto3
    from botocore.config import Config

    # The AWS CLI also reads AWS_REGION; boto3 does not.
    region = None if "AWS_DEFAULT_REGION" in os.environ else os.environ.get("AWS_REGION")
    config = Config(max_pool_connections=64, connect_timeout=20, tcp_keepalive=True)
    return boto3.Session(region_name=region).client("s3", config=config)


def _translate(where: str, error: Exception) -> UserError | StageFailed:
    """A boto3 exception as a one-line error: UserError for wrong input, StageFailed where trying again may help."""
    from botocore.exceptions import (
        ClientError,
        EndpointConnectionError,
        HTTPClientError,
        NoCredentialsError,
        PartialCredentialsError,
    )

    cause = error if isinstance(error, ClientError) else error.__context__  # upload errors wrap the original
    if isinstance(cause, ClientError):
        code, metadata = cause.response["Error"].get("Code", "?"), cause.response["ResponseMetadata"]
        status = metadata.get("HTTPStatusCode", 0)
        if code in ERROR_MESSAGES:
            kind = Refused if code in MAY_PASS else NotFound if code in MISSING else UserError
            kind = Changed if code == "PreconditionFailed" else kind
            return kind(f"{where}: {ERROR_MESSAGES[code]}")
        if status >= 500 or status == 429 or code in ("SlowDown", "InternalError", "RequestTimeout"):
            attempts = metadata.get("RetryAttempts", 0) + 1
            return StageFailed(f"{where}: the server answered {status} ({code}) {attempts} times; run again to go on")
        return UserError(f"{where}: {code}: {_one_line(cause)}")
    if isinstance(error, NoCredentialsError | PartialCredentialsError):
        return Refused(f"{where}: no credentials; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or ~/.aws")
    if isinstance(error, HTTPClientError | EndpointConnectionError):
        return StageFailed(f"{where}: the server cannot be reached: {_one_line(error)}; run again to go on")
    return UserError(f"{where}: {_one_line(error)}")


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())
