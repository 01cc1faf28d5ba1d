"""Predictions of a simulated world that need no model: from its condition frames to the 5 s after them.

Videos are uint8 RGB (T, H, W, 3) at the worlds' rate. What the condition frames show of a world (its kind, look, size,
and where bodies are) is taken from its specification, as a perfect eye would read it off the pixels.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

import cv2
import numpy as np

from phantom.baselines.simulator import estimate
from phantom.baselines.simulator.simulation import State, continue_from
from phantom.data.sources import worlds
from phantom.data.sources.worlds import Scene, WorldSpec
from phantom.data.sources.worlds_files import CONDITION_SECONDS, TEST_SECONDS, TRUTH_SIZE, released_early

TITLES = {
    "last_frame": ("Last frame held", "nothing moves"),
    "constant_velocity": ("Constant velocity", "of the last two condition frames"),
    "nearest_clip": ("Nearest clip", "the most similar training clip goes on"),
    "simulator": ("Simulator", "a world fitted to the condition frames"),
    "simulator_pixels": ("Simulator, from pixels", "bodies, motion and laws read off the condition frames"),
    "simulator_state": ("Simulator, true state", "of the last condition frame, with the true laws"),
    "other_take": ("Other take", "the experiment again, slightly displaced"),
}
DRAWS = 256  # worlds among which the simulator chooses
DRAW_SEED = 600_000  # added to evaluate.seed; no clip or scenario is drawn with it


def last_frame(condition: np.ndarray, count: int) -> np.ndarray:
    """The last condition frame held for `count` frames."""
    return np.repeat(condition[-1:], count, axis=0)


def constant_velocity(condition: np.ndarray, spec: WorldSpec) -> np.ndarray:
    """Each body moves on, through everything, with its velocity between the last two frames that show its centre.

    A body that fewer than two condition frames show stays where it is. Drawn by the worlds' renderer.
    """
    given, count = _frames(spec)
    scene = worlds.simulate(spec, given)
    positions = np.repeat(scene.positions[-1:], count, axis=0)
    for body in range(positions.shape[1]):
        shown = np.flatnonzero(worlds.is_visible(scene, body))
        if len(shown := shown[shown >= given - len(condition)]) > 1:
            before, last = shown[-2:]
            step = (scene.positions[last, body] - scene.positions[before, body]) / (last - before)
            later = np.arange(given, given + count)[:, None] - last
            positions[:, body] = scene.positions[last, body] + later * step
    angles = np.repeat(scene.angles[-1:], count, axis=0)
    moved = Scene(spec, positions, angles, np.zeros_like(positions))
    return _rendered(moved, 0, count, condition)


def simulated_anew(condition: np.ndarray, spec: WorldSpec, seed: int, number: int) -> np.ndarray:
    """The simulator that sees only the condition frames: what they do not show of scenario `number` is drawn anew.

    Of `DRAWS` worlds that look like `spec` the one whose frames are nearest to the condition goes on. Parameters are
    drawn from the training ranges. If the first condition frame shows the start, the start is kept, and the speed,
    which the later frames show, may lie outside of its range.
    """
    given, count = _frames(spec)
    first = given - len(condition)
    drawn = [_draw_alike(spec, first, seed, number * DRAWS + n) for n in range(DRAWS)]
    distances = [
        _distance(_rendered(worlds.simulate(one, given), first, len(condition), condition), condition) for one in drawn
    ]
    chosen = worlds.simulate(drawn[int(np.argmin(distances))])
    return _rendered(chosen, given, count, condition)


def simulated_from_pixels(condition: np.ndarray, fps: int) -> np.ndarray:
    """The simulator that sees nothing but the condition frames (`baselines.simulator`); what it cannot read is held."""
    count = TEST_SECONDS * fps
    scene = estimate.predict(condition, count, fps)
    return last_frame(condition, count) if scene is None else _rendered(scene, 0, count, condition)


def simulated_from_state(condition: np.ndarray, spec: WorldSpec) -> np.ndarray:
    """The simulator that knows the world and its bodies in the last condition frame, but for their spins."""
    given, count = _frames(spec)
    scene, last = worlds.simulate(spec, given), given - 1
    state = State(scene.positions[last], scene.velocities[last], scene.angles[last], np.zeros(scene.angles.shape[1]))
    return _rendered(continue_from(spec, state, 1 + count), 1, count, condition)


def nearest_continuations(
    conditions: Sequence[np.ndarray], clips: Iterable[np.ndarray], longest: int, ahead: int
) -> list[np.ndarray]:
    """For each condition how the nearest clip goes on: where its frames differ least in their squares.

    clips: uint8 RGB (F, H, W, 3), read one by one. longest: frames of the longest. Only places that are followed by
    `ahead` frames are compared, or by what is left of the longest clip; the last frame is held where a clip ends.
    """
    found = [(np.inf, last_frame(condition, ahead)) for condition in conditions]
    for clip in clips:
        for number, condition in enumerate(conditions):
            count = min(len(condition), longest)
            last = len(clip) - min(ahead, longest - count)
            for end in range(count, last + 1):
                distance = _distance(clip[end - count : end], condition[-count:])
                if distance < found[number][0]:
                    picks = np.minimum(np.arange(end, end + ahead), len(clip) - 1)
                    found[number] = distance, clip[picks]
    return [continuation for _, continuation in found]


def _draw_alike(spec: WorldSpec, first: int, seed: int, index: int) -> WorldSpec:
    """World `index` with what frames from `first` to the last condition frame show of `spec`."""
    drawn = released_early(worlds.draw_spec(DRAW_SEED + seed, index, kind=spec.kind))
    look = {
        name: getattr(spec, name)
        for name in (
            *("colour", "second_colour", "background", "floor", "radius", "second_radius", "direction"),
            *("fps", "others"),
        )
    }
    if spec.release > first / spec.fps:  # at rest in the first of them
        rng = np.random.default_rng([DRAW_SEED + seed, index, 3])
        speed = float(rng.uniform(worlds.UNSEEN["speed"][0][0], worlds.UNSEEN["speed"][1][1]))
        return replace(drawn, **look, start=spec.start, angle=spec.angle, speed=speed)
    x, y = drawn.start
    x = x if drawn.direction == spec.direction else worlds.SIZE - x
    if spec.kind in ("projectile", "collision", "occluder"):  # y is measured from a ball that lies on the floor
        y += (spec.floor - spec.radius) - (drawn.floor - drawn.radius)
    if spec.kind == "pendulum":  # the pivot
        return replace(drawn, **look, start=spec.start)
    angle = spec.angle if spec.kind == "incline" else drawn.angle  # of the slope
    return replace(drawn, **look, start=(x, y), angle=angle)


def _frames(spec: WorldSpec) -> tuple[int, int]:
    """How many are given, of which a condition is the last ones, and how many are predicted."""
    return CONDITION_SECONDS * spec.fps, TEST_SECONDS * spec.fps


def _rendered(scene: Scene, first: int, count: int, like: np.ndarray) -> np.ndarray:
    """Frames `first` to `first + count` at the size of the video `like`, downscaled like its frames."""
    large = worlds.render(scene, first, count, TRUTH_SIZE)
    return np.stack([cv2.resize(frame, like.shape[2:0:-1], interpolation=cv2.INTER_AREA) for frame in large])


def _distance(a: np.ndarray, b: np.ndarray) -> float:
    """The sum of squared differences of two uint8 videos of the same shape (exact, of integers)."""
    return cv2.norm(a.reshape(len(a), -1), b.reshape(len(b), -1), cv2.NORM_L2SQR)
