"""Physics-IQ (Motamed et al., 2025), original and Verified, behind the protocol of all benchmarks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

from phantom.config import Params
from phantom.errors import UserError
from phantom.evaluation.physics_iq.figures import FIGURES
from phantom.evaluation.protocol import (
    NOTHING_PUBLISHED,
    Benchmark,
    Evaluated,
    Figure,
    Option,
    Published,
    Run,
    Scores,
    VideoSet,
    Workload,
)
from phantom.progress import say

# Of the paper (arXiv 2604.08503), most likely under the original protocol: `docs/evaluation.md`.
PAPER = Published(
    {
        "Wan2.2-TI2V-5B, one frame": {
            "score": 22.10,
            "spatial_iou": 0.164,
            "spatiotemporal_iou": 0.132,
            "weighted_spatial_iou": 0.102,
            "mse": 0.010,
        },
        "Phantom, one frame": {
            "score": 29.59,
            "spatial_iou": 0.245,
            "spatiotemporal_iou": 0.146,
            "weighted_spatial_iou": 0.140,
            "mse": 0.009,
        },
        "Phantom, several frames": {"score": 27.53},
    },
    198,
    "recordings",
)
DESCRIPTIONS = Option("descriptions", Path | None, "The CSV of descriptions, if not in the benchmark's folder.")


class PhysicsIQ(Benchmark):
    """Videos that continue a recording, compared with both takes of it."""

    name = "physics-iq"
    title = "Physics-IQ"
    score_figure = FIGURES[0]
    intervenes = True
    sample_options = (
        Option("benchmark", Path, "The benchmark's folder.", ...),
        DESCRIPTIONS,
        Option("mode", str, "single: condition on one frame; multi: on the preceding video.", "single"),
    )
    score_options = (
        Option("generated", list[Path] | None, "A folder of mp4 files; repeat it for several runs of a model."),
        Option("benchmark", Path | None, "The benchmark's folder."),
        DESCRIPTIONS,
        Option("protocol", str, "original or verified.", "original"),
        Option("mask_codec", str, "mp4v, as published, or none.", "mp4v"),
        Option("subset", bool, "Score only the videos that exist.", False, ("--subset",)),
        Option("csv", Path | None, "Write the metrics as a CSV in the official format."),
        Option("from_csv", Path | None, "Score an official CSV of metrics instead of videos."),
        Option("workers", int | None, "Videos compared in parallel; by default one per core.", least=1),
        Option(
            "cache",
            Path,
            "Cache of comparisons and downscaled recordings, keyed by content.",
            Path("checkpoints/scores"),
        ),
        Option("no_cache", bool, "Do not use the cache.", False, ("--no-cache",)),
    )
    scored_by_settings = False

    def videos(self, params: Params, root: Path = Path(), **options: Any) -> dict[str, VideoSet]:
        """By mode: of one with `options`, of all in the settings without."""
        from phantom.evaluation.physics_iq.requests import open_benchmark, physics_iq_requests, recordings
        from phantom.evaluation.sampling_spec import Mode, Settings, other_rate

        settings = params.evaluate.physics_iq
        modes = (options["mode"],) if options else settings.modes
        if unknown := [mode for mode in modes if mode not in get_args(Mode)]:
            raise UserError(f"--mode: found {unknown[0]!r}, accepted: {', '.join(get_args(Mode))}")
        sizes = {mode: Settings.for_physics_iq(params, mode) for mode in modes}
        if warning := other_rate(params):
            say(warning)
        folder, descriptions = (options["benchmark"], options["descriptions"]) if options else recordings(params, root)
        place, rows = open_benchmark(folder, settings.protocol, descriptions)
        return {mode: VideoSet(size, physics_iq_requests(rows, place, size)) for mode, size in sizes.items()}

    def workload(self, params: Params, root: Path) -> list[Workload]:
        from phantom.evaluation.sampling_spec import Settings

        settings = params.evaluate.physics_iq
        count = params.data.worlds.scenarios if settings.benchmark == "worlds" else PAPER.videos
        again = len(params.evaluate.interventions)
        sizes = [Settings.for_physics_iq(params, mode) for mode in settings.modes]
        return [Workload.of_videos(count, size, again) for size in sizes]

    def score(self, load: Callable[[], Params], **options: Any) -> dict[str, Any]:
        from phantom.evaluation.physics_iq.runs import score_runs

        no_cache, csv = options.pop("no_cache"), options.pop("csv")
        options |= {"csv_out": csv, "cache": None if no_cache else options["cache"]}
        return score_runs(options.pop("generated") or [], **options)

    def recording(self, folder: Path, protocol: str, file: str, fps: int) -> tuple[Path, int] | None:
        from phantom.data.physics_iq import layout

        root = layout.find_root(folder, protocol or "original")
        for name in layout.recordings(root).values():
            if f"{name.id:04d}" == file[:4] and (rate := layout.source_rate(root, name, fps)):
                return layout.testing_video(root, name, rate), rate
        return None

    def evaluate(self, run: Run) -> Evaluated:
        from phantom.evaluation.physics_iq.evaluate import evaluate

        return evaluate(run)

    def as_text(self, result: Scores) -> str:
        from phantom.evaluation.physics_iq.runs import as_text

        return as_text(dict(result))

    def figures(self, scores: Sequence[Scores]) -> Sequence[Figure]:
        return FIGURES

    def published(self, protocol: str) -> Published:
        return PAPER if protocol == "original" else NOTHING_PUBLISHED

    def gain(self, base: Scores, other: Scores) -> dict[str, Any] | None:
        """Over the scenarios that both files have, and over the runs that they are the means of."""
        from phantom.evaluation.gains import gain

        if not all("per_scenario" in scores for scores in (base, other)):
            return None
        runs = base.get("per_run", ()), other.get("per_run", ())
        return gain(base["per_scenario"], other["per_scenario"], base.get("protocol", ""), runs=runs)

    def figure_gain(self, figure: Figure, base: Scores, other: Scores) -> dict[str, Any] | None:
        from phantom.evaluation.gains import row_gain

        ours, theirs = (scores.get("per_scenario", []) for scores in (base, other))
        if not all(figure.key in row for row in [*ours, *theirs]):
            return None
        return row_gain(ours, theirs, figure.key)

    def items(self, scores: Scores) -> tuple[str, Mapping[str, float]]:
        rows = scores.get("per_scenario", [])
        return "Verified score by scenario", {row["scenario"]: row["verified"] for row in rows}


PHYSICS_IQ = PhysicsIQ()
