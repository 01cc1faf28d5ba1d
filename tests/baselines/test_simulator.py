"""The simulator that reads worlds off their pixels: what it reads, and where it says that bodies go."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from phantom.baselines.simulator.estimate import predict, predict_reading
from phantom.baselines.simulator.segmentation import Reading, centres_of, read_world
from phantom.baselines.simulator.simulation import State, continue_from
from phantom.data.sources import worlds
from phantom.data.sources.worlds_files import CONDITION_FRAMES, TEST_FRAMES, benchmark_spec
from phantom.data.video import read_frames, write_mp4

MULTI = 9  # condition frames


def scenario(kind: str, round_: int = 0) -> tuple[worlds.WorldSpec, worlds.Scene]:
    spec = benchmark_spec(0, round_ * len(worlds.KINDS) + worlds.KINDS.index(kind))
    return spec, worlds.simulate(spec)


def condition(scene: worlds.Scene, frames: int, size: int = 64) -> np.ndarray:
    return worlds.render(scene, CONDITION_FRAMES - frames, frames, size)


def error(found: worlds.Scene, scene: worlds.Scene, first: int = CONDITION_FRAMES, frames: int = TEST_FRAMES) -> float:
    """Mean distance of the bodies, by default in the test frames, in whichever order they are."""
    true = scene.positions[first : first + frames]
    orders = [list(range(true.shape[1])), list(range(true.shape[1]))[::-1]]
    return min(float(np.linalg.norm(found.positions[:, order] - true, axis=-1).mean()) for order in orders)


@pytest.mark.parametrize("kind", worlds.KINDS)
@pytest.mark.parametrize("frames", [1, MULTI])
def test_a_world_is_read_off_its_pixels(kind, frames):
    spec, scene = scenario(kind)
    found = read_world(condition(scene, frames))
    assert found is not None and found.spec.kind == ("fall" if kind == "projectile" else kind)
    bodies = scene.positions.shape[1]
    looks = (
        {(spec.colour, spec.radius), (spec.second_colour, spec.second_radius)}
        if bodies == 2
        else {(spec.colour, spec.radius)}
    )
    read = [(found.spec.colour, found.spec.radius), (found.spec.second_colour, found.spec.second_radius)][:bodies]
    for colour, radius in looks:
        assert dict(read)[colour] == pytest.approx(radius, abs=0.35)
    assert (found.spec.background, found.spec.floor) == (spec.background, pytest.approx(spec.floor, abs=0.25))
    order = slice(None, None, 1 if read[0][0] == spec.colour else -1)
    true = scene.positions[CONDITION_FRAMES - frames : CONDITION_FRAMES, order]
    assert found.centres.shape == true.shape and np.nanmax(np.abs(found.centres - true)) < 0.3
    if kind == "pendulum":
        assert found.spec.start == pytest.approx(spec.start, abs=0.1)
    if kind == "incline":
        assert found.spec.direction == spec.direction and found.spec.angle == pytest.approx(spec.angle, abs=0.02)
        assert math.remainder(found.angles[0] - scene.angles[CONDITION_FRAMES - 1, 0], math.pi / 2) == pytest.approx(
            0, abs=0.03
        )


@pytest.mark.parametrize("kind", worlds.KINDS)
def test_the_codec_does_not_hide_it(kind, tmp_path):
    spec, scene = scenario(kind, 1)
    write_mp4(tmp_path / "a.mp4", condition(scene, MULTI, 256), worlds.FPS)
    found = read_world(read_frames(tmp_path / "a.mp4")[0])
    assert found is not None and found.spec.kind == ("fall" if kind == "projectile" else kind)
    assert found.spec.floor == pytest.approx(spec.floor, abs=0.45)


@pytest.mark.parametrize("kind", worlds.KINDS)
def test_bodies_go_where_they_do_go(kind):
    errors = []
    for round_ in range(3):
        _, scene = scenario(kind, round_)
        found = predict(condition(scene, MULTI), TEST_FRAMES)
        assert found is not None and found.positions.shape == (TEST_FRAMES, scene.positions.shape[1], 2)
        errors.append(error(found, scene))
    assert np.mean(errors) < 4.0


def test_what_is_not_shown_is_not_known():
    """Two worlds that look alike up to the last condition frame have the same future."""
    spec, _ = scenario("fall")
    late = replace(spec, release=2.75)
    scenes = [worlds.simulate(replace(late, gravity=gravity, restitution=0.9)) for gravity in (11.0, 21.0)]
    shown = [condition(scene, MULTI) for scene in scenes]
    assert (shown[0] == shown[1]).all()
    found = [predict(frames, TEST_FRAMES) for frames in shown]
    assert found[0] is not None and found[1] is not None and (found[0].positions == found[1].positions).all()


def test_one_frame_shows_no_velocity():
    _, scene = scenario("projectile")
    assert np.linalg.norm(scene.velocities[CONDITION_FRAMES - 1, 0]) > 5
    found = predict(condition(scene, 1), TEST_FRAMES)
    assert found is not None and np.ptp(found.positions[:, 0, 0]) < 0.1  # it falls, straight down
    first = found.positions[0, 0, 1] - scene.positions[CONDITION_FRAMES - 1, 0, 1]
    assert first == pytest.approx(found.spec.gravity / 2 / worlds.FPS**2, abs=0.2)

    _, scene = scenario("occluder")
    held = predict(condition(scene, 1), TEST_FRAMES)
    assert held is not None and np.ptp(held.positions, axis=0).max() < 0.1


@pytest.mark.parametrize("kind", ["fall", "collision", "pendulum", "incline"])
def test_a_motion_that_is_on_from_the_first_frame_goes_on(kind):
    """As in training clips, some of which start in the middle of the motion: no moment of release is seen."""
    spec, _ = scenario(kind)
    scene = worlds.simulate(replace(spec, release=0.6))
    shown, after = worlds.render(scene, 4, 5), 4
    found = predict(shown, after)
    assert found is not None
    assert error(found, scene, 9, after) < 1.5


@pytest.mark.parametrize("kind", worlds.KINDS)
def test_the_true_state_goes_on_as_the_world_does(kind):
    spec, scene = scenario(kind)
    last = CONDITION_FRAMES - 1
    spins = np.zeros(scene.positions.shape[1])
    found = continue_from(spec, State(scene.positions[last], scene.velocities[last], scene.angles[last], spins), 11)
    assert np.abs(found.positions - scene.positions[last : last + 11]).max() < 0.05


def test_other_segmentations_and_laws_may_be_given():
    """Masks of any tool, and physical parameters by hand: what an estimate is made around."""
    spec, scene = scenario("fall")
    shown = condition(scene, MULTI)
    masks = (np.linalg.norm(shown - np.array(worlds.COLOURS[spec.colour]), axis=-1) < 60)[:, None]
    centres = centres_of(masks)
    assert np.abs(centres - scene.positions[CONDITION_FRAMES - MULTI : CONDITION_FRAMES]).max() < 0.3
    found = predict_reading(Reading(spec, centres, np.zeros(1)), TEST_FRAMES)
    assert found is not None and error(found, scene) < 1.0
    elastic = predict_reading(Reading(replace(spec, restitution=0.4), centres, np.zeros(1)), TEST_FRAMES)
    assert elastic is not None and error(elastic, scene) > 2.0


def test_frames_of_another_size_and_frames_without_bodies():
    _, scene = scenario("fall")
    large, small = (predict(condition(scene, MULTI, size), TEST_FRAMES) for size in (256, 64))
    assert large is not None and small is not None and np.abs(large.positions - small.positions).max() < 0.01
    assert predict(np.full((3, 64, 64, 3), 236, np.uint8), TEST_FRAMES) is None
