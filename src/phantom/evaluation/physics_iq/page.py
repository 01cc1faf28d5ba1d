"""What the page of the evaluate stage shows of Physics-IQ: scores, figures, and videos side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from phantom.config import Params
from phantom.data.physics_iq import layout
from phantom.data.physics_iq.layout import Row
from phantom.evaluation.cells import COLOURS, INTERVAL, MODES, NAMES, delta_cell, difference_cell, gain_bar, text_of
from phantom.evaluation.gains import row_gain
from phantom.evaluation.page import (
    EMBEDDED_WIDTH,
    Bar,
    Cell,
    Page,
    Scene,
    SceneVideo,
    Table,
    TableRow,
    embed_file,
    embed_frames,
    embed_shrunk,
)
from phantom.evaluation.physics_iq.conditions import find_condition, read_condition
from phantom.evaluation.physics_iq.figures import FIGURES as PHYSICS_IQ
from phantom.evaluation.protocol import Figure, Mark
from phantom.evaluation.sampling_spec import Settings
from phantom.evaluation.trivial.predictions import TITLES
from phantom.evaluation.worlds_figures import WORLDS

COUNT = {2: "two", 3: "three", 4: "four", 5: "five"}
KINDS = "Score by kind of scenario"
BOUNDS = ("last_frame", "nearest_clip", "other_take")  # predictions that are marked on every bar
COUNTS = (
    ("vanished", "bodies", "Bodies vanished", "never seen in the last second"),
    ("lost", "hidden", "Lost behind the wall", "of those that should come out again"),
)


def physics_iq_page(
    evaluation: Mapping[str, Any],
    params: Params,
    place: Path,
    rows: Sequence[Row],
    videos: Mapping[str, Mapping[str, Path]],
) -> Page:
    """The page without verdict, training curves and data.

    evaluation: the entries of evaluation.json. place: folder of the benchmark's files. videos: folder of videos by mode
    and model.
    """
    models = list(next(iter(evaluation["physics_iq"].values())))
    settings, benchmark = params.evaluate, evaluation["benchmark"]
    worlds = benchmark["recordings"] == "worlds"
    scenes = _scenes(evaluation, params, place, rows, videos)
    return Page(
        title="Phantom against its base",
        lede=(
            f"{len(rows)} {'simulated worlds' if worlds else 'recordings'} that no model was trained on, each "
            "continued for five seconds by "
            f"{COUNT[len(models)]} models from the same condition, the same prompt and the same noise."
        ),
        facts=[
            ("Benchmark", f"Physics-IQ {settings.physics_iq.protocol}, {benchmark['scenarios']} scenarios"),
            ("Recordings", "simulated worlds (data/benchmark)" if worlds else str(benchmark["recordings"])),
            ("Videos", _videos(params)),
            (
                "Sampler",
                f"{settings.sampling.scheduler}, {settings.sampling.steps} steps, "
                f"guidance {settings.sampling.guidance_scale:g}, seed {settings.seed}",
            ),
            ("Base", params.models.base),
            ("Training", f"{params.train.steps} steps of {params.train.batch_size} clips"),
        ],
        bars=[
            (_mode(mode, params), _bars(found, evaluation.get("trivial", {}).get(mode, {})))
            for mode, found in evaluation["physics_iq"].items()
        ],
        tables=[_figures(mode, evaluation, models, params) for mode in evaluation["physics_iq"]],
        scenes=scenes,
        modes=[(mode, MODES[mode]) for mode in evaluation["physics_iq"]],
        fps=benchmark["fps"],
        seconds=float(layout.SECONDS),
        shape=(params.data.width, params.data.height),
        notes=_notes(models, worlds),
    )


def _videos(params: Params) -> str:
    fps, trained = params.evaluate.physics_iq.fps, params.data.fps
    of = f" (training clips: {trained})" if trained != fps else ""
    return f"{params.data.width}x{params.data.height} at {fps} frames per second{of}"


def _mode(mode: str, params: Params) -> str:
    frames = 1 if mode == "single" else params.evaluate.physics_iq.prefix_frames
    return f"{MODES[mode].capitalize()} ({frames})" if frames > 1 else MODES[mode].capitalize()


def _bars(models: Mapping[str, Any], predictions: Mapping[str, Any]) -> list[Bar]:
    """The models, each against the base, but Phantom against its control; then the predictions without a model."""
    marks = [
        Mark(found["score"], f"{TITLES[name][0]}: {text_of(PHYSICS_IQ[0], found['score'])}")
        for name, found in predictions.items()
        if name in BOUNDS and found["score"] is not None
    ]
    bars = []
    for name, found in models.items():
        over = "control" if "gain_over_control" in found else "base"
        gained = found.get("gain_over_control", found["gain"])
        base = None if name == "base" else models[over]["score"]
        bars.append(gain_bar(NAMES[name], name, found["score"], base, gained, over=f"the {over}", marks=marks))
    figure = PHYSICS_IQ[0]
    return bars + [
        Bar(TITLES[name][0], "trivial", found["score"] or 0.0, text_of(figure, found["score"]))
        for name, found in predictions.items()
    ]


def _figures(mode: str, evaluation: Mapping[str, Any], models: Sequence[str], params: Params) -> Table:
    groups = [("Physics-IQ", _rows(PHYSICS_IQ, evaluation["physics_iq"][mode], models))]
    more = [Cell("")] * ("control" in models)
    if worlds := evaluation.get("worlds", {}).get(mode):
        counted = [
            TableRow(name, note, [*(Cell(f"{worlds[m][key]} of {worlds[m][of]}") for m in models), *more])
            for key, of, name, note in COUNTS
        ]
        groups.append(("Against the simulator", _rows(WORLDS, worlds, models) + counted))
    groups.append((KINDS, _categories(evaluation["physics_iq"][mode], models)))
    note = "A kind has few scenarios: its scores show where to look, not which model is better. " + COLOURS
    columns = [NAMES[name] for name in models] + ["Phantom − control"] * len(more)
    return Table(_mode(mode, params), columns, [*models, *[""] * len(more)], groups, note, [KINDS])


def _rows(figures: Sequence[Figure], found: Mapping[str, Any], models: Sequence[str]) -> list[TableRow]:
    """A row per figure, with the value measured on the recording itself in its note."""
    rows = []
    for figure in figures:
        base, truth = found["base"][figure.key], found.get("truth", {}).get(figure.key)
        note = figure.note if truth is None else f"{figure.note}; {text_of(figure, truth)} in the recording itself"
        cells = [
            delta_cell(figure, found[m][figure.key], None if m == "base" else base, _gained(figure, found, "base", m))
            for m in models
        ]
        if "control" in models:
            cells.append(difference_cell(figure, _gained(figure, found, "control", "phantom")))
        rows.append(TableRow(figure.title, note, cells))
    return rows


def _gained(figure: Figure, found: Mapping[str, Any], reference: str, model: str) -> Mapping[str, Any] | None:
    """The gain of a model over another with its interval: that of the score as it is stored, of others by scenario."""
    if model == reference:
        return None
    if figure.key == "score":
        return found[model]["gain_over_control" if reference == "control" else "gain"]
    return row_gain(found[reference]["per_scenario"], found[model]["per_scenario"], figure.key)


def _categories(found: Mapping[str, Any], models: Sequence[str]) -> list[TableRow]:
    scores = {m: {part["category"]: part["score"] for part in found[m]["categories"]} for m in models}
    return [
        TableRow(
            category,
            "",
            [
                *(
                    delta_cell(PHYSICS_IQ[0], scores[m][category], None if m == "base" else scores["base"][category])
                    for m in models
                ),
                *[Cell("")] * ("control" in models),
            ],
        )
        for category in scores["base"]
    ]


def _scenes(
    evaluation: Mapping[str, Any],
    params: Params,
    place: Path,
    rows: Sequence[Row],
    videos: Mapping[str, Mapping[str, Path]],
) -> list[Scene]:
    """The scenes of evenly spaced scenarios, at most `evaluate.report_videos`."""
    count = min(params.evaluate.report_videos, len(rows))
    fps, size = params.evaluate.physics_iq.fps, (params.data.width, params.data.height)
    wide = params.data.width > EMBEDDED_WIDTH
    scenes = []
    for row in (rows[i * len(rows) // count] for i in range(count)):
        rate = layout.source_rate(place, row.name, fps) or fps
        truth = embed_shrunk(layout.testing_video(place, row.name, rate), rate, size, layout.SECONDS)
        shown = []
        for mode in videos:
            settings = Settings.for_physics_iq(params, mode)  # type: ignore[arg-type]
            condition = embed_frames(read_condition(find_condition(place, row.name, settings), settings), fps)
            shown.append(SceneVideo("Condition", "condition", condition, mode == "single", mode))
        shown.append(SceneVideo("Truth", "truth", truth, False))
        for mode, folders in videos.items():
            for model, folder in folders.items():
                path = folder / row.name.generated
                made = embed_shrunk(path, fps, size, layout.SECONDS) if wide else embed_file(path)
                shown.append(
                    SceneVideo(NAMES[model], model, made, False, mode, _scene_figures(evaluation, mode, model, row))
                )
        title = row.name.scenario.removeprefix("trimmed-").replace("-", " ")
        gains = {mode: _scene_gain(evaluation, mode, row) for mode in videos}
        scenes.append(Scene(title, row.category, row.description, shown, gains))
    return scenes


def _scene_gain(evaluation: Mapping[str, Any], mode: str, row: Row) -> float:
    """The gain of Phantom over the base in Verified score of this view."""
    scores = []
    for model in ("base", "phantom"):
        found = evaluation["physics_iq"][mode][model]["per_scenario"]
        of = next(r for r in found if r["scenario"] == row.name.scenario)
        scores.append(of["views"][row.name.view]["score"])
    return scores[1] - scores[0]


def _scene_figures(evaluation: Mapping[str, Any], mode: str, model: str, row: Row) -> list[str]:
    def of(table: Mapping[str, Any]) -> dict[str, Any]:
        return next(r for r in table[mode][model]["per_scenario"] if r["scenario"] == row.name.scenario)

    found = of(evaluation["physics_iq"])
    figures = [f"verified {found['views'][row.name.view]['score']:.0f}", f"IoU {found['spatial_iou']:.2f}"]
    if "worlds" in evaluation:
        error = of(evaluation["worlds"])["position_error"]
        figures.append("never found" if error is None else f"off by {text_of(WORLDS[0], error)} px")
    return figures


def _notes(models: Sequence[str], worlds: bool) -> list[tuple[str, str]]:
    notes = [
        ("Base", "The frozen video branch alone, without the physics branch."),
        ("Phantom", "Both branches, coupled in every block."),
        INTERVAL,
    ]
    if "control" in models:
        what = "The same parameters, data and steps as Phantom with alpha_z held at 0: no loss on the physics states."
        notes.insert(1, ("Control", what))
    if "lora" in models:
        what = "The base with low-rank adapters in its layers, fine-tuned on the same videos without physics states."
        notes.insert(len(notes) - 2, ("LoRA", what))
    if "alignment" in models:
        what = (
            "Such adapters, trained also to bring the similarities of the base's tokens to those of V-JEPA 2's: "
            "VideoREPA's token relation distillation."
        )
        notes.insert(len(notes) - 2, ("Alignment", what))
    if worlds:
        notes += [
            (
                "Against the simulator",
                "Each body is tracked by its colour and compared with where the simulator has it, while it is whole in "
                "the picture. What the same tracking finds in the recording itself is what it cannot resolve.",
            ),
            (
                "Energy drift",
                "How far kinetic plus potential energy departs from its mean until something is touched, as a share of "
                "the mean kinetic energy. Gravity is fitted to the video, within the range of all worlds; 100% for a "
                "body that stands still or is not found.",
            ),
        ]
    return notes
