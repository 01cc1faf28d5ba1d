"""Who encodes what: workers that take their clips by hash, each into a folder of its own, and never the same file."""

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
from phantom.data.prefetch import ahead
from phantom.data.shards import stored_name
from phantom.data.storage import Folder
from phantom.errors import UserError

LOCK, MERGER = "lock", "merger"


@dataclass(frozen=True)
class Share:
    """What worker `worker` of `of` takes; without others that is everything."""

    worker: int = 0
    of: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.worker < self.of:
            raise UserError(f"--worker: found {self.worker}, accepted: 0 to {self.of - 1} (--of {self.of})")

    def __str__(self) -> str:
        return f"worker {self.worker} of {self.of}"

    @property
    def folder(self) -> str:
        """The name of its folder."""
        return f"{self.of:05d}-{self.worker:05d}"

    def takes(self, id_: str) -> bool:
        """Whether the clip `id_` falls to it: a function of the id alone."""
        return int.from_bytes(hashlib.sha256(id_.encode()).digest()[:8]) % self.of == self.worker


@dataclass(frozen=True)
class Shard:
    """A finished shard of a worker: where it is, and the note of what it holds."""

    path: Path
    note: dict[str, Any]

    @property
    def ids(self) -> list[str]:
        """The clips in it."""
        return [clip["id"] for clip in self.note["clips"]]


@contextmanager
def at_work(folder: Path, who: str) -> Iterator[None]:
    """Holds the folder of a worker. Raises UserError if another process does: two would do the same work."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOCK).open("w") as lock:
        if not _lock(lock):
            raise UserError(f"{folder}: {who} is at work already; give each worker a number of its own")
        yield


def refuse_others_at_work(work: Path, own: str) -> None:
    """Raises UserError if a worker other than that of the folder `own` is at work."""
    for path in sorted(work.glob(f"*/{LOCK}")):
        if path.parent.name != own:
            with path.open("r+") as lock:
                if not _lock(lock):
                    raise UserError(f"{path.parent}: a worker is at work there; run `phantom encode` when it is done")


def finished_shards(work: Path) -> list[Shard]:
    """The finished shards of all workers, in an order that does not depend on who was faster."""
    notes = sorted(work.glob("*/shard-*.json"))
    return [Shard(note.with_suffix(".safetensors"), json.loads(note.read_text(encoding="utf-8"))) for note in notes]


def damaged_shards(shards: list[Shard], store: Folder | None = None) -> list[Shard]:
    """Those whose file is not what its note says. Their notes are removed, so that their clips are encoded again.

    Of those that are in `store` already the size is compared: they are read there with their clips' checksums.
    """
    whole = ahead(partial(_is_whole, store=store), shards, cores())
    damaged = [shard for shard, is_whole in zip(shards, whole, strict=True) if not is_whole]
    for shard in damaged:
        shard.path.with_suffix(".json").unlink()
        shard.path.unlink(missing_ok=True)
    return damaged


def is_merger(work: Path, share: Share) -> bool:
    """Whether it falls to this worker to merge. The first to ask is it, and still is when it is started again."""
    claim = work / MERGER
    with suppress(FileNotFoundError):  # it is merged, and the folder gone
        with suppress(FileExistsError):
            claim.symlink_to(str(share))  # to nothing: a link is there with its contents, or not at all
        return claim.readlink() == Path(str(share))
    return False


def _is_whole(shard: Shard, store: Folder | None) -> bool:
    if shard.path.is_file():
        return sha256(shard.path) == shard.note["sha256"]
    return store is not None and store.size(stored_name(shard.note["sha256"])) == shard.note["bytes"]


def _lock(file: IO[str]) -> bool:
    try:
        lock_file(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except BlockingIOError:
        return False
