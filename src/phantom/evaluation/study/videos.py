"""A few of the videos that the position errors of a study are of: kept beside its page, and side by side on it.

studies/<name>/videos/<world>/<arm>.mp4      of the first seed; _recording.mp4 and _base.mp4 beside them
"""

from __future__ import annotations

import shutil
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from phantom.data.physics_iq import layout
from phantom.data.physics_iq.layout import Row
from phantom.data.physics_iq.video import probe
from phantom.data.video import write_mp4
from phantom.evaluation.page import Scene, SceneVideo, embed_file, shrunk
from phantom.evaluation.sampling_spec import Settings
from phantom.evaluation.study.spec import STUDIES, Study

KEPT = 4  # worlds
VIDEOS = "videos"
RECORDING, BASE = "_recording", "_base"  # no label of an arm begins so


def keep_videos(rows: Sequence[Row], place: Path, made: Path, settings: Settings, out: Path) -> None:
    """Writes `out/<world>/_own.mp4` and `_recording.mp4` of `KEPT` worlds, from the first of `rows` to the last.

    place: the benchmark, with the recordings. made: the folder of generated videos.
    """
    size, last, count = (settings.width, settings.height), len(rows) - 1, min(KEPT, len(rows))
    for row in (rows[round(i * last / max(1, count - 1))] for i in range(count)):
        rate = layout.source_rate(place, row.name, settings.fps) or settings.fps
        sources = {"_own": (made / row.name.generated, settings.fps)}
        sources[RECORDING] = layout.testing_video(place, row.name, rate), rate
        folder = out / row.name.scenario
        folder.mkdir(parents=True, exist_ok=True)
        for name, (path, fps) in sources.items():
            write_mp4(folder / f"{name}.mp4", shrunk(path, fps, size, layout.SECONDS), fps, crf=18)


def gather_videos(name: str, labels: Collection[str], kept: Mapping[str, Path], root: Path = Path()) -> None:
    """Copies the videos that runs have kept to the study's folder, in place of the arm's that are there.

    Those of arms without any stay: they came with results of another machine. labels: of the study's arms; videos of
    any other go. kept: by the label of the arm, or `BASE`, the folder that `keep_videos` wrote.
    """
    target = root / STUDIES / name / VIDEOS
    for label, source in kept.items():
        found = sorted(source.glob("*/_own.mp4"))
        for earlier in target.glob(f"*/{label}.mp4") if found else ():
            earlier.unlink()
        for path in found:
            (folder := target / path.parent.name).mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, folder / f"{label}.mp4")
            shutil.copyfile(path.with_name(f"{RECORDING}.mp4"), folder / f"{RECORDING}.mp4")
    for path in target.glob("*/*.mp4"):
        if path.stem not in (RECORDING, BASE, *labels):
            path.unlink()
    for folder in target.glob("*/"):  # worlds that no arm has a video of any more
        if [path.name for path in folder.iterdir()] == [f"{RECORDING}.mp4"]:
            shutil.rmtree(folder)


@dataclass(frozen=True)
class StudyVideos:
    """The scenes of a study's page, and what the player needs to know."""

    scenes: Sequence[Scene] = ()
    fps: int = 1
    seconds: float = 0.0
    shape: tuple[int, int] = (1, 1)


NO_VIDEOS = StudyVideos()


def study_videos(
    name: str, study: Study, results: Mapping[str, Any], kinds: Mapping[str, str], root: Path = Path()
) -> StudyVideos:
    """The videos in the study's folder: of each world the recording, the frozen base and the arms. kinds: by label."""
    errors = _errors(study, results)
    titles = {RECORDING: "Recording", BASE: "Frozen base", **{label: label for label in study.labels}}
    scenes, infos = [], []
    for folder in sorted((root / STUDIES / name / VIDEOS).glob("*/")):
        shown = []
        for label, title in titles.items():
            path = folder / f"{label}.mp4"
            if path.is_file():
                infos.append(probe(path))
                error = errors.get((label, folder.name))
                figures = [f"off by {error:.1f} px"] if error is not None else []
                kind = {RECORDING: "condition", BASE: "base"}.get(label) or kinds[label]
                shown.append(SceneVideo(title, kind, embed_file(path), False, figures=figures))
        scenes.append(Scene(folder.name.replace("-", " "), f"seed {study.seeds[0]}", "", shown))
    if not infos:
        return NO_VIDEOS
    fps, seconds = max(round(info.fps) for info in infos), max(info.seconds for info in infos)
    return StudyVideos(scenes, fps, seconds, (infos[0].width, infos[0].height))


def _errors(study: Study, results: Mapping[str, Any]) -> dict[tuple[str, str], float | None]:
    """Position errors of the first seed, by label, or `BASE`, and world."""
    worlds, figure = results["ids"].get("positions", []), "position_error"
    clips = {run["arm"]: run["clips"] for run in results["runs"] if run["seed"] == study.seeds[0]}
    clips[BASE] = (results["base"] or {"clips": {}})["clips"]
    pairs = {label: zip(worlds, found.get(figure, ()), strict=False) for label, found in clips.items()}
    return {(label, world): error for label, found in pairs.items() for world, error in found}
