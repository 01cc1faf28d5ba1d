"""Simple simulated worlds (pymunk): the mini preset's clips and its benchmark in Physics-IQ's layout.

Lengths are in pixels of a 64 x 64 image (y points down), times in seconds. Bodies rest until their release, so a single
condition frame may show the start of a motion or its middle, as in Physics-IQ. A clip is a pure function of its
`WorldSpec`, and the spec a pure function of (seed, index): the same seed gives the same bytes.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import cv2
import numpy as np
import pymunk

from phantom.data.sources.world_forces import MAGNITUDE, WorldForce

KINDS = ("fall", "projectile", "collision", "pendulum", "incline", "occluder")
SIZE = 64.0  # side length of the world
FPS = 4  # by default (`data.worlds.fps`); of the worlds that the shipped parts were trained on
SCENE_SECONDS = 10  # are simulated; clips and benchmark videos are windows of them
SCENE_FRAMES = SCENE_SECONDS * FPS
STEPS = 240  # of the simulation, per second
HALF_WALL = 8.0  # half the width of the wall that hides

COLOURS = {
    "red": (214, 48, 49),
    "blue": (38, 84, 214),
    "green": (30, 150, 70),
    "yellow": (240, 200, 40),
    "purple": (140, 60, 190),
    "black": (35, 35, 40),
}
BACKGROUNDS = {"white": (236, 236, 232), "grey": (170, 174, 180), "pink": (244, 196, 200), "cyan": (168, 220, 226)}
FLOOR = (120, 100, 84)
OCCLUDER = (96, 120, 104)
STRING = (70, 70, 76)

# (low, high) in training, and the held-out ranges on both sides of it.
TRAINED = {
    "gravity": (10.0, 16.0),
    "restitution": (0.55, 0.85),
    "friction": (0.05, 0.25),
    "speed": (7.0, 12.0),
    "radius": (5.0, 7.0),
    "angle": (0.45, 0.9),
}
UNSEEN = {
    "gravity": ((7.0, 9.0), (18.0, 21.0)),
    "restitution": ((0.35, 0.5), (0.9, 0.95)),
    "friction": ((0.0, 0.03), (0.3, 0.38)),
    "speed": ((5.0, 6.5), (13.0, 15.0)),
    "radius": ((4.5, 4.9), (7.2, 8.0)),
    "angle": ((0.3, 0.42), (0.95, 1.1)),
}
# By kind, the parameters that change where bodies go by more than a pixel, on average, if they leave the range.
ACTING = {
    "fall": ("gravity", "restitution"),
    "projectile": ("speed", "gravity", "restitution"),
    "collision": ("radius", "speed"),
    "pendulum": ("angle", "gravity"),
    "incline": ("friction", "angle", "gravity"),
    "occluder": ("speed",),
}
RELEASE = (1.75, 2.75)  # s


@dataclass(frozen=True)
class OtherBall:
    """A further ball, which is dropped when the others are released: where it hangs until then, in px."""

    colour: str
    radius: float
    x: float
    y: float


@dataclass(frozen=True)
class WorldSpec:
    """The initial state of one world. `direction`: +1 right, -1 left; `jitter` perturbs a second take."""

    kind: str
    colour: str
    second_colour: str
    background: str
    floor: float  # y of the floor's surface
    start: tuple[float, float]
    gravity: float
    restitution: float
    friction: float
    speed: float
    radius: float
    second_radius: float
    angle: float
    direction: int
    release: float  # s
    unseen: bool  # some parameter lies outside the trained ranges
    first_frame: int = 0  # start of a training clip's window, at `fps`
    jitter: tuple[float, float, float] = (0.0, 0.0, 0.0)  # dx, dy in px; relative change of the speed
    force: WorldForce | None = field(default=None, repr=False)  # hashes of drawn worlds are of all before
    fps: int = field(default=FPS, repr=False)
    others: tuple[OtherBall, ...] = field(default=(), repr=False)


@dataclass(frozen=True)
class Look:
    """How a body is drawn: a ball, or a box whose sides are 1.7 radii."""

    colour: str
    radius: float
    shape: Literal["ball", "box"] = "ball"
    visible: bool = True


@dataclass(frozen=True)
class Scene:
    """Trajectories of N bodies: positions (T, N, 2) in px, angles (T, N) in rad, velocities (T, N, 2) in px/s."""

    spec: WorldSpec
    positions: np.ndarray
    angles: np.ndarray
    velocities: np.ndarray
    changed_look: tuple[int, int, Look] | None = None  # (frame, body, look from that frame on)

    def look(self, body: int, frame: int) -> Look:
        """How `body` is drawn in `frame`."""
        if self.changed_look and body == self.changed_look[1] and frame >= self.changed_look[0]:
            return self.changed_look[2]
        spec = self.spec
        own = 2 if spec.kind == "collision" else 1
        if body >= own:
            return Look(spec.others[body - own].colour, spec.others[body - own].radius)
        if body:
            return Look(spec.second_colour, spec.second_radius)
        return Look(spec.colour, spec.radius, "box" if spec.kind == "incline" else "ball")


FrameHook = Callable[[int, pymunk.Space, list[pymunk.Body]], None]  # called at the start of every frame


def draw_spec(
    seed: int, index: int, *, unseen: bool = False, kind: str | None = None, factor: str | None = None
) -> WorldSpec:
    """Draws world `index` of `seed`. Kinds alternate; `unseen` draws parameters outside the training ranges.

    Those are two at random, which need not act in this kind of world, or the `factor` that is named.
    """
    rng = np.random.default_rng([seed, index, int(unseen)])
    chosen = kind or KINDS[index % len(KINDS)]
    names = list(TRAINED)
    outside = set()
    if unseen:
        outside = {factor} if factor else set(rng.choice(names, size=2, replace=False))

    def value(name: str) -> float:
        low, high = UNSEEN[name][rng.integers(2)] if name in outside else TRAINED[name]
        return float(rng.uniform(low, high))

    drawn = {name: value(name) for name in names}
    colour, second = rng.choice(list(COLOURS), size=2, replace=False)
    direction = int(rng.choice([-1, 1]))
    floor = float(rng.uniform(54, 59))
    radius = drawn["radius"]
    near = SIZE / 2 - direction * float(rng.uniform(17, 22))  # the side the motion starts from
    starts: dict[str, Callable[[], tuple[float, float]]] = {
        "fall": lambda: (float(rng.uniform(14, 50)), float(rng.uniform(10, 20))),
        "projectile": lambda: (near, floor - radius - float(rng.uniform(4, 16))),
        "collision": lambda: (near, floor - radius),
        "pendulum": lambda: (float(rng.uniform(28, 36)), 4.0),  # the pivot
        "incline": lambda: (near, 0.0),
        "occluder": lambda: (SIZE / 2 - direction * float(rng.uniform(20, 23)), floor - radius),
    }
    return WorldSpec(
        kind=chosen,
        colour=str(colour),
        second_colour=str(second),
        background=str(rng.choice(list(BACKGROUNDS))),
        floor=floor,
        start=starts[chosen](),
        radius=radius,
        second_radius=float(rng.uniform(*TRAINED["radius"])),
        direction=direction,
        release=float(rng.uniform(*RELEASE)),
        unseen=unseen,
        first_frame=int(rng.integers(3, 12)),
        gravity=drawn["gravity"],
        restitution=drawn["restitution"],
        friction=drawn["friction"],
        speed=drawn["speed"],
        angle=drawn["angle"],
    )


def vary(spec: WorldSpec, seed: int, index: int, *, fps: int = FPS, more_balls: int = 0) -> WorldSpec:
    """World `index` of `seed`, which `spec` is, at another rate, and with up to 3 more balls than its kind has."""
    spec = replace(spec, fps=fps, first_frame=spec.first_frame * fps // FPS)
    rng = np.random.default_rng([seed, index, 6])
    colours = [colour for colour in COLOURS if colour not in (spec.colour, spec.second_colour)]
    for colour in rng.permutation(colours)[:more_balls]:
        spec = replace(spec, others=(*spec.others, _other_ball(spec, str(colour), rng)))
    return spec


def change(spec: WorldSpec, factor: str, seed: int, index: int) -> WorldSpec:
    """`spec` with one parameter outside of the training ranges, and all else as it is: a counterfactual."""
    rng = np.random.default_rng([seed, index, 7])
    value = float(rng.uniform(*UNSEEN[factor][rng.integers(2)]))
    x, y = spec.start
    if factor == "radius" and spec.kind in ("collision", "occluder"):  # it lies on the floor
        y = spec.floor - value
    changed: dict[str, Any] = {factor: value, "start": (x, y), "unseen": True}
    return replace(spec, **changed)


def _other_ball(spec: WorldSpec, colour: str, rng: np.random.Generator) -> OtherBall:
    """A ball that hangs above the floor where nothing else is, nor the wall, which would hide it."""
    space = pymunk.Space()
    _build(space, spec)
    while True:  # what is there never fills the space
        radius, x, y = (float(rng.uniform(*within)) for within in ((3.5, 4.5), (7, SIZE - 7), (6, 34)))
        is_free = space.point_query_nearest((x, y), radius + 1, pymunk.ShapeFilter()) is None
        if spec.kind == "occluder":
            is_free &= abs(x - SIZE / 2) > HALF_WALL + radius
        if spec.kind == "incline":  # not inside the slope
            (top_x, top_y), (foot_x, foot_y) = _slope(spec)
            is_free &= y < top_y + (x - top_x) / (foot_x - top_x) * (foot_y - top_y) or (x < top_x) == (x < foot_x)
        if is_free:
            return OtherBall(colour, radius, x, y)


def unseen_parameters(spec: WorldSpec) -> list[str]:
    """The parameters of `spec` that lie outside the training ranges."""
    return [name for name, (low, high) in TRAINED.items() if not low <= getattr(spec, name) <= high]


def second_take(spec: WorldSpec, seed: int, index: int) -> WorldSpec:
    """The same world with a slightly perturbed start, like a repeated experiment."""
    rng = np.random.default_rng([seed, index, 2])
    dx, dy, dv = rng.uniform(-1, 1, size=3) * (0.8, 0.8, 0.04)
    return replace(spec, jitter=(float(dx), float(dy), float(dv)))


def caption(spec: WorldSpec) -> str:
    """The caption: one sentence that describes the clip."""
    way = "right" if spec.direction > 0 else "left"
    pace = "quickly" if spec.speed > 9.5 else "slowly"
    text = {
        "fall": f"A {spec.colour} ball falls and bounces on the floor",
        "projectile": f"A {spec.colour} ball is thrown to the {way} and lands on the floor",
        "collision": f"A {spec.colour} ball rolls {pace} to the {way} and hits a {spec.second_colour} ball",
        "pendulum": f"A {spec.colour} ball swings on a string",
        "incline": f"A {spec.colour} box slides down a slope to the {way}",
        "occluder": f"A {spec.colour} ball rolls {pace} to the {way} behind a wall",
    }[spec.kind]
    force = spec.force
    if force and force.at_rest:
        text = {
            "fall": f"A {spec.colour} ball above the floor",
            "projectile": f"A {spec.colour} ball above the floor",
            "collision": f"A {spec.colour} ball and a {spec.second_colour} ball on the floor",
            "pendulum": f"A {spec.colour} ball on a string",
            "incline": f"A {spec.colour} box on a slope",
            "occluder": f"A {spec.colour} ball beside a wall",
        }[spec.kind]
    if force and force.in_caption:  # in place of the background: 96 bytes are what the mini preset reads
        thing = f"{spec.second_colour if force.body else spec.colour} {'box' if spec.kind == 'incline' else 'ball'}"
        return f"{text}, {force.words(thing)}."
    if spec.others:
        text += f", {len(spec.others)} more fall{'s' * (len(spec.others) == 1)}"
    return f"{text}, {spec.background} background."


def clip_id(spec: WorldSpec, index: int) -> str:
    """The id of the clip of world `index`."""
    return f"{index:05d}-{spec.kind}" + ("-unseen" if spec.unseen else "") + ("-forced" if spec.force else "")


def clip_spec(
    seed: int, index: int, *, unseen: bool = False, forced: float = 0.0, fps: int = FPS, more_balls: int = 0
) -> WorldSpec:
    """The world of training clip `index`: `draw_spec`, but every second round of kinds starts with the
    motion or during it, so that there are enough single frames from which motion continues.

    forced: the fraction of clips on whose bodies a force acts (`add_force`). fps, more_balls: as in `vary`.
    """
    spec = vary(draw_spec(seed, index, unseen=unseen), seed, index, fps=fps, more_balls=more_balls)
    starts_with_motion = index // len(KINDS) % 2 == 1
    if starts_with_motion:
        spec = replace(spec, first_frame=max(spec.first_frame, released(spec)))
    return add_force(spec, seed, index) if np.random.default_rng([seed, index, 4]).random() < forced else spec


def add_force(spec: WorldSpec, seed: int, index: int) -> WorldSpec:
    """`spec` with a push or a wind, in half of all cases on bodies at rest, from the first 1.75 s of the clip on.

    In half of all cases the caption tells of it. What is pushed can be seen then.
    """
    rng = np.random.default_rng([seed, index, 3])
    is_push, at_rest, in_caption = rng.random() < 2 / 3, rng.random() < 0.5, rng.random() < 0.5
    angle, magnitude = float(rng.uniform(0, 360)), float(rng.uniform(*MAGNITUDE))
    delay, body = int(rng.integers(0, 8)) * spec.fps // FPS, int(rng.integers(2)) if spec.kind == "collision" else 0
    first = spec.first_frame if at_rest else max(spec.first_frame, released(spec))
    frame = first + delay * is_push
    if is_push and not at_rest:
        seen = is_visible(simulate(spec), body)
        near = [other for other in range(first, first + 2 * spec.fps) if seen[other]]
        if near:
            frame = min(near, key=lambda other: abs(other - frame))
        else:  # it has left the picture, or is behind the wall
            at_rest, first = True, spec.first_frame
            frame = first + delay
    force = WorldForce("push" if is_push else "wind", angle, magnitude, frame, body, at_rest, in_caption)
    release = frame / spec.fps if at_rest else spec.release
    return replace(spec, first_frame=first, release=release, force=force)


def released(spec: WorldSpec) -> int:
    """The first frame in which the bodies have been released."""
    return math.ceil(spec.release * spec.fps)


def find_spec(id_: str, caption_: str, seed: int, *, fps: int = FPS, more_balls: int = 0) -> WorldSpec | None:
    """The world of `seed` whose clip has this id and caption; None if there is none."""
    if not (found := re.fullmatch(r"(\d+)-\w+(-unseen)?(-forced)?", id_)):
        return None
    forced = float(bool(found[3]))
    spec = clip_spec(seed, int(found[1]), unseen=bool(found[2]), forced=forced, fps=fps, more_balls=more_balls)
    return spec if (clip_id(spec, int(found[1])), caption(spec)) == (id_, caption_) else None


def simulate(spec: WorldSpec, frames: int | None = None, on_frame: FrameHook | None = None) -> Scene:
    """Simulates `frames` frames at `spec.fps`, by default those of 10 s.

    on_frame: may change the world at the start of a frame, for worlds that break its laws.
    """
    space = pymunk.Space()
    wind_x, wind_y = spec.force.wind if spec.force else (0.0, 0.0)
    space.gravity = (wind_x, spec.gravity + wind_y)
    space.iterations = 30
    bodies, launch = _build(space, spec)
    positions, angles, velocities = [], [], []
    released, time, dt = False, 0.0, 1.0 / STEPS
    for frame in range(SCENE_SECONDS * spec.fps if frames is None else frames):
        if on_frame is not None:
            on_frame(frame, space, bodies)
        positions.append([tuple(b.position) for b in bodies])
        angles.append([b.angle for b in bodies])
        velocities.append([tuple(b.velocity) if released else (0.0, 0.0) for b in bodies])
        if spec.force:
            spec.force.push(frame, bodies)
        for _ in range(STEPS // spec.fps):
            time += dt
            if time < spec.release:
                continue
            if not released:
                if not (spec.force and spec.force.at_rest):
                    launch()
                released = True
            space.step(dt)
    return Scene(spec, np.array(positions), np.array(angles), np.array(velocities))


def render(scene: Scene, first: int, count: int, size: int = 64) -> np.ndarray:
    """Renders frames `first` to `first + count` of `scene`: uint8 RGB (count, size, size, 3), antialiased."""
    canvas_size = max(256, size)
    background = _background(scene.spec, canvas_size)
    frames = []
    for t in range(first, first + count):
        canvas = background.copy()
        _draw_bodies(canvas, scene, t)
        if canvas_size != size:
            canvas = cv2.resize(canvas, (size, size), interpolation=cv2.INTER_AREA)
        frames.append(canvas)
    return np.stack(frames)


# --- the six worlds -------------------------------------------------------------------------------------------------


def _build(space: pymunk.Space, spec: WorldSpec) -> tuple[list[pymunk.Body], Callable[[], None]]:
    """Adds scenery and bodies; returns the bodies, and what sets the first in motion."""
    bodies, launch = _BUILD[spec.kind](space, spec)
    return [*bodies, *(_ball(space, spec, one.x, one.y, one.radius) for one in spec.others)], launch


def _segment(space: pymunk.Space, a: tuple[float, float], b: tuple[float, float], spec: WorldSpec) -> None:
    wall = pymunk.Segment(space.static_body, a, b, 1.0)
    wall.elasticity, wall.friction = spec.restitution, spec.friction
    space.add(wall)


def _ball(space: pymunk.Space, spec: WorldSpec, x: float, y: float, radius: float, rolls: bool = False) -> pymunk.Body:
    mass = radius**2 / 25  # same thickness and density for all
    body = pymunk.Body(mass, pymunk.moment_for_circle(mass, 0, radius))
    body.position = (x + spec.jitter[0], y if rolls else y + spec.jitter[1])
    shape = pymunk.Circle(body, radius)
    shape.elasticity, shape.friction = (0.95 if rolls else spec.restitution**0.5), 0.0 if rolls else spec.friction
    space.add(body, shape)
    return body


def _floor(space: pymunk.Space, spec: WorldSpec) -> None:
    wall = pymunk.Segment(space.static_body, (-200, spec.floor + 1), (SIZE + 200, spec.floor + 1), 1.0)
    wall.elasticity, wall.friction = (
        spec.restitution**0.5,
        spec.friction,
    )  # Chipmunk multiplies the elasticities of the two shapes
    space.add(wall)


def _push(body: pymunk.Body, spec: WorldSpec, vx: float, vy: float = 0.0) -> Callable[[], None]:
    def launch() -> None:
        body.velocity = (vx * (1 + spec.jitter[2]), vy * (1 + spec.jitter[2]))

    return launch


def _fall(space: pymunk.Space, spec: WorldSpec) -> tuple[list[pymunk.Body], Callable[[], None]]:
    _floor(space, spec)
    ball = _ball(space, spec, *spec.start, spec.radius)
    return [ball], _push(ball, spec, 0.0)


def _projectile(space: pymunk.Space, spec: WorldSpec) -> tuple[list[pymunk.Body], Callable[[], None]]:
    _floor(space, spec)
    ball = _ball(space, spec, *spec.start, spec.radius)
    speed = spec.speed * 2.0
    return [ball], _push(ball, spec, spec.direction * speed * math.cos(1.0), -speed * math.sin(1.0))


def _collision(space: pymunk.Space, spec: WorldSpec) -> tuple[list[pymunk.Body], Callable[[], None]]:
    _floor(space, spec)
    ball = _ball(space, spec, *spec.start, spec.radius, rolls=True)
    x = SIZE / 2 + spec.direction * 6
    other = _ball(space, spec, x - spec.jitter[0], spec.floor - spec.second_radius, spec.second_radius, rolls=True)
    return [ball, other], _push(ball, spec, spec.direction * spec.speed)


def _pendulum(space: pymunk.Space, spec: WorldSpec) -> tuple[list[pymunk.Body], Callable[[], None]]:
    length = 30.0 + spec.radius
    swing = spec.angle * 0.9
    x = spec.start[0] - spec.direction * length * math.sin(swing)
    ball = _ball(space, spec, x, spec.start[1] + length * math.cos(swing), spec.radius)
    space.add(pymunk.PinJoint(space.static_body, ball, spec.start, (0, 0)))
    return [ball], _push(ball, spec, 0.0)


def _incline(space: pymunk.Space, spec: WorldSpec) -> tuple[list[pymunk.Body], Callable[[], None]]:
    _floor(space, spec)
    top, foot = _slope(spec)
    _segment(space, top, foot, replace(spec, restitution=0.0))
    side = spec.radius * 1.7
    mass = side**2 / 70
    box = pymunk.Body(mass, pymunk.moment_for_box(mass, (side, side)))
    tilt = math.atan2(foot[1] - top[1], foot[0] - top[0])
    tilt = tilt if spec.direction > 0 else tilt - math.pi
    along = np.array(foot) - np.array(top)
    along = along / np.linalg.norm(along)
    normal = np.array([along[1], -along[0]]) * spec.direction
    centre = np.array(top) + along * (side * 0.8 + 1.5 * spec.jitter[0]) + normal * (side / 2 + 1.0)
    box.position, box.angle = (float(centre[0]), float(centre[1])), tilt
    shape = pymunk.Poly.create_box(box, (side, side))
    shape.elasticity, shape.friction = 0.0, 1.0  # the pair's friction is the slope's
    space.add(box, shape)
    return [box], _push(box, spec, 0.0)


def _occluder(space: pymunk.Space, spec: WorldSpec) -> tuple[list[pymunk.Body], Callable[[], None]]:
    _floor(space, spec)
    ball = _ball(space, spec, *spec.start, spec.radius, rolls=True)
    return [ball], _push(ball, spec, spec.direction * spec.speed)


_BUILD = {
    "fall": _fall,
    "projectile": _projectile,
    "collision": _collision,
    "pendulum": _pendulum,
    "incline": _incline,
    "occluder": _occluder,
}


def _slope(spec: WorldSpec) -> tuple[tuple[float, float], tuple[float, float]]:
    """Top and foot of the incline."""
    run = 40.0
    top_x = SIZE / 2 - spec.direction * 27
    return (top_x, spec.floor - run * math.tan(spec.angle * 0.7)), (top_x + spec.direction * run, spec.floor)


# --- drawing --------------------------------------------------------------------------------------------------------

_SHIFT = 4  # cv2 draws with 1/16 pixel


def _points(points: list[tuple[float, float]], scale: float) -> np.ndarray:
    return np.round((np.array(points) * scale - 0.5) * 2**_SHIFT).astype(np.int32)


def _polygon(canvas: np.ndarray, points: list[tuple[float, float]], colour: tuple[int, int, int]) -> None:
    cv2.fillPoly(canvas, [_points(points, canvas.shape[0] / SIZE)], colour, cv2.LINE_AA, _SHIFT)


def _disc(canvas: np.ndarray, x: float, y: float, radius: float, colour: tuple[int, int, int]) -> None:
    scale = canvas.shape[0] / SIZE
    centre = _points([(x, y)], scale)[0]
    cv2.circle(
        canvas, (int(centre[0]), int(centre[1])), round(radius * scale * 2**_SHIFT), colour, -1, cv2.LINE_AA, _SHIFT
    )


def _background(spec: WorldSpec, size: int) -> np.ndarray:
    canvas = np.full((size, size, 3), BACKGROUNDS[spec.background], np.uint8)
    _polygon(canvas, [(0, spec.floor), (SIZE, spec.floor), (SIZE, SIZE), (0, SIZE)], FLOOR)
    if spec.kind == "incline":
        top, foot = _slope(spec)
        _polygon(canvas, [top, foot, (top[0], spec.floor)], FLOOR)
    return canvas


def _draw_bodies(canvas: np.ndarray, scene: Scene, t: int) -> None:
    spec = scene.spec
    x, y = scene.positions[t, 0]
    if spec.kind == "pendulum":
        px, py = spec.start
        dx, dy = np.array([y - py, px - x]) / max(math.hypot(x - px, y - py), 1e-9) * 0.5
        _polygon(canvas, [(px - dx, py - dy), (px + dx, py + dy), (x + dx, y + dy), (x - dx, y - dy)], STRING)
    for body in range(scene.positions.shape[1]):
        _draw_body(canvas, scene, body, t)
    if spec.kind == "occluder":
        left, right = SIZE / 2 - HALF_WALL, SIZE / 2 + HALF_WALL
        wall = [(left, spec.floor - 24), (right, spec.floor - 24), (right, spec.floor), (left, spec.floor)]
        _polygon(canvas, wall, OCCLUDER)


def _draw_body(canvas: np.ndarray, scene: Scene, body: int, t: int) -> None:
    look, (x, y) = scene.look(body, t), scene.positions[t, body]
    if not look.visible:
        return
    if look.shape == "ball":
        _disc(canvas, x, y, look.radius, COLOURS[look.colour])
        return
    half, angle = look.radius * 0.85, scene.angles[t, body]
    c, s = math.cos(angle) * half, math.sin(angle) * half
    corners = [(-c + s, -s - c), (c + s, s - c), (c - s, s + c), (-c - s, -s + c)]
    _polygon(canvas, [(x + a, y + b) for a, b in corners], COLOURS[look.colour])


def states(scene: Scene, body: int = 0) -> np.ndarray:
    """Position and velocity of `body`, (T, 4): x, y in px and vx, vy in px/s."""
    return np.concatenate([scene.positions[:, body], scene.velocities[:, body]], axis=-1)


def is_visible(scene: Scene, body: int = 0) -> np.ndarray:
    """Whether the centre of `body` is inside the image and not behind the occluder: bool (T,)."""
    x, y = scene.positions[:, body, 0], scene.positions[:, body, 1]
    inside = (x >= 0) & (x <= SIZE) & (y >= 0) & (y <= SIZE)
    return inside & (np.abs(x - SIZE / 2) > HALF_WALL) if scene.spec.kind == "occluder" else inside
