"""Matches a folder of generated videos with the recordings, and reports in one line what is missing or invalid."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from phantom.data.physics_iq import layout
from phantom.data.physics_iq.layout import SECONDS, Name
from phantom.data.physics_iq.masks import Codec
from phantom.data.physics_iq.video import probe
from phantom.errors import UserError, listed
from phantom.evaluation.physics_iq.compare import Job

TOLERANCE = 0.001  # deviation of a video's length from 5 s, in seconds, and of its frame rate from an integer
_GENERATED = re.compile(r"(\d{4})_.*\.mp4")


@dataclass(frozen=True)
class Pair:
    """A generated video, the take-1 recording it is compared with, and take 2 of the same scenario and view."""

    first: Name
    second: Name
    generated: Path


def find_pairs(generated: Path, root: Path, rows: Sequence[layout.Row], subset: bool) -> list[Pair]:
    """Matches generated files by id with their take 1, and with take 2 of its scenario and view. Raises UserError."""
    if not generated.is_dir():
        raise UserError(f"{generated}: no such folder; expected the generated mp4 files")
    files: dict[int, Path] = {}
    unknown = []
    first = {row.name.id: row for row in rows if row.name.take == 1}
    for path in sorted(generated.glob("*.mp4")):
        match = _GENERATED.fullmatch(path.name)
        number = int(match[1]) if match else -1
        if number in files:
            raise UserError(f"{generated}: {files[number].name} and {path.name} have the same id")
        if number in first:
            files[number] = path
        else:
            unknown.append(path.name)
    missing = [f"{number:04d}" for number in first if number not in files]
    if not files:
        raise UserError(
            f"{generated}: none of the {len(first)} videos, expected mp4 files named by id, {missing[0]}_*.mp4"
        )
    if not subset and (missing or unknown):
        parts = [f"{len(missing)} of {len(first)} missing ({listed(missing)})"] if missing else []
        parts += [f"{len(unknown)} not of the benchmark ({listed(unknown)})"] if unknown else []
        raise UserError(f"{generated}: {'; '.join(parts)}; --subset scores what is there")

    known = layout.recordings(root) | {(r.name.scenario, r.name.view, r.name.take): r.name for r in rows}
    pairs = []
    for number, path in sorted(files.items()):
        row = first[number]
        second = known.get((row.name.scenario, row.name.view, 2))
        if second is None:
            raise UserError(f"{root}: no take-2 of {row.name.scenario} from {row.name.view}")
        pairs.append(Pair(row.name, second, path))
    return pairs


def common_rate(paths: Sequence[Path]) -> int:
    """The common frame rate of all videos, an integer. Raises UserError naming wrong frame rates or lengths."""
    rates: dict[float, list[str]] = {}
    lengths = []
    for path in paths:
        info = probe(path)
        rates.setdefault(round(info.fps, 3), []).append(path.name)
        if abs(info.seconds - SECONDS) > TOLERANCE + 1e-9:
            lengths.append(f"{path.name} {info.seconds:.3f} s")
    if len(rates) > 1:
        found = [f"{len(names)} at {rate:g} ({listed(names, 3)})" for rate, names in sorted(rates.items())]
        raise UserError(f"{paths[0].parent}: several frame rates, {'; '.join(found)}; all must be the same")
    (rate,) = rates
    if rate < 1 or abs(rate - round(rate)) > TOLERANCE:
        raise UserError(f"{paths[0].parent}: {rate:g} frames per second, expected a whole number")
    if lengths:
        raise UserError(
            f"{paths[0].parent}: {len(lengths)} of {len(paths)} videos are not {SECONDS} s long "
            f"({listed(lengths, 3)}); cut them to the {SECONDS} s right after the switch frame"
        )
    return round(rate)


def find_jobs(pairs: Sequence[Pair], root: Path, fps: int, codec: Codec) -> list[Job]:
    """Finds the recordings and masks of every pair. Raises UserError naming those that are missing."""
    jobs, missing = [], []
    for pair in pairs:
        names = (pair.first, pair.second)
        rates = [layout.source_rate(root, name, fps) for name in names]
        missing += [
            layout.testing_video(root, n, fps).name for n, rate in zip(names, rates, strict=True) if rate is None
        ]
        takes = [layout.testing_video(root, name, rate or fps) for name, rate in zip(names, rates, strict=True)]
        masks = [layout.mask_video(root, name, fps) for name in names]
        jobs.append(
            Job(
                pair.generated,
                (takes[0], takes[1]),
                (rates[0] or fps, rates[1] or fps),
                (masks[0] if masks[0].is_file() else None, masks[1] if masks[1].is_file() else None),
                fps,
                codec,
            )
        )
    if missing:
        where = root / "split-videos" / "testing"
        raise UserError(f"{where}: {len(missing)} missing at any rate ({listed(missing, 3)})")
    return jobs
