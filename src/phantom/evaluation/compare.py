"""`phantom report`: score files of several models -> one page, with gains over a base and the paper's numbers."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from phantom.errors import UserError
from phantom.evaluation.gains import gain
from phantom.evaluation.page import Bar, Cell, Page, Table, TableRow, render
from phantom.evaluation.report import INTERVAL, PHYSICS_IQ, Figure, bar_of, compared

TITLES = {"physics-iq": "Physics-IQ", "videophy": "VideoPhy", "videophy2": "VideoPhy-2", "vbench2": "VBench-2.0"}
# As the paper states them (arXiv 2604.08503, tables of the main text), in our fields' names and units.
PAPER = {
    ("physics-iq", "original"): {
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
}
PUBLISHED_VIDEOS = 198
COUNTS = ("fps", "scenarios", "videos", "expected_videos")  # numbers that are no figures of a model

Scores = Mapping[str, Any]


@dataclass(frozen=True)
class Comparison:
    """Where the page and its numbers are, and each model's gain over the base by benchmark."""

    report: str
    comparison: str
    base: str
    gains: dict[str, dict[str, dict[str, Any] | None]]


def compare(files: Sequence[str], out: Path, base: str | None = None) -> Comparison:
    """Writes `index.html` and `comparison.json` into `out`.

    files: JSON of `phantom score`; a model is named by its file, or as NAME=FILE. Files of one name and several
        benchmarks are one model. base: the model that the others are compared with; the first by default.
    Raises UserError.
    """
    found: dict[tuple[str, str], dict[str, Scores]] = {}
    models: list[str] = []
    for given in files:
        name, scores = read_scores(given)
        table = found.setdefault((scores["benchmark"], scores.get("protocol", "")), {})
        if name in table:
            raise UserError(f"{given}: a second {scores['benchmark']} score of {name}; name one of them as NAME=FILE")
        table[name] = scores
        models += [name] if name not in models else []
    first = base or models[0]
    if first not in models:
        raise UserError(f"--base: found {first!r}, accepted: {', '.join(models)}")

    gains = {
        _title(key): {
            name: gain(table[first]["per_scenario"], scores["per_scenario"], key[1])
            for name, scores in table.items()
            if name != first and first in table and "per_scenario" in scores
        }
        for key, table in found.items()
    }
    page = Page(
        title="Models compared",
        lede=f"{len(models)} models; differences are to {first}.",
        bars=[(_title(key), _bars(table, first, gains[_title(key)])) for key, table in found.items()],
        tables=[
            made
            for key, table in found.items()
            for made in (_figures(key, table, first), _scenarios(key, table, first))
            if made
        ],
        notes=[INTERVAL, ("Paper", "Published by the authors of Phantom (arXiv 2604.08503); not measured here.")],
    )
    out.mkdir(parents=True, exist_ok=True)
    (out / "index.html").write_text(render(page), encoding="utf-8")
    result = Comparison(str(out / "index.html"), str(out / "comparison.json"), first, gains)
    (out / "comparison.json").write_text(json.dumps({"base": first, "gains": gains}, indent=2) + "\n", encoding="utf-8")
    return result


def read_scores(given: str) -> tuple[str, Scores]:
    """The name and content of FILE or NAME=FILE. Raises UserError."""
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


def _title(key: tuple[str, str]) -> str:
    benchmark, protocol = key
    return TITLES.get(benchmark, benchmark) + (f", {protocol}" if protocol else "")


def _kinds(names: Sequence[str], base: str) -> list[str]:
    """The colours: grey for the base, violet for the last of the others, amber for those between."""
    others = [name for name in names if name != base]
    return ["base" if name == base else "phantom" if name == others[-1] else "control" for name in names]


def _bars(table: Mapping[str, Scores], base: str, gains: Mapping[str, dict[str, Any] | None]) -> list[Bar]:
    kinds = _kinds(list(table), base)
    reference = table[base]["score"] if base in table else None
    return [
        bar_of(name, kind, scores["score"], None if name == base else reference, gains.get(name))
        for kind, (name, scores) in zip(kinds, table.items(), strict=True)
    ]


def _figures(key: tuple[str, str], table: Mapping[str, Scores], base: str) -> Table:
    paper = PAPER.get(key, {})
    reference = table.get(base, {})
    figures = list(PHYSICS_IQ) if key[0] == "physics-iq" else _all_figures(table)
    rows = []
    for figure in figures:
        cells = [
            compared(figure, _value(scores, figure), None if name == base else _value(reference, figure))
            for name, scores in table.items()
        ]
        cells += [compared(figure, published.get(figure.key), None) for published in paper.values()]
        rows.append(TableRow(figure.name, figure.note, cells))
    groups = [("", rows)]
    if categories := [part for part in reference.get("categories", {}) if part]:
        groups.append(("Score by category", [_category(part, table, base, len(paper)) for part in categories]))
    kinds = _kinds(list(table), base)
    columns = [*table, *(f"Paper: {name}" for name in paper)]
    return Table(_title(key), columns, [*kinds, *["truth"] * len(paper)], groups, _conditions(table, paper))


def _category(part: str, table: Mapping[str, Scores], base: str, papers: int) -> TableRow:
    def of(scores: Scores) -> float | None:
        return scores.get("categories", {}).get(part, {}).get("score")

    cells = [compared(PHYSICS_IQ[0], of(s), None if n == base else of(table[base])) for n, s in table.items()]
    return TableRow(part, "", [*cells, *[Cell("–")] * papers])


def _scenarios(key: tuple[str, str], table: Mapping[str, Scores], base: str) -> Table | None:
    """Where a gain comes from: the Verified score of each scenario, widest differences to the base first."""
    rows = {name: {r["scenario"]: r["verified"] for r in s.get("per_scenario", [])} for name, s in table.items()}
    if key[0] != "physics-iq" or base not in rows or len(rows) < 2:
        return None

    def widest(scenario: str) -> float:
        return max(abs(rows[n].get(scenario, rows[base][scenario]) - rows[base][scenario]) for n in rows)

    figure = PHYSICS_IQ[0]
    lines = [
        TableRow(
            scenario.removeprefix("trimmed-").replace("-", " "),
            "",
            [compared(figure, rows[n].get(scenario), None if n == base else rows[base][scenario]) for n in rows],
        )
        for scenario in sorted(rows[base], key=lambda s: (-widest(s), s))
    ]
    columns = list(table)
    return Table(f"{_title(key)}: Verified score by scenario", columns, _kinds(columns, base), [("", lines)])


def _conditions(table: Mapping[str, Scores], paper: Mapping[str, Any]) -> str:
    """What differs between the files, or from the paper, and should not."""
    warnings = []
    for field, what in (("fps", "frame rates"), ("videos", "numbers of videos"), ("mask_codec", "mask codecs")):
        values = {name: scores[field] for name, scores in table.items() if field in scores}
        if len(set(values.values())) > 1:
            warnings.append(f"different {what}: " + ", ".join(f"{name} {value}" for name, value in values.items()))
    notes = [f"Not alike: {'; '.join(warnings)}."] if warnings else []
    if paper and any(scores.get("videos") != PUBLISHED_VIDEOS for scores in table.values()):
        notes.append(f"The paper's numbers are of the {PUBLISHED_VIDEOS} published recordings, these are not.")
    return " ".join(notes)


def _value(scores: Scores, figure: Figure) -> float | None:
    value = scores.get(figure.key)
    return value["score"] if isinstance(value, dict) else value


def _all_figures(table: Mapping[str, Scores]) -> list[Figure]:
    """Every number that stands at the top of a score file."""
    keys: list[str] = []
    for scores in table.values():
        numbers = [k for k, v in scores.items() if isinstance(v, int | float) and not isinstance(v, bool)]
        keys += [key for key in numbers if key not in (*keys, *COUNTS)]
    return [Figure(key, key.replace("_", " ").capitalize(), "", 2, 1) for key in keys]
