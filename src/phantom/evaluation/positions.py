"""Position errors of generated videos against the simulator, world by world, also with z replaced while sampling."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from phantom.config import Params, StateSource
from phantom.data.sources.worlds_files import TRAJECTORIES
from phantom.data.state_probe import StateProbe
from phantom.data.video import read_frames
from phantom.evaluation.generated_states import GeneratedStates
from phantom.evaluation.provenance import record, short_digest
from phantom.evaluation.sample import open_benchmark, physics_iq_requests, sample
from phantom.evaluation.sampling_spec import Model, Settings
from phantom.evaluation.study.videos import keep_videos
from phantom.evaluation.trajectories import compare, track_all
from phantom.progress import say

NAME = "position_error"


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
    settings = Settings.for_physics_iq(params, "multi")
    place, rows = open_benchmark(benchmark, "original")
    known = json.loads((place / TRAJECTORIES).read_text(encoding="utf-8"))
    worlds = [known[f"{row.name.id:04d}"] for row in rows]
    requests = physics_iq_requests(rows, place, settings)

    def states_of(folder: Path) -> GeneratedStates | None:
        return GeneratedStates(probe, params.data.worlds.seed, settings, folder) if probe else None

    def videos(of: Model, name: str) -> Path:
        provenance = record(of, requests, settings)
        folder = out / f"{name}-{short_digest(provenance)}"
        for other in set(out.glob(f"{name}-*")) - {folder}:
            say(f"{other}: was made by another model, other settings or other code, and is made again")
            shutil.rmtree(other)
        read = states_of(folder)
        sample(of, requests, settings, folder, provenance, read.write if read and of is model else None)
        return folder

    def errors(folder: Path) -> list[float | None]:
        frames = [read_frames(folder / row.name.generated)[0] for row in rows]
        tracked = [(track_all(shown, world), world) for shown, world in zip(frames, worlds, strict=True)]
        return [compare(tracks, settings.fps, world)[NAME] for tracks, world in tracked]

    folder = videos(model, "own")
    keep_videos(rows, place, folder, settings, kept)
    own = errors(folder)
    clips = {NAME: own}
    if read := states_of(folder):
        clips |= read.figures(rows)
    for name, unseen in (("trained", False), ("unseen", True)):
        pairs = zip(own, worlds, strict=True)
        clips[f"{NAME}_{name}"] = [error if world["unseen"] == unseen else None for error, world in pairs]
    for source in sources:
        replaced = replace(model, name=f"{model.name}, {source} z", states=source)
        clips[f"{NAME}_{source}_z"] = errors(videos(replaced, source))
    return {"ids": [row.name.scenario for row in rows], "clips": clips}
