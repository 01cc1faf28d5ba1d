"""Simulates a world on from any state, by its own laws."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pymunk

from phantom.data.sources import worlds
from phantom.data.sources.worlds import Scene, WorldSpec


@dataclass(frozen=True)
class State:
    """N bodies at a moment: positions (N, 2) in px, velocities (N, 2), angles (N,) in rad, spins (N,); per s."""

    positions: np.ndarray
    velocities: np.ndarray
    angles: np.ndarray
    spins: np.ndarray


def continue_from(spec: WorldSpec, state: State, frames: int) -> Scene:
    """The world `spec` from `state` on, which is that of the first of `frames` frames at its rate.

    The laws are those of `worlds.simulate`, with the scenery, gravity, elasticity, friction and radii of `spec`; its
    start, speed and release mean nothing.
    """

    def set_state(frame: int, space: pymunk.Space, bodies: list[pymunk.Body]) -> None:
        if frame == 1:  # in frame 0 the world is as it was built, and released
            _place(space, bodies, state)

    scene = worlds.simulate(replace(spec, release=0.0), frames + 1, set_state)
    return Scene(spec, scene.positions[1:], scene.angles[1:], scene.velocities[1:])


def release_from(spec: WorldSpec, state: State, frames: int) -> Scene:
    """The world `spec` whose bodies rest in `state` until its release and are pushed then as its kind and speed say."""

    def set_state(frame: int, space: pymunk.Space, bodies: list[pymunk.Body]) -> None:
        if frame == 0:
            _place(space, bodies, state)

    return worlds.simulate(spec, frames, set_state)


def _place(space: pymunk.Space, bodies: list[pymunk.Body], state: State) -> None:
    parts = state.positions, state.velocities, state.angles, state.spins
    for body, position, velocity, angle, spin in zip(bodies, *parts, strict=True):
        body.position, body.velocity = tuple(position.tolist()), tuple(velocity.tolist())
        body.angle, body.angular_velocity = float(angle), float(spin)
        space.reindex_shapes_for_body(body)
