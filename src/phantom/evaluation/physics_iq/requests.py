"""The videos that Physics-IQ asks for: one per recording of take 1, from its condition frames."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from phantom.config import Params
from phantom.data.physics_iq import layout
from phantom.data.physics_iq.layout import Row
from phantom.evaluation.physics_iq.conditions import find_condition, find_truth
from phantom.evaluation.sampling_spec import Settings, VideoRequest


def recordings(params: Params, root: Path) -> tuple[Path, Path | None]:
    """The folder and the descriptions that the settings name, or those of the simulated worlds in their place."""
    settings = params.evaluate.physics_iq
    folder = root / ("data/benchmark" if settings.benchmark == "worlds" else settings.benchmark)
    return folder, root / settings.descriptions if settings.descriptions else None


def open_benchmark(benchmark: Path, protocol: str, descriptions: Path | None = None) -> tuple[Path, list[Row]]:
    """The folder of the benchmark's files, and the rows for which a video is generated. Raises UserError."""
    root = layout.find_root(benchmark, protocol)
    rows = layout.read_descriptions(layout.find_descriptions(benchmark, root, descriptions))
    return root, [row for row in rows if row.name.take == 1]


def physics_iq_requests(rows: Sequence[Row], root: Path, settings: Settings) -> list[VideoRequest]:
    """One video per row of the benchmark in `root`. Raises UserError for missing conditions."""
    return [
        VideoRequest(
            row.name.generated,
            row.description,
            (settings.seed, row.name.id),
            find_condition(root, row.name, settings),
            truth=find_truth(root, row.name, settings),
        )
        for row in rows
    ]
