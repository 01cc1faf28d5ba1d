"""Captions and results of `phantom prepare` on a folder of videos."""

from __future__ import annotations

import csv
from pathlib import Path

from phantom.data.manifest import Clip, read_manifest, read_quarantine

# Of the videos in the fixture `videos`.
CAPTIONS = {"a.mp4": "A ball, red.", "b.mp4": "A “box”\nslides.", "c.mp4": " A wheel. ", "more/d.mp4": "Ein Würfel."}


def write_captions(source: Path, captions: dict[str, str]) -> None:
    """Writes captions.csv into `source`."""
    with (source / "captions.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("file", "caption"), *captions.items()])


def read_result(root: Path) -> tuple[dict[str, Clip], dict[str, str]]:
    """The clips of data/clips by id, and the reasons for quarantine by path."""
    clips = read_manifest(root / "data/clips/manifest.jsonl")
    return {c.id: c for c in clips}, {q.path: q.reason for q in read_quarantine(root / "data/clips/quarantine.jsonl")}
