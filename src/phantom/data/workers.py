"""Parallel encoding: each worker encodes the clips of its hash partition into a folder of its own."""

from __future__ import annotations

import fcntl
import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any

from phantom.cores import cores
from phantom.data.files import lock_file, sha256
from phantom.data.prefetch import prefetch
from phantom.data.shards import store_key
from phantom.data.storage import Folder
from phantom.errors import UserError

LOCK, MERGER = "lock", "merger"


@dataclass(frozen=True)
class Partition:
    """The clips of worker `worker` of `of`; by default, of a single worker, all clips."""

    worker: int = 0
    of: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.worker < self.of:
            raise UserError(f"--worker: found {self.worker}, accepted: 0 to {self.of - 1} (--of {self.of})")

    def __str__(self) -> str:
        return f"worker {self.worker} of {self.of}"

    @property
    def folder(self) -> str:
        """The name of the worker's folder."""
        return f"{self.of:05d}-{self.worker:05d}"

    def contains(self, id_: str) -> bool:
        """Whether the clip `id_` belongs to this worker: a function of the id alone."""
        return int.from_bytes(hashlib.sha256(id_.encode()).digest()[:8]) % self.of == self.worker


@dataclass(frozen=True)
class Shard:
    """A finished shard of a worker: its path, and the metadata written beside it."""

    path: Path
    metadata: dict[str, Any]

    @property
    def keys(self) -> set[str]:
        """The keys of the clips and texts in it."""
        return {clip["key"] for clip in self.metadata["clips"]} | {text["text_key"] for text in self.metadata["texts"]}

    @property
    def contents(self) -> str:
        """What is in it, in words."""
        clips, texts = self.metadata["clips"], self.metadata["texts"]
        return f"{len(clips)} clips" if clips else f"{len(texts)} captions"


@contextmanager
def worker_lock(folder: Path, who: str) -> Iterator[None]:
    """Locks a worker's folder. Raises UserError if another process holds it: two would do the same work."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOCK).open("w") as lock:
        if not _try_lock(lock):
            raise UserError(f"{folder}: {who} is at work already; give each worker a number of its own")
        yield


def require_no_running_workers(work: Path, own: str) -> None:
    """Raises UserError if a worker is running, other than the one whose folder is `own`."""
    for path in sorted(work.glob(f"*/{LOCK}")):
        if path.parent.name != own:
            with path.open("r+") as lock:
                if not _try_lock(lock):
                    raise UserError(f"{path.parent}: a worker is at work there; run `phantom encode` when it is done")


def finished_shards(work: Path) -> list[Shard]:
    """The finished shards of all workers, in an order independent of which worker was faster."""
    paths = sorted(work.glob("*/shard-*.json"))
    return [Shard(path.with_suffix(".safetensors"), json.loads(path.read_text(encoding="utf-8"))) for path in paths]


def discard_corrupt_shards(shards: list[Shard], store: Folder | None = None) -> list[Shard]:
    """Deletes shards that do not match their metadata, so that their clips are encoded again, and returns them.

    Shards in `store` are compared by size only; reading a clip verifies its checksum.
    """
    intact = prefetch(partial(_is_intact, store=store), shards, cores())
    corrupt = [shard for shard, is_intact in zip(shards, intact, strict=True) if not is_intact]
    for shard in corrupt:
        shard.path.with_suffix(".json").unlink()
        shard.path.unlink(missing_ok=True)
    return corrupt


def claim_merge(work: Path, partition: Partition, manifest: str) -> bool:
    """Whether this worker is to merge: the first to ask claims it, and keeps the claim when restarted.

    A claim holds among as many workers on the clips of the same `manifest`, by its digest.
    """
    claim = work / f"{MERGER}-{manifest[:16]}-{partition.of}"
    with suppress(FileNotFoundError):  # already merged, and the folder removed
        with suppress(FileExistsError):
            claim.symlink_to(str(partition))  # dangling on purpose: a link is created atomically with its contents
        return claim.readlink() == Path(str(partition))
    return False


def _is_intact(shard: Shard, store: Folder | None) -> bool:
    if shard.path.is_file():
        return sha256(shard.path) == shard.metadata["sha256"]
    return store is not None and store.size(store_key(shard.metadata["sha256"])) == shard.metadata["bytes"]


def _try_lock(file: IO[str]) -> bool:
    try:
        lock_file(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except BlockingIOError:
        return False
