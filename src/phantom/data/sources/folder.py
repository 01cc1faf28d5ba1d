"""A folder of captioned mp4 files, local or under s3://.

Captions come from `captions.csv` (columns `file,caption`), else `captions.jsonl` (one object with `file` and `caption`
per line), else `NAME.txt` beside `NAME.mp4`. Subfolders are searched; names are relative to the folder; hidden files
are ignored.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

from phantom.config import Data
from phantom.data.manifest import Probe, Reference
from phantom.data.part import Part
from phantom.data.prefetch import prefetch
from phantom.data.references import make_segment
from phantom.data.sources.clips import (
    SourceContents,
    SourceVideo,
    Span,
    caption_text,
    name_languages,
    printable,
    read_failure,
)
from phantom.data.sources.tables import TOO_MANY_CELLS, csv_rows
from phantom.data.storage import Folder
from phantom.data.video import BadClip
from phantom.errors import UserError

CSV, JSONL = "captions.csv", "captions.jsonl"
CAPTION_READERS = 16  # caption files read in parallel


def find_videos(folder: Folder, data: Data, languages: Path, part: Part) -> tuple[SourceContents, FolderVideos]:
    """The mp4 of a part of `folder`, and access to them; `languages`: see `caption_languages`.

    Raises UserError if the folder, its videos or its captions are missing.
    """
    found = list_videos(folder)
    found.videos = part.piece(found.videos)
    name_languages(found, languages)
    return found, FolderVideos(folder, str(data.path))


class FolderVideos:
    """The mp4 of `folder`, which the settings call `source`."""

    def __init__(self, folder: Folder, source: str) -> None:
        self.folder, self.source = folder, source

    @contextmanager
    def open(self, video: SourceVideo) -> Iterator[tuple[Path, Span]]:
        """See `clips.Videos`."""
        with self.folder.local_path(video.path) as path:
            yield path, Span(0, path.stat().st_size)

    def refer(self, video: SourceVideo, span: Span) -> Reference:
        """See `clips.Videos`."""
        return Reference(self.source, (make_segment(self.folder, video.path, span.start, span.stop),))

    def check(self) -> Callable[[Probe], None] | None:
        """Nothing: all of them are wanted."""
        return None


def list_videos(folder: Folder) -> SourceContents:
    """The captioned videos of `folder`, sorted by id; what is unusable without decoding it is quarantined."""
    names = [entry.name for entry in folder.list()]
    videos = [name for name in names if name.lower().endswith(".mp4")]
    captions = list(_captions(folder, names, videos))
    origin = next((file for file in (CSV, JSONL) if file in names), None)
    if not videos and not captions:
        raise UserError(f"data.path: {folder}: no mp4 in it")
    existing = set(names)
    named = {PurePosixPath(file).as_posix() for file, _ in captions}
    by_id: dict[str, SourceVideo] = {}
    found = SourceContents()
    for file, caption in [*captions, *((name, None) for name in videos if name not in named)]:
        name = PurePosixPath(file).as_posix()
        is_video = name.lower().endswith(".mp4")
        id_ = name[:-4] if is_video else name
        try:
            if not is_video:
                raise BadClip("not an mp4")
            if problem := _why_unreadable(folder, name):
                raise BadClip(problem)
            if files := [str(parent) for parent in PurePosixPath(name).parents if str(parent) in existing]:
                raise BadClip(f"{files[0]} is a file too")  # possible on S3, which has no folders
            version = f"{folder} {folder.version(name)}"
            video = SourceVideo(id_, name, caption_text(caption), origin or _sidecar_of(name), version)
            if id_ in by_id:
                raise BadClip(f"duplicate: {by_id[id_].path} has the same name")
            by_id[id_] = video
        except BadClip as reason:
            found.quarantine(id_, file, reason)
    found.videos = [by_id[id_] for id_ in sorted(by_id)]
    return found


def _captions(folder: Folder, names: list[str], videos: list[str]) -> Iterator[tuple[str, Any]]:
    """Unchecked (file, caption) pairs of the folder; instead of a missing caption, a BadClip with the reason."""
    existing = set(names)
    if CSV in existing:
        yield from _csv_captions(folder)
    elif JSONL in existing:
        yield from _jsonl_captions(folder)
    else:
        sidecars = [_sidecar_of(name) for name in videos]
        if videos and existing.isdisjoint(sidecars):
            raise UserError(
                f"data.path: {folder}: no captions, expected {CSV} (file,caption), {JSONL}, or NAME.txt beside NAME.mp4"
            )
        yield from zip(videos, prefetch(partial(_sidecar_caption, folder), sidecars, CAPTION_READERS), strict=True)


def _csv_captions(folder: Folder) -> Iterator[tuple[str, Any]]:
    for row in csv_rows(folder, CSV, ("file", "caption")):
        yield row["file"] or "", BadClip(TOO_MANY_CELLS) if None in row else row["caption"]


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


def _sidecar_of(video: str) -> str:
    return str(PurePosixPath(video).with_suffix(".txt"))


def _sidecar_caption(folder: Folder, name: str) -> Any:
    """The text of the caption file `name`, or a BadClip with the reason why there is none."""
    if problem := _why_unreadable(folder, name):
        return BadClip(f"no caption: {name}: {problem}")
    try:
        with folder.open(name) as file:
            return file.read().decode("utf-8-sig")
    except UnicodeDecodeError:
        return BadClip("its caption is not UTF-8")
    except OSError as error:
        return BadClip(f"no caption: {name}: {read_failure(error, name)}")


def _why_unreadable(folder: Folder, name: str) -> str | None:
    return "its name is not UTF-8" if printable(name) != name else folder.why_unreadable(name)
