"""A folder of mp4 with captions, here or under s3://.

Captions come from `captions.csv` (columns `file,caption`), else `captions.jsonl` (an object with `file` and `caption`
a line), else `NAME.txt` beside `NAME.mp4`. Subfolders count; names are relative to the folder, hidden files are not
looked at.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

from phantom.config import Data
from phantom.data.prefetch import ahead
from phantom.data.sources import clips
from phantom.data.sources.clips import Found, Item, caption_text, printable, unreadable
from phantom.data.storage import Folder
from phantom.data.video import BadClip
from phantom.errors import UserError

CSV, JSONL = "captions.csv", "captions.jsonl"
MAX_CELL = 2**30  # characters; csv's own limit would refuse the whole file for one long caption
QUOTES = "is a quote not closed, or not doubled, there or before?"
READERS = 16  # caption files that are read at a time


def write_clips(out: Path, folder: Folder, data: Data, work: Path) -> Found:
    """Writes every usable mp4 of `folder` into `out`; see clips.write_clips.

    Raises UserError if the folder, its videos or its captions are not there.
    """
    return clips.write_clips(find(folder), lambda item: folder.local(item.path), out, data, work)


def find(folder: Folder) -> Found:
    """The captioned videos of `folder`, by id, and what can be told to be unusable without decoding it."""
    names = [entry.name for entry in folder.list()]
    videos = [name for name in names if name.lower().endswith(".mp4")]
    captions = list(_captions(folder, names, videos))
    if not videos and not captions:
        raise UserError(f"data.path: {folder}: no mp4 in it")
    there = set(names)
    named = {PurePosixPath(file).as_posix() for file, _ in captions}
    items: dict[str, Item] = {}
    found = Found()
    for file, caption in [*captions, *((name, None) for name in videos if name not in named)]:
        name = PurePosixPath(file).as_posix()
        is_video = name.lower().endswith(".mp4")
        id_ = name[:-4] if is_video else name
        try:
            if not is_video:
                raise BadClip("not an mp4")
            if refusal := _refusal(folder, name):
                raise BadClip(refusal)
            if both := [str(above) for above in PurePosixPath(name).parents if str(above) in there]:
                raise BadClip(f"{both[0]} is a file too")  # S3 knows no folders
            item = Item(id_, name, caption_text(caption), f"{folder} {folder.version(name)}")
            if id_ in items:
                raise BadClip(f"duplicate: {items[id_].path} has the same name")
            items[id_] = item
        except BadClip as reason:
            found.refuse(id_, file, reason)
    found.items = [items[id_] for id_ in sorted(items)]
    return found


def _captions(folder: Folder, names: list[str], videos: list[str]) -> Iterator[tuple[str, Any]]:
    """(file, caption) as the folder states them, both unchecked; a BadClip says why there is no caption."""
    there = set(names)
    if CSV in there:
        yield from _csv_captions(folder)
    elif JSONL in there:
        yield from _jsonl_captions(folder)
    else:
        beside = [str(PurePosixPath(name).with_suffix(".txt")) for name in videos]
        if videos and there.isdisjoint(beside):
            raise UserError(
                f"data.path: {folder}: no captions, expected {CSV} (file,caption), {JSONL}, or NAME.txt beside NAME.mp4"
            )
        yield from zip(videos, ahead(partial(_beside, folder), beside, READERS), strict=True)


def _csv_captions(folder: Folder) -> Iterator[tuple[str, Any]]:
    csv.field_size_limit(MAX_CELL)
    try:
        with io.TextIOWrapper(folder.open(CSV), encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, strict=True)  # else a quote left open takes the rows behind it for a caption
            columns = reader.fieldnames or []
            if not {"file", "caption"} <= set(columns):
                raise UserError(f"{folder}/{CSV}: columns {','.join(columns) or 'missing'}, expected file,caption")
            for row in reader:
                caption: Any = row["caption"]
                if None in row:
                    caption = BadClip("more cells than columns: a caption that holds a comma stands in quotes")
                yield row["file"] or "", caption
    except UnicodeDecodeError:
        raise UserError(f"{folder}/{CSV}: not UTF-8") from None
    except csv.Error as error:
        raise UserError(f"{folder}/{CSV} line {reader.reader.line_num}: {error}; {QUOTES}") from None


def _jsonl_captions(folder: Folder) -> Iterator[tuple[str, Any]]:
    where = f"{folder}/{JSONL}"
    with folder.open(JSONL) as file:
        for number, line in enumerate(file, 1):
            try:
                row = json.loads(line) if line.strip() else None
            except (ValueError, RecursionError):
                raise UserError(f"{where} line {number}: not JSON") from None
            if row is not None:
                if not isinstance(row, dict) or not isinstance(row.get("file"), str):
                    raise UserError(f"{where} line {number}: expected an object with file and caption")
                yield row["file"], row.get("caption")


def _beside(folder: Folder, name: str) -> Any:
    """The text of the caption file `name`, or why there is none."""
    if refusal := _refusal(folder, name):
        return BadClip(f"no caption: {name}: {refusal}")
    try:
        with folder.open(name) as file:
            return file.read().decode("utf-8-sig")
    except UnicodeDecodeError:
        return BadClip("its caption is not UTF-8")
    except OSError as error:
        return BadClip(f"no caption: {name}: {unreadable(error, name)}")


def _refusal(folder: Folder, name: str) -> str | None:
    return "its name is not UTF-8" if printable(name) != name else folder.refusal(name)
