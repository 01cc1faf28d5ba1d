"""The rows of the manifest as a Parquet file, written and read in row groups."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from phantom.data.part import ALL, Part
from phantom.errors import UserError

ROWS_PER_GROUP = 2**14
Makers = Mapping[str, Callable[..., Any]]


def _required(*fields: tuple[str, pa.DataType]) -> list[pa.Field]:
    return [pa.field(name, type_, nullable=False) for name, type_ in fields]


SEGMENT = pa.struct(
    [
        *_required(("file", pa.string())),
        ("version", pa.string()),
        *_required(("start", pa.int64()), ("stop", pa.int64())),
    ]
)
REFERENCE = pa.struct(
    [
        *_required(("source", pa.string()), ("segments", pa.list_(SEGMENT))),
        ("member", pa.string()),
        ("compression", pa.string()),
    ]
)
PROBE = pa.struct(
    _required(
        ("codec", pa.string()),
        ("frames", pa.int32()),
        ("fps", pa.float64()),
        ("seconds", pa.float64()),
        ("height", pa.int32()),
        ("width", pa.int32()),
        ("colour_primaries", pa.int16()),
        ("colour_transfer", pa.int16()),
        ("colour_matrix", pa.int16()),
        ("is_full_range", pa.bool_()),
    )
)
SCORES = pa.struct(
    [
        ("aesthetic", pa.float64()),
        ("motion", pa.float64()),
        ("consistency", pa.float64()),
        ("camera_motion", pa.string()),
    ]
)
CURATION = pa.struct(
    [
        *_required(
            ("cuts", pa.int32()), ("motion", pa.float64()), ("static", pa.bool_()), ("black_bars", pa.float64())
        ),
        ("duplicate_of", pa.string()),
    ]
)
SCHEMA = pa.schema(
    [
        *_required(("id", pa.string())),
        ("path", pa.string()),
        *_required(("caption", pa.string()), ("frames", pa.int32()), ("fps", pa.float64()), ("sha256", pa.string())),
        *_required(("split", pa.string())),
        ("height", pa.int32()),
        ("width", pa.int32()),
        ("moves_from", pa.int32()),
        ("curation", CURATION),
        *_required(("first_frame", pa.int32())),
        ("reference", REFERENCE),
        ("probe", PROBE),
        ("scores", SCORES),
        ("caption_origin", pa.string()),
        *_required(("language", pa.string())),
        ("force", pa.string()),
    ]
)


def write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Writes rows of SCHEMA to `path`. The same rows give the same bytes, with one version of pyarrow."""
    rows = iter(rows)
    with pq.ParquetWriter(path, SCHEMA, compression="zstd") as writer:
        while group := [*islice(rows, ROWS_PER_GROUP)]:
            writer.write_batch(pa.RecordBatch.from_pylist(group, schema=SCHEMA))


def read_rows(path: Path, makers: Makers, part: Part = ALL) -> Iterator[dict[str, Any]]:
    """The rows of `path` whose sha256 is in `part`, with what `makers`, by name, make of the fields of each struct, in
    their order.

    Raises UserError if it is no such file, or a column is missing or of another type.
    """
    with _open(path) as file:
        found = file.schema_arrow
        for field in SCHEMA:
            if field.name not in found.names:
                raise UserError(f"{path}: no column {field.name!r}; run `phantom prepare` again")
            if (kind := found.field(field.name).type) != field.type:
                raise UserError(f"{path}: column {field.name!r} is {kind}, accepted: {field.type}")
        names = SCHEMA.names
        try:
            for batch in file.iter_batches(ROWS_PER_GROUP, columns=names):
                if part != ALL:
                    is_wanted = [part.contains(sha256) for sha256 in batch.column("sha256").to_pylist()]
                    batch = batch.filter(pa.array(is_wanted, pa.bool_()))
                columns = [_values(name, batch.column(name), makers) for name in names]
                for values in zip(*columns, strict=True):
                    yield dict(zip(names, values, strict=True))
        except (pa.ArrowInvalid, OSError) as error:
            raise _damaged(path, error) from None


def _values(name: str, column: pa.Array, makers: Makers) -> list[Any]:
    """The values of a column. By columns, which takes half of the time that `to_pylist` of a batch does."""
    if pa.types.is_struct(column.type):
        fields = [field.name for field in column.type]
        inner = [_values(field, one, makers) for field, one in zip(fields, column.flatten(), strict=True)]
        make = makers[name]
        stated = column.is_valid().to_pylist()
        return [make(*values) if is_stated else None for is_stated, *values in zip(stated, *inner, strict=True)]
    if pa.types.is_list(column.type):
        items, offsets = _values(name, column.values, makers), column.offsets.to_pylist()
        return [tuple(items[start:stop]) for start, stop in pairwise(offsets)]
    return column.to_pylist()


def read_training_ids(path: Path) -> list[str]:
    """The ids of the training clips. Raises UserError if it is no such file."""
    with _open(path) as file:
        columns = file.read(["id", "split"]).to_pydict()
    return [id_ for id_, split in zip(columns["id"], columns["split"], strict=True) if split == "train"]


def count_rows(path: Path) -> int:
    """The number of rows of `path`. Raises UserError if it is no such file."""
    with _open(path) as file:
        return file.metadata.num_rows


def _open(path: Path) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(path)
    except (pa.ArrowInvalid, OSError) as error:
        raise _damaged(path, error) from None


def _damaged(path: Path, error: Exception) -> UserError:
    return UserError(f"{path}: damaged: {str(error).splitlines()[0]}; run `phantom prepare` again")
