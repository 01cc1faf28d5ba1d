"""An S3 server for the tests of data, started once, when the first test asks for it; and locks as strict as NFS's."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Iterator
from uuid import uuid4

import boto3
import pytest

from phantom.data.storage import s3 as s3_storage
from tests.data.s3 import Proxy, Server


@pytest.fixture(autouse=True)
def locks_of_nfs(monkeypatch: pytest.MonkeyPatch) -> None:
    """There an exclusive lock asks for a file that may be written, a shared one for one that may be read."""
    flock = fcntl.flock

    def strict(file, kind):
        mode = fcntl.fcntl(file, fcntl.F_GETFL) & os.O_ACCMODE
        if mode == (os.O_RDONLY if kind & fcntl.LOCK_EX else os.O_WRONLY):
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        flock(file, kind)

    monkeypatch.setattr(fcntl, "flock", strict)


@pytest.fixture(scope="session")
def s3_server() -> Iterator[Server]:
    server = Server()
    yield server
    server.stop()


@pytest.fixture
def s3(s3_server: Server, monkeypatch: pytest.MonkeyPatch, tmp_path) -> Iterator[Proxy]:
    """A proxy before the server, which the environment names as the AWS tools expect it. Waiting costs nothing."""
    proxy = Proxy(s3_server.port)
    for name, value in {
        "AWS_ENDPOINT_URL": proxy.url,
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_REGION": "eu-central-1",
        "AWS_MAX_ATTEMPTS": "2",
        "AWS_CONFIG_FILE": str(tmp_path / "no-config"),
        "AWS_SHARED_CREDENTIALS_FILE": str(tmp_path / "no-credentials"),
        "AWS_EC2_METADATA_DISABLED": "true",
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(s3_storage, "RETRY_DELAYS_SECONDS", (0.01, 0.01))
    yield proxy
    proxy.stop()


@pytest.fixture
def bucket(s3: Proxy) -> str:
    """The name of an empty bucket."""
    name = f"clips-{uuid4().hex[:12]}"
    boto3.client("s3", region_name="us-east-1").create_bucket(Bucket=name)
    return name
