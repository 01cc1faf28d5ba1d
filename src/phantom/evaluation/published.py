"""Published numbers of other models (`published.yaml`): in one column only where they were made in the same way."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Annotated

import yaml
from pydantic import Field, model_validator

from phantom.config import Section
from phantom.config.base import Positive
from phantom.evaluation.benchmarks import benchmark_of
from phantom.evaluation.page import Cell, Table, TableRow
from phantom.evaluation.score_tables import Scored

FILE = Path(__file__).with_name("published.yaml")
PAPER = "Phantom (2604.08503)"


class OwnFigure(Section):
    """Which score files have numbers of a column's protocol: a figure of a benchmark, over so many videos."""

    benchmark: str
    figure: str
    videos: Positive


class PaperFigure(Section):
    """Which numbers of Phantom's paper are of a column's protocol. ending: of the names of its rows."""

    benchmark: str
    figure: str
    protocol: str = ""
    ending: str = ""


class Column(Section):
    """A protocol. Numbers of two columns cannot be compared."""

    title: str
    protocol: str
    own: OwnFigure | None = None
    paper: PaperFigure | None = None


class Row(Section):
    """What a source states of a model: a value by column. disputed: why one of them is doubtful, likewise.

    second_hand: it was read in another text than the source.
    """

    model: str
    source: str
    values: Annotated[dict[str, float], Field(min_length=1)]
    second_hand: bool = False
    disputed: dict[str, str] = {}


class PublishedTable(Section):
    """The numbers of one benchmark, or of several that have few."""

    columns: dict[str, Column]
    rows: tuple[Row, ...]

    @model_validator(mode="after")
    def _names(self) -> PublishedTable:
        for row in self.rows:
            if unknown := row.values.keys() - self.columns.keys() or row.disputed.keys() - row.values.keys():
                raise ValueError(f"{row.model}: found {min(unknown)!r}, accepted: a column of the table")
        return self


class PublishedNumbers(Section):
    """The file: tables by title."""

    tables: dict[str, PublishedTable]


@cache
def read_published() -> PublishedNumbers:
    """The published numbers."""
    return PublishedNumbers.model_validate(yaml.safe_load(FILE.read_text(encoding="utf-8")))


def published_tables(own: Sequence[Scored] = ()) -> list[Table]:
    """A table for each benchmark: models as rows, protocols as columns; `own` scores where the protocol is the same."""
    return [_table(title, of, own) for title, of in read_published().tables.items()]


def _table(title: str, of: PublishedTable, own: Sequence[Scored]) -> Table:
    measured = [
        TableRow(name, "measured here", [_cell(values.get(key)) for key in of.columns])
        for name, values in _measured(of.columns, own).items()
    ]
    stated = [*_of_the_paper(of.columns), *of.rows]
    rows = [
        TableRow(
            row.model,
            row.source + (", read at second hand" if row.second_hand else ""),
            [_cell(row.values.get(key), disputed=key in row.disputed) for key in of.columns],
        )
        for row in stated
    ]
    protocols = "; ".join(f"{column.title}: {column.protocol}" for column in of.columns.values())
    doubts = "; ".join(
        f"{row.model}, {of.columns[key].title}: {text}" for row in of.rows for key, text in row.disputed.items()
    )
    note = f"Numbers of two columns cannot be compared. {protocols}."
    note += f" Disputed: {doubts}." if doubts else ""
    groups = [*([("Measured here", measured)] if measured else []), ("Published", rows)]
    columns = [column.title for column in of.columns.values()]
    return Table(f"Published: {title}", columns, ["truth"] * len(columns), groups, note, ["Published"])


def _cell(value: float | None, disputed: bool = False) -> Cell:
    return Cell("") if value is None else Cell(f"{value:g}", "disputed" if disputed else "")


def _of_the_paper(columns: Mapping[str, Column]) -> Iterator[Row]:
    """The rows of Phantom's paper, from the benchmarks that know them."""
    found: dict[str, dict[str, float]] = {}
    for key, column in columns.items():
        if (paper := column.paper) is not None:
            models = benchmark_of(paper.benchmark).published(paper.protocol).models
            for name, figures in models.items():
                if name.endswith(paper.ending) and paper.figure in figures:
                    found.setdefault(name.removesuffix(paper.ending), {})[key] = figures[paper.figure]
    for name, values in found.items():
        yield Row(model=name, source=PAPER, values=values)


def _measured(columns: Mapping[str, Column], own: Sequence[Scored]) -> dict[str, dict[str, float]]:
    """By model, the scores of score files under a column's protocol, over as many videos."""
    found: dict[str, dict[str, float]] = {}
    for key, column in columns.items():
        for scored in own:
            if column.own is None or scored.benchmark.name != column.own.benchmark:
                continue
            for name, scores in scored.table.items():
                if scores.get("videos") == column.own.videos and scores.get(column.own.figure) is not None:
                    found.setdefault(name, {})[key] = scores[column.own.figure]
    return found
