"""`phantom report`: compares score files of several models on one page, with gains over a base and published scores."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations
from pathlib import Path
from typing import Any

from phantom.errors import UserError
from phantom.evaluation.benchmarks import benchmark_of
from phantom.evaluation.page import Bar, Cell, Page, Table, TableRow, as_csv, embed_data, render
from phantom.evaluation.protocol import Benchmark, Figure, Published, Scores
from phantom.evaluation.report import COLOURS, INTERVAL, NAMES, delta_cell, difference_cell, gain_bar
from phantom.evaluation.side_by_side import video_walls


@dataclass(frozen=True)
class Scored:
    """The scores of several models on a benchmark under a protocol, by model."""

    benchmark: Benchmark
    protocol: str
    table: dict[str, Scores] = field(default_factory=dict)

    @property
    def title(self) -> str:
        return self.benchmark.title + (f", {self.protocol}" if self.protocol else "")

    @property
    def published(self) -> Published:
        return self.benchmark.published(self.protocol)

    def gains(self, base: str) -> dict[str, dict[str, Any] | None]:
        """The gain of each other model over the base; none where the base has no score."""
        reference = self.table.get(base)
        others = {name: scores for name, scores in self.table.items() if name != base and reference}
        return {name: self.benchmark.gain(self.table[base], scores) for name, scores in others.items()}

    def pairs(self) -> list[dict[str, Any]]:
        """The gain of every later model over every earlier one."""
        return [
            {"model": model, "over": over, "gain": self.benchmark.gain(self.table[over], self.table[model])}
            for over, model in combinations(self.table, 2)
        ]


@dataclass(frozen=True)
class Comparison:
    """Paths of the page and of its numbers; by benchmark the gain of each model over the base, and of every pair."""

    report: str
    comparison: str
    base: str
    gains: dict[str, dict[str, dict[str, Any] | None]]
    pairs: dict[str, list[dict[str, Any]]]


def compare(files: Sequence[str], out: Path, base: str | None = None, videos: Sequence[str] = ()) -> Comparison:
    """Writes `index.html` and `comparison.json` into `out`.

    files: JSON of `phantom score`. A model is named after its file, or by NAME=FILE; files of several benchmarks with
        the same name are one model. base: the model that the others are compared with, by default the first.
    videos: NAME=FOLDER of the videos of a model to show, one folder per benchmark.
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
    first = base or models[0]
    if first not in models:
        raise UserError(f"--base: found {first!r}, accepted: {', '.join(models)}")

    every = {scored.title: scored for scored in found.values()}
    gains = {title: scored.gains(first) for title, scored in every.items()}
    pairs = {title: scored.pairs() for title, scored in every.items()}
    kinds = dict(zip(models, _kinds(models, first), strict=True))
    tables = {title: scored.table for title, scored in every.items()}
    shown, titles = video_walls(tables, _folders(videos, models), kinds, first)
    page = Page(
        title="Models compared",
        lede=f"{len(models)} models; differences are to {first}.",
        bars=[
            *((title, _bars(scored.benchmark, scored.table, first, gains[title])) for title, scored in every.items()),
            *(plot for scored in every.values() for plot in _plots(scored, first)),
        ],
        tables=[
            made
            for title, scored in every.items()
            for made in (_figures(scored, first), _differences(scored, pairs[title]), _items(scored, first))
            if made
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


def against_base(benchmark: str, models: Mapping[str, Scores]) -> Table:
    """The table of one benchmark with base, control and Phantom."""
    named = {NAMES[name]: scores for name, scores in models.items()}
    return _figures(Scored(benchmark_of(benchmark), "", named), NAMES["base"])


def figures(benchmark: str, models: Mapping[str, Scores]) -> dict[str, Any]:
    """The entries of evaluation.json for one benchmark: scores, gains over the base, and details as lists.

    Phantom also has its gain over the control, if there is one.
    """
    base, last = models["base"], "phantom" if "control" in models else None
    gain = benchmark_of(benchmark).gain
    return {
        name: {key: value for key, value in found.items() if key not in ("per_prompt", "categories", "conventions")}
        | {"gain": None if name == "base" else gain(base, found)}
        | ({"gain_over_control": gain(models["control"], found)} if name == last else {})
        | {"categories": [{"category": part, **numbers} for part, numbers in found["categories"].items()]}
        | {"per_prompt": found["per_prompt"]}
        for name, found in models.items()
    }


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


def _differences(scored: Scored, pairs: Sequence[Mapping[str, Any]]) -> Table | None:
    """Every pair of more than two models: by how much the model of a row is above that of a column."""
    names, figure = list(scored.table), scored.benchmark.score_figure
    if len(names) < 3:
        return None
    known = {(pair["model"], pair["over"]): difference_cell(figure, pair["gain"]) for pair in pairs}
    rows = [TableRow(model, "", [known.get((model, over), Cell("")) for over in names[:-1]]) for model in names[1:]]
    title = f"{scored.title}: {figure.title.lower()}, model of the row minus model of the column"
    return Table(title, names[:-1], [""] * (len(names) - 1), [("", rows)], COLOURS)


def _kinds(names: Sequence[str], base: str) -> list[str]:
    """Colour classes: grey for the base, violet for the last of the other models, amber for the rest."""
    others = [name for name in names if name != base]
    return ["base" if name == base else "phantom" if name == others[-1] else "control" for name in names]


def _bars(
    benchmark: Benchmark, table: Mapping[str, Scores], base: str, gains: Mapping[str, dict[str, Any] | None]
) -> list[Bar]:
    reference = table[base]["score"] if base in table else None
    return [
        gain_bar(
            name,
            kind,
            scores["score"],
            None if name == base else reference,
            gains.get(name),
            benchmark.score_figure,
            marks=benchmark.marks,
        )
        for kind, (name, scores) in zip(_kinds(list(table), base), table.items(), strict=True)
    ]


def _plots(scored: Scored, base: str) -> list[tuple[str, list[Bar]]]:
    """Bars of the scores by category, for several models."""
    plots, table = [], scored.table
    for part in table.get(base, {}).get("categories", {}) if len(table) > 1 else ():
        found = {name: scores.get("categories", {}).get(part) for name, scores in table.items()}
        there = {name: scores for name, scores in found.items() if scores and scores["score"] is not None}
        if base in there and part:
            title = f"{scored.title}: {part.replace('_', ' ')}"
            plots.append((title, _bars(scored.benchmark, there, base, {})))
    return plots


def _folders(videos: Sequence[str], models: Sequence[str]) -> dict[str, list[Path]]:
    """Parses NAME=FOLDER arguments into folders by model. Raises UserError."""
    folders: dict[str, list[Path]] = {}
    for given in videos:
        name, _, folder = given.partition("=")
        if name not in models or not Path(folder).is_dir() or not folder:
            raise UserError(f"--videos: found {given!r}, accepted: NAME=FOLDER, where NAME is of {', '.join(models)}")
        folders.setdefault(name, []).append(Path(folder))
    return folders


def _figures(scored: Scored, base: str) -> Table:
    benchmark, table, published = scored.benchmark, scored.table, scored.published
    reference = table.get(base, {})
    rows = []
    for figure in benchmark.figures(list(table.values())):
        cells = []
        for name, scores in table.items():
            known = None if name == base else _value(reference, figure)
            gained = _gain(benchmark, figure, reference, scores) if known is not None else None
            cells.append(delta_cell(figure, _value(scores, figure), known, gained))
        cells += [delta_cell(figure, paper.get(figure.key), None) for paper in published.models.values()]
        rows.append(TableRow(figure.title, figure.note, cells))
    groups = [("", rows)]
    if categories := [part for part in reference.get("categories", {}) if part]:
        groups.append((benchmark.categories, [_category(part, scored, base) for part in categories]))
    columns = [*table, *(f"Paper: {name}" for name in published.models)]
    kinds = [*_kinds(list(table), base), *["truth"] * len(published.models)]
    note = " ".join(filter(None, [_conditions(table, published), published.uncertain, COLOURS]))
    return Table(scored.title, columns, kinds, groups, note)


def _gain(benchmark: Benchmark, figure: Figure, base: Scores, other: Scores) -> dict[str, Any] | None:
    return benchmark.gain(base, other) if figure.key == "score" else benchmark.figure_gain(figure, base, other)


def _category(part: str, scored: Scored, base: str) -> TableRow:
    def of(scores: Scores) -> float | None:
        return scores.get("categories", {}).get(part, {}).get("score")

    table, figure = scored.table, scored.benchmark.score_figure
    cells = [delta_cell(figure, of(s), None if n == base else of(table[base])) for n, s in table.items()]
    return TableRow(part.replace("_", " "), "", [*cells, *[Cell("–")] * len(scored.published.models)])


def _items(scored: Scored, base: str) -> Table | None:
    """The score by item, sorted by the size of the difference to the base: where a gain comes from."""
    found = {name: scored.benchmark.items(scores) for name, scores in scored.table.items()}
    rows = {name: items[1] for name, items in found.items() if items}
    if base not in rows or len(rows) < 2 or not (title := found[base]):
        return None

    def widest(item: str) -> float:
        return max(abs(rows[n].get(item, rows[base][item]) - rows[base][item]) for n in rows)

    figure, columns = scored.benchmark.score_figure, list(rows)
    lines = [
        TableRow(
            item.removeprefix("trimmed-").replace("-", " "),
            "",
            [delta_cell(figure, rows[n].get(item), None if n == base else rows[base][item]) for n in columns],
        )
        for item in sorted(rows[base], key=lambda item: (-widest(item), item))
    ]
    return Table(f"{scored.title}: {title[0]}", columns, _kinds(columns, base), [("", lines)])


def _conditions(table: Mapping[str, Scores], published: Published) -> str:
    """A note on conditions that should be equal but differ between the files, or from the paper."""
    warnings = []
    for key, what in (
        ("fps", "frame rates"),
        ("videos", "numbers of videos"),
        ("mask_codec", "mask codecs"),
        ("seeds", "seeds"),
    ):
        values = {name: _shown(scores[key]) for name, scores in table.items() if scores.get(key)}
        if len(set(values.values())) > 1:
            warnings.append(f"different {what}: " + ", ".join(f"{name} {value}" for name, value in values.items()))
    notes = [f"Not alike: {'; '.join(warnings)}."] if warnings else []
    for name, scores in table.items():
        if scores.get("missing"):
            notes.append(f"{name} lacks {', '.join(scores['missing'])}: its score is of the others.")
    if published.videos and any(scores.get("videos") != published.videos for scores in table.values()):
        notes.append(
            f"The paper's numbers are of the {published.videos} published {published.videos_of}, these are not."
        )
    return " ".join(notes)


def _shown(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _value(scores: Scores, figure: Figure) -> float | None:
    value = scores.get(figure.key)
    return value["score"] if isinstance(value, dict) else value
