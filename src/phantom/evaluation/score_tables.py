"""Score files of several models on a benchmark, side by side: tables, bars, and the entries of evaluation.json."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations, cycle
from typing import Any

from phantom.evaluation.cells import COLOURS, NAMES, delta_cell, difference_cell, gain_bar
from phantom.evaluation.page import Bar, Cell, Table, TableRow
from phantom.evaluation.protocol import Benchmark, Figure, Published, Scores

BETWEEN = ("control", "lora", "fourth", "fifth")  # classes of models that are neither the base nor the last


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


def against_base(benchmark: Benchmark, models: Mapping[str, Scores]) -> Table:
    """The table of one benchmark with base, control and Phantom."""
    named = {NAMES[name]: scores for name, scores in models.items()}
    return figures_table(Scored(benchmark, "", named), NAMES["base"])


def entries(benchmark: Benchmark, models: Mapping[str, Scores]) -> dict[str, Any]:
    """The entries of evaluation.json for one benchmark: scores, gains over the base, and details as lists.

    Phantom also has its gain over the control, if there is one.
    """
    base, last = models["base"], "phantom" if "control" in models else None
    gain = benchmark.gain
    return {
        name: {key: value for key, value in found.items() if key not in ("per_prompt", "categories", "conventions")}
        | {"gain": None if name == "base" else gain(base, found)}
        | ({"gain_over_control": gain(models["control"], found)} if name == last else {})
        | {"categories": [{"category": part, **numbers} for part, numbers in found.get("categories", {}).items()]}
        | {key: found[key] for key in ("per_prompt",) if key in found}
        for name, found in models.items()
    }


def figures_table(scored: Scored, base: str) -> Table:
    """The figures of several models, with differences to the model `base`, and those that were published."""
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
    kinds = [*colour_classes(list(table), base), *["truth"] * len(published.models)]
    note = " ".join(filter(None, [_conditions(table, published), published.uncertain, COLOURS]))
    return Table(scored.title, columns, kinds, groups, note, [benchmark.categories])


def _gain(benchmark: Benchmark, figure: Figure, base: Scores, other: Scores) -> dict[str, Any] | None:
    return benchmark.gain(base, other) if figure.key == "score" else benchmark.figure_gain(figure, base, other)


def _category(part: str, scored: Scored, base: str) -> TableRow:
    def of(scores: Scores) -> float | None:
        return scores.get("categories", {}).get(part, {}).get("score")

    table, figure = scored.table, scored.benchmark.score_figure
    cells = [delta_cell(figure, of(s), None if n == base else of(table[base])) for n, s in table.items()]
    return TableRow(part.replace("_", " "), "", [*cells, *[Cell("–")] * len(scored.published.models)])


def items_table(scored: Scored, base: str) -> Table | None:
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
    return Table(f"{scored.title}: {title[0]}", columns, colour_classes(columns, base), [("", lines)], "", [""])


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


def differences_table(scored: Scored, pairs: Sequence[Mapping[str, Any]]) -> Table | None:
    """Every pair of more than two models: by how much the model of a row is above that of a column."""
    names, figure = list(scored.table), scored.benchmark.score_figure
    if len(names) < 3:
        return None
    known = {(pair["model"], pair["over"]): difference_cell(figure, pair["gain"]) for pair in pairs}
    rows = [TableRow(model, "", [known.get((model, over), Cell("")) for over in names[:-1]]) for model in names[1:]]
    title = f"{scored.title}: {figure.title.lower()}, model of the row minus model of the column"
    return Table(title, names[:-1], [""] * (len(names) - 1), [("", rows)], COLOURS, [""])


def colour_classes(names: Sequence[str], base: str) -> list[str]:
    """Classes of the page's styles: one for the base, one for the last of the other models, and more between."""
    others = [name for name in names if name != base]
    between = dict(zip(others[:-1], cycle(BETWEEN), strict=False))
    return ["base" if name == base else between.get(name, "phantom") for name in names]


def score_bars(
    benchmark: Benchmark, table: Mapping[str, Scores], base: str, gains: Mapping[str, dict[str, Any] | None]
) -> list[Bar]:
    """The scores of several models as bars, each with its gain over the model `base` (`gains`, by model)."""
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
        for kind, (name, scores) in zip(colour_classes(list(table), base), table.items(), strict=True)
    ]


def plots_by_category(scored: Scored, base: str) -> list[tuple[str, list[Bar]]]:
    """Bars of the scores by category, for several models."""
    plots, table = [], scored.table
    for part in table.get(base, {}).get("categories", {}) if len(table) > 1 else ():
        found = {name: scores.get("categories", {}).get(part) for name, scores in table.items()}
        there = {name: scores for name, scores in found.items() if scores and scores["score"] is not None}
        if base in there and part:
            title = f"{scored.title}: {part.replace('_', ' ')}"
            plots.append((title, score_bars(scored.benchmark, there, base, {})))
    return plots
