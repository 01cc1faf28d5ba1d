"""The videos of several models side by side, on the page of `phantom report`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from phantom.data.physics_iq.video import probe
from phantom.errors import UserError
from phantom.evaluation.page import Scene, Shown, embed_shrunk

MOST = 24  # scenes on a page, half of them the largest gains and half the largest losses


@dataclass(frozen=True)
class Part:
    """A scenario or prompt of a score: the video that shows it, as a pattern of names, and its own score."""

    title: str
    tag: str
    files: str
    value: float


@dataclass(frozen=True)
class Wall:
    """Scenes, and what the player must know of them."""

    scenes: list[Scene]
    fps: int
    seconds: float
    shape: tuple[int, int]


def wall(
    table: Mapping[str, Mapping[str, Any]], folders: Mapping[str, Path], kinds: Mapping[str, str], base: str
) -> Wall | None:
    """The scenes of one benchmark whose models have `folders` of videos; None if none of them has.

    table: scores by model. kinds: their colours. Raises UserError for a video that is missing.
    """
    shown = [name for name in table if name in folders]
    if not shown:
        return None
    parts = {name: parts_of(table[name]) for name in dict.fromkeys([*shown, base])}
    shared = [key for key in parts[shown[0]] if all(key in found for found in parts.values())]
    gains = {key: _widest([parts[n][key].value - parts[base][key].value for n in parts if n != base]) for key in shared}
    ordered = sorted(shared, key=lambda key: (-gains[key], key))
    chosen = ordered if len(ordered) <= MOST else ordered[: MOST // 2] + ordered[-MOST // 2 :]
    scenes, infos = [], []
    for key in sorted(chosen, key=shared.index):
        videos = []
        for name in shown:
            part = parts[name][key]
            path = _video(folders[name], part.files)
            info = probe(path)
            infos.append(info)
            source = embed_shrunk(path, round(info.fps), (info.width, info.height), info.seconds)
            videos.append(Shown(name, kinds[name], source, False, figures=[f"{part.value:.1f}"]))
        first = parts[shown[0]][key]
        scenes.append(Scene(first.title, first.tag, "", videos, gains[key]))
    if not infos:
        return None
    return Wall(
        scenes,
        max(round(info.fps) for info in infos),
        max(info.seconds for info in infos),
        (infos[0].width, infos[0].height),
    )


def parts_of(scores: Mapping[str, Any]) -> dict[tuple[str, str], Part]:
    """The scenarios or prompts of a score, by (category, name)."""
    found = {}
    for row in scores.get("per_scenario", ()):
        title = row["scenario"].removeprefix("trimmed-").replace("-", " ")
        part = Part(title, row["category"] or "", f"*_{row['scenario']}.mp4", row["verified"])
        found[part.tag, row["scenario"]] = part
    for row in scores.get("per_prompt", ()):
        tag = next(iter(row["groups"]), "").replace("_", " ")
        found[tag, row["prompt"]] = Part(row["prompt"], tag, row["file"], row["value"])
    return found


def _widest(gains: Sequence[float]) -> float:
    return max(gains, key=abs, default=0.0)


def _video(folder: Path, name: str) -> Path:
    """The first file of that name, or of that pattern."""
    path = folder / name
    found = path if path.is_file() else next(iter(sorted(folder.glob(name))), None) if name.startswith("*") else None
    if found is None:
        raise UserError(f"{folder}: no {name} in it, which its score is of; --videos names a model's folder of videos")
    return found
