"""Scores folders of generated videos: finds the files, compares them with both takes, and aggregates the metrics."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from phantom.data.physics_iq import layout
from phantom.data.physics_iq.masks import CODECS, Codec
from phantom.errors import UserError
from phantom.evaluation.physics_iq import score, table
from phantom.evaluation.physics_iq.compare import compare_all
from phantom.evaluation.physics_iq.metrics import Metrics
from phantom.evaluation.physics_iq.pairs import common_rate, find_jobs, find_pairs
from phantom.evaluation.physics_iq.summary import PROTOCOLS, Protocol, summary


def score_folder(
    generated: Path | str,
    benchmark: Path | str,
    descriptions: Path | str | None = None,
    *,
    csv_out: Path | str | None = None,
    **options: Any,
) -> dict[str, Any]:
    """`score_folders` for one folder. csv_out: file for its metrics, in the official csv format."""
    ((found, results),) = _score([generated], benchmark, descriptions, **options)
    if csv_out:
        table.write(Path(csv_out), results)
    return found


def score_folders(
    generated: Sequence[Path | str], benchmark: Path | str, descriptions: Path | str | None = None, **options: Any
) -> list[dict[str, Any]]:
    """The Physics-IQ score of each folder of mp4 files, as a JSON-able dict; see `summary` for its keys.

    Each recording is decoded once for all folders: decoding is most of the work.
    generated: folders with a 5 s video per take-1 row of `descriptions` (default: the csv in `benchmark`), named by its
        id (`0001_*.mp4`), all at the same integer frame rate. With `subset`, any part of them.
    benchmark: the published folder (`layout`), or its parent. Recordings at another frame rate are resampled, and
        missing masks are computed.
    mask_codec: how computed masks are encoded before the comparison: `mp4v` as published, or `none`.
    workers: comparisons in parallel, each on one core with a few frames in memory.
    cache: folder of finished comparisons, keyed by the contents of their files.
    Raises UserError, one line, for invalid folders, names, counts, lengths, frame rates and files.
    """
    return [found for found, _ in _score(generated, benchmark, descriptions, **options)]


def _score(
    generated: Sequence[Path | str],
    benchmark: Path | str,
    descriptions: Path | str | None,
    *,
    protocol: Protocol = "original",
    mask_codec: Codec = "mp4v",
    subset: bool = False,
    workers: int = 1,
    cache: Path | str | None = None,
) -> list[tuple[dict[str, Any], score.Table]]:
    """The score and the metrics of each folder."""
    _choice("--protocol", protocol, PROTOCOLS)
    _choice("--mask-codec", mask_codec, CODECS)
    folders, root = [Path(folder) for folder in generated], layout.find_root(Path(benchmark), protocol)
    rows = layout.read_descriptions(layout.find_descriptions(Path(benchmark), root, descriptions))
    expected = [row for row in rows if row.name.take == 1]
    categories = {row.name.scenario: row.category for row in expected}
    pairs = [find_pairs(folder, root, rows, subset) for folder in folders]
    rates = [common_rate([pair.generated for pair in found]) for found in pairs]
    jobs = [find_jobs(found, root, fps, mask_codec) for found, fps in zip(pairs, rates, strict=True)]
    compared = compare_all([job for found in jobs for job in found], workers, Path(cache) if cache else None)
    scored: list[tuple[dict[str, Any], score.Table]] = []
    for folder, of_folder, fps, its_jobs in zip(folders, pairs, rates, jobs, strict=True):
        results: dict[str, dict[str, Metrics]] = {}
        for pair, job in zip(of_folder, its_jobs, strict=True):
            results.setdefault(pair.first.scenario, {})[pair.first.view] = compared[job]
        found = summary(results, protocol, categories) | {
            "fps": fps,
            "mask_codec": mask_codec,
            "seeds": _seeds(folder),
            "subset": len(of_folder) < len(expected),
            "expected_videos": len(expected),
        }
        scored.append((found, results))
    return scored


def score_csv(
    path: Path | str, *, protocol: Protocol = "original", descriptions: Path | str | None = None
) -> dict[str, Any]:
    """`summary` of an official csv of metrics; `descriptions` adds the categories. Raises UserError."""
    _choice("--protocol", protocol, PROTOCOLS)
    rows = layout.read_descriptions(Path(descriptions)) if descriptions else []
    return summary(table.read(Path(path)), protocol, {row.name.scenario: row.category for row in rows})


def _seeds(generated: Path) -> list[int]:
    """The seeds of the videos, if they were made by `phantom sample`; none for another maker's record."""
    try:
        seed = json.loads((generated / layout.RECORD).read_text(encoding="utf-8"))["settings"]["seed"]
    except (OSError, ValueError, LookupError, TypeError):
        return []
    return [seed] if isinstance(seed, int) else []


def _choice(name: str, found: str, accepted: Sequence[str]) -> None:
    if found not in accepted:
        raise UserError(f"{name}: found {found!r}, accepted: {', '.join(accepted)}")
