"""Position errors of generated videos against the simulator, world by world, also with z replaced while sampling."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from phantom.config import Params, StateSource
from phantom.data.physics_iq.layout import Row
from phantom.data.sources.worlds_files import TRAJECTORIES
from phantom.data.state_probe import StateProbe
from phantom.data.video import read_frames
from phantom.errors import UserError
from phantom.evaluation.generated_states import GeneratedStates
from phantom.evaluation.physics_iq.requests import open_benchmark, physics_iq_requests
from phantom.evaluation.provenance import record, short_digest
from phantom.evaluation.sample import sample
from phantom.evaluation.sampling_spec import Mode, Model, Settings
from phantom.evaluation.study.videos import keep_videos
from phantom.evaluation.trajectories import compare, track_all
from phantom.evaluation.trivial.run import predict
from phantom.progress import say

NAME = "position_error"
MODE: Mode = "multi"  # after several condition frames


def position_errors(
    params: Params,
    model: Model,
    benchmark: Path,
    sources: Sequence[StateSource],
    out: Path,
    kept: Path,
    probe: StateProbe | None = None,
) -> dict[str, Any]:
    """Figures of `model` after several condition frames, JSON-able: `ids` of the worlds; `clips`, name -> a value each.

    benchmark: a folder of simulated worlds. sources: what z is replaced by in further videos. out: where the videos
    lie; those that are there are reused, but not those of another model, other settings or another version of the
    code. kept: the folder that a few of the model's own are copied to (`keep_videos`). probe: reads the state of a
    body from the z that the model generates with its own (`GeneratedStates`).
    """
    settings = Settings.for_physics_iq(params, MODE)
    place, rows, known = _open(benchmark)
    requests = physics_iq_requests(rows, place, settings)

    def states_of(folder: Path) -> GeneratedStates | None:
        return GeneratedStates(probe, params.data.worlds, settings, folder) if probe else None

    def videos(of: Model, name: str) -> Path:
        provenance = record(of, requests, settings)
        folder = out / f"{name}-{short_digest(provenance)}"
        for other in set(out.glob(f"{name}-*")) - {folder}:
            say(f"{other}: was made by another model, other settings or other code, and is made again")
            shutil.rmtree(other)
        read = states_of(folder)
        sample(of, requests, settings, folder, provenance, read.write if read and of is model else None)
        return folder

    folder = videos(model, "own")
    keep_videos(rows, place, folder, settings, kept)
    clips = _errors(folder, settings.fps, rows, known)
    if read := states_of(folder):
        clips |= read.figures(rows)
    for source in sources:
        replaced = replace(model, name=f"{model.name}, {source} z", states=source)
        clips[f"{NAME}_{source}_z"] = _errors(videos(replaced, source), settings.fps, rows, known)[NAME]
    return {"ids": [row.name.scenario for row in rows], "clips": clips}


def prediction_errors(
    params: Params, root: Path, benchmark: Path, names: Sequence[str], work: Path
) -> dict[str, list[float | None]]:
    """The position errors of predictions without a model, by figure: its name and the prediction's.

    root: has the training clips in data/clips. names: of the predictions (`trivial.predictions.TITLES`). work: where
    their videos are made.
    """
    place, rows, known = _open(benchmark)
    folders = predict(params, root, place, rows, work, (MODE,), names)[MODE]
    if missing := [name for name in names if name not in folders]:
        raise UserError(f"compare: found {missing[0]!r}, accepted with data.source worlds, {params.data.source} is set")
    return {
        f"{figure}_{name}": values
        for name in names
        for figure, values in _errors(folders[name], params.data.worlds.fps, rows, known).items()
    }


def _open(benchmark: Path) -> tuple[Path, list[Row], list[dict[str, Any]]]:
    """The folder of a benchmark of simulated worlds, its rows, and what is known of the world of each."""
    place, rows = open_benchmark(benchmark, "original")
    known = json.loads((place / TRAJECTORIES).read_text(encoding="utf-8"))
    return place, rows, [known[f"{row.name.id:04d}"] for row in rows]


def _errors(
    folder: Path, fps: int, rows: Sequence[Row], known: Sequence[dict[str, Any]]
) -> dict[str, list[float | None]]:
    """The position error of each video, by figure: of all, of worlds in the trained ranges and of those beyond."""
    videos = [read_frames(folder / row.name.generated)[0] for row in rows]
    own = [compare(track_all(frames, world), fps, world)[NAME] for frames, world in zip(videos, known, strict=True)]
    found = {NAME: own}
    for name, unseen in (("trained", False), ("unseen", True)):
        pairs = zip(own, known, strict=True)
        found[f"{NAME}_{name}"] = [error if world["unseen"] == unseen else None for error, world in pairs]
    return found
