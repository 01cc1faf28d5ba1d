"""The clips of data/latents as an Arrow file, memory-mapped: half a million open in a moment, for all processes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

CLIP_TABLE = "clips.arrow"
ROWS_PER_BATCH = 2**14
TENSOR = pa.struct(
    [
        ("name", pa.string()),
        ("dtype", pa.string()),
        ("shape", pa.list_(pa.int32())),
        ("start", pa.int64()),
        ("stop", pa.int64()),
        ("xxh3", pa.string()),
    ]
)
FIELDS = {
    "id": pa.string(),
    "is_heldout": pa.bool_(),
    "caption": pa.string(),
    "frames": pa.int32(),
    "key": pa.string(),
    "video": pa.list_(pa.int32(), 4),  # the shape of the video latents
    "prefixes": pa.list_(pa.int32()),  # frames
    "xxh3": pa.string(),  # of all tensors of the clip
    "physics_error": pa.float64(),
    "shard": pa.int32(),  # its place in the index's list of shards
    "tensors": pa.list_(TENSOR),
    "text_key": pa.string(),
    "text_shard": pa.int32(),
    "text": TENSOR,
    "force": pa.string(),  # a force prompt as JSON, or null; absent before there were forces
}


def write_clip_table(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Writes rows of FIELDS and `columns`: what `data.filter` selects by, or None; of all rows the same ones."""
    rows = iter(rows)
    first = next(rows)
    fields = [*FIELDS.items(), ("columns", pa.array([first["columns"]]).type)]
    schema = pa.schema(fields)
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, schema) as writer:
        for batch in _batches(first, rows):
            writer.write_batch(pa.RecordBatch.from_pylist(batch, schema=schema))


def _batches(first: dict[str, Any], rows: Iterator[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    batch = [first, *islice(rows, ROWS_PER_BATCH - 1)]
    while batch:
        yield batch
        batch = [*islice(rows, ROWS_PER_BATCH)]


class ClipTable:
    """Rows of the file at `path`, read on access.

    Without `pa.array`, `pa.scalar` and `to_numpy`, which import pandas: that takes longer than all else.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with pa.memory_map(str(path)) as file:
            self._table = pa.ipc.open_file(file).read_all()

    def __len__(self) -> int:
        return self._table.num_rows

    def __reduce__(self) -> tuple[Any, ...]:
        return ClipTable, (self.path,)  # mapped there too

    def row(self, number: int) -> dict[str, Any]:
        """One row, as it was written."""
        return self._table.slice(number, 1).to_pylist()[0]

    def rows(self) -> Iterator[dict[str, Any]]:
        """All rows."""
        for batch in self._table.to_batches():
            yield from batch.to_pylist()

    def numbers_of(self, split: str) -> np.ndarray:
        """The numbers of the rows of a split."""
        is_heldout = self._table["is_heldout"]
        return np.from_dlpack(pc.indices_nonzero(is_heldout if split == "heldout" else pc.invert(is_heldout)))

    def values(self, name: str, numbers: np.ndarray | None = None) -> list[Any]:
        """The values of a field in these rows, or in all; None for all where an earlier version wrote none."""
        if name not in self._table.column_names:
            return [None] * (len(self) if numbers is None else len(numbers))
        column = self._table[name]
        if numbers is not None:
            numbers = np.ascontiguousarray(numbers, np.int64)
            column = column.take(pa.Array.from_buffers(pa.int64(), len(numbers), [None, pa.py_buffer(numbers)]))
        return column.to_pylist()

    def shapes(self, numbers: np.ndarray) -> list[tuple[int, ...]]:
        """The shape of the video latents of each of these rows; equal ones are one object."""
        flat = np.concatenate([np.from_dlpack(chunk.flatten()) for chunk in self._table["video"].chunks])
        sides = flat.reshape(-1, 4)[numbers]
        if not len(sides):
            return []
        as_one = np.ravel_multi_index(tuple(sides.T), tuple(sides.max(axis=0) + 1))
        _, first, places = np.unique(as_one, return_index=True, return_inverse=True)
        shapes = [tuple(shape) for shape in sides[first].tolist()]
        return [shapes[place] for place in places.tolist()]
