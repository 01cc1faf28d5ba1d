"""The page of a study: the verdict first, and the rest from results.json and the videos beside it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from phantom.errors import listed
from phantom.evaluation.charts import Chart, chart
from phantom.evaluation.page import PIXELATED_WIDTH, Cell, Scene, Table, TableRow, render
from phantom.evaluation.study.figures import CURVES, FIGURES, UNITS
from phantom.evaluation.study.plots import Row, dots, over_cost
from phantom.evaluation.study.results import page_path, paired_interval, seed_means
from phantom.evaluation.study.spec import Study, study_digest
from phantom.evaluation.study.verdict import is_significant
from phantom.evaluation.study.videos import NO_VIDEOS, StudyVideos, study_videos

COLOURS = 8  # classes key0 to key7 of the style sheet
INTERVENTIONS = {  # own figure -> the same with z replaced
    "heldout_loss_video": {
        "heldout_loss_video_other_z": "another clip's z",
        "heldout_loss_video_noise_z": "noise as z",
    },
    "position_error": {
        "position_error_oracle_z": "z of the recording",
        "position_error_other_z": "z of another recording",
        "position_error_noise_z": "noise as z",
    },
}
NOTES = (
    (
        "Held-out L_v",
        "The flow-matching loss of the video branch on clips that were not trained on: the same clips, noise levels "
        "and noises for every arm and seed, and for the frozen base. Lower is better.",
    ),
    (
        "Interval",
        "95%, of the mean difference, from a hierarchical bootstrap: seeds are drawn with replacement, then clips. "
        "With few seeds it is too narrow: the variance between n seeds comes out (n - 1) / n of what it is.",
    ),
    (
        "Permutation p",
        "Exact, over seeds: the share of all flips of the signs of the seeds' mean differences whose mean is at least "
        "as far from zero. Its smallest value is given by the number of seeds alone.",
    ),
    (
        "Smallest effect",
        "The true difference that a t test over these seeds would find in 80% of studies, from the spread between the "
        "seeds' differences.",
    ),
    (
        "Share of the gap",
        "The gain over the reference, as a share of what the reference gained over the frozen base.",
    ),
)


@dataclass(frozen=True)
class StudyPage:
    """The data of the template. `warnings` are shown in red; the shared templates ask for what `Page` has, too."""

    title: str
    lede: str  # the question
    verdict: str
    warnings: Sequence[str]
    facts: Sequence[tuple[str, str]]
    primary: Sequence[tuple[str, Sequence[Chart], Table | None]]  # title, drawings and differences of each figure
    curves: Sequence[Chart]
    tables: Mapping[str, Table]
    scenes: Sequence[Scene] = ()
    fps: int = 1
    seconds: float = 0.0
    shape: tuple[int, int] = (1, 1)
    notes: Sequence[tuple[str, str]] = NOTES
    modes: Sequence[tuple[str, str]] = ()

    @property
    def pixelated(self) -> bool:
        """As of `Page`."""
        return bool(self.scenes) and self.shape[0] < PIXELATED_WIDTH


def write_page(name: str, results: Mapping[str, Any], root: Path = Path()) -> Path:
    """Writes `studies/<name>/index.html`. Returns its path."""
    path = page_path(name, root)
    study = Study.model_validate(results["study"])
    videos = study_videos(name, study, results, {label: _colour(study, label) for label in study.labels}, root)
    page = make_page(results, study_digest(name, root), videos)
    path.write_text(render(page, "study/page.html"), encoding="utf-8")
    return path


def make_page(results: Mapping[str, Any], digest: str, videos: StudyVideos = NO_VIDEOS) -> StudyPage:
    """The page of `results`. digest: sha256 of study.yaml as it is now."""
    study = Study.model_validate(results["study"])
    tables = {
        "interventions": _interventions(study, results),
        "figures": _figures(study, results),
        "levels": _levels(study, results),
        "equality": _equality(study, results),
        "settings": _settings(study, results),
    }
    return StudyPage(
        title=results["name"],
        lede=study.question,
        verdict=results["verdict"],
        warnings=_warnings(study, results, digest),
        facts=_facts(study, results),
        primary=[_primary(study, results, primary.figure) for primary in study.primary],
        curves=_curves(study, results),
        tables={name: table for name, table in tables.items() if table},
        **vars(videos),
    )


def _primary(study: Study, results: Mapping[str, Any], figure: str) -> tuple[str, list[Chart], Table | None]:
    title = capitalized(FIGURES[figure].title)
    found = [one for one in results["comparisons"] if one["figure"] == figure and one["seeds"]]
    rows, base = _arm_rows(study, results, figure), _base_level(results, figure)
    key, unit = _cost_that_differs(results, figure)
    drawn = (
        dots(f"{title}, each seed", rows, base),
        dots("Differences, each seed, with 95% intervals", _difference_rows(study, found), ("no difference", 0.0)),
        over_cost(f"{title} over {unit}", [(results["equality"][row.name][key], row) for row in rows], unit, base),
    )
    return title, [chart for chart in drawn if chart], _differences(study, found)


def _cost_that_differs(results: Mapping[str, Any], figure: str) -> tuple[str, str]:
    """What the arms differ in that the figure could be bought with, as a key of `equality` and in words."""
    of_videos = figure.startswith("position_error")
    passes = {costs.get("passes_per_video") for costs in results["equality"].values()} if of_videos else set()
    is_bought = len(passes) > 1
    return ("passes_per_video", "passes of the denoiser per video") if is_bought else ("flops", "training FLOPs")


def capitalized(text: str) -> str:
    """`text` with a capital first letter; the others stay."""
    return text[:1].upper() + text[1:]


def _warnings(study: Study, results: Mapping[str, Any], digest: str) -> list[str]:
    reference, found = study.equal_to, []
    for label, costs in results["equality"].items():
        if costs["unequal"]:
            keys = listed([key.replace("_", " ") for key in costs["unequal"]])
            found.append(f"{label} is not equal to {reference}: {keys} differ.")
    if results["finished"] < results["expected"]:
        found.append(f"{results['finished']} of {results['expected']} runs are finished.")
    if results["sha256"] != digest:
        found.append("study.yaml was changed after these results were made.")
    if results["earlier"]:
        found.append("study.yaml was changed after a first run; its commits tell what was written before.")
    if len(results["made_with"]) > 1:
        found.append("The runs were made with different commits or versions.")
    if results["set"]:
        found.append(f"Run with settings that study.yaml does not state: {listed(results['set'])}.")
    return found


def _facts(study: Study, results: Mapping[str, Any]) -> list[tuple[str, str]]:
    made, test = results["made_with"], study.test
    dirty = " with uncommitted changes"
    commits = [f"{one['commit'][:12]}{dirty if one['dirty'] == 'true' else ''}" for one in made]
    costs = next(iter(results["equality"].values()))
    return [
        *(
            ("Primary metric", f"{FIGURES[primary.figure].title}, {primary.better} is better")
            for primary in study.primary
        ),
        ("Test", f"sign flips over seeds, {test.sides}-sided, level {test.level:g}"),
        ("Arms x seeds", f"{len(study.arms)} x {len(study.seeds)}"),
        ("Held-out clips", f"{len(results['ids']['heldout'])}, at sigma {listed(study.heldout_sigmas, 8)}"),
        *((UNITS[name].capitalize(), str(len(ids))) for name, ids in results["ids"].items() if name != "heldout"),
        ("Training", f"{costs['steps']:,} steps, {costs['samples']:,} samples"),
        ("Held equal", listed([key.replace("_", " ") for key in study.equal]) or "nothing"),
        ("Preset", study.preset),
        ("Commit", listed(list(dict.fromkeys(commits)))),
        ("study.yaml", f"sha256 {results['sha256'][:16]}"),
    ]


def _colour(study: Study, label: str) -> str:
    return f"key{study.labels.index(label) % COLOURS}"


def _arm_rows(study: Study, results: Mapping[str, Any], figure: str) -> list[Row]:
    rows = []
    for label in study.labels:
        means = seed_means(results["runs"], label, figure)
        if means:
            points = {f"seed {seed}": value for seed, value in means.items()}
            rows.append(Row(label, _colour(study, label), points, float(np.mean(list(means.values())))))
    return rows


def _base_level(results: Mapping[str, Any], figure: str) -> tuple[str, float] | None:
    values = [value for value in (results["base"] or {"clips": {}})["clips"].get(figure, []) if value is not None]
    return ("frozen base", float(np.mean(values))) if values else None


def _difference_rows(study: Study, comparisons: Sequence[Mapping[str, Any]]) -> list[Row]:
    return [
        Row(
            f"{found['arm']} - {found['reference']}",
            _colour(study, found["arm"]),
            {f"seed {seed}": value for seed, value in zip(found["seeds"], found["by_seed"], strict=True)},
            found["difference"],
            (found["low"], found["high"]),
        )
        for found in comparisons
    ]


def _differences(study: Study, found: Sequence[Mapping[str, Any]]) -> Table | None:
    if not found:
        return None

    def cells(key: str, form: str) -> list[Cell]:
        return [Cell("" if one[key] is None else format(one[key], form)) for one in found]

    better = -1 if found[0]["better"] == "lower" else 1
    shown, tests = [], []
    for one in found:
        shown.append(Cell(f"{one['difference']:+.4g}", f"[{one['low']:+.4g}, {one['high']:+.4g}]"))
        passed, gained = is_significant(study, one), better * one["difference"] > 0
        outcome = Cell("passed", "better" if gained else "worse", "good" if gained else "bad")
        tests.append(outcome if passed else Cell("not passed"))
    rows = [
        TableRow("Difference", "mean, and 95% interval", shown),
        TableRow("Test", f"p at most {study.test.level:g}", tests),
        TableRow("Permutation p", f"{study.test.sides}-sided, over seeds", cells("p", ".3g")),
        TableRow("Smallest p possible", "with this number of seeds", cells("smallest_p", ".3g")),
        TableRow("Smallest effect", f"80% power at level {study.test.level:g}", cells("detectable", ".3g")),
        TableRow("Share of the gap", "of the reference to the frozen base", cells("share_of_gap", ".1%")),
    ]
    columns = [f"{one['arm']} - {one['reference']}" for one in found]
    note = "The study was made for the first comparison; the others are not corrected for their number."
    kinds = [_colour(study, one["arm"]) for one in found]
    return Table("Paired differences", columns, kinds, [("", rows)], note if len(found) > 1 else "")


def _interventions(study: Study, results: Mapping[str, Any]) -> Table | None:
    runs, groups = results["runs"], []
    labels = [label for label in study.labels if seed_means(runs, label, "heldout_loss_video")]
    if not labels:
        return None
    for own, replaced in INTERVENTIONS.items():
        rows = [TableRow("own z", "", [Cell(_mean(runs, label, own)) for label in labels])]
        for figure, name in replaced.items():
            found = [paired_interval(runs, label, figure, own) for label in labels]
            if not any(found):
                continue
            deltas = [f"{d[0]:+.3g} [{d[1]:+.3g}, {d[2]:+.3g}]" if d else "" for d in found]
            values = [_mean(runs, label, figure) for label in labels]
            rows.append(TableRow(name, "and its difference to own z", list(map(Cell, values, deltas))))
        if len(rows) > 1:
            groups.append((capitalized(FIGURES[own].title), rows))
    note = "If nothing changes when z is replaced, the video branch does not read z, whatever the losses say."
    return Table("Interventions on z", labels, [_colour(study, label) for label in labels], groups, note)


def _figures(study: Study, results: Mapping[str, Any]) -> Table:
    rows = []
    base = (results["base"] or {"clips": {}})["clips"]
    for name, figure in FIGURES.items():
        cells = [
            Cell(_mean(results["runs"], label, name), _spread(results["runs"], label, name)) for label in study.labels
        ]
        known = [value for value in base.get(name, []) if value is not None]
        cells.append(Cell(f"{np.mean(known):.5g}" if known else ""))
        if any(cell.text for cell in cells):
            rows.append(TableRow(figure.title, figure.note, cells))
    columns, kinds = [*study.labels, "frozen base"], [*(_colour(study, label) for label in study.labels), "base"]
    return Table("All figures", columns, kinds, [("", rows)], "Means over seeds, and the deviation between them.")


def _levels(study: Study, results: Mapping[str, Any]) -> Table | None:
    sigmas, name, runs = study.heldout_sigmas, "heldout_loss_video", results["runs"]
    if not runs:
        return None

    def at(number: int, label: str) -> str:
        values = [run["by_sigma"][name][number] for run in runs if run["arm"] == label]
        return f"{np.mean(values):.5g}" if values else ""

    rows = []
    for number, sigma in enumerate(sigmas):
        cells = [Cell(at(number, label)) for label in study.labels]
        cells.append(Cell(f"{results['base']['by_sigma'][name][number]:.5g}" if results["base"] else ""))
        rows.append(TableRow(f"sigma {sigma:g}", "", cells))
    columns, kinds = [*study.labels, "frozen base"], [*(_colour(study, label) for label in study.labels), "base"]
    return Table("Held-out L_v by noise level", columns, kinds, [("", rows)])


def _equality(study: Study, results: Mapping[str, Any]) -> Table:
    rows = []
    known = next(iter(results["equality"].values()))
    for key in [key for key in known if key != "unequal"]:
        cells = []
        for label in study.labels:
            costs = results["equality"][label]
            text = f"{costs[key]:.4g}" if key == "flops" else f"{costs[key]:,}"
            cells.append(Cell(text, "not equal", "bad") if key in costs["unequal"] else Cell(text))
        note = "held equal" if key in study.equal else "not asked to be equal"
        rows.append(TableRow(key.replace("_", " "), note, cells))
    note = f"From `phantom plan`, against {study.equal_to}."
    for arm in study.arms:
        if arm.weights:
            note += f" {arm.label} is not trained: its weights, and what they cost, are {arm.weights}'s."
        if arm.start:
            note += f" {arm.label} begins from the weights of {arm.start}, whose training it counts too."
    return Table("What the arms cost", study.labels, [_colour(study, x) for x in study.labels], [("", rows)], note)


def _settings(study: Study, results: Mapping[str, Any]) -> Table:
    keys = next(iter(results["settings"].values()))
    rows = [TableRow(key, "", [Cell(str(results["settings"][label][key])) for label in study.labels]) for key in keys]
    return Table("Settings that differ", study.labels, [_colour(study, x) for x in study.labels], [("", rows)])


def _curves(study: Study, results: Mapping[str, Any]) -> list[Chart]:
    drawn = []
    for name in CURVES:
        lines = {label: _mean_curve(results["runs"], label, name) for label in study.labels}
        title = FIGURES[name].title.replace(" at the last validation", " at validation")
        unit = " In the unit of each arm's train.physics_loss." if name == "val_loss_physics" else ""
        is_loss = name != "val_physics_explained"
        drawn.append(chart(capitalized(title), lines, f"Mean over seeds.{unit}", log=is_loss))
    return [one for one in drawn if one]


def _mean_curve(runs: Sequence[Mapping[str, Any]], label: str, name: str) -> list[tuple[float, float]]:
    """A curve's mean over the seeds, at the steps that all of them have."""
    found = [dict(run["curves"][name]) for run in runs if run["arm"] == label and name in run["curves"]]
    steps = set.intersection(*(set(one) for one in found)) if found else set()
    return [(step, float(np.mean([one[step] for one in found]))) for step in sorted(steps)]


def _mean(runs: Sequence[Mapping[str, Any]], label: str, figure: str) -> str:
    means = seed_means(runs, label, figure)
    return f"{np.mean(list(means.values())):.5g}" if means else ""


def _spread(runs: Sequence[Mapping[str, Any]], label: str, figure: str) -> str:
    means = list(seed_means(runs, label, figure).values())
    return f"± {np.std(means, ddof=1):.2g}" if len(means) > 1 else ""
