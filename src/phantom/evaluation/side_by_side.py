"""Videos of several models side by side, for the page of `phantom report`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from phantom.data.physics_iq.video import probe
from phantom.errors import UserError
from phantom.evaluation.page import Scene, SceneVideo, embed_shrunk

Recording = Callable[[str, int], tuple[Path, int] | None]  # of a video's file name, at a preferred rate
MAX_SCENES = 24  # per page: half with the largest gains, half with the largest losses


@dataclass(frozen=True)
class ScoredScene:
    """A scenario or prompt of a score, with its own score and the file name (or glob pattern) of its video."""

    title: str
    tag: str
    files: str
    value: float


@dataclass(frozen=True)
class VideoWall:
    """Scenes of a page, settings of the player, and the (model, folder) pairs that the videos come from."""

    scenes: list[Scene]
    fps: int
    seconds: float
    shape: tuple[int, int]
    folders: frozenset[tuple[str, Path]]


def video_wall(
    table: Mapping[str, Mapping[str, Any]],
    given: Mapping[str, Sequence[Path]],
    kinds: Mapping[str, str],
    base: str,
    title: str = "",
    recording: Recording = lambda file, fps: None,
) -> VideoWall | None:
    """The scenes of one benchmark, for the models with a folder of its videos in `given`; None if there are none.

    table: scores by model. kinds: colour class by model. title: prefix of the categories if there are several
    benchmarks. recording: shown before the models' videos. Raises UserError for a missing video.
    """
    if not any(name in given for name in table):
        return None
    parts = {name: scored_scenes(scores) for name, scores in table.items()}
    folders = {
        name: folder
        for name, found in parts.items()
        for folder in given.get(name, ())
        if any(_find(folder, part.files) for part in found.values())
    }
    shown = list(folders)
    if not shown:
        return None
    parts = {name: parts[name] for name in dict.fromkeys([*shown, base])}
    shared = [key for key in parts[shown[0]] if all(key in found for found in parts.values())]
    gains = {key: _widest([parts[n][key].value - parts[base][key].value for n in parts if n != base]) for key in shared}
    ordered = sorted(shared, key=lambda key: (-gains[key], key))
    half = MAX_SCENES // 2
    chosen = ordered if len(ordered) <= MAX_SCENES else ordered[:half] + ordered[-half:]
    scenes, infos = [], []
    for key in sorted(chosen, key=shared.index):
        videos = []
        for name in shown:
            part = parts[name][key]
            path = _video(folders[name], part.files)
            info = probe(path)
            infos.append(info)
            source = embed_shrunk(path, round(info.fps), (info.width, info.height), info.seconds)
            videos.append(SceneVideo(name, kinds[name], source, False, figures=[f"{part.value:.1f}"]))
        first = parts[shown[0]][key]
        if found := recording(_video(folders[shown[0]], first.files).name, round(info.fps)):
            source = embed_shrunk(*found, (info.width, info.height), info.seconds)
            videos.insert(0, SceneVideo("Truth", "truth", source, False))
        tag = ": ".join(filter(None, [title, first.tag]))
        scenes.append(Scene(first.title, tag, "", videos, {"": gains[key]}, (info.width, info.height)))
    if not infos:
        return None
    return VideoWall(
        scenes,
        max(round(info.fps) for info in infos),
        max(info.seconds for info in infos),
        (infos[0].width, infos[0].height),
        frozenset(folders.items()),
    )


def video_walls(
    tables: Mapping[str, Mapping[str, Mapping[str, Any]]],
    given: Mapping[str, Sequence[Path]],
    kinds: Mapping[str, str],
    base: str,
    recordings: Mapping[str, Recording] = MappingProxyType({}),
) -> tuple[VideoWall | None, list[str]]:
    """The scenes of all benchmarks in sequence, and the titles of the benchmarks that have any.

    tables: scores by title of the benchmark. recordings: what really happens, likewise.
    Raises UserError for a folder without any video of its model's scores.
    """
    titles = list(tables) if len(tables) > 1 else [""]
    found = [
        video_wall(
            table,
            given,
            kinds,
            base if base in table else next(iter(table)),
            title,
            recordings.get(name, lambda file, fps: None),
        )
        for title, (name, table) in zip(titles, tables.items(), strict=True)
    ]
    made = {title: one for title, one in zip(tables, found, strict=True) if one}
    used = frozenset().union(*(one.folders for one in made.values()))
    for name, folder in ((name, folder) for name, folders in given.items() for folder in folders):
        if (name, folder) not in used:
            scores = next(table[name] for table in tables.values() if name in table)
            raise _missing(folder, next((part.files for part in scored_scenes(scores).values()), "scene"))
    if not made:
        return None, []
    several = list(made.values())
    widest = max((one.shape for one in several), key=lambda shape: shape[0])
    whole = VideoWall(
        [replace(scene, benchmark=number) for number, one in enumerate(several) for scene in one.scenes],
        max(one.fps for one in several),
        max(one.seconds for one in several),
        widest,
        used,
    )
    return whole, list(made)


def scored_scenes(scores: Mapping[str, Any]) -> dict[tuple[str, str], ScoredScene]:
    """The scenarios or prompts of a score by (category, name)."""
    found = {}
    for row in scores.get("per_scenario", ()):
        title = row["scenario"].removeprefix("trimmed-").replace("-", " ")
        part = ScoredScene(title, row["category"] or "", f"*_{row['scenario']}.mp4", row["verified"])
        found[part.tag, row["scenario"]] = part
    for row in scores.get("per_prompt", ()):
        tag = next(iter(row["groups"]), "").replace("_", " ")
        found[tag, row["prompt"]] = ScoredScene(row["prompt"], tag, row["file"], row["value"])
    return found


def _widest(gains: Sequence[float]) -> float:
    return max(gains, key=abs, default=0.0)


def _video(folder: Path, name: str) -> Path:
    found = _find(folder, name)
    if found is None:
        raise _missing(folder, name)
    return found


def _find(folder: Path, name: str) -> Path | None:
    """The file called `name`, or the first that matches it if it is a pattern."""
    path = folder / name
    return path if path.is_file() else next(iter(sorted(folder.glob(name))), None) if name.startswith("*") else None


def _missing(folder: Path, name: str) -> UserError:
    return UserError(f"{folder}: no {name} in it, which its score is of; --videos names a model's folder of videos")
