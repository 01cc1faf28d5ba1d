"""File names and folder layout of the published Physics-IQ benchmark.

A benchmark folder holds, for every recorded `Name`,
```
full-videos/take-{n}/{fps}FPS/          {id}_full-videos_{fps}FPS_{view}_take-{n}_{scenario}.mp4           8 s
split-videos/conditioning/{fps}FPS/     {id}_conditioning-videos_{fps}FPS_{view}_take-{n}_{scenario}.mp4   3 s
split-videos/testing/{fps}FPS/          {id}_testing-videos_{fps}FPS_{view}_take-{n}_{scenario}.mp4        5 s
switch-frames/                          {id}_switch-frames_anyFPS_{view}_{scenario}.jpg                    take 1
video-masks/real/{fps}FPS/              {id}_video-masks_{fps}FPS_{view}_take-{n}_{scenario}.mp4           5 s
```
and a model's folder holds `{id}_{view}_{scenario}.mp4` (only the id counts) for every take-1 name.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from phantom.errors import UserError

SECONDS = 5  # of every scored video
DESCRIPTIONS = "descriptions.csv"
COLUMNS = ("scenario", "description", "category", "generated_video_name")
RECORD = "sampling.json"  # beside a model's videos: how they were sampled
PUBLISHED_FPS = 30  # at which every published video exists; other rates are resampled from it
PUBLISHED_FOLDERS = {"original": "physics-IQ-benchmark", "verified": "physics-IQ-benchmark-verified"}

_ROW_PATTERN = re.compile(r"(?P<id>\d{4})_(?P<view>[^_]+)_take-(?P<take>\d+)_(?P<scenario>[^_]+)\.mp4")
_VIDEO_PATTERN = re.compile(r"(?P<id>\d{4})_[^_]+_\d+FPS_(?P<view>[^_]+)_take-(?P<take>\d+)_(?P<scenario>[^_]+)\.mp4")


@dataclass(frozen=True, order=True)
class Name:
    """One recording: `id` (unique over views and takes), `view` (`perspective-left`), `take` 1 or 2, and `scenario`.

    `scenario` is written as in the file names, without the suffix (`trimmed-ball-hits-duck`); no part contains `_`.
    """

    id: int
    view: str
    take: int
    scenario: str

    def __post_init__(self) -> None:
        if not _ROW_PATTERN.fullmatch(self.row):
            raise ValueError(f"not a Physics-IQ name: {self.row!r}")

    @property
    def row(self) -> str:
        """The `scenario` column of the descriptions."""
        return f"{self.id:04d}_{self.view}_take-{self.take}_{self.scenario}.mp4"

    @property
    def generated(self) -> str:
        """The file name of a model's video for this recording."""
        return f"{self.id:04d}_{self.view}_{self.scenario}.mp4"


@dataclass(frozen=True)
class Row:
    """One line of the descriptions."""

    name: Name
    description: str
    category: str


def full_video(root: Path, name: Name, fps: int) -> Path:
    """The whole recording: 3 s of condition, then 5 s of test."""
    return root / "full-videos" / f"take-{name.take}" / f"{fps}FPS" / _file_name(name, "full-videos", fps)


def conditioning_video(root: Path, name: Name, fps: int) -> Path:
    """The 3 s that a video-to-video model is conditioned on."""
    return root / "split-videos" / "conditioning" / f"{fps}FPS" / _file_name(name, "conditioning-videos", fps)


def testing_video(root: Path, name: Name, fps: int) -> Path:
    """The 5 s that a model must predict."""
    return testing_folder(root, fps) / _file_name(name, "testing-videos", fps)


def testing_folder(root: Path, fps: int) -> Path:
    """The folder of the test videos at one frame rate."""
    return root / "split-videos" / "testing" / f"{fps}FPS"


def mask_video(root: Path, name: Name, fps: int) -> Path:
    """The motion masks of the test video."""
    return root / "video-masks" / "real" / f"{fps}FPS" / _file_name(name, "video-masks", fps)


def switch_frame(root: Path, name: Name) -> Path:
    """The last condition frame, from which an image-to-video model starts."""
    return root / "switch-frames" / f"{name.id:04d}_switch-frames_anyFPS_{name.view}_{name.scenario}.jpg"


def _file_name(name: Name, kind: str, fps: int) -> str:
    return f"{name.id:04d}_{kind}_{fps}FPS_{name.view}_take-{name.take}_{name.scenario}.mp4"


def write_descriptions(folder: Path, rows: Iterable[tuple[Name, str, str]]) -> Path:
    """Writes `descriptions.csv` into `folder` from (name, description, category), sorted by id; returns its path."""
    path = folder / DESCRIPTIONS
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        for name, description, category in sorted(rows):
            writer.writerow([name.row, description, category, name.generated])
    return path


def read_descriptions(path: Path) -> list[Row]:
    """Reads the descriptions, sorted by id. Raises UserError naming the invalid line."""
    if not path.is_file():
        raise UserError(f"{path}: no such file; the descriptions csv of the benchmark is needed")
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file)
        if "scenario" not in (reader.fieldnames or ()):
            raise UserError(f"{path}: columns {reader.fieldnames}, expected {','.join(COLUMNS)}")
        rows = []
        for line in reader:
            match = _ROW_PATTERN.fullmatch((line["scenario"] or "").strip())
            if not match:
                raise UserError(
                    f"{path} line {reader.line_num}: scenario {line['scenario']!r}, "
                    "expected a name such as 0001_perspective-left_take-1_trimmed-ball-and-block-fall.mp4"
                )
            rows.append(Row(_name(match), line.get("description") or "", line.get("category") or ""))
    if len({row.name.id for row in rows}) < len(rows):
        raise UserError(f"{path}: the ids of its {len(rows)} rows are not all different")
    if not any(row.name.take == 1 for row in rows):
        raise UserError(f"{path}: no row of take-1")
    return sorted(rows, key=lambda row: row.name)


def find_descriptions(benchmark: Path, root: Path, given: Path | str | None = None) -> Path:
    """The descriptions csv: `given`, else the one in the benchmark's root, else in the folder that the user named."""
    if given:
        return Path(given)
    places = [folder / DESCRIPTIONS for folder in (root, benchmark)]
    found = next((place for place in places if place.is_file()), None)
    if not found:
        raise UserError(f"{places[0]}: no such file; name the descriptions csv with --descriptions")
    return found


def recordings(root: Path) -> dict[tuple[str, str, int], Name]:
    """All recordings with a test video at any frame rate, by (scenario, view, take)."""
    names = {}
    for path in sorted((root / "split-videos" / "testing").glob("*FPS/*.mp4")):
        if match := _VIDEO_PATTERN.fullmatch(path.name):
            name = _name(match)
            names[name.scenario, name.view, name.take] = name
    return names


def find_root(benchmark: Path, protocol: str) -> Path:
    """The folder that holds `split-videos`: `benchmark` itself, or the published folder inside it."""
    for root in (benchmark, benchmark / PUBLISHED_FOLDERS[protocol]):
        if (root / "split-videos" / "testing").is_dir():
            return root
    raise UserError(
        f"{benchmark}: no split-videos/testing in it, nor in {PUBLISHED_FOLDERS[protocol]}/; is it a Physics-IQ folder?"
    )


def source_rate(root: Path, name: Name, fps: int) -> int | None:
    """The frame rate to read for `fps`: `fps` itself, else 30, else the highest available; None if there is none."""
    rates = {int(p.name[:-3]) for p in (root / "split-videos" / "testing").glob("*FPS") if p.name[:-3].isdigit()}
    there = [rate for rate in rates if testing_video(root, name, rate).is_file()]
    return next((rate for rate in (fps, PUBLISHED_FPS) if rate in there), max(there, default=None))


def _name(match: re.Match[str]) -> Name:
    return Name(int(match["id"]), match["view"], int(match["take"]), match["scenario"])
