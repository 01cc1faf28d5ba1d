"""OpenVidHD as it is published, here or under s3://: captions and scores in `OpenVidHD.csv`, clips in zips.

The zips are `OpenVidHD_part_N.zip`, or pieces of one (`OpenVidHD_part_N_part_aa`, `_part_ab`, ...). Any number of them
may be there, in any subfolders; clips are read where they lie, and never unpacked to disk.
"""

from __future__ import annotations

import csv
import io
import math
import re
import threading
import zipfile
import zlib
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from lzma import LZMAError
from pathlib import Path, PurePosixPath
from string import ascii_lowercase
from typing import Any, BinaryIO, cast

from phantom.config import Data, OpenVid
from phantom.data.sources import clips
from phantom.data.sources.clips import Found, Item, Removed, caption_text
from phantom.data.sources.folder import MAX_CELL, QUOTES
from phantom.data.storage import Folder, Joined, leaves
from phantom.data.video import BadClip, probe
from phantom.errors import UserError

CSV = "OpenVidHD.csv"
PART = re.compile(r"OpenVidHD_part_(\d+)(?:\.zip|(?:\.zip)?_part_?([a-z]{2}))")
SCORES = {"aesthetic": "aesthetic score", "motion": "motion score", "consistency": "temporal consistency score"}
RANGES = {**SCORES, "seconds": "seconds"}
MAX_BYTES = 2**30  # of a clip, which is held in memory while it is decoded
FAULTS = (zipfile.BadZipFile, zlib.error, LZMAError, EOFError, NotImplementedError, RuntimeError, OSError, ValueError)
# An English text of some length has some of these.
ENGLISH = frozenset(["a", "the", "and", "of", "is", "are", "to", "with", "from", "at", "on", "that", "it"])


def write_clips(out: Path, folder: Folder, data: Data, work: Path) -> Found:
    """Writes every usable clip of `folder` that the filters let pass into `out`; see clips.write_clips.

    Raises UserError if the csv or the zips are not there or not whole.
    """
    zips = Zips(folder)
    found, members = find(folder, zips, data.openvid)
    sizes = {"height": data.openvid.height, "width": data.openvid.width}

    @contextmanager
    def read(item: Item) -> Iterator[bytes]:
        contents = zips.read(*members[item.id])
        if any(end is not None for ends in sizes.values() for end in ends):
            info = probe(contents)
            for name, ends in sizes.items():
                if not _within(getattr(info, name), ends):
                    raise Removed(name)
        yield contents

    return clips.write_clips(found, read, out, data, work)


def find(folder: Folder, zips: Zips, settings: OpenVid) -> tuple[Found, dict[str, tuple[int, int]]]:
    """The clips that pass the filters on the csv, in the order in which they lie, and where: part, number in it.

    Clips of the csv that are in no part here are removed as `absent`, those of the parts that are not in the csv as
    `unlisted`: a part of the data set, or a csv of chosen rows, is all right.
    """
    found = Found()
    places: dict[str, tuple[int, int]] = {}
    versions: dict[str, str] = {}
    for part, number, info in zips.members():
        name = info.filename
        if leaves(name):
            found.refuse(name, f"part {part}: {name}", "its path leaves the zip")
            continue
        name = PurePosixPath(name).name
        if name in places:
            found.refuse(name[:-4], f"part {part}: {name}", f"duplicate: part {places[name][0]} has the same name")
        else:
            places[name] = (part, number)
            # The filters on the size look into the file, so that what passed others says nothing.
            versions[name] = f"{info.CRC:08x} {info.file_size} {settings.height} {settings.width}"
    listed: set[str] = set()
    members: dict[str, tuple[int, int]] = {}
    for row in _rows(folder, settings):
        name = row["video"] or ""
        id_ = name[:-4] if name.lower().endswith(".mp4") else name
        try:
            if leaves(name) or "/" in name:
                raise BadClip("its path leaves the zip")
            if id_ == name:
                raise BadClip("not an mp4")
            if name in listed:
                raise BadClip("duplicate: the csv has the same name before")
            listed.add(name)
            if name not in places:
                raise Removed("absent")
            if None in row:
                raise BadClip("more cells than columns: a caption that holds a comma stands in quotes")
            item = Item(id_, f"part_{places[name][0]:03d}/{name}", caption_text(row["caption"]), versions[name])
            _filter(row, settings)
        except BadClip as reason:
            found.refuse(id_, name, reason)
        except Removed as reason:
            found.removed[str(reason)] += 1
        else:
            members[id_] = places[name]
            found.items.append(item)
    if unlisted := len(places.keys() - listed):
        found.removed["unlisted"] = unlisted
    found.items.sort(key=lambda item: members[item.id])
    return found, members


class Zips:
    """The parts that a folder holds. Each thread keeps the part open from which it has read last."""

    def __init__(self, folder: Folder) -> None:
        self.folder = folder
        whole: dict[int, str] = {}
        pieces: dict[int, dict[str, str]] = defaultdict(dict)
        for entry in folder.list():
            if match := PART.fullmatch(PurePosixPath(entry.name).name):
                number, letters = int(match[1]), match[2]
                if letters:
                    pieces[number][letters] = entry.name
                else:
                    whole[number] = entry.name
        order = [a + b for a in ascii_lowercase for b in ascii_lowercase]
        for number, named in pieces.items():
            expected = order[: order.index(max(named)) + 1]
            if number not in whole and (missing := [letters for letters in expected if letters not in named]):
                raise UserError(f"{folder}: OpenVidHD_part_{number}: piece {missing[0]} is missing; fetch it")
        self.parts = {n: [name for _, name in sorted(named.items())] for n, named in pieces.items()}
        self.parts |= {n: [name] for n, name in whole.items()}
        if not self.parts:
            raise UserError(f"data.path: {folder}: no OpenVidHD_part_N.zip in it")
        self._opened = threading.local()

    def members(self) -> Iterator[tuple[int, int, zipfile.ZipInfo]]:
        """(part, number in it, what is said of it) of every mp4, part by part. Raises UserError for a zip not whole."""
        for part in sorted(self.parts):
            for number, info in enumerate(self._open(part).infolist()):
                pure = PurePosixPath(info.filename)
                # Archives made on a Mac hold a "._NAME.mp4" beside each file.
                if info.filename.lower().endswith(".mp4") and not pure.name.startswith("."):
                    yield part, number, info

    def read(self, part: int, number: int) -> bytes:
        """The contents of a member. Raises BadClip."""
        opened = self._open(part)
        info = opened.infolist()[number]
        if info.flag_bits & 1:
            raise BadClip("encrypted in its zip")
        if info.file_size > MAX_BYTES:
            raise BadClip(f"{info.file_size} bytes are too many, accepted: {MAX_BYTES}")
        try:
            return opened.read(info)
        except FAULTS as error:
            if isinstance(error, OSError) and error.errno is not None:  # not of the zip, but of what it lies on
                raise
            raise BadClip(f"damaged in its zip: {' '.join(str(error).split()) or type(error).__name__}") from None

    def _open(self, part: int) -> zipfile.ZipFile:
        if getattr(self._opened, "part", None) == part:
            return self._opened.zip
        if hasattr(self._opened, "zip"):
            self._opened.zip.close()
        names = self.parts[part]
        files = [self.folder.open(name) for name in names]
        file = files[0] if len(files) == 1 else cast(BinaryIO, io.BufferedReader(Joined(files), 2**16))
        try:
            self._opened.zip, self._opened.part = zipfile.ZipFile(file), part
        except FAULTS as error:
            raise UserError(f"{self.folder}/{names[-1]}: not a whole zip ({error}); fetch it again") from None
        return self._opened.zip


def _rows(folder: Folder, settings: OpenVid) -> Iterator[dict[Any, Any]]:
    """The rows of the csv, by column. Raises UserError if columns are missing that are needed."""
    path = next((e.name for e in folder.list() if PurePosixPath(e.name).name == CSV), None)
    if path is None:
        raise UserError(f"data.path: {folder}: no {CSV} in it")
    needed = ["video", "caption"]
    needed += [column for key, column in RANGES.items() if getattr(settings, key) != (None, None)]
    needed += ["camera motion"] if settings.camera_motion is not None else []
    csv.field_size_limit(MAX_CELL)
    try:
        with io.TextIOWrapper(folder.open(path), encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, strict=True)
            columns = reader.fieldnames or []
            if missing := [column for column in needed if column not in columns]:
                found = ", ".join(columns) or "none"
                raise UserError(f"{folder}/{path}: no column {missing[0]!r}, found: {found}")
            yield from reader
    except UnicodeDecodeError:
        raise UserError(f"{folder}/{path}: not UTF-8") from None
    except csv.Error as error:
        raise UserError(f"{folder}/{path} line {reader.reader.line_num}: {error}; {QUOTES}") from None


def _filter(row: dict[str, Any], settings: OpenVid) -> None:
    """Raises Removed, naming the first filter that does not let the row pass, or BadClip for what is no number."""
    for key, column in RANGES.items():
        ends = getattr(settings, key)
        if ends == (None, None):
            continue
        try:
            value = float(row[column])
        except (TypeError, ValueError):
            value = math.nan
        if math.isnan(value):
            raise BadClip(f"its {column} is no number: {row[column]!r}")
        if not _within(value, ends):
            raise Removed(key)
    if settings.camera_motion is not None and row["camera motion"] not in settings.camera_motion:
        raise Removed("camera_motion")
    if settings.language == "en" and not is_english(row["caption"]):
        raise Removed("language")


def is_english(text: str) -> bool:
    """Whether nine of ten letters are of the basic Latin alphabet, and one of ten words is a small English one."""
    letters = [c for c in text if c.isalpha()]
    words = re.findall(r"[^\W\d_]+", text.lower())
    small = sum(word in ENGLISH for word in words)
    return bool(letters) and sum(c.isascii() for c in letters) >= 0.9 * len(letters) and small >= 0.1 * len(words)


def _within(value: float, ends: tuple[float | None, float | None]) -> bool:
    least, most = ends
    return (least is None or value >= least) and (most is None or value <= most)
