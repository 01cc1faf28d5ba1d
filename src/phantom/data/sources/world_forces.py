"""Pushes and winds on the bodies of the simulated worlds, and their words in captions.

A push is an impulse at the centre of a body: at magnitude 1 a ball of mean radius (6 px, mass 1.44) gains 13.9 px/s, a
heavier one less. A wind is an acceleration of all bodies that are free to move, 6 px/s^2 at magnitude 1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import pymunk

IMPULSE = 20.0  # of a push of magnitude 1, in px/s of a body of mass 1
ACCELERATION = 6.0  # of a wind of magnitude 1, in px/s^2
MAGNITUDE = (0.3, 1.0)
WAYS = ("right", "up right", "up", "up left", "left", "down left", "down", "down right")


@dataclass(frozen=True)
class WorldForce:
    """A push on one body, or a wind. Bodies at rest are held until it begins, and then get no launch of their own."""

    kind: Literal["push", "wind"]
    angle: float  # degrees: 0 right, 90 up
    magnitude: float
    frame: int  # of the scene, at which it begins to act; a wind acts as soon as bodies are free
    body: int  # that is pushed
    at_rest: bool
    in_caption: bool

    @property
    def wind(self) -> tuple[float, float]:
        """The acceleration that it adds, in px/s^2, y down."""
        return self._vector(ACCELERATION) if self.kind == "wind" else (0.0, 0.0)

    def push(self, frame: int, bodies: list[pymunk.Body]) -> None:
        """Applies the impulse, if `frame` is the one in which it acts."""
        if self.kind == "push" and frame == self.frame:
            body = bodies[self.body]
            body.apply_impulse_at_world_point(self._vector(IMPULSE), body.position)

    def words(self, thing: str) -> str:
        """What a caption says of it; `thing` is what is pushed."""
        way = WAYS[round(self.angle / 45) % len(WAYS)]
        return f"a wind blows {way}" if self.kind == "wind" else f"{thing} pushed {way}"

    def _vector(self, strength: float) -> tuple[float, float]:
        size, angle = self.magnitude * strength, math.radians(self.angle)
        return size * math.cos(angle), -size * math.sin(angle)
