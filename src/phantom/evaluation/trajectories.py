"""Compares the trajectories of bodies in a generated video with those of the simulator.

Positions are in pixels of a 64 x 64 frame, y pointing down; times are in seconds; mass is proportional to the radius
squared.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np

from phantom.data.sources import worlds

# Worlds in which energy is conserved until the first contact (not on an incline, which has friction).
CONSERVED = ("fall", "projectile", "pendulum", "occluder")
GRAVITY = (worlds.UNSEEN["gravity"][0][0], worlds.UNSEEN["gravity"][1][1])  # in any world
LEAST_SPEEDS = 3  # frames with a speed that an energy is fitted to
STILL = 1.0  # pixels per second: a body that is slower stands still
TOUCH = 1.0  # pixels from the floor at which a body touches it
FOUND = 0.25  # share of a body's area that must be visible for it to be found
MISS = 16.0  # pixels: the error of a body that is not found, and the largest of one that is
SCENERY = [*worlds.BACKGROUNDS.values(), worlds.FLOOR]  # colours that are not bodies, in all worlds
EXTRA_SCENERY = {"occluder": [worlds.OCCLUDER], "pendulum": [worlds.STRING]}  # likewise, by kind of world


@dataclass(frozen=True)
class Track:
    """A body in every frame of a video, nan where it is not found.

    centres (T, 2) and areas (T,) in pixels of 64 x 64; colours (T, 3): the median RGB of its pixels, 0 to 255.
    """

    centres: np.ndarray
    areas: np.ndarray
    colours: np.ndarray


def track_all(frames: np.ndarray, known: dict[str, Any]) -> list[Track]:
    """The tracks of all bodies of a world in uint8 RGB `frames` (T, H, W, 3)."""
    return [track(frames, known, number) for number in range(len(known["bodies"]))]


def track(frames: np.ndarray, known: dict[str, Any], number: int) -> Track:
    """Finds body `number` in uint8 RGB `frames` (T, H, W, 3).

    A body is the largest connected component of pixels closer to its colour than to any other colour of its world.
    """
    bodies = [body["colour"] for body in known["bodies"]]
    palette = np.array([*bodies, *SCENERY, *EXTRA_SCENERY.get(known["kind"], [])], np.float32)
    height, width = frames.shape[1:3]
    scale = np.array([worlds.SIZE / width, worlds.SIZE / height])
    least = FOUND * np.pi * known["bodies"][number]["radius"] ** 2 / scale.prod()
    found = Track(*(np.full((len(frames), *shape), np.nan) for shape in ((2,), (), (3,))))
    for t, frame in enumerate(frames):
        distance = np.linalg.norm(frame[:, :, None].astype(np.float32) - palette, axis=-1)
        mask = (distance.argmin(-1) == number).astype(np.uint8)
        count, labels, stats, middles = cv2.connectedComponentsWithStats(mask)
        if count > 1:
            largest = 1 + int(np.argmax(stats[1:, cv2.CC_STAT_AREA]))
            if stats[largest, cv2.CC_STAT_AREA] >= least:
                found.centres[t] = (middles[largest] + 0.5) * scale
                found.areas[t] = stats[largest, cv2.CC_STAT_AREA] * scale.prod()
                found.colours[t] = np.median(frame[labels == largest], axis=0)
    return found


def compare(tracks: Sequence[Track], fps: int, known: dict[str, Any]) -> dict[str, Any]:
    """The figures of a generated video, from the tracks of its bodies and its entry in trajectories.json.

    position_error: mean distance to the simulated centres, over frames that should show the whole body; at most MISS,
        which is also the error of a body that is not found: a video is not better for showing less.
    missing: share of the frames that should show the body in which it is not found.
    energy_drift: departure of the body's energy from its own mean, 0 to 1 (`_energy_drift`), before it touches
        anything; 1 where too little is seen of it, but for an early contact, though the simulator shows enough. Not
        measured where further balls may hit it.
    momentum_drift: mean relative departure of the horizontal momentum of two balls from the simulator's. None if
        nothing is conserved or too little is found.
    bodies: number of bodies. vanished: those visible in the simulator's last second but never found there. hidden:
        those that reappear from behind the wall. lost: hidden bodies that never come out on that side in the video.
    """
    truth_fps = known["fps"]
    count = len(known["bodies"][0]["positions"])
    shown = np.minimum(np.round(np.arange(count) * fps / truth_fps).astype(int), len(tracks[0].areas) - 1)
    errors, missing, drifts = [], [], []
    vanished = hidden = lost = 0
    centres = []
    for of_body, body in zip(tracks, known["bodies"], strict=True):
        found = of_body.centres[shown]
        true, visible = np.array(body["positions"]), np.array(body["visible"])
        seen = ~np.isnan(found[:, 0])
        whole = visible & is_whole(known, body, true)
        distance = np.linalg.norm(found - true, axis=1)
        errors += np.where(seen, np.minimum(distance, MISS), MISS)[whole].tolist()
        missing += (~seen)[visible].tolist()
        last = visible & (np.arange(count) >= count - truth_fps)
        vanished += bool(last.any() and not seen[last].any())
        again = _reappears(visible)
        hidden += bool(again.any())
        across = (found[:, 0] > worlds.SIZE / 2) == (true[:, 0] > worlds.SIZE / 2)
        lost += bool(again.any() and not (seen & across)[again].any())
        if known["kind"] in CONSERVED and len(tracks) == 1:
            drift = _energy_drift(found, known, body)
            if drift is None and not _touches(found, known, body) and _energy_drift(true, known, body) is not None:
                drift = 1.0
            drifts += [drift] if drift is not None else []
        found[~whole] = np.nan
        centres.append((found, np.where(whole[:, None], true, np.nan)))
    return {
        "kind": known["kind"],
        "unseen": known["unseen"],
        "position_error": _mean(errors),
        "missing": _mean(missing),
        "energy_drift": _mean(drifts),
        "momentum_drift": _mean(_momentum_drift(centres, known))
        if known["kind"] == "collision" and len(tracks) == 2
        else None,
        "bodies": len(known["bodies"]),
        "vanished": vanished,
        "hidden": hidden,
        "lost": lost,
    }


def summary(rows: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Means and counts over many videos; position errors also for `trained` and `unseen` parameters separately."""
    rows = list(rows)
    means = ("position_error", "missing", "energy_drift", "momentum_drift")
    counts = ("bodies", "vanished", "hidden", "lost")
    groups = {"trained": [r for r in rows if not r["unseen"]], "unseen": [r for r in rows if r["unseen"]]}
    return {
        **{key: _mean([row[key] for row in rows if row[key] is not None]) for key in means},
        **{
            f"position_error_{name}": _mean([r["position_error"] for r in part if r["position_error"] is not None])
            for name, part in groups.items()
        },
        **{key: sum(row[key] for row in rows) for key in counts},
        "per_scenario": rows,
    }


def is_whole(known: dict[str, Any], body: dict[str, Any], centres: np.ndarray, margin: float = 0.0) -> np.ndarray:
    """Whether a body at `centres` (T, 2) is fully inside the frame and not behind the wall, by `margin`: bool (T,)."""
    corners = 1.21 if known["kind"] == "incline" else 1.0  # those of a box extend further
    reach = corners * body["radius"] + margin
    whole = ((centres >= reach) & (centres <= worlds.SIZE - reach)).all(1)
    if known["kind"] == "occluder":
        whole &= np.abs(centres[:, 0] - worlds.SIZE / 2) >= worlds.HALF_WALL + reach
    return whole


def _reappears(visible: np.ndarray) -> np.ndarray:
    """The frames in which a body is visible again after being hidden: bool (T,)."""
    was_seen = np.maximum.accumulate(visible)
    was_hidden = np.maximum.accumulate(was_seen & ~visible)
    return visible & was_hidden


def _energy_drift(centres: np.ndarray, known: dict[str, Any], body: dict[str, Any]) -> float | None:
    """Mean departure of K + g h from its mean, in units of the mean of K = v^2 / 2, with the g that fits best.

    centres: those found in a video (T, 2). Until the first contact; g is within `GRAVITY`, so that what moves on
    through the air without falling conserves nothing. At most 1, which is also that of a body that stands still.
    None if too few frames show it.
    """
    free = np.where(is_whole(known, body, centres)[:, None], centres, np.nan)
    free[_first_contact(free[:, 1], known, body) :] = np.nan
    velocity = (free[2:] - free[:-2]) * known["fps"] / 2
    kinetic, height = (velocity**2).sum(1) / 2, -free[1:-1, 1]
    there = ~np.isnan(kinetic + height)
    if there.sum() < LEAST_SPEEDS:
        return None
    kinetic, height = kinetic[there], height[there]
    if kinetic.mean() < STILL**2 / 2:
        return 1.0
    rise = height - height.mean()
    gravity = np.clip(-(rise * kinetic).sum() / max((rise**2).sum(), 1e-9), *GRAVITY)
    energy = kinetic + gravity * height
    return float(min(np.abs(energy - energy.mean()).mean() / kinetic.mean(), 1.0))


def _touches(centres: np.ndarray, known: dict[str, Any], body: dict[str, Any]) -> bool:
    return _first_contact(centres[:, 1], known, body) < len(centres)


def _first_contact(y: np.ndarray, known: dict[str, Any], body: dict[str, Any]) -> int:
    """The first frame after a body at heights `y` (T,), nan where it is not found, has touched the floor.

    A bounce between two frames shows in a fall that would have reached the floor, and did not go on.
    """
    if known["kind"] not in ("fall", "projectile"):
        return len(y)
    lowest = known["floor"] - body["radius"] - TOUCH
    step = np.diff(y, prepend=np.nan)
    due = np.roll(y + step, 1) >= lowest  # by the step before
    bounced = due & (step < np.roll(step, 1))
    bounced[:2] = False
    return int(np.argmax(touched)) if (touched := bounced | (y >= lowest)).any() else len(y)


def _momentum_drift(centres: Sequence[tuple[np.ndarray, np.ndarray]], known: dict[str, Any]) -> list[float]:
    """|p / p_0 - 1| of the horizontal momentum of two bodies, per frame in which both are fully visible and found."""

    def momentum(which: int) -> np.ndarray:
        moved = [(pair[which][2:, 0] - pair[which][:-2, 0]) * body["radius"] ** 2 for pair, body in masses]
        return np.sum(moved, axis=0) * known["fps"] / 2

    masses = list(zip(centres, known["bodies"], strict=True))
    found, true = momentum(0), momentum(1)
    if np.isnan(true).all():
        return []
    drift = np.abs(found / np.nanmean(true) - 1)
    return drift[~np.isnan(drift)].tolist()


def _mean(values: Sequence[float]) -> float | None:
    return float(np.mean(values)) if len(values) else None
