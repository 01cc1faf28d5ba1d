"""From condition frames to what happens after them: the simulator that sees nothing but pixels.

Motion and laws are those whose simulation passes nearest to the centres that were read off the frames: the maximum a
posteriori estimate, with noise of `CENTRE_NOISE` pixels and normal priors around the middle of the training ranges.
Where the first frames show the bodies at rest, they are released at a moment that is estimated too; else their
velocities are estimated. One frame shows neither, so everything rests in it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
from scipy.optimize import least_squares

from phantom.baselines.simulator.motions import Motion, motion_of
from phantom.baselines.simulator.segmentation import Reading, read_world
from phantom.baselines.simulator.simulation import State, continue_from, release_from
from phantom.data.sources.worlds import FPS, Scene, WorldSpec

CENTRE_NOISE = 0.1  # px: standard deviation of a centre that was read
PLACE_PRIOR, VELOCITY_PRIOR = 0.3, 20.0  # px and px/s around the first guess
RELEASE_PRIOR = 0.25  # s around the frame before the first with motion
UNSEEN_MOTION = 0.75  # s before that one in which a slow body may have moved, by less than STILL
# Around the reading's own values: half of the width of the training ranges.
LAW_PRIORS = {"gravity": 3.0, "restitution": 0.15, "friction": 0.1, "speed": 3.0}
LIMITS = {"gravity": (1.0, 40.0), "restitution": (0.0, 1.0), "friction": (0.0, 1.0), "speed": (0.0, 40.0)}
STILL = 0.4  # px from the first frame up to which a body has not moved
SIDEWAYS = 1.5  # px that a ball moves to the side if it was thrown
EVALUATIONS = 20  # of the optimiser, at most; each takes a simulation per unknown


def predict(frames: np.ndarray, count: int, fps: int = FPS) -> Scene | None:
    """The `count` frames after uint8 RGB frames (T, H, W, 3), H = W, of a simulated world at `fps`.

    None if the frames do not show its bodies.
    """
    found = read_world(frames)
    return None if found is None else predict_reading(replace(found, spec=replace(found.spec, fps=fps)), count)


def predict_reading(found: Reading, count: int) -> Scene | None:
    """`predict` of what was read off the frames, by this package or by any other segmentation.

    Laws are estimated around those of its spec. None if a body is never seen.
    """
    if np.isnan(found.centres[..., 0]).all(0).any():
        return None
    start = _first_moving(found.centres)
    if start is None:
        motion = motion_of(found)
        places = motion.places(_first_seen(found.centres[::-1]))
        scene = continue_from(found.spec, motion.state(found.spec, places, np.zeros_like(places)), 1 + count)
    elif start == 0:
        scene = _fit_state(found, count)
    else:
        scene = _fit_release(found, start, count)
    return Scene(scene.spec, scene.positions[-count:], scene.angles[-count:], scene.velocities[-count:])


def _fit_release(found: Reading, start: int, count: int) -> Scene:
    """The scene of all frames and `count` more, of bodies that rest before frame `start` and are pushed then."""
    found = _with_push(found, start)
    motion, centres, fps = motion_of(found), found.centres, found.spec.fps
    still = max(1, start - round(UNSEEN_MOTION * fps) + 1)
    resting = np.array([np.nanmedian(of, axis=0) for of in centres[:still].transpose(1, 0, 2)])
    laws = (*motion.laws, *(("speed",) if found.spec.kind in ("projectile", "collision", "occluder") else ()))
    places = motion.places(resting)

    def world(values: np.ndarray) -> tuple[WorldSpec, State]:
        release = float(np.clip(values[0], (start - 1) / fps - UNSEEN_MOTION, start / fps))
        spec = replace(_ruled(found.spec, laws, values[1:]), release=release)
        return spec, motion.state(spec, places, np.zeros_like(places))

    def simulate(values: np.ndarray, frames: int) -> Scene:
        return release_from(*world(values), frames)

    guess = np.array([(start - 1) / fps, *(getattr(found.spec, law) for law in laws)])
    scales = np.array([RELEASE_PRIOR, *(LAW_PRIORS[law] for law in laws)])
    steps = np.array([0.2, *[0.01] * len(laws)])  # the simulation's own step is 1/60 of the release's prior
    return simulate(_nearest(simulate, guess, scales, steps, centres), len(centres) + count)


def _fit_state(found: Reading, count: int) -> Scene:
    """The scene of all frames and `count` more, of bodies that move in the first."""
    motion, centres, spec = motion_of(found), found.centres, found.spec
    places = motion.places(_first_seen(centres))
    size = len(places)

    def simulate(values: np.ndarray, frames: int) -> Scene:
        ruled = _ruled(spec, motion.laws, values[2 * size :])
        return continue_from(ruled, motion.state(ruled, values[:size], values[size : 2 * size]), frames)

    guess = np.concatenate(
        [places, _first_velocities(motion, spec, centres), [getattr(spec, law) for law in motion.laws]]
    )
    laws = [LAW_PRIORS[law] for law in motion.laws]
    scales = np.concatenate([PLACE_PRIOR * motion.units, VELOCITY_PRIOR * motion.units, laws])
    best = _nearest(simulate, guess, scales, np.full(len(guess), 0.001), centres)
    return simulate(best, len(centres) + count)


def _nearest(
    simulate: Callable[[np.ndarray, int], Scene],
    guess: np.ndarray,
    scales: np.ndarray,
    steps: np.ndarray,
    centres: np.ndarray,
) -> np.ndarray:
    """The unknowns, by their priors `guess` and `scales`, whose simulation passes nearest to `centres` (T, N, 2).

    steps: of the numerical derivatives, in units of the scales.
    """
    seen = ~np.isnan(centres)

    def misfit(units: np.ndarray) -> np.ndarray:
        positions = simulate(guess + scales * (units - 1), len(centres)).positions
        return np.concatenate([(positions - centres)[seen] / CENTRE_NOISE, units - 1])

    # Counted from 1, since the optimiser's steps are relative.
    found = least_squares(misfit, np.ones(len(guess)), diff_step=steps, max_nfev=EVALUATIONS)
    return guess + scales * (found.x - 1)


def _ruled(spec: WorldSpec, laws: tuple[str, ...], values: np.ndarray) -> WorldSpec:
    limited = {law: float(np.clip(value, *LIMITS[law])) for law, value in zip(laws, values, strict=True)}
    return replace(spec, **limited)  # type: ignore[arg-type]


def _with_push(found: Reading, start: int) -> Reading:
    """The reading with the way in which the first body to move was pushed; that body comes first."""
    centres, spec = found.centres, found.spec
    moved = np.nan_to_num(centres[start:] - _first_seen(centres))  # (T, N, 2)
    if spec.kind == "collision" and abs(moved[0, 1, 0]) > abs(moved[0, 0, 0]):
        spec = replace(
            spec,
            colour=spec.second_colour,
            second_colour=spec.colour,
            radius=spec.second_radius,
            second_radius=spec.radius,
        )
        centres, moved = centres[:, ::-1], moved[:, ::-1]
    sideways = float(moved[np.abs(moved[:, 0, 0]).argmax(), 0, 0])
    if spec.kind == "fall" and abs(sideways) > SIDEWAYS:
        spec = replace(spec, kind="projectile")
    if spec.kind in ("projectile", "collision", "occluder"):
        spec = replace(spec, direction=1 if sideways > 0 else -1)
    return replace(found, spec=spec, centres=centres)


def _first_velocities(motion: Motion, spec: WorldSpec, centres: np.ndarray) -> np.ndarray:
    """The velocities of the places in the first frame, by the second: with a constant acceleration between them."""
    there = np.flatnonzero(~np.isnan(centres).any((1, 2)))
    if len(there) < 2:
        return np.zeros_like(motion.places(_first_seen(centres)))
    first, second = (motion.places(centres[t]) for t in there[:2])
    seconds = (there[1] - there[0]) / spec.fps
    return (second - first) / seconds - motion.accelerations(spec, first) * seconds / 2


def _first_moving(centres: np.ndarray) -> int | None:
    """The first frame from which a body moves; None if none ever does, 0 if it does from the first on."""
    moved = (np.nan_to_num(np.linalg.norm(centres - _first_seen(centres), axis=2)) > STILL).any(1)
    if not moved.any():
        return None
    first = int(np.argmax(moved))
    return 0 if first == 1 else first


def _first_seen(centres: np.ndarray) -> np.ndarray:
    """Where each body is first seen, (N, 2)."""
    return np.array([of[~np.isnan(of[:, 0])][0] for of in centres.transpose(1, 0, 2)])
