"""A disk cache of recordings at the size of the comparison: they are decoded and downscaled once for all scores.

A file is a zip with one entry per frame: both takes and their masks, as the difference to the previous frame. Most of a
recording does not move, so that the differences compress well with zstd. The zip's checksums detect a damaged file,
which is written again.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa

from phantom.evaluation.physics_iq.metrics import Row
from phantom.progress import say

RESERVE = 2 << 30  # bytes of disk space that are left free


def cache_path(cache: Path, key: str) -> Path:
    """The file of the recordings with cache key `key`."""
    return cache / "recordings" / f"{key}.zip"


def make_folder(cache: Path) -> bool:
    """Creates the folder of recordings in `cache`. False, with a warning, if it is not writable."""
    folder = cache / "recordings"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        say(f"{folder}: {error.strerror}; what is compared is not kept")
        return False
    return True


def cached_bytes(cache: Path) -> int:
    """Total size of all cached recordings in bytes."""
    return sum(path.stat().st_size for path in (cache / "recordings").glob("*.zip"))


def has_room(folder: Path) -> bool:
    """Whether the disk of `folder` has room for another recording."""
    return shutil.disk_usage(folder).free > RESERVE


def write_through(rows: Iterable[Row], path: Path) -> Iterator[Row]:
    """Yields `rows` unchanged, and writes them to `path` (atomically, once the last one has been consumed).

    Frames are uint8 (h, w, 3), masks bool (h, w), all of the same size.
    """
    part = path.with_suffix(f".{os.urandom(4).hex()}.part")
    try:
        with zipfile.ZipFile(part, "w") as archive:
            before: np.ndarray | None = None
            for index, row in enumerate(rows):
                packed = _pack(row)
                if before is None:
                    archive.writestr("shape", json.dumps(row[2].shape))
                difference = packed if before is None else packed - before
                archive.writestr(f"{index:04d}", pa.compress(difference, codec="zstd", asbytes=True))
                before = packed
                yield row
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def read(path: Path, count: int) -> tuple[tuple[int, int], Iterator[Row]] | None:
    """The size (width, height) and the `count` rows in `path`; None if the file is missing or damaged."""
    try:
        with zipfile.ZipFile(path) as archive:
            if archive.testzip() is not None or len(archive.namelist()) != count + 1:
                return None
            height, width = json.loads(archive.read("shape"))
    except (FileNotFoundError, zipfile.BadZipFile, EOFError, KeyError, ValueError):
        return None
    return (width, height), _rows(path, count, (height, width))


def _rows(path: Path, count: int, shape: tuple[int, int]) -> Iterator[Row]:
    pixels = shape[0] * shape[1]
    length = 6 * pixels + 2 * -(-pixels // 8)
    packed = np.zeros(length, np.uint8)
    with zipfile.ZipFile(path) as archive:
        for index in range(count):
            difference = pa.decompress(archive.read(f"{index:04d}"), decompressed_size=length, codec="zstd")
            packed = packed + np.frombuffer(difference, np.uint8)
            first, second, masks = np.split(packed, [3 * pixels, 6 * pixels])
            bits = np.unpackbits(masks.reshape(2, -1), axis=1, count=pixels).view(bool).reshape(2, *shape)
            yield first.reshape(*shape, 3), second.reshape(*shape, 3), bits[0], bits[1]


def _pack(row: Row) -> np.ndarray:
    first, second, *masks = row
    return np.concatenate([first.ravel(), second.ravel(), *(np.packbits(mask) for mask in masks)])
