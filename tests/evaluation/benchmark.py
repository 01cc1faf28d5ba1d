"""A small benchmark in Physics-IQ's layout: squares that slide, in three scenarios, two views, two takes, at 8 fps."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from phantom.data.physics_iq import layout, masks
from phantom.data.video import write_mp4

FPS, FRAMES, HEIGHT, WIDTH = 8, 40, 96, 128
VIEWS = ("perspective-left", "perspective-right")
SCENARIOS = {
    "trimmed-slow": ("Solid Mechanics", 1.0),
    "trimmed-fast": ("Solid Mechanics", 2.0),
    "trimmed-melt": ("Thermodynamics", 1.5),
}


def sliding(
    speed: float, offset: int = 0, frames: int = FRAMES, height: int = HEIGHT, width: int = WIDTH
) -> np.ndarray:
    """A bright square crosses a dark picture: uint8 RGB (frames, height, width, 3)."""
    video = np.full((frames, height, width, 3), (40, 60, 50), np.uint8)
    for t, frame in enumerate(video):
        x, y = 8 + offset + round(speed * t), 30 + 2 * offset
        frame[y : y + 28, x : x + 28] = (230, 200, 120)
    return video


def names() -> list[layout.Name]:
    """All recordings; take 2 of each has the id of take 1, plus 6."""
    pairs = [(scenario, view) for scenario in SCENARIOS for view in VIEWS]
    return [
        layout.Name(i + 1 + (take - 1) * len(pairs), view, take, scenario)
        for take in (1, 2)
        for i, (scenario, view) in enumerate(pairs)
    ]


def recorded(name: layout.Name) -> np.ndarray:
    """What the recording `name` shows."""
    return sliding(SCENARIOS[name.scenario][1], offset=2 * (name.take - 1) + VIEWS.index(name.view))


def write(folder: Path, fps: int = FPS, with_masks: bool = True) -> Path:
    """Writes test videos, their masks in mp4v, and the descriptions."""
    for name in names():
        path = layout.testing_video(folder, name, fps)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_mp4(path, recorded(name), fps=fps)
        if with_masks:
            mask = layout.mask_video(folder, name, fps)
            mask.parent.mkdir(parents=True, exist_ok=True)
            masks.write_masks(mask, masks.motion_masks(f[..., ::-1] for f in recorded(name)), fps)
    rows = [(name, f"A square, {name.view}.", SCENARIOS[name.scenario][0]) for name in names()]
    layout.write_descriptions(folder, rows)
    return folder


def write_generated(folder: Path, offset: int = 0, fps: int = FPS) -> Path:
    """A model's videos: take 1, moved by `offset` pixels."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in names():
        if name.take == 1:
            speed, view = SCENARIOS[name.scenario][1], VIEWS.index(name.view)
            write_mp4(folder / name.generated, sliding(speed, offset + view), fps=fps)
    return folder
