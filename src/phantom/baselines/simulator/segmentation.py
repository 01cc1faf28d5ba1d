"""Reads a simulated world off its pixels: scenery, bodies by their colours, and where these are in each frame.

Only the worlds' palette and geometry are known (`data.sources.worlds`): which colours there are, that a string hangs
from y = 4 and that a slope is 40 wide. Lengths are in pixels of 64 x 64, y points down.

Legend: T frames, N bodies, H x W pixels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import cv2
import numpy as np

from phantom.data.sources import worlds
from phantom.data.sources.worlds import BACKGROUNDS, COLOURS, FLOOR, OCCLUDER, SIZE, STRING, WorldSpec

PURE = 45.0  # Euclidean RGB distance up to which a pixel shows a colour alone: half of that of the most similar ones
CODEC = 18.0  # by which the codec changes a colour at most: half of the distance of floor and wall
LEAST_PURE = 20  # pixels of a body, of 64 x 64: the smallest ball covers 63, with its edge
LEAST_ASPECT = 0.85  # of a body that is seen whole: the shorter side of its bounding box, of the longer
EDGE = 0.12  # pixels that the worlds' renderer draws beyond an outline
LEAST_SHARE = 0.1  # of a colour in a blend: less is noise of the codec
OFF_LINE = 20.0  # RGB distance of a blend of two colours from the line between them, after the codec
LEAST_WALL = 200  # pixels of the wall, which has 16 x 24
LEAST_SLOPE = 4.0  # pixels that a slope rises above the floor
STRING_ROWS = slice(6, 13)  # which the string of a pendulum crosses at any angle, above the ball
PIVOT_Y, STRING_LENGTH = 4.0, 30.0  # without the ball's radius
UNKNOWN = {name: (low + high) / 2 for name, (low, high) in worlds.TRAINED.items()}  # where the frames do not tell


@dataclass(frozen=True)
class Reading:
    """What the frames show: the world's look, with parameters that they do not tell at the middle of their ranges.

    centres (T, N, 2), nan where a body is not seen whole; angles (N,): of boxes in the last frame that shows them.
    """

    spec: WorldSpec
    centres: np.ndarray
    angles: np.ndarray


def read_world(frames: np.ndarray) -> Reading | None:
    """Reads uint8 RGB frames (T, H, W, 3), H = W, of a simulated world. None if they show no body of one."""
    size = int(SIZE)
    small = [
        f if f.shape[:2] == (size, size) else cv2.resize(f, (size, size), interpolation=cv2.INTER_AREA) for f in frames
    ]
    shown = np.stack(small).astype(np.float32)
    background = max(BACKGROUNDS, key=lambda name: int(_is_pure(shown, BACKGROUNDS[name]).sum()))
    colours = _body_colours(shown)
    if not colours:
        return None
    behind = _actual(shown, BACKGROUNDS[background])
    spec = _scenery(shown, behind, replace(_UNSEEN_WORLD, background=background, colour=colours[0]))
    if len(colours) > 1 and spec.kind == "fall":
        spec = replace(spec, kind="collision", second_colour=colours[1])
    masks = _masks(shown, spec, behind)
    areas, centres = masks.sum((2, 3)).astype(float), centres_of(masks)
    whole = ~np.isnan(centres[..., 0])
    area = [float(np.median(areas[whole[:, body], body])) for body in range(masks.shape[1])]
    radii = [
        (math.sqrt(one) - 2 * EDGE) / 1.7 if spec.kind == "incline" else math.sqrt(one / math.pi) - EDGE for one in area
    ]
    if spec.kind == "pendulum":  # the length of the string tells it better
        radii = [float(np.nanmedian(np.linalg.norm(centres[:, 0] - spec.start, axis=1))) - STRING_LENGTH]
    if not all(1 < radius < SIZE / 4 for radius in radii):
        return None
    spec = replace(spec, radius=radii[0], second_radius=radii[-1])
    seen = [np.flatnonzero(whole[:, body])[-1] for body in range(masks.shape[1])]
    angles = np.array([_angle(masks[t, body], spec) for body, t in enumerate(seen)])
    return Reading(spec, centres, angles)


_UNSEEN_WORLD = WorldSpec(
    kind="fall",
    colour="red",
    second_colour="red",
    background="white",
    floor=SIZE,
    start=(SIZE / 2, SIZE / 2),
    gravity=UNKNOWN["gravity"],
    restitution=UNKNOWN["restitution"],
    friction=UNKNOWN["friction"],
    speed=UNKNOWN["speed"],
    radius=UNKNOWN["radius"],
    second_radius=UNKNOWN["radius"],
    angle=UNKNOWN["angle"],
    direction=1,
    release=0.0,
    unseen=False,
)


def _is_pure(frames: np.ndarray, colour: tuple[int, int, int], within: float = PURE) -> np.ndarray:
    return np.linalg.norm(frames - np.array(colour, np.float32), axis=-1) < within


def _body_colours(frames: np.ndarray) -> list[str]:
    """The colours of one or two bodies, the one with more pixels first."""
    counts = {name: int(_is_pure(frames, colour).sum((1, 2)).max()) for name, colour in COLOURS.items()}
    return sorted((name for name in counts if counts[name] >= LEAST_PURE), key=lambda name: -counts[name])[:2]


def _actual(frames: np.ndarray, colour: tuple[int, int, int]) -> np.ndarray:
    """`colour` as the codec has left it: the median of the pixels that show it alone."""
    pure = frames[_is_pure(frames, colour, CODEC)]
    return np.median(pure, axis=0) if len(pure) else np.array(colour, np.float32)


def _blend(frames: np.ndarray, behind: np.ndarray, colour: np.ndarray) -> np.ndarray:
    """The share of `colour` in pixels that blend it with what is `behind`, (T, H, W); 0 in others."""
    line = colour - behind
    share = (frames - behind) @ line / (line @ line)
    off = np.linalg.norm(frames - behind - share[..., None] * line, axis=-1)
    return np.where((off < OFF_LINE) & (share > LEAST_SHARE), share.clip(0, 1), 0)


def _scenery(frames: np.ndarray, behind: np.ndarray, spec: WorldSpec) -> WorldSpec:
    """The spec with its floor, and what tells the kind of world: a wall, a slope or a string."""
    heights = np.median(
        _blend(frames, behind, _actual(frames, FLOOR)).sum(1), axis=0
    )  # of the floor's colour, by column
    level = float(np.percentile(heights, 20))
    spec = replace(spec, floor=SIZE - level + EDGE)
    to_wall, to_floor = (np.linalg.norm(frames - np.array(one, np.float32), axis=-1) for one in (OCCLUDER, FLOOR))
    if ((to_wall < to_floor) & (to_wall < PURE))[:, :, 24:40].sum((1, 2)).max() > LEAST_WALL:
        return replace(spec, kind="occluder")
    if float(np.percentile(heights, 90)) - level > LEAST_SLOPE:
        return _with_slope(spec, heights - level)
    x = np.arange(SIZE) + 0.5
    string = _blend(frames, behind, np.array(STRING, np.float32))[:, STRING_ROWS]
    widths = string.sum(2)
    if ((widths > 0.5) & (widths < 2.0)).mean() > 0.8:
        crossing = (string * x).sum(2) / np.maximum(widths, 1e-6)  # (T, rows)
        rows = np.arange(STRING_ROWS.start, STRING_ROWS.stop) + 0.5
        lines = [np.polyfit(rows, one, 1) for one in crossing]
        pivot = float(np.median([np.polyval(line, PIVOT_Y) for line in lines]))
        return replace(spec, kind="pendulum", start=(pivot, PIVOT_Y))
    return spec


def _with_slope(spec: WorldSpec, rises: np.ndarray) -> WorldSpec:
    """The incline whose heights above the floor are `rises`, by column: 40 wide, its top 27 from the middle."""
    direction = 1 if rises[: len(rises) // 2].sum() > rises[len(rises) // 2 :].sum() else -1
    x = np.arange(len(rises)) + 0.5
    from_foot = (SIZE / 2 + direction * 13 - x) * direction
    inside = (from_foot > 4) & (from_foot < 38)
    tangent = float(np.median(rises[inside] / from_foot[inside]))
    return replace(spec, kind="incline", direction=direction, angle=math.atan(tangent) / 0.7)


def _masks(frames: np.ndarray, spec: WorldSpec, behind: np.ndarray) -> np.ndarray:
    """The largest component of each body's colour, bool (T, N, H, W)."""
    bodies = [spec.colour, spec.second_colour] if spec.kind == "collision" else [spec.colour]
    scenery = {"occluder": [OCCLUDER], "pendulum": [STRING]}.get(spec.kind, [])
    palette = np.array([*(COLOURS[name] for name in bodies), behind, FLOOR, *scenery], np.float32)
    nearest = np.linalg.norm(frames[..., None, :] - palette, axis=-1).argmin(-1)
    masks = np.zeros((len(frames), len(bodies), *frames.shape[1:3]), bool)
    for t, labels in enumerate(nearest):
        for body in range(len(bodies)):
            count, parts, stats, _ = cv2.connectedComponentsWithStats((labels == body).astype(np.uint8))
            if count > 1:
                masks[t, body] = parts == 1 + int(np.argmax(stats[1:, cv2.CC_STAT_AREA]))
    return masks


def centres_of(masks: np.ndarray) -> np.ndarray:
    """Centres (T, N, 2) of bodies in masks, bool (T, N, 64, 64); nan where one is not seen whole.

    If one is whole in no frame, its centres are those of what is seen of it.
    """
    centres = np.array([[_centre(mask) for mask in of] for of in masks])
    whole = np.array([[_is_whole(mask) for mask in of] for of in masks])
    centres[~whole & whole.any(0)] = np.nan
    return centres


def _is_whole(mask: np.ndarray) -> bool:
    """Whether a body is inside the frame and nothing is in front of it."""
    rows, columns = np.nonzero(mask)
    if not len(rows) or min(rows.min(), columns.min()) == 0 or max(rows.max(), columns.max()) == len(mask) - 1:
        return False
    sides = np.ptp(rows) + 1, np.ptp(columns) + 1
    return bool(min(sides) >= LEAST_ASPECT * max(sides))


def _centre(mask: np.ndarray) -> tuple[float, float]:
    rows, columns = np.nonzero(mask)
    return (float(columns.mean()) + 0.5, float(rows.mean()) + 0.5) if len(rows) else (math.nan, math.nan)


def _angle(mask: np.ndarray, spec: WorldSpec) -> float:
    """Of a box, up to quarter turns: that of the slope or the floor if it lies on one of them. 0 for a ball."""
    if spec.kind != "incline":
        return 0.0
    points = np.argwhere(mask)[:, ::-1].astype(np.float32)
    measured = math.radians(cv2.minAreaRect(points)[2])
    tilt = spec.direction * spec.angle * 0.7
    quarter = math.pi / 2
    near = min((tilt, 0.0), key=lambda one: abs((measured - one + quarter / 2) % quarter - quarter / 2))
    off = abs((measured - near + quarter / 2) % quarter - quarter / 2)
    return near if off < math.radians(12) else measured
