"""The options of `phantom serve`, as its processes share them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from phantom.config import Storage

LEASE_SECONDS = 30.0  # a job whose worker has not been heard of for this long is given to another
BEAT_SECONDS = 0.5  # between two reports of a worker that makes a video
POLL_SECONDS = 0.25  # between two looks of an idle worker for a job
MODEL_POLL_SECONDS = 10.0  # between two looks for another model


@dataclass(frozen=True)
class Options:
    """Options of the service. Sent to its worker processes."""

    model: str  # a folder, or models:/NAME@ALIAS
    state: Path  # folder of the queue, of models from the registry and of files in progress
    database: str  # SQLAlchemy URL of the queue
    results: str  # folder or s3:// of videos and uploads
    storage: Storage
    tracking_uri: str
    base_defaults: dict[str, Any]  # default arguments of a base that is served alone
    workers: int
    fallback: str | None = None  # the base that is served as long as the folder `model` has no model
    host: str = "127.0.0.1"
    port: int = 8000
    token: str | None = None
    queue_limit: int = 64  # jobs that may wait
    job_seconds: float = 3600.0  # a job may take
    keep_hours: float = 168.0  # a finished job and its video are kept
    upload_mib: float = 64.0
    allowed_uris: tuple[str, ...] = ()  # prefixes of what may be fetched as an input


def local_options(state: Path, **values: Any) -> Options:
    """Options with the queue and the results in `state`, where `values` do not say otherwise."""
    database = values.pop("database", None) or f"sqlite:///{state / 'queue.db'}"
    results = values.pop("results", None) or str((state / "results").resolve())
    return Options(state=state, database=database, results=results, **values)
