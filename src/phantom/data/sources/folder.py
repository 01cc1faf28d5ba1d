"""A folder of mp4 with captions, made into clips of one rate and size.

Captions come from `captions.csv` (columns `file,caption`), else `captions.jsonl` (an object with `file` and `caption`
a line), else `NAME.txt` beside `NAME.mp4`. Subfolders count; names are relative to the folder, hidden files are not
looked at.
"""

from __future__ import annotations

import csv
import json
import os
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

from phantom.config import Data
from phantom.data.ahead import ahead
from phantom.data.files import link, settle, sha256
from phantom.data.manifest import Clip, Quarantined, Split
from phantom.data.video import BadClip, probe, read_clip, write_mp4
from phantom.errors import UserError
from phantom.progress import track

CSV, JSONL = "captions.csv", "captions.jsonl"


@dataclass(frozen=True)
class Item:
    """A captioned file that may become a clip."""

    id: str  # its name without .mp4
    path: Path
    caption: str


@dataclass(frozen=True)
class Made:
    """A file that became a clip of `frames` frames at `path`; `source` is the digest of what it was made from."""

    source: str
    path: Path
    frames: int
    sha256: str


def write_clips(out: Path, source: Path, data: Data, work: Path) -> tuple[list[Clip], list[Quarantined]]:
    """Writes every usable mp4 of the folder `source` into `out`; returns the clips and what was left out, by id.

    Clips are made in `work`, where a later call finds them again, and then linked into `out`. Raises UserError if the
    folder, its videos or its captions are not there.
    """
    items, bad = find(source)
    work.mkdir(parents=True, exist_ok=True)
    made: dict[str, Made] = {}
    first: dict[str, str] = {}  # the id that a clip's bytes came from first
    make = partial(_make, data=data, work=work)
    with track("prepare", len(items), "clips") as bar:
        for item, result in zip(items, ahead(make, items, os.cpu_count() or 1), strict=True):
            if isinstance(result, Made) and first.setdefault(result.sha256, item.id) != item.id:
                result = f"duplicate: the same video as {first[result.sha256]}.mp4"
            if isinstance(result, Made):
                made[item.id] = result
            else:
                bad.append(Quarantined(item.id, item.path.relative_to(source).as_posix(), result))
            bar.advance()
    heldout = choose_heldout([m.source for m in made.values()], data.heldout)
    clips = []
    for item in items:
        if item.id in made:
            this = made[item.id]
            path = item.path.relative_to(source).as_posix()
            link(this.path, out / path)
            split: Split = "heldout" if this.source in heldout else "train"
            clips.append(Clip(item.id, path, item.caption, this.frames, float(data.fps), this.sha256, split))
    return clips, sorted(bad, key=lambda q: (q.id, q.path, q.reason))


def find(folder: Path) -> tuple[list[Item], list[Quarantined]]:
    """The captioned videos of `folder`, by id, and what can be told to be unusable without decoding it."""
    if not folder.is_dir():
        raise UserError(f"data.path: {folder}: no such folder")
    videos = [name for name in _names(folder) if name.lower().endswith(".mp4")]
    captions = list(_captions(folder, videos))
    if not videos and not captions:
        raise UserError(f"data.path: {folder}: no mp4 in it")
    named = {PurePosixPath(file).as_posix() for file, _ in captions}
    items: dict[str, Item] = {}
    bad = []
    for file, caption in [*captions, *((name, None) for name in videos if name not in named)]:
        name = PurePosixPath(file).as_posix()
        is_video = name.lower().endswith(".mp4")
        id_ = name[:-4] if is_video else name
        try:
            if not is_video:
                raise BadClip("not an mp4")
            item = Item(id_, _locate(folder, name), _text(caption))
            if id_ in items:
                raise BadClip(f"duplicate: {items[id_].path.relative_to(folder).as_posix()} has the same name")
            items[id_] = item
        except BadClip as reason:
            bad.append(Quarantined(_printable(id_), _printable(file), str(reason)))
    return [items[id_] for id_ in sorted(items)], bad


def choose_heldout(digests: Iterable[str], share: float) -> set[str]:
    """Which clips, known by their digests, are kept for validation: those in the lowest `share` of all digests.

    A clip keeps its side when others come or go. Neither side stays empty where there are two clips and 0 < share < 1.
    """
    ordered = sorted(digests)
    count = sum(int(digest[:16], 16) < share * 2**64 for digest in ordered)
    count = min(max(count, int(share > 0)), max(len(ordered) - int(share < 1), 0))
    return set(ordered[:count])


def _make(item: Item, data: Data, work: Path) -> Made | str:
    """The clip of `item`, made unless `work` has it; or the reason why there is none."""
    try:
        source = sha256(item.path)
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    path = work / f"{source}.mp4"
    if not path.is_file():
        try:
            frames = read_clip(item.path, data.fps, data.height, data.width, data.frames, data.min_frames)
        except BadClip as reason:
            return str(reason)
        part = path.with_suffix(f".{threading.get_ident()}.part")  # the same video may be there twice
        write_mp4(part, frames, data.fps)
        settle(part)
        part.replace(path)
    return Made(source, path, probe(path).frames, sha256(path))


def _names(folder: Path) -> list[str]:
    names = (path.relative_to(folder) for path in folder.rglob("*"))
    return sorted(name.as_posix() for name in names if not any(part.startswith(".") for part in name.parts))


def _captions(folder: Path, videos: list[str]) -> Iterator[tuple[str, Any]]:
    """(file, caption) as the folder states them, both unchecked; a BadClip says why there is no caption."""
    if (folder / CSV).is_file():
        yield from _csv_captions(folder / CSV)
    elif (folder / JSONL).is_file():
        yield from _jsonl_captions(folder / JSONL)
    else:
        beside = {name: str(PurePosixPath(name).with_suffix(".txt")) for name in videos}
        if videos and not any((folder / text).is_file() for text in beside.values()):
            raise UserError(
                f"data.path: {folder}: no captions, expected {CSV} (file,caption), {JSONL}, or NAME.txt beside NAME.mp4"
            )
        for name, text in beside.items():
            yield name, _beside(folder, text)


def _csv_captions(path: Path) -> Iterator[tuple[str, Any]]:
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file)
            columns = reader.fieldnames or []
            if not {"file", "caption"} <= set(columns):
                raise UserError(f"{path}: columns {','.join(columns) or 'missing'}, expected file,caption")
            for row in reader:
                caption: Any = row["caption"]
                if None in row:
                    caption = BadClip("more cells than columns: a caption that holds a comma stands in quotes")
                yield row["file"] or "", caption
    except UnicodeDecodeError:
        raise UserError(f"{path}: not UTF-8") from None
    except csv.Error as error:
        raise UserError(f"{path} line {reader.line_num}: {error}") from None


def _jsonl_captions(path: Path) -> Iterator[tuple[str, Any]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                row = json.loads(line) if line.strip() else None
            except (ValueError, RecursionError):
                raise UserError(f"{path} line {number}: not JSON") from None
            if row is not None:
                if not isinstance(row, dict) or not isinstance(row.get("file"), str):
                    raise UserError(f"{path} line {number}: expected an object with file and caption")
                yield row["file"], row.get("caption")


def _beside(folder: Path, name: str) -> Any:
    """The text of the caption file `name`, or why there is none."""
    try:
        return _locate(folder, name).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        return BadClip("its caption is not UTF-8")
    except BadClip as reason:
        return BadClip(f"no caption: {name}: {reason}")
    except OSError as error:
        return BadClip(f"no caption: {name}: {error.strerror}")


def _locate(folder: Path, name: str) -> Path:
    """The file `name` of `folder`. Raises BadClip if there is none, or if it lies elsewhere."""
    pure = PurePosixPath(name)
    if _printable(name) != name:
        raise BadClip("its name is not UTF-8")
    if pure.is_absolute() or ".." in pure.parts:
        raise BadClip("its path leaves the folder")
    path = folder / pure
    try:
        real = path.resolve(strict=True)
    except (OSError, RuntimeError, ValueError):
        raise BadClip("no such file") from None
    if not real.is_relative_to(folder.resolve()):
        raise BadClip("a link that leaves the folder")
    if not real.is_file():
        raise BadClip("not a file")
    return path


def _text(caption: Any) -> str:
    """A caption without space around it. Raises BadClip if it says nothing or is no text."""
    if isinstance(caption, BadClip):
        raise caption
    if caption is None:
        raise BadClip("no caption")
    if not isinstance(caption, str) or _printable(caption) != caption:
        raise BadClip("its caption is not text")
    if not caption.strip():
        raise BadClip("its caption is empty")
    return caption.strip()


def _printable(text: str) -> str:
    """`text` with what no UTF-8 file can hold spelled out."""
    return text.encode("utf-8", "backslashreplace").decode()
