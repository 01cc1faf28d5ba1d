"""`phantom report`: compares score files of several models on one page, with gains over a base and published scores."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from phantom.errors import UserError
from phantom.evaluation.benchmarks import benchmark_of
from phantom.evaluation.cells import INTERVAL
from phantom.evaluation.page import Page, as_csv, embed_data, render
from phantom.evaluation.protocol import Scores
from phantom.evaluation.published import published_tables
from phantom.evaluation.score_tables import (
    Scored,
    colour_classes,
    differences_table,
    figures_table,
    items_table,
    plots_by_category,
    score_bars,
)
from phantom.evaluation.side_by_side import video_walls


@dataclass(frozen=True)
class Comparison:
    """Paths of the page and of its numbers; by benchmark the gain of each model over the base, and of every pair."""

    report: str
    comparison: str
    base: str
    gains: dict[str, dict[str, dict[str, Any] | None]]
    pairs: dict[str, list[dict[str, Any]]]


def compare(
    files: Sequence[str],
    out: Path,
    base: str | None = None,
    videos: Sequence[str] = (),
    truth: Path | None = None,
    published: bool = False,
) -> Comparison:
    """Writes `index.html` and `comparison.json` into `out`.

    files: JSON of `phantom score`. A model is named after its file, or by NAME=FILE; files of several benchmarks with
        the same name are one model. base: the model that the others are compared with, by default the first.
    videos: NAME=FOLDER of the videos of a model to show, one folder per benchmark.
    truth: a benchmark's folder of recordings, which are shown beside them.
    published: also show what others have published; then there need be no files.
    Raises UserError.
    """
    found: dict[tuple[str, str], Scored] = {}
    models: list[str] = []
    for given in files:
        name, scores = read_scores(given)
        key = scores["benchmark"], scores.get("protocol", "")
        table = found.setdefault(key, Scored(benchmark_of(key[0]), key[1])).table
        if name in table:
            raise UserError(f"{given}: a second {key[0]} score of {name}; name one of them as NAME=FILE")
        table[name] = scores
        models += [name] if name not in models else []
    if not models and not published:
        raise UserError("report: found no score file; accepted: at least one, or --published")
    first = base or (models[0] if models else "")
    if first not in (models or [""]):
        raise UserError(f"--base: found {first!r}, accepted: {', '.join(models)}")

    every = {scored.title: scored for scored in found.values()}
    gains = {title: scored.gains(first) for title, scored in every.items()}
    pairs = {title: scored.pairs() for title, scored in every.items()}
    kinds = dict(zip(models, colour_classes(models, first), strict=True))
    tables = {title: scored.table for title, scored in every.items()}
    recordings = {t: partial(of.benchmark.recording, truth, of.protocol) for t, of in every.items()} if truth else {}
    folders = _folders(videos, models)
    shown, titles = video_walls(tables, folders, kinds, first, recordings) if tables else (None, [])
    if truth and not any(video.kind == "truth" for scene in (shown.scenes if shown else ()) for video in scene.shown):
        raise UserError(f"--truth: found {truth}, with no recording of a video that --videos shows")
    page = Page(
        title="Models compared",
        lede=f"{len(models)} models; differences are to {first}." if models else "What others have published.",
        bars=[
            *(
                (title, score_bars(scored.benchmark, scored.table, first, gains[title]))
                for title, scored in every.items()
            ),
            *(plot for scored in every.values() for plot in plots_by_category(scored, first)),
        ],
        tables=[
            *(
                made
                for title, scored in every.items()
                for made in (
                    figures_table(scored, first),
                    differences_table(scored, pairs[title]),
                    items_table(scored, first),
                )
                if made
            ),
            *(published_tables(list(every.values())) if published else ()),
        ],
        notes=[
            INTERVAL,
            ("Paper", "Published by the authors of Phantom (arXiv 2604.08503); not measured here."),
            *([("Videos", f"Of {' and '.join(titles)}; the number is the score of the scene.")] if shown else []),
        ],
    )
    if shown:
        page = replace(page, scenes=shown.scenes, fps=shown.fps, seconds=shown.seconds, shape=shown.shape)
    out.mkdir(parents=True, exist_ok=True)
    numbers = json.dumps({"base": first, "gains": gains, "pairs": pairs}, indent=2) + "\n"
    (out / "comparison.json").write_text(numbers, encoding="utf-8")
    files_ = [("comparison.json", "application/json", numbers), ("comparison.csv", "text/csv", as_csv(page.tables))]
    (out / "index.html").write_text(render(replace(page, data=embed_data(files_))), encoding="utf-8")
    return Comparison(str(out / "index.html"), str(out / "comparison.json"), first, gains, pairs)


def read_scores(given: str) -> tuple[str, Scores]:
    """The model name and scores of FILE or NAME=FILE. Raises UserError."""
    name, separator, rest = given.partition("=")
    path = Path(rest if separator and not Path(given).is_file() else given)
    name = name if separator and not Path(given).is_file() else path.stem
    try:
        scores = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: {getattr(error, 'strerror', None) or 'no text'}; a score file is needed") from None
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(scores, dict) or not {"score", "benchmark"} <= scores.keys():
        raise UserError(f"{path}: no score and benchmark in it; accepted: what `phantom score ... --json` prints")
    return name, scores


def _folders(videos: Sequence[str], models: Sequence[str]) -> dict[str, list[Path]]:
    """Parses NAME=FOLDER arguments into folders by model. Raises UserError."""
    folders: dict[str, list[Path]] = {}
    for given in videos:
        name, _, folder = given.partition("=")
        if name not in models or not Path(folder).is_dir() or not folder:
            raise UserError(f"--videos: found {given!r}, accepted: NAME=FOLDER, where NAME is of {', '.join(models)}")
        folders.setdefault(name, []).append(Path(folder))
    return folders
