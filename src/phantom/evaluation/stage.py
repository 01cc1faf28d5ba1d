"""The evaluate stage: base, control, LoRA and Phantom on the benchmarks, from the same seeds; scores and the page."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from phantom.config import Params
from phantom.data.part import Part
from phantom.errors import UserError
from phantom.evaluation.benchmarks import BENCHMARKS
from phantom.evaluation.models import ORDER, find_models, intervened_models, sample_models
from phantom.evaluation.protocol import Benchmark, Evaluated, Run, VideoSet
from phantom.evaluation.report import evaluation_page
from phantom.evaluation.score_tables import against_base, entries
from phantom.evaluation.verdict import verdict
from phantom.generation.processes import joined
from phantom.progress import is_first_process

EVALUATION, PAGE = Path("reports/evaluation.json"), Path("reports/index.html")
WORK = Path("checkpoints/evaluate")  # videos and comparisons, reused by digest; not tracked by DVC


@dataclass(frozen=True)
class EvaluateResult:
    """Paths of the scores and the page, and the score by mode (or benchmark) and model."""

    evaluation: str
    report: str
    scores: dict[str, dict[str, float | None]]


@dataclass(frozen=True)
class PartResult:
    """A part of the videos that `evaluate` needs: which one, and the folder of all of them."""

    part: int
    of: int
    folder: str


def evaluate(params: Params, root: Path = Path()) -> EvaluateResult | None:
    """Generates and scores the videos of every model for `evaluate.benchmarks`; writes the scores and the page.

    Where torchrun started several processes, each generates a share of the videos on its GPU, and the first one alone
    goes on; in the others it returns None. Resumes after an interruption: finished videos, comparisons and ratings are
    reused. Raises UserError.
    """
    wanted = [benchmark for name, benchmark in BENCHMARKS.items() if name in params.evaluate.benchmarks]
    sets = _find_videos(wanted, params, root)
    models, work = partial(find_models, params, root), root / WORK
    with joined() as part:
        folders = _sample(sets, params, root, part)
    if not is_first_process():
        return None
    evaluated = []
    for one in wanted:
        of = {mode: {name: found[name] for name in ORDER if name in found} for mode, found in folders[one.name].items()}
        run = Run(params, root, work, sets[one.name], of, models)
        evaluated.append(one.evaluate(run) or _score_folders(one, run))

    evaluation: dict[str, Any] = {}
    scores: dict[str, dict[str, float | None]] = {}
    for found in evaluated:
        evaluation |= found.entries
        scores |= {mode: dict(models) for mode, models in found.scores.items()}
    if said := " ".join(found.verdict for found in evaluated if found.verdict):
        evaluation = {"verdict": said, **evaluation}
    tables = [table for found in evaluated for table in found.tables]
    shown = next((found.page for found in evaluated if found.page), None)
    _write(root / PAGE, evaluation_page(evaluation, params, root, tables, shown))
    _write(root / EVALUATION, json.dumps(evaluation, indent=2) + "\n")
    return EvaluateResult(str(EVALUATION), str(PAGE), scores)


def evaluate_part(params: Params, part: Part, root: Path = Path()) -> PartResult:
    """Generates a part of the videos of `evaluate`, which makes those that are missing and scores all of them.

    Parts may be made at the same time, in any order, and more than once. Raises UserError.
    """
    wanted = [benchmark for name, benchmark in BENCHMARKS.items() if name in params.evaluate.benchmarks]
    sets = _find_videos(wanted, params, root)
    with joined(part) as own:
        _sample(sets, params, root, own)
    return PartResult(part.index, part.of, str(WORK))


def _find_videos(wanted: Sequence[Benchmark], params: Params, root: Path) -> dict[str, dict[str, VideoSet]]:
    """The videos to generate, by benchmark and mode. Raises UserError without a model to generate them."""
    if not (root / "models/phantom/config.json").is_file():
        raise UserError("models/phantom: no export there; `phantom train` writes it")
    return {one.name: one.videos(params, root) if one.sample_options is not None else {} for one in wanted}


def _sample(
    sets: Mapping[str, Mapping[str, VideoSet]], params: Params, root: Path, part: Part
) -> dict[str, dict[str, dict[str, Path]]]:
    """`sample_models` of a part; where there are several, also with z replaced, which else a benchmark itself does."""
    folders = sample_models(find_models(params, root), root / WORK, sets, part)
    if part.of > 1 and (asked := {name: videos for name, videos in sets.items() if BENCHMARKS[name].intervenes}):
        sample_models(intervened_models(params, root), root / WORK, asked, part)
    return folders


def _score_folders(benchmark: Benchmark, run: Run) -> Evaluated:
    """The score of every model's videos, side by side."""
    scored = {mode: _score_models(benchmark, run.params, folders, run.work) for mode, folders in run.folders.items()}
    found = {mode: entries(benchmark, models) for mode, models in scored.items()}
    return Evaluated(
        found,
        {mode: {name: found["score"] for name, found in models.items()} for mode, models in scored.items()},
        [against_base(benchmark, models) for models in scored.values()],
        verdict=verdict(benchmark.title, benchmark.score_figure, found),
    )


def _score_models(
    benchmark: Benchmark, params: Params, folders: Mapping[str, Path], work: Path
) -> dict[str, dict[str, Any]]:
    """Scores the videos of several models. Without a judge, its inputs for all models are written, then UserError."""
    found, failed = {}, []
    for model, folder in folders.items():
        try:
            found[model] = benchmark.score_folder(params, folder, work)
        except UserError as error:
            failed.append(str(error))
    if failed:
        raise UserError(failed[0] + (f"; so also for {len(failed) - 1} other models" if len(failed) > 1 else ""))
    return found


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)
