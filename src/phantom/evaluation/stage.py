"""The evaluate stage: base, control and Phantom on the benchmark, from the same seeds; numbers and the page."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from phantom.config import Params
from phantom.cores import cores
from phantom.data.video import read_frames
from phantom.errors import UserError
from phantom.evaluation import report, trajectories
from phantom.evaluation.gains import gain
from phantom.evaluation.physics_iq import layout
from phantom.evaluation.physics_iq.folder import score_folder
from phantom.evaluation.physics_iq.layout import Row
from phantom.evaluation.sample import (
    Model,
    Settings,
    export,
    items_of,
    key,
    load,
    open_benchmark,
    parts_of,
    record,
    sample,
)

EVALUATION, PAGE = Path("reports/evaluation.json"), Path("reports/index.html")
WORK = Path("checkpoints/evaluate")  # not DVC's: videos and comparisons, found again by what they were made of
ORDER = ("base", "control", "phantom")
PARTS = ("score", "spatial_iou", "spatiotemporal_iou", "weighted_spatial_iou", "mse")


@dataclass(frozen=True)
class EvaluateResult:
    """Where the numbers and the page are, and the score by mode and model."""

    evaluation: str
    report: str
    scores: dict[str, dict[str, float | None]]


def evaluate(params: Params, root: Path = Path()) -> EvaluateResult:
    """Makes and scores the videos of every model and mode; writes `reports/evaluation.json` and `reports/index.html`.

    Interrupted work is taken up again: a finished video or comparison is never made twice. Raises UserError.
    """
    settings = params.evaluate.physics_iq
    benchmark = root / ("data/benchmark" if settings.benchmark == "worlds" else settings.benchmark)
    descriptions = root / settings.descriptions if settings.descriptions else None
    place, rows = open_benchmark(benchmark, settings.protocol, descriptions)
    videos = make_videos(params, root, place, rows)

    modes: dict[str, dict[str, Path]] = {
        mode: {name: videos[mode, name] for name in ORDER if (mode, name) in videos} for mode in settings.modes
    }
    scored = {
        mode: {
            name: score_folder(
                folder,
                benchmark,
                descriptions,
                protocol=settings.protocol,
                mask_codec=settings.mask_codec,
                workers=cores(),
                cache=root / WORK / "scores",
            )
            for name, folder in folders.items()
        }
        for mode, folders in modes.items()
    }
    evaluation: dict[str, Any] = {
        "benchmark": {
            "name": "physics-iq",
            "recordings": settings.benchmark,
            "protocol": settings.protocol,
            "mask_codec": settings.mask_codec,
            "fps": settings.fps,
            "scenarios": len({row.name.scenario for row in rows}),
            "videos": len(rows),
        },
        "physics_iq": {mode: _figures(models, settings.protocol) for mode, models in scored.items()},
    }
    known_file = place / "trajectories.json"
    if known_file.is_file():
        known = json.loads(known_file.read_text(encoding="utf-8"))
        truth = _truth_figures(rows, place, params, known)
        evaluation["worlds"] = {
            mode: {name: _world_figures(rows, folder, settings.fps, known) for name, folder in folders.items()}
            | {"truth": truth}
            for mode, folders in modes.items()
        }
    page = report.evaluation_page(evaluation, params, root, place, rows, modes)
    _write(root / EVALUATION, json.dumps(evaluation, indent=2) + "\n")
    _write(root / PAGE, page)
    scores = {mode: {name: found["score"] for name, found in models.items()} for mode, models in scored.items()}
    return EvaluateResult(str(EVALUATION), str(PAGE), scores)


def make_videos(params: Params, root: Path, place: Path, rows: Sequence[Row]) -> dict[tuple[str, str], Path]:
    """The folder of videos of each (mode, model), all of them made."""
    variants = {"models/phantom": {"base": False, "phantom": True}, "models/control": {"control": True}}
    if not (root / "models/phantom/config.json").is_file():
        raise UserError("models/phantom: no export there; `phantom train` writes it")
    folders: dict[tuple[str, str], Path] = {}
    for model, names in variants.items():
        if not (root / model / "config.json").is_file():  # trained without a control
            continue
        pipeline = cache(partial(load, root / model, params))  # one in memory at a time
        parts = parts_of(root / model)
        for name, physics in names.items():
            for mode in params.evaluate.physics_iq.modes:
                folders[mode, name] = _make(export(name, parts, pipeline, physics), params, root, mode, place, rows)
    return folders


def _make(model: Model, params: Params, root: Path, mode: Any, place: Path, rows: Sequence[Row]) -> Path:
    settings = Settings.of(params, mode)
    items = items_of(rows, place, settings)
    made_of = record(model, items, settings)
    out = root / WORK / f"{model.name}-{key(made_of)}" / mode
    sample(model, items, settings, out, made_of)
    return out


def _figures(models: dict[str, dict[str, Any]], protocol: str) -> dict[str, Any]:
    """What evaluation.json says of one mode: numbers, gains over the base, and in lists what tables leave out."""
    return {
        name: {key: found[key] for key in PARTS}
        | {"verified": found["verified"]["score"]}
        | {"gain": None if name == "base" else gain(models["base"]["per_scenario"], found["per_scenario"], protocol)}
        | {"categories": [{"category": k, **v} for k, v in found["categories"].items()]}
        | {"per_scenario": found["per_scenario"]}
        for name, found in models.items()
    }


def _world_figures(rows: Sequence[Row], folder: Path, fps: int, known: dict[str, Any]) -> dict[str, Any]:
    found = []
    for row in rows:
        frames, _ = read_frames(folder / row.name.generated)
        world = known[f"{row.name.id:04d}"]
        found.append({"scenario": row.name.scenario, **trajectories.compare(frames, fps, world)})
    return trajectories.summary(found)


def _truth_figures(rows: Sequence[Row], place: Path, params: Params, known: dict[str, Any]) -> dict[str, Any]:
    """The same of the recordings themselves, at the size of the generated videos: what tracking cannot resolve."""
    size, found = (params.data.width, params.data.height), []
    for row in rows:
        world = known[f"{row.name.id:04d}"]
        frames, _ = read_frames(layout.testing_video(place, row.name, world["fps"]))
        small = np.stack([cv2.resize(frame, size, interpolation=cv2.INTER_AREA) for frame in frames])
        found.append({"scenario": row.name.scenario, **trajectories.compare(small, world["fps"], world)})
    return trajectories.summary(found)


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)
