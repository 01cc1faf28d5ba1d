"""`phantom report`: compares score files of several models on one page, with gains over a base and published scores."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Any

from phantom.errors import UserError
from phantom.evaluation import vbench2, videophy, videophy2
from phantom.evaluation.gains import gain, prompt_gain, row_gain
from phantom.evaluation.likephys.score import Ranking
from phantom.evaluation.likephys.score import gain as ranking_gain
from phantom.evaluation.likephys.table import PPE
from phantom.evaluation.page import Bar, Cell, Mark, Page, Table, TableRow, as_csv, embed_data, render
from phantom.evaluation.report import (
    COLOURS,
    INTERVAL,
    NAMES,
    PHYSICS_IQ,
    Figure,
    delta_cell,
    difference_cell,
    gain_bar,
)
from phantom.evaluation.side_by_side import video_walls

TITLES = {
    "physics-iq": "Physics-IQ",
    "videophy": "VideoPhy",
    "videophy2": "VideoPhy-2",
    "vbench2": "VBench-2.0",
    "likephys": "LikePhys",
}
# Scores from the paper (arXiv 2604.08503, tables of the main text), under the names and in the units of our fields.
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
    ("videophy", ""): {
        "Wan2.2-TI2V-5B": {"sa_mean": 41.5, "pc_mean": 25.2},
        "Phantom": {"sa_mean": 47.5, "pc_mean": 37.9},
    },
    ("videophy2", ""): {
        "Wan2.2-TI2V-5B": {"sa_4": 24.53, "pc_4": 69.20},
        "Phantom": {"sa_4": 27.75, "pc_4": 71.74},
    },
    ("vbench2", ""): {
        "Wan2.2-TI2V-5B": {
            "score": 51.57,
            "Human Fidelity": 86.10,
            "Creativity": 52.50,
            "Controllability": 18.50,
            "Commonsense": 60.57,
            "Physics": 40.19,
        },
        "Phantom": {
            "score": 51.84,
            "Human Fidelity": 88.39,
            "Creativity": 45.51,
            "Controllability": 20.23,
            "Commonsense": 61.43,
            "Physics": 43.61,
        },
    },
}
# What the paper leaves open about its scores.
UNCERTAIN = {
    "videophy": "The paper does not say how it sums up; its numbers are no shares of 344 videos, so most likely means.",
    "videophy2": (
        "The paper's numbers are shares >= 4 of 591 videos. They stand here as in its header; among comparable models "
        "semantic adherence is the higher one, so that its two columns may be exchanged."
    ),
}
PUBLISHED_VIDEOS = {
    "physics-iq": (198, "recordings"),
    "videophy": (344, "captions"),
    "videophy2": (591, "captions"),
    "vbench2": (0, ""),  # not comparable: a judge may give one result for several videos
}
COUNTS = ("fps", "scenarios", "videos", "prompts", "expected_videos")  # numbers that are not scores

Scores = Mapping[str, Any]


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
            name: _gain(key, table[first], scores) for name, scores in table.items() if name != first and first in table
        }
        for key, table in found.items()
    }
    pairs = {_title(key): _pairs(key, table) for key, table in found.items()}
    kinds = dict(zip(models, _kinds(models, first), strict=True))
    tables = {_title(key): table for key, table in found.items()}
    shown, titles = video_walls(tables, _folders(videos, models), kinds, first)
    page = Page(
        title="Models compared",
        lede=f"{len(models)} models; differences are to {first}.",
        bars=[
            *((_title(key), _bars(table, first, gains[_title(key)], key[0])) for key, table in found.items()),
            *(plot for key, table in found.items() for plot in _plots(key, table, first)),
        ],
        tables=[
            made
            for key, table in found.items()
            for made in (
                _figures(key, table, first),
                _differences(key, list(table), pairs[_title(key)]),
                _scenarios(key, table, first),
            )
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
    return _figures((benchmark, ""), named, NAMES["base"])


def figures(benchmark: str, models: Mapping[str, Scores]) -> dict[str, Any]:
    """The entries of evaluation.json for one benchmark: scores, gains over the base, and details as lists.

    Phantom also has its gain over the control, if there is one.
    """
    base, last = models["base"], "phantom" if "control" in models else None
    return {
        name: {key: value for key, value in found.items() if key not in ("per_prompt", "categories", "conventions")}
        | {"gain": None if name == "base" else _gain((benchmark, ""), base, found)}
        | ({"gain_over_control": _gain((benchmark, ""), models["control"], found)} if name == last else {})
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


def _gain(key: tuple[str, str], base: Scores, other: Scores) -> dict[str, Any] | None:
    """The gain with its interval; None if the files have no scenarios, groups or prompts to compare."""
    if all("per_group" in scores for scores in (base, other)):
        return _group_gain(base, other)
    if all("per_scenario" in scores for scores in (base, other)):
        return gain(base["per_scenario"], other["per_scenario"], key[1])
    if not all("per_prompt" in scores for scores in (base, other)):
        return None
    weights = {"": 1.0}
    if key[0] == "vbench2":
        if base["dimensions"].keys() != other["dimensions"].keys():
            return None  # totals over different dimensions are not comparable
        weights = vbench2.weights(base["dimensions"])
    return prompt_gain(base["per_prompt"], other["per_prompt"], weights)


def _group_gain(base: Scores, other: Scores) -> dict[str, Any] | None:
    """The change of LikePhys' error on the groups of clips that both files have."""
    ours, theirs = ({(r["scenario"], r["group"]): r["video"] for r in s["per_group"]} for s in (base, other))
    shared = [group for group in ours if group in theirs]
    if len(shared) < 2:
        return None
    rankings = (Ranking([(group[0], rows[group]) for group in shared]) for rows in (ours, theirs))
    return ranking_gain(*rankings) | {"pairs": len(shared)}


def _pairs(key: tuple[str, str], table: Mapping[str, Scores]) -> list[dict[str, Any]]:
    """The gain of every later model over every earlier one."""
    return [
        {"model": model, "over": over, "gain": _gain(key, table[over], table[model])}
        for over, model in combinations(table, 2)
    ]


def _differences(key: tuple[str, str], names: Sequence[str], pairs: Sequence[Mapping[str, Any]]) -> Table | None:
    """Every pair of more than two models: by how much the model of a row is above that of a column."""
    if len(names) < 3:
        return None
    figure = _score_figure(key[0])
    known = {(pair["model"], pair["over"]): difference_cell(figure, pair["gain"]) for pair in pairs}
    rows = [TableRow(model, "", [known.get((model, over), Cell("")) for over in names[:-1]]) for model in names[1:]]
    title = f"{_title(key)}: {figure.name.lower()}, model of the row minus model of the column"
    return Table(title, names[:-1], [""] * (len(names) - 1), [("", rows)], COLOURS)


def _score_figure(benchmark: str) -> Figure:
    return PPE if benchmark == "likephys" else PHYSICS_IQ[0]


def _title(key: tuple[str, str]) -> str:
    benchmark, protocol = key
    return TITLES.get(benchmark, benchmark) + (f", {protocol}" if protocol else "")


def _kinds(names: Sequence[str], base: str) -> list[str]:
    """Colour classes: grey for the base, violet for the last of the other models, amber for the rest."""
    others = [name for name in names if name != base]
    return ["base" if name == base else "phantom" if name == others[-1] else "control" for name in names]


def _bars(
    table: Mapping[str, Scores], base: str, gains: Mapping[str, dict[str, Any] | None], benchmark: str = ""
) -> list[Bar]:
    kinds = _kinds(list(table), base)
    reference = table[base]["score"] if base in table else None
    figure = _score_figure(benchmark)
    marks = [Mark(50.0, "chance")] if benchmark == "likephys" else []
    return [
        gain_bar(name, kind, scores["score"], None if name == base else reference, gains.get(name), figure, marks=marks)
        for kind, (name, scores) in zip(kinds, table.items(), strict=True)
    ]


def _plots(key: tuple[str, str], table: Mapping[str, Scores], base: str) -> list[tuple[str, list[Bar]]]:
    """Bars of the scores by category, for several models."""
    plots = []
    for part in table.get(base, {}).get("categories", {}) if len(table) > 1 else ():
        found = {name: scores.get("categories", {}).get(part) for name, scores in table.items()}
        there = {name: scores for name, scores in found.items() if scores and scores["score"] is not None}
        if base in there and part:
            plots.append((f"{_title(key)}: {part.replace('_', ' ')}", _bars(there, base, {})))
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


def _figures(key: tuple[str, str], table: Mapping[str, Scores], base: str) -> Table:
    paper = PAPER.get(key, {})
    reference = table.get(base, {})
    figures = _figures_of(key[0], table)
    rows = []
    for figure in figures:
        cells = []
        for name, scores in table.items():
            known = None if name == base else _value(reference, figure)
            gained = _figure_gain(key, figure, reference, scores) if known is not None else None
            cells.append(delta_cell(figure, _value(scores, figure), known, gained))
        cells += [delta_cell(figure, published.get(figure.key), None) for published in paper.values()]
        rows.append(TableRow(figure.name, figure.note, cells))
    groups = [("", rows)]
    if categories := [part for part in reference.get("categories", {}) if part]:
        title = "Score by dimension" if key[0] == "vbench2" else "Score by category"
        groups.append((title, [_category(part, table, base, len(paper)) for part in categories]))
    kinds = _kinds(list(table), base)
    columns = [*table, *(f"Paper: {name}" for name in paper)]
    note = " ".join(filter(None, [_conditions(key[0], table, paper), UNCERTAIN.get(key[0], ""), COLOURS]))
    return Table(_title(key), columns, [*kinds, *["truth"] * len(paper)], groups, note)


def _figure_gain(key: tuple[str, str], figure: Figure, base: Scores, other: Scores) -> dict[str, Any] | None:
    """The gain in the score, or over scenarios in another figure of Physics-IQ; None where it is not known."""
    if figure.key == "score":
        return _gain(key, base, other)
    ours, theirs = (scores.get("per_scenario", []) for scores in (base, other))
    if key[0] != "physics-iq" or not all(figure.key in row for row in [*ours, *theirs]):
        return None
    return row_gain(ours, theirs, figure.key)


def _category(part: str, table: Mapping[str, Scores], base: str, papers: int) -> TableRow:
    def of(scores: Scores) -> float | None:
        return scores.get("categories", {}).get(part, {}).get("score")

    cells = [delta_cell(PHYSICS_IQ[0], of(s), None if n == base else of(table[base])) for n, s in table.items()]
    return TableRow(part.replace("_", " "), "", [*cells, *[Cell("–")] * papers])


def _scenarios(key: tuple[str, str], table: Mapping[str, Scores], base: str) -> Table | None:
    """The Verified score by scenario, sorted by the size of the difference to the base: where a gain comes from."""
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
            [delta_cell(figure, rows[n].get(scenario), None if n == base else rows[base][scenario]) for n in rows],
        )
        for scenario in sorted(rows[base], key=lambda s: (-widest(s), s))
    ]
    columns = list(table)
    return Table(f"{_title(key)}: Verified score by scenario", columns, _kinds(columns, base), [("", lines)])


def _conditions(benchmark: str, table: Mapping[str, Scores], paper: Mapping[str, Any]) -> str:
    """A note on conditions that should be equal but differ between the files, or from the paper."""
    warnings = []
    for field, what in (
        ("fps", "frame rates"),
        ("videos", "numbers of videos"),
        ("mask_codec", "mask codecs"),
        ("seeds", "seeds"),
    ):
        values = {name: _shown(scores[field]) for name, scores in table.items() if scores.get(field)}
        if len(set(values.values())) > 1:
            warnings.append(f"different {what}: " + ", ".join(f"{name} {value}" for name, value in values.items()))
    notes = [f"Not alike: {'; '.join(warnings)}."] if warnings else []
    for name, scores in table.items():
        if scores.get("missing"):
            notes.append(f"{name} lacks {', '.join(scores['missing'])}: its score is of the others.")
    count, what = PUBLISHED_VIDEOS[benchmark] if paper else (0, "")
    if count and any(scores.get("videos") != count for scores in table.values()):
        notes.append(f"The paper's numbers are of the {count} published {what}, these are not.")
    return " ".join(notes)


def _shown(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _value(scores: Scores, figure: Figure) -> float | None:
    value = scores.get(figure.key)
    return value["score"] if isinstance(value, dict) else value


def _figures_of(benchmark: str, table: Mapping[str, Scores]) -> list[Figure]:
    """The figures of a benchmark's table: all known conventions, or all top-level numbers of the score files."""
    if benchmark == "physics-iq":
        return list(PHYSICS_IQ)
    if benchmark == "likephys":
        return [PPE]
    if benchmark == "vbench2":
        total = Figure("score", "Total", "mean of the five groups, 0 to 100", 2, 1)
        return [total, *(Figure(group, group, "mean of its dimensions", 2, 1) for group in vbench2.GROUPS)]
    known = {"videophy": videophy.CONVENTIONS, "videophy2": videophy2.CONVENTIONS}.get(benchmark, {})
    shown = {key: text for key, text in known.items() if any(key in scores for scores in table.values())}
    if shown:
        return [Figure(key, *_name_and_note(text), 2, 1) for key, text in shown.items()]
    keys: list[str] = []
    for scores in table.values():
        numbers = [k for k, v in scores.items() if isinstance(v, int | float) and not isinstance(v, bool)]
        keys += [key for key in numbers if key not in (*keys, *COUNTS)]
    return [Figure(key, key.replace("_", " ").capitalize(), "", 2, 1) for key in keys]


def _name_and_note(text: str) -> tuple[str, str]:
    """Splits `semantic adherence, mean of 1 to 5` at the comma."""
    name, _, note = text.partition(", ")
    return name.capitalize(), note
