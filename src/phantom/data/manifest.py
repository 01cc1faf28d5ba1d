"""The index of data/clips: `manifest.jsonl` lists the clips, `quarantine.jsonl` the files that were rejected."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar

from pydantic import ConfigDict, TypeAdapter, ValidationError

from phantom.config import ClipFilter
from phantom.errors import UserError

CLIPS = Path("data/clips")
MANIFEST, QUARANTINE = "manifest.jsonl", "quarantine.jsonl"
Split = Literal["train", "heldout"]


@dataclass(frozen=True)
class Curation:
    """What the frames of a clip show (`curation.measure`)."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    cuts: int
    motion: float
    static: bool
    black_bars: float
    duplicate_of: str | None = None  # the id of the clip that it nearly equals; known once all clips are


@dataclass(frozen=True)
class Clip:
    """One clip, re-encoded at the frame rate and size of the run."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    id: str
    path: str  # relative to data/clips
    caption: str
    frames: int
    fps: float
    sha256: str  # of the file at `path`
    split: Split
    height: int | None = None  # None for the main size, data.height x data.width
    width: int | None = None
    moves_from: int | None = None  # first frame in which something moves, where it is known: conditions last beyond it
    curation: Curation | None = None  # None: prepared by a version before 0.2


def columns(clip: Clip) -> dict[str, float] | None:
    """What `data.filter` selects by (`config.COLUMNS`); None for a clip whose frames were not measured."""
    if clip.curation is None:
        return None
    one = clip.curation
    return {
        "cuts": one.cuts,
        "motion": one.motion,
        "static": one.static,
        "black_bars": one.black_bars,
        "duplicate": one.duplicate_of is not None,
        "caption_length": len(clip.caption),
        "frames": clip.frames,
    }


def training_clips(clips: Iterable[Clip], condition: str | None) -> list[Clip]:
    """The clips that a run trains on: those for which `condition`, `data.filter`, holds, or all without one.

    Raises UserError where a clip has no columns.
    """
    found = [clip for clip in clips if clip.split == "train"]
    if condition is None:
        return found
    rows = [columns(clip) for clip in found]
    keeps = ClipFilter.parse(condition).keeps
    if None in rows:
        raise UserError(f"{CLIPS / MANIFEST}: states no columns, which data.filter needs; run `phantom prepare` again")
    return [clip for clip, row in zip(found, rows, strict=True) if row and keeps(row)]


@dataclass(frozen=True)
class Quarantined:
    """A rejected file of the source, and why."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    id: str
    path: str  # in the source
    reason: str


Row = TypeVar("Row", Clip, Quarantined)


def write_manifest(path: Path, clips: Iterable[Clip]) -> None:
    """Writes the clips to `path` as JSON lines; None values are omitted."""
    _write(path, clips)


def read_manifest(path: Path) -> list[Clip]:
    """Reads the clips of `path`, in its order. Raises UserError naming the invalid line."""
    clips = _read(path, Clip)
    lines: dict[str, int] = {}
    for number, clip in enumerate(clips, 1):
        if lines.setdefault(clip.id, number) != number:
            raise UserError(f"{path} line {number}: id {clip.id!r} stands in line {lines[clip.id]} too")
    return clips


def write_quarantine(path: Path, quarantined: Iterable[Quarantined]) -> None:
    """Writes the rejected files to `path` as JSON lines."""
    _write(path, quarantined)


def read_quarantine(path: Path) -> list[Quarantined]:
    """Reads the rejected files of `path`. Raises UserError naming the invalid line."""
    return _read(path, Quarantined)


def by_kind(quarantined: Iterable[Quarantined]) -> list[list[Quarantined]]:
    """Rejected files with the same kind of reason, the most common first: numbers and details do not count."""
    kinds: dict[str, list[Quarantined]] = defaultdict(list)
    for file in quarantined:
        kinds[re.sub(r"\d+(\.\d+)?", "#", file.reason.partition(":")[0])].append(file)
    return sorted(kinds.values(), key=len, reverse=True)


def _write(path: Path, rows: Iterable[Any]) -> None:
    with path.open("w", encoding="utf-8", newline="\n") as file:
        for row in rows:
            stated = {key: value for key, value in asdict(row).items() if value is not None}
            file.write(json.dumps(stated, ensure_ascii=False) + "\n")


def _read(path: Path, kind: type[Row]) -> list[Row]:
    if not path.is_file():
        raise UserError(f"{path}: no such file; `phantom prepare` writes it")
    adapter: TypeAdapter[Row] = TypeAdapter(kind)
    rows = []
    # As bytes, which split at \n only: a caption may contain other line separators.
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                rows.append(adapter.validate_json(line, strict=True))
            except ValidationError as error:
                problem = error.errors()[0]
                where = "".join(f"{part}: " for part in problem["loc"])
                names = ", ".join(f.name for f in fields(kind))
                raise UserError(
                    f"{path} line {number}: {where}{problem['msg']}; expected an object of {names}"
                ) from None
    return rows
