"""Writes the predictions without a model into folders like those of a model; they are reused by digest."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import repeat
from pathlib import Path
from typing import Any

import numpy as np

import phantom
from phantom.config import Params
from phantom.data.clip_frames import ClipReader
from phantom.data.manifest import CLIPS, find_manifest, read_manifest, training_clips
from phantom.data.physics_iq import layout
from phantom.data.physics_iq.layout import Row
from phantom.data.sources.worlds_files import TEST_SECONDS, benchmark_spec
from phantom.data.video import write_mp4
from phantom.evaluation.physics_iq.conditions import find_condition, read_condition, read_truth
from phantom.evaluation.provenance import claim, digest, short_digest
from phantom.evaluation.sampling_spec import Mode, Settings
from phantom.evaluation.trivial.predictions import (
    constant_velocity,
    last_frame,
    nearest_continuations,
    simulated_anew,
    simulated_from_pixels,
    simulated_from_state,
)
from phantom.progress import track

# The code, relative to the package, that decides what a prediction shows.
CODE = (
    "baselines/simulator/estimate.py",
    "baselines/simulator/motions.py",
    "baselines/simulator/segmentation.py",
    "baselines/simulator/simulation.py",
    "evaluation/trivial/predictions.py",
    "evaluation/trivial/run.py",
    "evaluation/physics_iq/conditions.py",
    "evaluation/sampling_spec.py",
    "data/physics_iq/video.py",
    "data/sources/world_forces.py",
    "data/sources/worlds.py",
    "data/sources/worlds_files.py",
    "data/video.py",
)


@dataclass(frozen=True)
class Prediction:
    """One kind of prediction: what it depends on besides the conditions, JSON-able, and how videos are made of them."""

    name: str
    depends: Any
    make: Callable[[Sequence[np.ndarray]], Iterable[np.ndarray]]  # uint8 RGB (T, H, W, 3), one per row


def predict(
    params: Params,
    root: Path,
    place: Path,
    rows: Sequence[Row],
    work: Path,
    modes: Sequence[Mode] | None = None,
    names: Sequence[str] | None = None,
) -> dict[str, dict[str, Path]]:
    """Writes the videos that are missing; returns their folders by mode and prediction.

    place: folder of the simulated worlds' benchmark, with `rows`. work: where the folders are made. modes: by default
    those of `evaluate.physics_iq`. names: of the predictions, by default all. Raises UserError.
    """
    folders: dict[str, dict[str, Path]] = {}
    for mode in modes or params.evaluate.physics_iq.modes:
        fps = params.data.worlds.fps
        settings = replace(Settings.for_physics_iq(params, mode), fps=fps, frames=TEST_SECONDS * fps)
        found = _predictions(params, root, place, rows, settings)
        wanted = [one for one in found if names is None or one.name in names]
        folders[mode] = {one.name: _write(one, place, rows, settings, work) for one in wanted}
    return folders


def _predictions(params: Params, root: Path, place: Path, rows: Sequence[Row], settings: Settings) -> list[Prediction]:
    """Those of a mode: a velocity takes two condition frames, and only clips of the same worlds are looked up."""
    drawn, fps, count = params.data.worlds, settings.fps, settings.frames
    specs = [benchmark_spec(drawn.seed, row.name.id - 1, **drawn.scenario_variation) for row in rows]
    known = [asdict(spec) for spec in specs]
    numbers = [row.name.id for row in rows]
    found = [Prediction("last_frame", None, lambda given: (last_frame(one, count) for one in given))]
    if settings.prefix_frames > 1:
        found.append(Prediction("constant_velocity", known, lambda given: map(constant_velocity, given, specs)))
    if params.data.source == "worlds":
        clips = training_clips(read_manifest(find_manifest(root / CLIPS)), params.data.filter)
        longest = max(clip.frames for clip in clips)
        reader = ClipReader(root / CLIPS, params)
        stored = map(reader.read, clips)
        digests = [clip.sha256 for clip in clips]
        look_up = partial(nearest_continuations, clips=stored, longest=longest, ahead=count)
        found.append(Prediction("nearest_clip", digests, look_up))
    seeds = repeat(settings.seed)
    found.append(Prediction("simulator", known, lambda given: map(simulated_anew, given, specs, seeds, numbers)))
    if not drawn.more_balls:  # it takes a kind's own bodies for all there are
        read = partial(simulated_from_pixels, fps=fps)
        found.append(Prediction("simulator_pixels", None, partial(map, read)))
    found.append(Prediction("simulator_state", known, lambda given: map(simulated_from_state, given, specs)))
    takes = layout.recordings(place)
    second = [layout.testing_video(place, takes[row.name.scenario, row.name.view, 2], fps) for row in rows]
    taken = (read_truth((path, fps), settings)[: settings.frames] for path in second)
    found.append(Prediction("other_take", [digest(path) for path in second], lambda given: taken))
    return found


def _write(prediction: Prediction, place: Path, rows: Sequence[Row], settings: Settings, work: Path) -> Path:
    """The folder of a prediction's videos, which are written if they are not all there."""
    files = [find_condition(place, row.name, settings) for row in rows]
    package = Path(phantom.__file__).parent
    items = [
        prediction.depends,
        [[row.name.generated, digest(path)] for row, (path, _) in zip(rows, files, strict=True)],
    ]
    record = {
        "model": {"prediction": prediction.name},
        "settings": {key: value for key, value in settings.record().items() if key != "sampling"},
        "items": hashlib.sha256(json.dumps(items).encode()).hexdigest(),
        "code": [digest(package / part) for part in CODE],
    }
    out = work / f"{prediction.name}-{short_digest(record)}" / settings.mode
    claim(out, record)
    if all((out / row.name.generated).is_file() for row in rows):
        return out
    made = prediction.make([read_condition(file, settings) for file in files])
    with track(f"predict {prediction.name}, {settings.mode}", len(rows), "videos") as bar:
        for row, frames in zip(rows, made, strict=True):
            path = out / row.name.generated
            part = path.with_suffix(".part")
            write_mp4(part, frames, fps=settings.fps)
            part.replace(path)
            bar.advance()
    return out
