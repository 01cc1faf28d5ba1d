"""Videos of simulated worlds, whose physics is known, against the simulator: figures of bodies by scenario and all."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from phantom.config import Params
from phantom.data.physics_iq import layout
from phantom.data.physics_iq.layout import Row
from phantom.data.video import read_frames
from phantom.evaluation import shapes, trajectories
from phantom.evaluation.gains import row_gain
from phantom.evaluation.worlds_figures import WORLDS


def with_gains(models: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Figures of the worlds with their changes from the base and, of Phantom, the control, each with an interval."""
    references = {"gain": "base", "gain_over_control": "control"}
    for name, figures in models.items():
        for key, reference in references.items():
            if reference in models and (name == "phantom" or (key == "gain" and name != reference)):
                of = (models[reference]["per_scenario"], figures["per_scenario"])
                figures[key] = {figure.key: row_gain(*of, figure.key) for figure in WORLDS}
    return {name: {**figures, "per_scenario": figures.pop("per_scenario")} for name, figures in models.items()}


def world_figures(rows: Sequence[Row], folder: Path, fps: int, known: dict[str, Any]) -> dict[str, Any]:
    """The figures of a folder of videos. known: the simulator's trajectories, by the scenario's number."""
    found = []
    for row in rows:
        frames, _ = read_frames(folder / row.name.generated)
        found.append(_against_world(row, frames, fps, known))
    return trajectories.summary(found) | shapes.summary(found)


def truth_figures(rows: Sequence[Row], place: Path, params: Params, known: dict[str, Any]) -> dict[str, Any]:
    """`world_figures` of the recordings, at the size of the generated videos: the error of tracking itself."""
    size, found = (params.data.width, params.data.height), []
    for row in rows:
        fps = known[f"{row.name.id:04d}"]["fps"]
        frames, _ = read_frames(layout.testing_video(place, row.name, fps))
        small = np.stack([cv2.resize(frame, size, interpolation=cv2.INTER_AREA) for frame in frames])
        found.append(_against_world(row, small, fps, known))
    return trajectories.summary(found) | shapes.summary(found)


def worst_kind(models: Mapping[str, Any]) -> str:
    """The kind of world in which Phantom's position error is largest, in a sentence. models: the entries of a mode."""
    errors: dict[str, list[float]] = defaultdict(list)
    for row in models["phantom"]["per_scenario"]:
        if row["position_error"] is not None:
            errors[row["kind"]].append(row["position_error"])
    means = {kind: sum(of) / len(of) for kind, of in errors.items()}
    kind = max(means, key=lambda kind: means[kind])
    return f"It is worst at the {kind}, where bodies are off by {means[kind]:.1f} of 64 pixels"


def _against_world(row: Row, frames: np.ndarray, fps: int, known: dict[str, Any]) -> dict[str, Any]:
    world = known[f"{row.name.id:04d}"]
    tracks = trajectories.track_all(frames, world)
    compared = trajectories.compare(tracks, fps, world) | shapes.compare(tracks, fps, world)
    return {"scenario": row.name.scenario, **compared}
