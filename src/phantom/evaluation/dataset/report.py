"""The page of the data: counts, histograms, refusals, and pictures of what a filter drops."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from phantom.config import COLUMNS, FLAGS, TEXTS, ClipFilter, Params
from phantom.data.clip_frames import ClipReader
from phantom.data.manifest import (
    CLIPS,
    QUARANTINE,
    Clip,
    Quarantined,
    by_kind,
    columns,
    find_manifest,
    read_manifest,
    read_quarantine,
)
from phantom.data.prepare import REPORT
from phantom.errors import UserError
from phantom.evaluation.dataset.histogram import Histogram, histogram
from phantom.evaluation.page import PIXELATED_WIDTH, Cell, Table, TableRow, embed_picture, render

PAGE = Path("reports/data.html")
# Conditions whose effect is shown beside that of data.filter.
EXAMPLES = ("cuts == 0", "motion > 0.3", "not static", "black_bars < 0.02", "not duplicate")
SAMPLES, SAMPLE_FRAMES = 4, 3  # dropped clips shown per condition, and pictures of each
PICTURE_WIDTH = 160  # pixels
Columns = dict[str, dict[str, Any]]  # by clip id
MEASURES = [name for name in COLUMNS if name not in (*FLAGS, *TEXTS)]
REASONS, SIZES, LANGUAGES = 12, 12, 12  # rows of a table


@dataclass(frozen=True)
class DataReport:
    """Numbers of clips, and of training clips that `data.filter` keeps; `drops`: those that each condition drops.

    refused: files by the kind of reason, and an example of it.
    """

    train: int
    heldout: int
    quarantined: int
    kept: int
    drops: dict[str, int]
    refused: dict[str, int]
    page: str


@dataclass(frozen=True)
class Sample:
    """A dropped clip: its id, caption, the columns of the condition, pictures as data URIs; `first`: a clip like it."""

    id: str
    caption: str
    values: str
    pictures: Sequence[str]
    first: Sample | None = None


@dataclass(frozen=True)
class Dropped:
    """A condition, how many training clips it drops, and samples of them."""

    condition: str
    count: int
    samples: Sequence[Sample]


@dataclass(frozen=True)
class DataPage:
    """The data of the template."""

    lede: str
    verdict: str
    facts: Sequence[tuple[str, str]]
    histograms: Sequence[Histogram]
    constant: str
    is_filtered: bool
    tables: Sequence[Table]
    dropped: Sequence[Dropped]
    pixelated: bool
    title: str = "Data"
    modes: Sequence[tuple[str, str]] = ()  # the style sheet's: there are none here


def write_report(params: Params, root: Path = Path(), out: Path = PAGE) -> DataReport:
    """Writes the page of data/clips to `out`, with what `data.filter` keeps and drops of the training clips.

    Raises UserError if there are no clips, or their manifest states no columns.
    """
    manifest = find_manifest(root / CLIPS)
    clips = read_manifest(manifest)
    quarantined = read_quarantine(root / CLIPS / QUARANTINE)
    if not clips or any(clip.curation is None for clip in clips):
        found = "no clip in it" if not clips else "states no columns"
        raise UserError(f"{manifest}: {found}; run `phantom prepare` again")
    training = {clip.id: columns(clip) or {} for clip in clips if clip.split == "train"}
    chosen = ClipFilter.parse(params.data.filter) if params.data.filter else None
    kept = {id_ for id_, row in training.items() if chosen is None or chosen.keeps(row)}
    terms = chosen.terms() if chosen else []
    others = [ClipFilter.parse(text) for text in EXAMPLES if text not in {term.text for term in terms}]
    drops = {one.text: [id_ for id_, row in training.items() if not one.keeps(row)] for one in (*terms, *others)}
    by_id = {clip.id: clip for clip in clips}
    reader = ClipReader(root / CLIPS, params)
    page = DataPage(
        lede=f"{len(training):,} training and {len(clips) - len(training):,} held-out clips of {_source(params)}.",
        verdict=_verdict(params.data.filter, len(kept), len(training)),
        facts=_facts(clips, quarantined),
        histograms=_histograms(training, kept),
        constant=_constant(training),
        is_filtered=chosen is not None,
        tables=[
            _drops_table(terms, others, drops, len(training)),
            *_refusals(quarantined, root / CLIPS / REPORT),
            _sizes_table(clips, params),
            _languages_table(training, kept),
        ],
        dropped=[
            Dropped(text, len(ids), [_sample(by_id, id_, text, reader) for id_ in _drawn(ids)])
            for text, ids in drops.items()
            if ids
        ],
        pixelated=params.data.width < PIXELATED_WIDTH,
    )
    path = root / out
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(render(page, "dataset/page.html"), encoding="utf-8")
    return DataReport(
        train=len(training),
        heldout=len(clips) - len(training),
        quarantined=len(quarantined),
        kept=len(kept),
        drops={text: len(ids) for text, ids in drops.items()},
        refused={files[0].reason: len(files) for files in by_kind(quarantined)},
        page=str(path),
    )


def _source(params: Params) -> str:
    return "the simulated worlds" if params.data.source == "worlds" else str(params.data.path)


def _verdict(text: str | None, kept: int, total: int) -> str:
    if text is None:
        return "data.filter is null: a run trains on all training clips."
    return f"data.filter: {text} leaves {kept:,} of {total:,} training clips ({_share(kept, total)})."


def _share(count: int, total: int) -> str:
    return f"{count / total:.1%}" if total else "-"


def _facts(clips: Sequence[Clip], quarantined: Sequence[Quarantined]) -> list[tuple[str, str]]:
    rows = [columns(clip) or {} for clip in clips]
    return [
        ("Refused files", f"{len(quarantined):,}"),
        ("With hard cuts", f"{sum(row['cuts'] > 0 for row in rows):,}"),
        ("Static", f"{sum(bool(row['static']) for row in rows):,}"),
        ("With black bars", f"{sum(row['black_bars'] > 0 for row in rows):,}"),
        ("Near-duplicates of others", f"{sum(bool(row['duplicate']) for row in rows):,}"),
        ("Hours", f"{sum(clip.frames / clip.fps for clip in clips) / 3600:.2f}"),
    ]


def _histograms(training: Columns, kept: set[str]) -> list[Histogram]:
    found = []
    for name in MEASURES:
        sides = [[row[name] for id_, row in training.items() if (id_ in kept) == keep] for keep in (True, False)]
        if len({*sides[0], *sides[1]}) > 1:
            found.append(histogram(name, COLUMNS[name], *sides))
    return found


def _constant(training: Columns) -> str:
    """The columns that are the same in all clips, and so have no histogram."""
    values = {name: {row[name] for row in training.values()} for name in MEASURES}
    same = [f"{name} {min(found):g}" for name, found in values.items() if len(found) == 1]
    return f"The same in all of them: {', '.join(same)}." if same else ""


def _drops_table(
    terms: Sequence[ClipFilter], others: Sequence[ClipFilter], drops: dict[str, list[str]], total: int
) -> Table:
    def rows(conditions: Sequence[ClipFilter]) -> list[TableRow]:
        return [
            TableRow(
                one.text,
                "; ".join(f"{name}: {COLUMNS[name]}" for name in one.columns),
                [Cell(f"{len(drops[one.text]):,}"), Cell(_share(len(drops[one.text]), total))],
            )
            for one in conditions
        ]

    groups = [("Terms of data.filter", rows(terms)), ("Other conditions", rows(others))]
    return Table(
        "What conditions drop",
        ["Clips", "Share"],
        ["", ""],
        [(title, found) for title, found in groups if found],
        "Each by itself, of the training clips. A clip may be dropped by several.",
    )


def _refusals(quarantined: Sequence[Quarantined], report: Path) -> list[Table]:
    kinds = by_kind(quarantined)[:REASONS]
    groups = [("Refused, with an example", [_refusal(files) for files in kinds])]
    removed = json.loads(report.read_text(encoding="utf-8"))["removed"] if report.is_file() else {}
    groups.append(("Not asked for", [TableRow(name, "", [Cell(f"{count:,}")]) for name, count in removed.items()]))
    found = [(title, rows) for title, rows in groups if rows]
    note = f"All are in {CLIPS / QUARANTINE}, with their reasons."
    return [Table("Files that are no clips", ["Files"], [""], found, note)] if found else []


def _refusal(files: Sequence[Quarantined]) -> TableRow:
    return TableRow(files[0].reason, files[0].path, [Cell(f"{len(files):,}")])


def _sizes_table(clips: Sequence[Clip], params: Params) -> Table:
    height, width = params.data.height, params.data.width
    counts = Counter((clip.frames, clip.height or height, clip.width or width) for clip in clips)
    rows = [
        TableRow(f"{frames} frames of {h} x {w}", "", [Cell(f"{count:,}"), Cell(_share(count, len(clips)))])
        for (frames, h, w), count in counts.most_common(SIZES)
    ]
    return Table("Lengths and sizes", ["Clips", "Share"], ["", ""], [("", rows)])


def _languages_table(training: Columns, kept: set[str]) -> Table:
    counts = Counter(str(row["language"]) for row in training.values())
    left = Counter(str(row["language"]) for id_, row in training.items() if id_ in kept)
    rows = [
        TableRow(language, "", [Cell(f"{count:,}"), Cell(f"{left[language]:,}")])
        for language, count in counts.most_common(LANGUAGES)
    ]
    note = "Of the training clips, ISO 639-1; und: it cannot be told."
    return Table("Languages of the captions", ["Clips", "Kept"], ["", ""], [("", rows)], note)


def _drawn(ids: Sequence[str]) -> list[str]:
    """`SAMPLES` of them, by a hash: the same ones however they are ordered."""
    return sorted(ids, key=lambda id_: hashlib.sha256(id_.encode()).digest())[:SAMPLES]


def _sample(clips: dict[str, Clip], id_: str, condition: str, reader: ClipReader) -> Sample:
    clip = clips[id_]
    row = columns(clip) or {}
    names = ClipFilter.parse(condition).columns
    values = ", ".join(f"{name} {row[name] if name in TEXTS else f'{row[name]:g}'}" for name in names)
    first = clip.curation and clip.curation.duplicate_of
    like = None
    if first and "duplicate" in names:
        other = clips[first]
        like = Sample(other.id, other.caption, other.split, _pictures(reader, other))
    return Sample(clip.id, clip.caption, values, _pictures(reader, clip), like)


def _pictures(reader: ClipReader, clip: Clip) -> list[str]:
    """The first, a middle and the last frame as data URIs, at most `PICTURE_WIDTH` pixels wide."""
    frames = reader.read(clip)
    shown = frames[np.unique(np.linspace(0, len(frames) - 1, SAMPLE_FRAMES).round().astype(int))]
    height, width = shown.shape[1:3]
    if width > PICTURE_WIDTH:
        size = (PICTURE_WIDTH, max(1, round(height * PICTURE_WIDTH / width)))
        shown = np.stack([cv2.resize(frame, size, interpolation=cv2.INTER_AREA) for frame in shown])
    return [embed_picture(frame) for frame in shown]
