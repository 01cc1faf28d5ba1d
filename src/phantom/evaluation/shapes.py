"""Whether the bodies of a generated video keep their area and colour, and start to move at the right time.

Bodies are tracked by their colour (`trajectories.track_all`); lengths are in pixels of a 64 x 64 frame.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from phantom.evaluation.trajectories import Track, is_whole

AREA_TOLERANCE = 0.2  # relative
COLOUR_TOLERANCE = 50.0  # Euclidean distance of RGB, 0 to 255: half of that between the most similar bodies' colours
MOVED = 1.5  # pixels from the first place that count as motion
PUNCTUAL_SECONDS = 0.5
# A body that is not found may be out of sight if it was last seen this close to the frame's edge or to the wall: it
# covers up to 4 pixels per frame.
OUT_OF_SIGHT = 4.0
FIGURES = ("shape_kept", "area_kept", "colour_kept", "starts_on_time", "start_delay")


def compare(
    tracks: Sequence[Track], fps: int, known: dict[str, Any], same_world: bool = True
) -> dict[str, float | None]:
    """The figures of a generated video, from the tracks of its bodies and its `worlds_files.trajectory`.

    area_kept, colour_kept, shape_kept: share of the frames that show a body completely, over all bodies, in which its
        area is within 20% of its own, its colour within 50 of its own, and both. A frame without the body counts as not
        kept, unless the body was last seen at the edge of the frame or at the wall.
    starts_on_time: share of the bodies that move in the simulator which start within half a second of its start.
    start_delay: their mean delay in seconds, negative if early; a body that never moves starts at the video's end.

    same_world: the video continues frames of that world. Otherwise it shows the caption of it alone, so that only the
    bodies' colours are known: a body's own area is its median over the video, and starts are None.
    """
    area, colour, delays = [], [], []
    for found, body in zip(tracks, known["bodies"], strict=True):
        counted = _is_expected(found, known, body)
        own = _area(known, body) if same_world else _median(found.areas[counted])
        with np.errstate(invalid="ignore"):  # nan, where it is not found, is not kept
            area += (np.abs(found.areas / own - 1) <= AREA_TOLERANCE)[counted].tolist()
            distance = np.linalg.norm(found.colours - body["colour"], axis=1)
            colour += (distance <= COLOUR_TOLERANCE)[counted].tolist()
        if same_world:
            true = _start(np.array(body["positions"])) / known["fps"]
            if true < len(body["positions"]) / known["fps"]:
                delays.append(_start(found.centres) / fps - true)
    return {
        "shape_kept": _mean(np.logical_and(area, colour)),
        "area_kept": _mean(area),
        "colour_kept": _mean(colour),
        "starts_on_time": _mean(np.abs(delays) <= PUNCTUAL_SECONDS),
        "start_delay": _mean(delays),
    }


def summary(rows: Iterable[dict[str, float | None]]) -> dict[str, float | None]:
    """Means over many videos, of those with a value."""
    rows = list(rows)
    return {key: _mean([row[key] for row in rows if row[key] is not None]) for key in FIGURES}


def _is_expected(found: Track, known: dict[str, Any], body: dict[str, Any]) -> np.ndarray:
    """The frames in which the body should be seen completely, going by where it is found: bool (T,)."""
    seen = np.flatnonzero(~np.isnan(found.areas))
    if not len(seen):
        return np.ones(len(found.areas), bool)
    frames = np.arange(len(found.areas))
    last = seen[np.maximum(np.searchsorted(seen, frames, side="right") - 1, 0)]  # the first, before it is seen
    centres = found.centres[last]
    return np.where(last == frames, is_whole(known, body, centres), is_whole(known, body, centres, OUT_OF_SIGHT))


def _area(known: dict[str, Any], body: dict[str, Any]) -> float:
    """The area of a ball, or of a box whose sides are 1.7 radii."""
    return (1.7**2 if known["kind"] == "incline" else np.pi) * body["radius"] ** 2


def _start(centres: np.ndarray) -> int:
    """The first frame in which a body at `centres` (T, 2) has moved; T if it never does."""
    seen = np.flatnonzero(~np.isnan(centres[:, 0]))
    moved = np.linalg.norm(centres[seen] - centres[seen[:1]], axis=1) > MOVED
    return int(seen[moved][0]) if moved.any() else len(centres)


def _median(values: np.ndarray) -> float:
    return float(np.nanmedian(values)) if not np.isnan(values).all() else np.nan


def _mean(values: Any) -> float | None:
    return float(np.mean(values)) if len(values) else None
