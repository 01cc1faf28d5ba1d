"""Fixtures: an S3 server per session, started on first use; file locks as strict as NFS's; a folder of videos."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Iterator
from uuid import uuid4

import boto3
import pytest

from phantom.data.shards import ShardWriter
from phantom.data.storage import s3 as s3_storage
from phantom.encoders import VideoEncoder
from tests.data.latents import SETTINGS
from tests.data.s3 import Proxy, Server
from tests.data.videos import every, moving, write_video


@pytest.fixture(autouse=True)
def locks_of_nfs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Requires, as NFS does, a writable file for an exclusive lock and a readable one for a shared lock."""
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
    """A fault-injecting proxy in front of the server, set as the endpoint in the environment. Retries do not wait."""
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


@pytest.fixture
def videos(tmp_path):
    """Four videos without captions: two of 9 frames, one of 12, and one of 17 at 8 per second in a subfolder."""
    source = tmp_path / "videos"
    (source / "more").mkdir(parents=True)
    for name, count, seconds in [("a", 9, 0.25), ("b", 9, 0.25), ("c", 12, 0.25), ("more/d", 17, 0.125)]:
        frames = moving(count, seed=len(name) + ord(name[-1]), height=48, width=64)
        write_video(source / f"{name}.mp4", frames, every(seconds, count))
    return source


@pytest.fixture
def folder_params(make_params, videos):
    """Settings for that folder, without a benchmark."""

    def make(*overrides):
        return make_params(
            "data.source=folder",
            f"data.path={videos}",
            "data.heldout=0.25",
            "data.max_quarantine=0.9",
            "data.clips=files",
            "evaluate.physics_iq.benchmark=elsewhere",
            *overrides,
        )

    return make


@pytest.fixture
def encode_params(make_params, monkeypatch):
    """Settings with two clips per batch and two batches per shard (a shard limit below a megabyte)."""
    init = ShardWriter.__init__

    def smaller(self, *arguments):
        init(self, *arguments)
        self.limit = 600_000

    monkeypatch.setattr(ShardWriter, "__init__", smaller)

    def make(*overrides):
        return make_params(*SETTINGS, "encode.batch_size=2", "encode.prefixes_per_clip=2", *overrides)

    return make


@pytest.fixture
def encoded_clips(monkeypatch):
    """A list that grows by one item per clip encoded by the VAE."""
    seen = []
    original = VideoEncoder.encode

    def count(self, frames):
        seen.extend(range(len(frames)))
        return original(self, frames)

    monkeypatch.setattr(VideoEncoder, "encode", count)
    return seen
