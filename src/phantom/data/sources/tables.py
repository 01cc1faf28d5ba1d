"""Rows of a csv file in a folder, local or under s3://."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Sequence
from typing import Any

from phantom.data.storage import Folder
from phantom.errors import UserError

MAX_CELL = 2**30  # characters; csv's default limit would reject the whole file for one long caption
TOO_MANY_CELLS = "more cells than columns: a caption that holds a comma stands in quotes"  # of a row with the key None


def csv_rows(folder: Folder, path: str, needed: Sequence[str]) -> Iterator[dict[Any, Any]]:
    """The rows as dictionaries; cells without a column are listed under None.

    Raises UserError if it is not UTF-8, a column of `needed` is missing, or its quotes are wrong.
    """
    csv.field_size_limit(MAX_CELL)
    try:
        with io.TextIOWrapper(folder.open(path), encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, strict=True)  # otherwise an unclosed quote swallows the following rows
            columns = reader.fieldnames or []
            if missing := [column for column in needed if column not in columns]:
                raise UserError(f"{folder}/{path}: no column {missing[0]!r}, found: {', '.join(columns) or 'none'}")
            yield from reader
    except UnicodeDecodeError:
        raise UserError(f"{folder}/{path}: not UTF-8") from None
    except csv.Error as error:
        hint = "is a quote not closed, or not doubled, there or before?"
        raise UserError(f"{folder}/{path} line {reader.reader.line_num}: {error}; {hint}") from None
