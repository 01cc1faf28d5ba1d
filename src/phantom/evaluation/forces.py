"""Whether a body follows the force of a prompt, from where it is found in videos with and without that force.

The effect of a force is the difference between two videos of one world from the same noise, with the force and without
it: what the world does anyway, such as falling, is in both. In free flight the effect of a push is v t along its angle.
Lengths are in pixels of a 64 x 64 frame, y points down; angles are in degrees, 0 right, 90 up.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import cv2
import numpy as np
from scipy.stats import spearmanr

from phantom.force.prompt import ForcePrompt

LEAST_EFFECT = 0.5  # px: a smaller one has no direction
CHANCE = 90.0  # degrees: the mean error of a random angle
FIGURES = ("along", "rank", "angle_error")


def effect(pushed: np.ndarray, free: np.ndarray) -> np.ndarray:
    """Of centres (T, 2) from the push on, nan where the body is not found: the difference in the last frame in which
    both videos show it, (2,); zero if there is none."""
    seen = np.flatnonzero(~np.isnan(pushed[:, 0] + free[:, 0]))
    return pushed[seen[-1]] - free[seen[-1]] if len(seen) else np.zeros(2)


def world_figures(angle: float, magnitudes: Sequence[float], effects: np.ndarray) -> dict[str, float]:
    """The figures of one world with pushes of one angle, whose effects are (M, 2).

    along: displacement along the angle, mean over the magnitudes, in px. rank: Spearman's correlation of the
    displacement along the angle with the magnitude; 0 if it does not change. angle_error: between effect and angle,
    mean; 90 where there is no effect.
    """
    radians = np.radians(angle)
    along = effects @ np.array([np.cos(radians), -np.sin(radians)])
    sizes = np.linalg.norm(effects, axis=1)
    cosines = np.divide(along, sizes, out=np.zeros_like(along), where=sizes >= LEAST_EFFECT)
    moves = bool(np.ptp(along) > 0)
    return {
        "along": float(along.mean()),
        "rank": float(spearmanr(magnitudes, along).statistic) if moves else 0.0,
        "angle_error": float(np.degrees(np.arccos(cosines.clip(-1, 1))).mean()),
    }


def summary(worlds: Iterable[dict[str, float]]) -> dict[str, float]:
    """Means over worlds."""
    rows = list(worlds)
    return {name: float(np.mean([row[name] for row in rows])) for name in FIGURES}


def draw_arrows(frames: np.ndarray, prompt: ForcePrompt, fps: float) -> np.ndarray:
    """Copies of uint8 RGB `frames` (T, H, W, 3), with an arrow for each push from its time on, and for the wind."""
    drawn, (height, width) = frames.copy(), frames.shape[1:3]
    arrows: list[tuple[float, float, Any, float]] = [(p.x, p.y, p, p.time) for p in prompt.points]
    if prompt.wind:
        arrows.append((0.5, 0.15, prompt.wind, 0.0))
    for x, y, force, time in arrows:
        radians, length = np.radians(force.angle), force.magnitude * min(height, width) / 3
        start = np.array([x * width, y * height])
        end = start + length * np.array([np.cos(radians), -np.sin(radians)])
        tail, tip = ([int(v) for v in point.round()] for point in (start, end))
        for frame in drawn[int(np.ceil(time * fps)) :]:
            cv2.arrowedLine(frame, tail, tip, (255, 255, 255), max(1, height // 64), cv2.LINE_AA, tipLength=0.3)
    return drawn
