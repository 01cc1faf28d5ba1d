"""What only known physics can tell of a video: where the simulator has each body, and where the video has it.

Positions are in pixels of a 64 x 64 picture, y downwards, times in seconds; a mass goes with the radius squared.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import cv2
import numpy as np

from phantom.data.sources import worlds

# Bodies whose energy is conserved until they touch something, which the friction of a slope never lets be.
CONSERVED = ("fall", "projectile", "pendulum", "occluder")
STEADY = 0.05  # the simulated energy counts as conserved while it is this close, relatively, to where it starts
HALF_WALL = 8.0  # half the width of the wall that the worlds draw
FOUND = 0.25  # share of a body's area that must be seen
AROUND = [*worlds.BACKGROUNDS.values(), worlds.FLOOR]  # what is no body, in every world, and in some:
BESIDES = {"occluder": [worlds.OCCLUDER], "pendulum": [worlds.STRING]}


def track(frames: np.ndarray, known: dict[str, Any], number: int) -> np.ndarray:
    """Centres (T, 2) of body `number` in uint8 RGB `frames` (T, H, W, 3); nan where it is not found.

    It is the largest patch of pixels that are nearer to its colour than to any other of its world.
    """
    bodies = [body["colour"] for body in known["bodies"]]
    palette = np.array([*bodies, *AROUND, *BESIDES.get(known["kind"], [])], np.float32)
    height, width = frames.shape[1:3]
    scale = np.array([worlds.SIZE / width, worlds.SIZE / height])
    least = FOUND * np.pi * known["bodies"][number]["radius"] ** 2 / scale.prod()
    centres = np.full((len(frames), 2), np.nan)
    for t, frame in enumerate(frames):
        distance = np.linalg.norm(frame[:, :, None].astype(np.float32) - palette, axis=-1)
        mask = (distance.argmin(-1) == number).astype(np.uint8)
        count, _, stats, middles = cv2.connectedComponentsWithStats(mask)
        if count > 1:
            largest = 1 + int(np.argmax(stats[1:, cv2.CC_STAT_AREA]))
            if stats[largest, cv2.CC_STAT_AREA] >= least:
                centres[t] = (middles[largest] + 0.5) * scale
    return centres


def compare(frames: np.ndarray, fps: int, known: dict[str, Any]) -> dict[str, Any]:
    """The figures of one generated video, from uint8 RGB `frames` (T, H, W, 3) and its entry in trajectories.json.

    position_error: mean distance to the simulator's centres, over the frames in which the body is whole and found.
    missing: share of the frames that should show the body in which it is not found.
    energy_drift: mean distance of the body's energy from the one that is conserved, relative to it. momentum_drift: the
        same of two balls' horizontal momentum. None where nothing is conserved or too little is found.
    bodies; vanished: those never found in the last second, of those that should be seen then; hidden, lost: those that
        reappear from behind the wall, and those of them that never come out on that side in the video.
    """
    truth_fps = known["fps"]
    count = len(known["bodies"][0]["positions"])
    shown = frames[np.minimum(np.round(np.arange(count) * fps / truth_fps).astype(int), len(frames) - 1)]
    errors, missing, drifts = [], [], []
    vanished = hidden = lost = 0
    centres = []
    for number, body in enumerate(known["bodies"]):
        found = track(shown, known, number)
        true, visible = np.array(body["positions"]), np.array(body["visible"])
        seen = ~np.isnan(found[:, 0])
        whole = visible & _is_whole(known, body, true)
        errors += np.linalg.norm(found - true, axis=1)[whole & seen].tolist()
        missing += (~seen)[visible].tolist()
        last = visible & (np.arange(count) >= count - truth_fps)
        vanished += bool(last.any() and not seen[last].any())
        again = _reappears(visible)
        hidden += bool(again.any())
        across = (found[:, 0] > worlds.SIZE / 2) == (true[:, 0] > worlds.SIZE / 2)
        lost += bool(again.any() and not (seen & across)[again].any())
        found[~whole] = np.nan
        centres.append((found, np.where(whole[:, None], true, np.nan)))
        if known["kind"] in CONSERVED:
            drifts += _energy_drift(*centres[-1], known, body)
    return {
        "kind": known["kind"],
        "unseen": known["unseen"],
        "position_error": _mean(errors),
        "missing": _mean(missing),
        "energy_drift": _mean(drifts),
        "momentum_drift": _mean(_momentum_drift(centres, known)) if len(centres) == 2 else None,
        "bodies": len(known["bodies"]),
        "vanished": vanished,
        "hidden": hidden,
        "lost": lost,
    }


def summary(rows: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Means and counts over the figures of many videos; `trained` and `unseen` part those that go beyond training."""
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


def _is_whole(known: dict[str, Any], body: dict[str, Any], true: np.ndarray) -> np.ndarray:
    """Whether no part of the body is outside of the picture or behind the wall: bool (T,)."""
    reach = body["radius"] * (1.21 if known["kind"] == "incline" else 1.0)  # a box reaches further at its corners
    whole = ((true >= reach) & (true <= worlds.SIZE - reach)).all(1)
    if known["kind"] == "occluder":
        whole &= np.abs(true[:, 0] - worlds.SIZE / 2) >= HALF_WALL + reach
    return whole


def _reappears(visible: np.ndarray) -> np.ndarray:
    """The frames in which a body is seen again after it was hidden: bool (T,)."""
    was_seen = np.maximum.accumulate(visible)
    was_hidden = np.maximum.accumulate(was_seen & ~visible)
    return visible & was_hidden


def _energy(centres: np.ndarray, known: dict[str, Any], body: dict[str, Any]) -> np.ndarray:
    """g h + v^2 / 2 of each frame (T,) but the ends, which are nan, with velocities by central differences."""
    velocity = np.full_like(centres, np.nan)
    velocity[1:-1] = (centres[2:] - centres[:-2]) * known["fps"] / 2
    lowest = known["floor"] - body["radius"]
    if known["pivot"]:
        lowest = known["pivot"][1] + np.linalg.norm(np.array(body["positions"][0]) - known["pivot"])
    return known["gravity"] * (lowest - centres[:, 1]) + (velocity**2).sum(1) / 2


def _energy_drift(found: np.ndarray, true: np.ndarray, known: dict[str, Any], body: dict[str, Any]) -> list[float]:
    """|E / E_0 - 1| in each frame of the first stretch in which the simulator conserves the energy."""
    simulated, energy = _energy(true, known, body), _energy(found, known, body)
    present = np.flatnonzero(~np.isnan(simulated))
    if not len(present):
        return []
    conserved = simulated[present[0]]
    off = present[np.abs(simulated[present] / conserved - 1) > STEADY]
    steady = present[present < off[0]] if len(off) else present
    drift = np.abs(energy[steady] / conserved - 1)
    return drift[~np.isnan(drift)].tolist()


def _momentum_drift(centres: Sequence[tuple[np.ndarray, np.ndarray]], known: dict[str, Any]) -> list[float]:
    """|p / p_0 - 1| of two bodies' horizontal momentum in each frame in which both are whole and found."""

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
