"""Captions and results of `phantom prepare` on a folder of videos."""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path

from phantom.data.manifest import CLIPS, MANIFEST, Clip, read_manifest, read_quarantine
from tests.data.latents import contents

# Of the videos in the fixture `videos`.
CAPTIONS = {"a.mp4": "A ball, red.", "b.mp4": "A “box”\nslides.", "c.mp4": " A wheel. ", "more/d.mp4": "Ein Würfel."}


def write_captions(source: Path, captions: dict[str, str]) -> None:
    """Writes captions.csv into `source`."""
    with (source / "captions.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("file", "caption"), *captions.items()])


def read_result(root: Path) -> tuple[dict[str, Clip], dict[str, str]]:
    """The clips of data/clips by id, and the reasons for quarantine by path."""
    clips = read_manifest(root / "data/clips/manifest.parquet")
    return {c.id: c for c in clips}, {q.path: q.reason for q in read_quarantine(root / "data/clips/quarantine.jsonl")}


def read_apart_from_places(root: Path) -> tuple[dict[str, bytes], list[Clip]]:
    """The files of data/ but for the manifest, and its clips without where they and their captions come from."""
    clips = read_manifest(root / CLIPS / MANIFEST)
    found = contents(root / "data")
    del found[str(CLIPS.relative_to("data") / MANIFEST)]
    return found, [replace(clip, reference=None, caption_origin=None) for clip in clips]
