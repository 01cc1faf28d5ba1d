"""The index of data/clips: `manifest.parquet` lists the clips, `quarantine.jsonl` the files that were rejected.

A clip is a reference to a part of a video of the source, which is decoded where its frames are needed, or an mp4 in
data/clips.
"""

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
from phantom.data.part import ALL, Part
from phantom.errors import UserError

CLIPS = Path("data/clips")
MANIFEST, QUARANTINE = "manifest.parquet", "quarantine.jsonl"
FORMER_MANIFEST = "manifest.jsonl"  # of versions before 0.2, still read
Split = Literal["train", "heldout"]
UNKNOWN_LANGUAGE = "und"  # ISO 639-3: undetermined


@dataclass(frozen=True)
class Segment:
    """Bytes `start` to `stop` of a file of the source. `version`: of a file in a bucket, changes whenever it does."""

    file: str
    version: str | None
    start: int
    stop: int


@dataclass(frozen=True)
class Reference:
    """Where the video is that a clip is decoded from.

    source: a folder, s3://bucket/prefix or a path, relative to the checkout. segments: the video's bytes, in the order
    in which they are joined: of one file, or of the pieces of a zip that was split. member: its name in the zip, and
    compression: how it is compressed there, `stored`, `deflated` or `bzip2`.
    """

    source: str
    segments: tuple[Segment, ...]
    member: str | None = None
    compression: str | None = None


@dataclass(frozen=True)
class Probe:
    """What the file of the video states. Colours: code points of ITU-T H.273, 2 for none stated."""

    codec: str
    frames: int
    fps: float
    seconds: float
    height: int  # displayed, upright and in square pixels
    width: int
    colour_primaries: int
    colour_transfer: int
    colour_matrix: int
    is_full_range: bool


@dataclass(frozen=True)
class Scores:
    """The scores that a source states of a clip."""

    aesthetic: float | None = None
    motion: float | None = None
    consistency: float | None = None
    camera_motion: str | None = None


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
    """One clip at the frame rate and size of the run."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    id: str
    path: str | None  # of its mp4, relative to data/clips; None: decoded from `reference`
    caption: str
    frames: int
    fps: float
    sha256: str  # of the file at `path`, else of the video that `reference` names
    split: Split
    height: int | None = None  # None for the main size, data.height x data.width
    width: int | None = None
    moves_from: int | None = None  # first frame in which something moves, where it is known: conditions last beyond it
    curation: Curation | None = None  # None: prepared by a version before 0.2
    first_frame: int = 0  # of the video at `fps`, with which the clip begins
    reference: Reference | None = None  # None for clips that were made, not found
    probe: Probe | None = None
    scores: Scores | None = None
    caption_origin: str | None = None  # the file of the source that states the caption
    language: str = UNKNOWN_LANGUAGE  # of the caption, ISO 639-1
    force: str | None = None  # the force prompt of what acts in it, as JSON (`ForcePrompt.to_json`); None: nothing


def columns(clip: Clip) -> dict[str, Any] | None:
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
        "language": clip.language,
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
NESTED = {"curation": Curation, "reference": Reference, "segments": Segment, "probe": Probe, "scores": Scores}


def find_manifest(folder: Path) -> Path:
    """The manifest in `folder`: that of an earlier version where there is no other."""
    path, former = folder / MANIFEST, folder / FORMER_MANIFEST
    return former if former.is_file() and not path.is_file() else path


def write_manifest(path: Path, clips: Iterable[Clip]) -> None:
    """Writes the clips to `path` as Parquet, some thousands at a time."""
    from phantom.data.manifest_table import write_rows

    write_rows(path, map(_to_row, clips))


def read_manifest(path: Path, part: Part = ALL) -> list[Clip]:
    """Reads the clips of `path`, in its order, or those whose sha256 is in `part`: a manifest of this version or of an
    earlier one.

    Raises UserError naming what is invalid: a column, or a line of a former manifest; or the id that two clips have.
    """
    from phantom.data.manifest_table import read_rows

    _check_exists(path)
    if path.suffix == ".jsonl":
        clips = [clip for clip in _read(path, Clip) if part.contains(clip.sha256)]
    else:
        clips = [Clip(**row) for row in read_rows(path, NESTED, part)]
    numbers: dict[str, int] = {}
    for number, clip in enumerate(clips, 1):
        if numbers.setdefault(clip.id, number) != number:
            unit = "line" if path.suffix == ".jsonl" else "row"
            raise UserError(f"{path} {unit} {number}: id {clip.id!r} stands in {unit} {numbers[clip.id]} too")
    return clips


def read_training_ids(path: Path) -> list[str]:
    """The ids of the training clips in the manifest at `path`, in its order."""
    from phantom.data import manifest_table

    _check_exists(path)
    if path.suffix == ".jsonl":
        return [clip.id for clip in _read(path, Clip) if clip.split == "train"]
    return manifest_table.read_training_ids(path)


def count_clips(path: Path) -> int:
    """The number of clips in the manifest at `path`, without reading them."""
    from phantom.data.manifest_table import count_rows

    if path.suffix == ".jsonl":
        with path.open("rb") as lines:
            return sum(1 for _ in lines)
    return count_rows(path)


def write_quarantine(path: Path, quarantined: Iterable[Quarantined]) -> None:
    """Writes the rejected files to `path` as JSON lines."""
    with path.open("w", encoding="utf-8", newline="\n") as file:
        for row in quarantined:
            file.write(json.dumps(asdict(row), ensure_ascii=False) + "\n")


def read_quarantine(path: Path) -> list[Quarantined]:
    """Reads the rejected files of `path`. Raises UserError naming the invalid line."""
    _check_exists(path)
    return _read(path, Quarantined)


def by_kind(quarantined: Iterable[Quarantined]) -> list[list[Quarantined]]:
    """Rejected files with the same kind of reason, the most common first: numbers and details do not count."""
    kinds: dict[str, list[Quarantined]] = defaultdict(list)
    for file in quarantined:
        kinds[re.sub(r"\d+(\.\d+)?", "#", file.reason.partition(":")[0])].append(file)
    return sorted(kinds.values(), key=len, reverse=True)


def _to_row(clip: Clip) -> dict[str, Any]:
    """As in `manifest_table.SCHEMA`; not `asdict`, which copies each value."""
    row = dict(vars(clip))
    for name in ("curation", "probe", "scores"):
        row[name] = row[name] and vars(row[name])
    if clip.reference is not None:
        row["reference"] = {**vars(clip.reference), "segments": [vars(one) for one in clip.reference.segments]}
    return row


def _check_exists(path: Path) -> None:
    if not path.is_file():
        raise UserError(f"{path}: no such file; `phantom prepare` writes it")


def _read(path: Path, kind: type[Row]) -> list[Row]:
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
