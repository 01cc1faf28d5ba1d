"""How bodies can move in each kind of world: the few numbers that say where they are, and the laws that act.

Places are those numbers, one after the other; velocities are theirs. Lengths are in pixels of 64 x 64, y points down.

Legend: N bodies, P places.
"""

from __future__ import annotations

import math

import numpy as np

from phantom.baselines.simulator.segmentation import STRING_LENGTH, Reading
from phantom.baselines.simulator.simulation import State
from phantom.data.sources import worlds
from phantom.data.sources.worlds import WorldSpec

ON_FLOOR = 1.0  # px from the floor up to which a body lies on it


class Motion:
    """A free ball: x and y."""

    laws: tuple[str, ...] = ("gravity", "restitution")
    units = np.ones(2)  # pixels of a place, (P,)

    def __init__(self, reading: Reading) -> None:
        self.spec, self.angles = reading.spec, reading.angles

    def places(self, centres: np.ndarray) -> np.ndarray:
        """Centres (N, 2) -> places (P,)."""
        return centres.ravel()

    def accelerations(self, spec: WorldSpec, places: np.ndarray) -> np.ndarray:
        """Of the places (P,), per s^2, before a contact."""
        return np.array([0.0, spec.gravity])

    def state(self, spec: WorldSpec, places: np.ndarray, velocities: np.ndarray) -> State:
        """The state of the bodies."""
        return State(places[None], velocities[None], np.zeros(1), np.zeros(1))


class _Rolling(Motion):
    """Balls on the floor: x of each."""

    laws = ()

    def __init__(self, reading: Reading) -> None:
        super().__init__(reading)
        self.radii = np.array([self.spec.radius, self.spec.second_radius])[: len(self.angles)]
        self.units = np.ones(len(self.radii))

    def places(self, centres: np.ndarray) -> np.ndarray:
        return centres[:, 0]

    def accelerations(self, spec: WorldSpec, places: np.ndarray) -> np.ndarray:
        return np.zeros_like(places)

    def state(self, spec: WorldSpec, places: np.ndarray, velocities: np.ndarray) -> State:
        none = np.zeros(len(places))
        return State(
            np.stack([places, spec.floor - self.radii], 1), np.stack([velocities, none], 1), none.copy(), none.copy()
        )


class _Swinging(Motion):
    """A ball on a string: its angle from the vertical, counterclockwise."""

    laws = ("gravity",)
    units = np.full(1, 1 / STRING_LENGTH)

    def places(self, centres: np.ndarray) -> np.ndarray:
        x, y = centres[0] - self.spec.start
        return np.array([math.atan2(x, y)])

    def accelerations(self, spec: WorldSpec, places: np.ndarray) -> np.ndarray:
        return -spec.gravity / (STRING_LENGTH + spec.radius) * np.sin(places)

    def state(self, spec: WorldSpec, places: np.ndarray, velocities: np.ndarray) -> State:
        length, (angle,), (speed,) = STRING_LENGTH + spec.radius, places, velocities
        away = np.array([[math.sin(angle), math.cos(angle)]])
        along = np.array([[math.cos(angle), -math.sin(angle)]])
        # The rod turns the ball: its angle grows clockwise on the screen, where y points down.
        return State(np.array(spec.start) + length * away, length * speed * along, np.zeros(1), np.zeros(1))


class _Sliding(Motion):
    """A box on the slope, then on the floor: the way from the top of the slope."""

    laws = ("gravity", "friction")
    units = np.ones(1)

    def __init__(self, reading: Reading) -> None:
        super().__init__(reading)
        top, foot = (np.array(point) for point in worlds._slope(self.spec))
        self.top, self.foot, self.length = top, foot, float(np.linalg.norm(foot - top))
        self.along = (foot - top) / self.length
        self.half = self.spec.radius * 0.85
        # The slope is as thick as its segment, a pixel; the floor's is below the line that is drawn.
        self.off = np.array([self.along[1], -self.along[0]]) * self.spec.direction * (self.half + 1)

    def places(self, centres: np.ndarray) -> np.ndarray:
        beyond = (centres[0, 0] - self.foot[0]) * self.spec.direction
        on_floor = abs(centres[0, 1] + self.half - self.spec.floor) < ON_FLOOR and beyond > 0
        return np.array([self.length + beyond if on_floor else (centres[0] - self.off - self.top) @ self.along])

    def accelerations(self, spec: WorldSpec, places: np.ndarray) -> np.ndarray:
        down = spec.gravity * (abs(self.along[1]) - spec.friction * abs(self.along[0]))
        return np.array([down if places[0] < self.length else -spec.gravity * spec.friction])

    def state(self, spec: WorldSpec, places: np.ndarray, velocities: np.ndarray) -> State:
        (way,), (speed,) = places, velocities
        if way < self.length:
            tilt = spec.direction * spec.angle * 0.7
            position, towards = self.top + way * self.along + self.off, self.along
        else:
            beyond = self.foot[0] + (way - self.length) * spec.direction
            position, towards, tilt = np.array([beyond, spec.floor - self.half]), np.array([spec.direction, 0.0]), 0.0
        return State(position[None], speed * towards[None], np.array([tilt]), np.zeros(1))


_MOTIONS = {
    "fall": Motion,
    "projectile": Motion,
    "collision": _Rolling,
    "occluder": _Rolling,
    "pendulum": _Swinging,
    "incline": _Sliding,
}


def motion_of(reading: Reading) -> Motion:
    """The motions of the bodies of a world that was read."""
    return _MOTIONS[reading.spec.kind](reading)
