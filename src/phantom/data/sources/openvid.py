"""OpenVidHD in its published layout, local or under s3://: captions and scores in `OpenVidHD.csv`, clips in zips.

The zips are `OpenVidHD_part_N.zip`, or split files of one (`OpenVidHD_part_N_part_aa`, `_part_ab`, ...). Any subset may
be present, in any subfolder; clips are read directly from the zips and never unpacked to disk.
"""

from __future__ import annotations

import io
import math
import re
import struct
import threading
import zipfile
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from lzma import LZMAError
from pathlib import Path, PurePosixPath
from string import ascii_lowercase
from typing import Any, BinaryIO, cast

from phantom.config import Data, OpenVid
from phantom.data.manifest import Probe, Reference, Scores, Segment
from phantom.data.part import Part
from phantom.data.references import DECOMPRESS, make_segment
from phantom.data.sources.clips import FilteredOut, SourceContents, SourceVideo, Span, caption_text, name_languages
from phantom.data.sources.tables import TOO_MANY_CELLS, csv_rows
from phantom.data.storage import ConcatenatedFile, Folder, escapes_folder
from phantom.data.video import BadClip
from phantom.errors import UserError

CSV = "OpenVidHD.csv"
PART_NAME = re.compile(r"OpenVidHD_part_(\d+)(?:\.zip|(?:\.zip)?_part_?([a-z]{2}))")
SCORES = {"aesthetic": "aesthetic score", "motion": "motion score", "consistency": "temporal consistency score"}
RANGES = {**SCORES, "seconds": "seconds"}
COMPRESSIONS = {zipfile.ZIP_STORED: "stored", zipfile.ZIP_DEFLATED: "deflated", zipfile.ZIP_BZIP2: "bzip2"}
LOCAL_HEADER_BYTES = 30  # before a member's name: APPNOTE.TXT of the zip format, 4.3.7
NUMBERS = re.compile(r"(?<=.)(?:_\d+(?:to\d+)?)+$")  # of a shot and its frames, behind the name of the video
MAX_BYTES = 2**30  # of a video, which is held in memory while it is decoded
ZIP_ERRORS = (
    zipfile.BadZipFile,
    zlib.error,
    LZMAError,
    EOFError,
    NotImplementedError,
    RuntimeError,
    OSError,
    ValueError,
)


def find_videos(folder: Folder, data: Data, languages: Path, part: Part) -> tuple[SourceContents, ZipVideos]:
    """The videos of a part of `folder` that pass the filters, and access to them; `languages`: `caption_languages`.

    Raises UserError if the csv or the zips are missing or incomplete.
    """
    zips = ZipParts(folder)
    found, members = list_videos(folder, zips, data.openvid)
    found.videos = part.piece(found.videos)
    name_languages(found, languages)
    if (wanted := data.openvid.language) is not None:
        kept = [video for video in found.videos if video.language == wanted]
        found.removed["language"] += len(found.videos) - len(kept)
        found.videos = kept
    return found, ZipVideos(zips, members, data)


class ZipVideos:
    """The videos in `zips`; members: their location there by id, (part, member index)."""

    def __init__(self, zips: ZipParts, members: dict[str, tuple[int, int]], data: Data) -> None:
        self.zips, self.members, self.data = zips, members, data

    @contextmanager
    def open(self, video: SourceVideo) -> Iterator[tuple[bytes, Span]]:
        """See `clips.Videos`."""
        contents, span = self.zips.read(*self.members[video.id])
        if self.data.clips == "references" and span.compression not in DECOMPRESS:
            raise BadClip(f"compressed by {span.compression} in its zip, accepted: {', '.join(DECOMPRESS)}")
        yield contents, span

    def refer(self, video: SourceVideo, span: Span) -> Reference:
        """See `clips.Videos`."""
        segments = self.zips.segments(self.members[video.id][0], span)
        return Reference(str(self.data.path), segments, span.member, span.compression)

    def check(self) -> Callable[[Probe], None] | None:
        """See `clips.Videos`: the filters on sizes, where there are any."""
        sizes = {"height": self.data.openvid.height, "width": self.data.openvid.width}

        def check_size(found: Probe) -> None:
            for name, bounds in sizes.items():
                if not _in_range(getattr(found, name), bounds):
                    raise FilteredOut(name)

        return check_size if any(bounds != (None, None) for bounds in sizes.values()) else None


def list_videos(folder: Folder, zips: ZipParts, settings: OpenVid) -> tuple[SourceContents, dict[str, tuple[int, int]]]:
    """The videos that pass the filters on the csv, in storage order, and their location by id: (part, member index).

    Rows of the csv without a video in these parts are removed as `absent`, videos without a row as `unlisted`: a subset
    of the data set, or of the csv, is fine.
    """
    found = SourceContents()
    locations: dict[str, tuple[int, int]] = {}
    versions: dict[str, str] = {}
    for part, number, info in zips.members():
        name = info.filename
        if escapes_folder(name):
            found.quarantine(name, f"part {part}: {name}", "its path leaves the zip")
            continue
        name = PurePosixPath(name).name
        if name in locations:
            found.quarantine(
                name[:-4], f"part {part}: {name}", f"duplicate: part {locations[name][0]} has the same name"
            )
        else:
            locations[name] = (part, number)
            # Size filters open the file, so a clip made under other size filters is not reused.
            sizes = f"{settings.height} {settings.width}"
            versions[name] = f"{info.CRC:08x} {info.file_size} {info.header_offset} {sizes}"
    listed: set[str] = set()
    members: dict[str, tuple[int, int]] = {}
    for row in _rows(folder, settings):
        name = row["video"] or ""
        id_ = name[:-4] if name.lower().endswith(".mp4") else name
        try:
            if escapes_folder(name) or "/" in name:
                raise BadClip("its path leaves the zip")
            if id_ == name:
                raise BadClip("not an mp4")
            if name in listed:
                raise BadClip("duplicate: the csv has the same name before")
            listed.add(name)
            if name not in locations:
                raise FilteredOut("absent")
            if None in row:
                raise BadClip(TOO_MANY_CELLS)
            path = f"part_{locations[name][0]:03d}/{name}"
            cut_from = NUMBERS.sub("", id_)
            caption = caption_text(row["caption"])
            video = SourceVideo(id_, path, caption, CSV, versions[name], cut_from, _scores(row))
            _filter(row, settings)
        except BadClip as reason:
            found.quarantine(id_, name, reason)
        except FilteredOut as reason:
            found.removed[str(reason)] += 1
        else:
            members[id_] = locations[name]
            found.videos.append(video)
    if unlisted := len(locations.keys() - listed):
        found.removed["unlisted"] = unlisted
    found.videos.sort(key=lambda video: members[video.id])
    return found, members


def _scores(row: dict[str, Any]) -> Scores:
    """What the csv states of a clip; None for what is no number."""
    found: dict[str, float | None] = {}
    for key, column in SCORES.items():
        try:
            value = float(row.get(column) or "nan")
        except ValueError:
            value = math.nan
        found[key] = value if math.isfinite(value) else None
    return Scores(**found, camera_motion=row.get("camera motion") or None)


class ZipParts:
    """The zip parts in a folder. Each thread keeps the part open that it read from last."""

    def __init__(self, folder: Folder) -> None:
        self.folder = folder
        single: dict[int, str] = {}
        split: dict[int, dict[str, str]] = defaultdict(dict)
        self._sizes = {entry.name: entry.size for entry in folder.list()}
        for entry in folder.list():
            if match := PART_NAME.fullmatch(PurePosixPath(entry.name).name):
                number, letters = int(match[1]), match[2]
                if letters:
                    split[number][letters] = entry.name
                else:
                    single[number] = entry.name
        order = [a + b for a in ascii_lowercase for b in ascii_lowercase]
        for number, named in split.items():
            expected = order[: order.index(max(named)) + 1]
            if number not in single and (missing := [letters for letters in expected if letters not in named]):
                raise UserError(f"{folder}: OpenVidHD_part_{number}: piece {missing[0]} is missing; fetch it")
        self.parts = {n: [name for _, name in sorted(named.items())] for n, named in split.items()}
        self.parts |= {n: [name] for n, name in single.items()}
        if not self.parts:
            raise UserError(f"data.path: {folder}: no OpenVidHD_part_N.zip in it")
        self._opened = threading.local()

    def members(self) -> Iterator[tuple[int, int, zipfile.ZipInfo]]:
        """(part, member index, info) of every mp4, part by part. Raises UserError for an incomplete zip."""
        for part in sorted(self.parts):
            for number, info in enumerate(self._open(part).infolist()):
                pure = PurePosixPath(info.filename)
                # Archives made on macOS have a "._NAME.mp4" beside each file.
                if info.filename.lower().endswith(".mp4") and not pure.name.startswith("."):
                    yield part, number, info

    def read(self, part: int, number: int) -> tuple[bytes, Span]:
        """The contents of a zip member, and where they are in the part. Raises BadClip."""
        opened = self._open(part)
        info = opened.infolist()[number]
        if info.flag_bits & 1:
            raise BadClip("encrypted in its zip")
        if info.file_size > MAX_BYTES:
            raise BadClip(f"{info.file_size} bytes are too many, accepted: {MAX_BYTES}")
        try:
            start = _data_start(opened, info)
            compression = COMPRESSIONS.get(info.compress_type, f"method {info.compress_type}")
            return opened.read(info), Span(start, start + info.compress_size, info.filename, compression)
        except ZIP_ERRORS as error:
            if isinstance(error, OSError) and error.errno is not None:  # of the disk or network, not of the zip
                raise
            raise BadClip(f"damaged in its zip: {' '.join(str(error).split()) or type(error).__name__}") from None

    def segments(self, part: int, span: Span) -> tuple[Segment, ...]:
        """The files that have the bytes of a member: one, or more where a piece ends within it."""
        found, offset = [], 0
        for name in self.parts[part]:
            size = self._sizes[name]
            start, stop = max(span.start - offset, 0), min(span.stop - offset, size)
            if start < stop:
                found.append(make_segment(self.folder, name, start, stop))
            offset += size
        return tuple(found)

    def _open(self, part: int) -> zipfile.ZipFile:
        if getattr(self._opened, "part", None) == part:
            return self._opened.zip
        if hasattr(self._opened, "zip"):
            self._opened.zip.close()
        names = self.parts[part]
        files = [self.folder.open(name) for name in names]
        file = files[0] if len(files) == 1 else cast(BinaryIO, io.BufferedReader(ConcatenatedFile(files), 2**16))
        try:
            self._opened.zip, self._opened.part = zipfile.ZipFile(file), part
        except ZIP_ERRORS as error:
            raise UserError(f"{self.folder}/{names[-1]}: not a whole zip ({error}); fetch it again") from None
        return self._opened.zip


def _data_start(opened: zipfile.ZipFile, info: zipfile.ZipInfo) -> int:
    """Where the bytes of a member start: behind its local header, whose length the directory does not state."""
    file = cast(BinaryIO, opened.fp)
    file.seek(info.header_offset)
    header = file.read(LOCAL_HEADER_BYTES)
    if len(header) < LOCAL_HEADER_BYTES:
        raise zipfile.BadZipFile("Truncated file header")
    name, extra = struct.unpack("<HH", header[26:])
    return info.header_offset + LOCAL_HEADER_BYTES + name + extra


def _rows(folder: Folder, settings: OpenVid) -> Iterator[dict[Any, Any]]:
    """The rows of the csv as dictionaries. Raises UserError if required columns are missing."""
    path = next((e.name for e in folder.list() if PurePosixPath(e.name).name == CSV), None)
    if path is None:
        raise UserError(f"data.path: {folder}: no {CSV} in it")
    needed = ["video", "caption"]
    needed += [column for key, column in RANGES.items() if getattr(settings, key) != (None, None)]
    needed += ["camera motion"] if settings.camera_motion is not None else []
    return csv_rows(folder, path, needed)


def _filter(row: dict[str, Any], settings: OpenVid) -> None:
    """Raises FilteredOut with the first filter that the row fails, or BadClip for a score that is not a number."""
    for key, column in RANGES.items():
        bounds = getattr(settings, key)
        if bounds == (None, None):
            continue
        try:
            value = float(row[column])
        except (TypeError, ValueError):
            value = math.nan
        if math.isnan(value):
            raise BadClip(f"its {column} is no number: {row[column]!r}")
        if not _in_range(value, bounds):
            raise FilteredOut(key)
    if settings.camera_motion is not None and row["camera motion"] not in settings.camera_motion:
        raise FilteredOut("camera_motion")


def _in_range(value: float, bounds: tuple[float | None, float | None]) -> bool:
    low, high = bounds
    return (low is None or value >= low) and (high is None or value <= high)
