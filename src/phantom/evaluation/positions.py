"""Position errors of generated videos against the simulator, world by world, also with z replaced while sampling."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from phantom.config import Params, StateSource
from phantom.data.sources.worlds_files import TRAJECTORIES
from phantom.data.video import read_frames
from phantom.evaluation.provenance import record
from phantom.evaluation.sample import open_benchmark, physics_iq_requests, sample
from phantom.evaluation.sampling_spec import Model, Settings
from phantom.evaluation.trajectories import compare, track_all

NAME = "position_error"


def position_errors(
    params: Params, model: Model, benchmark: Path, sources: Sequence[StateSource], out: Path
) -> dict[str, Any]:
    """Figures of `model` after several condition frames, JSON-able: `ids` of the worlds; `clips`, name -> a value each.

    benchmark: a folder of simulated worlds. sources: what z is replaced by in further videos. out: where the videos
    lie; those that are there are reused.
    """
    settings = Settings.for_physics_iq(params, "multi")
    place, rows = open_benchmark(benchmark, "original")
    known = json.loads((place / TRAJECTORIES).read_text(encoding="utf-8"))
    worlds = [known[f"{row.name.id:04d}"] for row in rows]
    requests = physics_iq_requests(rows, place, settings)

    def errors(of: Model, folder: Path) -> list[float | None]:
        sample(of, requests, settings, folder, record(of, requests, settings))
        videos = [read_frames(folder / row.name.generated)[0] for row in rows]
        tracked = [(track_all(frames, world), world) for frames, world in zip(videos, worlds, strict=True)]
        return [compare(tracks, settings.fps, world)[NAME] for tracks, world in tracked]

    own = errors(model, out / "own")
    clips = {NAME: own}
    for name, unseen in (("trained", False), ("unseen", True)):
        pairs = zip(own, worlds, strict=True)
        clips[f"{NAME}_{name}"] = [error if world["unseen"] == unseen else None for error, world in pairs]
    for source in sources:
        replaced = replace(model, name=f"{model.name}, {source} z", states=source)
        clips[f"{NAME}_{source}_z"] = errors(replaced, out / source)
    return {"ids": [row.name.scenario for row in rows], "clips": clips}
