"""Matched clips of simulated worlds: a valid one, and others that equal it, byte for byte, until they break a law.

For benchmarks that ask whether a model finds impossible videos less likely than possible ones (LikePhys, Yuan et al.,
ICLR 2026, arXiv 2510.11512). A violation either changes the world while it is simulated (gravity, elasticity, contact)
or what is drawn of it (position, colour, size, shape). Benign variations break no law: no model should find them less
likely than the valid clip more often than half of the time. Everything is a function of (seed, scenario, number).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
import pymunk

from phantom.data.sources import worlds
from phantom.data.sources.worlds import COLOURS, KINDS, Look, Scene

BENIGN = "benign_"  # prefix of the names of variations that break no law
LIKEPHYS_SEED = 700_000  # added to the worlds' seed, so that no group is a training clip or a benchmark scenario
PROMPTS = {  # one for all groups of a scenario, as in LikePhys
    "fall": "A ball falls and bounces on the floor.",
    "projectile": "A ball is thrown and lands on the floor.",
    "collision": "A ball rolls and hits another ball.",
    "pendulum": "A ball swings on a string.",
    "incline": "A box slides down a slope.",
    "occluder": "A ball rolls behind a wall.",
}
# What can be broken in each scenario. A rolling ball has no weight to lose, a swinging one nothing to bounce off.
VIOLATIONS = {
    "fall": ("gravity_off", "gravity_turned", "bounce_gains_energy", "passes_through"),
    "projectile": ("gravity_off", "gravity_turned", "bounce_gains_energy", "passes_through"),
    "collision": ("bounce_gains_energy", "passes_through", "moves_without_cause"),
    "pendulum": ("gravity_off", "gravity_turned"),
    "incline": ("gravity_turned", "passes_through"),
    "occluder": (),
}
ANYWHERE = ("vanishes", "jumps", "changes_colour", "changes_size", "changes_shape", "stops", "reverses")

LEAST_FRAMES, MOST_FRAMES = 21, worlds.SCENE_FRAMES - 11  # of a clip; no window starts after frame 11
MARGIN = 5  # frames of the clip before a violation is first seen, and from then on to its end
LEAST_SPEED = 4.0  # px/s of a body that stops, reverses or vanishes
SEEN_PIXELS, SEEN_LEVELS, SEEN_FRAMES = 20, 30, 3  # a change is visible: so many pixels of 64 x 64, by so much, so long
ENERGY_GAIN = 1.2  # restitution of a bounce that gains energy
BRIGHTNESS = (0.95, 1.05)  # factors of the benign variation
MAX_WORLDS = 200  # worlds drawn for a group, until one shows all violations


@dataclass(frozen=True)
class Variant:
    """A clip of a group. `moment`: the first frame that differs from the valid clip; 0 for benign variations."""

    name: str
    frames: np.ndarray  # uint8 RGB (F, size, size, 3)
    moment: int

    @property
    def is_benign(self) -> bool:
        """Whether it breaks no law."""
        return self.name.startswith(BENIGN)


@dataclass(frozen=True)
class Group:
    """A valid clip, uint8 RGB (F, size, size, 3), and its variants."""

    scenario: str
    number: int
    caption: str
    valid: np.ndarray
    variants: tuple[Variant, ...]


def violations(scenario: str) -> tuple[str, ...]:
    """The names of the violations in `scenario`."""
    return (*VIOLATIONS[scenario], *(name for name in ANYWHERE if (scenario, name) != ("pendulum", "jumps")))


def groups(
    seed: int, per_scenario: int, frames: int = 29, size: int = 64, scenarios: Sequence[str] = KINDS
) -> Iterator[Group]:
    """`per_scenario` groups of every scenario. The same arguments give the same bytes."""
    for scenario in scenarios:
        for number in range(per_scenario):
            yield make_group(seed, scenario, number, frames, size)


def make_group(seed: int, scenario: str, number: int, frames: int = 29, size: int = 64) -> Group:
    """The first world, among those drawn for `number`, in which every violation of `scenario` can be seen.

    Raises ValueError for clips too short to show them.
    """
    if not LEAST_FRAMES <= frames <= MOST_FRAMES:
        raise ValueError(f"frames: found {frames}, accepted: {LEAST_FRAMES} to {MOST_FRAMES}")
    clip, found = _find_world(seed, scenario, number, frames, size)
    # Chosen in the same way as the valid clip, so that neither is the likelier one by choice: the next group's.
    other = _find_world(seed, scenario, number + 1, frames, size)[0].frames
    factor = float(np.random.default_rng([seed, number]).choice(BRIGHTNESS))
    brightness = np.clip(clip.frames.astype(np.float32) * factor, 0, 255).round().astype(np.uint8)
    benign = Variant(f"{BENIGN}other_world", other, 0), Variant(f"{BENIGN}brightness", brightness, 0)
    return Group(scenario, number, PROMPTS[scenario], clip.frames, (*found, *benign))


@lru_cache(maxsize=2)
def _find_world(seed: int, scenario: str, number: int, frames: int, size: int) -> tuple[_Clip, tuple[Variant, ...]]:
    """A valid clip, and one with each violation."""
    for attempt in range(MAX_WORLDS):
        rng = np.random.default_rng([LIKEPHYS_SEED + seed, KINDS.index(scenario), number, attempt])
        spec = worlds.draw_spec(LIKEPHYS_SEED + seed, number * MAX_WORLDS + attempt, kind=scenario)
        clip = _Clip(worlds.simulate(spec), frames, size)
        found: list[Variant] = []
        for name in violations(scenario):
            variant = _violate(clip, name, rng)
            if variant is None:
                break
            found.append(variant)
        else:
            return clip, tuple(found)
    raise ValueError(f"{scenario}: no world of {MAX_WORLDS} shows all violations in {frames} frames")


class _Clip:
    """A valid scene and the window of it that is shown."""

    def __init__(self, scene: Scene, count: int, size: int) -> None:
        self.scene, self.spec, self.size = scene, scene.spec, size
        self.window = range(scene.spec.first_frame, scene.spec.first_frame + count)
        self.frames = self.render(scene)

    def render(self, scene: Scene) -> np.ndarray:
        return worlds.render(scene, self.window.start, len(self.window), self.size)

    @property
    def release(self) -> int:
        """The last frame in which everything rests."""
        return int(self.spec.release * worlds.FPS)

    def moving(self, airborne: bool = False) -> list[int]:
        """Frames at which a change would be seen: body 0 moves, whole in the picture; `airborne`: above the floor."""
        spec, radius = self.spec, self.spec.radius
        (x, y), speed = self.scene.positions[:, 0].T, np.linalg.norm(self.scene.velocities[:, 0], axis=1)
        inside = (x > radius) & (x < worlds.SIZE - radius) & (y > radius) & (speed > LEAST_SPEED)
        inside &= worlds.is_visible(self.scene)
        if airborne:
            inside &= y < spec.floor - radius - 3
        shown = self.window[MARGIN : len(self.window) - MARGIN]
        return [frame for frame in shown if inside[frame] and frame > self.release]


def _violate(clip: _Clip, name: str, rng: np.random.Generator) -> Variant | None:
    """The clip with violation `name` at a random moment; None if it cannot be seen at any."""
    make = _MAKE[name]
    airborne = clip.spec.kind in ("fall", "projectile")
    early = name in ("bounce_gains_energy", "passes_through", "moves_without_cause")  # seen only at a contact
    moments = [max(clip.release, clip.window.start)] if early else clip.moving(airborne)
    if name == "moves_without_cause":
        moments = list(clip.window[MARGIN : len(clip.window) // 2])
    for frame in rng.permutation(moments) if moments else ():
        scene = make(clip.scene, int(frame), rng)
        frames = clip.render(scene)
        if (moment := _first_seen(clip.frames, frames)) is not None:
            return Variant(name, frames, moment)
    return None


def _first_seen(valid: np.ndarray, other: np.ndarray) -> int | None:
    """The first frame that differs at all; None if that is too early, too late, or too little of it is seen."""
    differs = np.flatnonzero((valid != other).any(axis=(1, 2, 3)))
    if not len(differs) or not MARGIN <= differs[0] <= len(valid) - MARGIN:
        return None
    change = np.abs(valid.astype(np.int16) - other.astype(np.int16)).max(axis=3) > SEEN_LEVELS
    share = SEEN_PIXELS / worlds.SIZE**2
    return int(differs[0]) if (change.mean(axis=(1, 2)) > share).sum() >= SEEN_FRAMES else None


# --- violations of the simulation -----------------------------------------------------------------------------------


def _gravity_off(scene: Scene, frame: int, rng: np.random.Generator) -> Scene:
    return _resimulate(scene, frame, lambda space, bodies: setattr(space, "gravity", (0.0, 0.0)))


def _gravity_turned(scene: Scene, frame: int, rng: np.random.Generator) -> Scene:
    gravity = scene.spec.gravity
    turned = ((0.0, -gravity), (gravity, 0.0), (-gravity, 0.0))[int(rng.integers(3))]
    return _resimulate(scene, frame, lambda space, bodies: setattr(space, "gravity", turned))


def _bounce_gains_energy(scene: Scene, frame: int, rng: np.random.Generator) -> Scene:
    def change(space: pymunk.Space, bodies: list[pymunk.Body]) -> None:
        for shape in space.shapes:  # Chipmunk multiplies the elasticities of the two shapes
            shape.elasticity = ENERGY_GAIN**0.5
            if len(bodies) > 1 and shape.body is space.static_body:
                shape.elasticity = 0.0  # the balls gain energy from each other, and go on rolling

    return _resimulate(scene, frame, change)


def _passes_through(scene: Scene, frame: int, rng: np.random.Generator) -> Scene:
    """Through the other ball, or through the floor or slope."""

    def change(space: pymunk.Space, bodies: list[pymunk.Body]) -> None:
        for body in bodies:
            for shape in body.shapes:
                shape.filter = pymunk.ShapeFilter(group=1) if len(bodies) > 1 else pymunk.ShapeFilter(mask=0)

    return _resimulate(scene, frame, change)


def _moves_without_cause(scene: Scene, frame: int, rng: np.random.Generator) -> Scene:
    """The second ball starts to roll before it is hit."""
    velocity = (float(rng.choice([-1, 1])) * scene.spec.speed, 0.0)
    return _resimulate(scene, frame, lambda space, bodies: setattr(bodies[1], "velocity", velocity))


def _resimulate(scene: Scene, frame: int, change: Callable[[pymunk.Space, list[pymunk.Body]], None]) -> Scene:
    """The same world, changed at the start of `frame`; until then the simulation is the same step by step."""

    def on_frame(now: int, space: pymunk.Space, bodies: list[pymunk.Body]) -> None:
        if now == frame:
            change(space, bodies)

    return worlds.simulate(scene.spec, len(scene.positions), on_frame)


# --- violations of what is drawn ------------------------------------------------------------------------------------


def _vanishes(scene: Scene, frame: int, rng: np.random.Generator) -> Scene:
    return _with_look(scene, frame, visible=False)


def _changes_colour(scene: Scene, frame: int, rng: np.random.Generator) -> Scene:
    others = [name for name in COLOURS if name not in (scene.spec.colour, scene.spec.second_colour)]
    return _with_look(scene, frame, colour=str(rng.choice(others)))


def _changes_size(scene: Scene, frame: int, rng: np.random.Generator) -> Scene:
    return _with_look(scene, frame, radius=scene.spec.radius * float(rng.choice([0.5, 1.7])))


def _changes_shape(scene: Scene, frame: int, rng: np.random.Generator) -> Scene:
    shape = "ball" if scene.look(0, 0).shape == "box" else "box"
    return _with_look(scene, frame, shape=shape, radius=scene.spec.radius * (1.1 if shape == "box" else 1.0))


def _jumps(scene: Scene, frame: int, rng: np.random.Generator) -> Scene:
    """A step to the side, to where there is more of the picture."""
    side = 1 if scene.positions[frame, 0, 0] < worlds.SIZE / 2 else -1
    positions = scene.positions.copy()
    positions[frame:, 0, 0] += side * rng.uniform(14, 20)
    return replace(scene, positions=positions)


def _stops(scene: Scene, frame: int, rng: np.random.Generator) -> Scene:
    at = np.minimum(np.arange(len(scene.positions)), frame)
    return _retimed(scene, at)


def _reverses(scene: Scene, frame: int, rng: np.random.Generator) -> Scene:
    at = frame - np.abs(np.arange(len(scene.positions)) - frame)
    return _retimed(scene, np.maximum(at, 0))


def _retimed(scene: Scene, at: np.ndarray) -> Scene:
    """Body 0 is in frame t where it was in frame at[t]."""
    positions, angles = scene.positions.copy(), scene.angles.copy()
    positions[:, 0], angles[:, 0] = scene.positions[at, 0], scene.angles[at, 0]
    return replace(scene, positions=positions, angles=angles)


def _with_look(scene: Scene, frame: int, **changes: Any) -> Scene:
    look: Look = replace(scene.look(0, 0), **changes)
    return replace(scene, changed_look=(frame, 0, look))


_MAKE: dict[str, Callable[[Scene, int, np.random.Generator], Scene]] = {
    "gravity_off": _gravity_off,
    "gravity_turned": _gravity_turned,
    "bounce_gains_energy": _bounce_gains_energy,
    "passes_through": _passes_through,
    "moves_without_cause": _moves_without_cause,
    "vanishes": _vanishes,
    "jumps": _jumps,
    "changes_colour": _changes_colour,
    "changes_size": _changes_size,
    "changes_shape": _changes_shape,
    "stops": _stops,
    "reverses": _reverses,
}
