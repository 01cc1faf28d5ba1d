"""Simulated worlds in which a push or a wind acts, from the draw to the manifest."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from phantom.data.manifest import CLIPS, MANIFEST, read_manifest
from phantom.data.prepare import prepare
from phantom.data.sources import worlds
from phantom.data.sources.world_forces import ACCELERATION, IMPULSE, WorldForce
from phantom.data.sources.worlds_files import force_prompt
from phantom.force.prompt import ForcePrompt

FREE = worlds.draw_spec(0, 5, kind="occluder")  # a ball on a floor without friction
MASS = FREE.radius**2 / 25
STILL = WorldForce("push", 0, 0.5, frame=4, body=0, at_rest=True, in_caption=False)


def pushed(spec: worlds.WorldSpec, **changes) -> worlds.Scene:
    force = replace(STILL, **changes)
    return worlds.simulate(replace(spec, force=force, release=force.frame / 4 if force.at_rest else spec.release))


@pytest.mark.parametrize("angle", [0, 180])
def test_a_push_sets_a_body_at_rest_in_motion_from_its_frame_on(angle):
    scene = pushed(FREE, angle=angle)
    x = scene.positions[:, 0, 0]
    speed = np.cos(np.radians(angle)) * 0.5 * IMPULSE / MASS
    assert np.ptp(x[:5]) == 0
    assert np.allclose(np.diff(x[4:12]) * worlds.FPS, speed, rtol=0.02)
    assert np.ptp(scene.positions[:, 0, 1]) < 0.5  # the floor holds it


def test_a_push_adds_to_the_motion_of_a_body_and_moves_a_heavier_one_less():
    free, frame = worlds.simulate(FREE), 16
    scene = pushed(FREE, frame=frame, at_rest=False)
    gained = scene.velocities[frame + 2, 0] - free.velocities[frame + 2, 0]
    assert np.array_equal(scene.positions[: frame + 1], free.positions[: frame + 1])
    assert gained == pytest.approx([0.5 * IMPULSE / MASS, 0], abs=0.2)
    heavy = replace(FREE, radius=FREE.radius * 1.2)
    more = pushed(heavy).velocities[8, 0, 0]
    assert more == pytest.approx(pushed(FREE).velocities[8, 0, 0] / 1.44, rel=0.02)


def test_a_wind_accelerates_all_bodies_alike_once_they_are_free():
    spec = worlds.draw_spec(0, 2, kind="collision")
    scene = pushed(spec, kind="wind", angle=180, magnitude=1.0, frame=3)
    for body in (0, 1):
        assert np.allclose(scene.velocities[5, body, 0], -ACCELERATION * 2 / worlds.FPS, rtol=0.02)
    assert np.ptp(scene.positions[:4], axis=0).max() == 0
    up = pushed(worlds.draw_spec(0, 0, kind="fall"), kind="wind", angle=90, magnitude=1.0, frame=3)
    down = pushed(worlds.draw_spec(0, 0, kind="fall"), kind="wind", angle=270, magnitude=1.0, frame=3)
    assert up.positions[8, 0, 1] < down.positions[8, 0, 1] - 1


def test_forces_are_drawn_per_clip_and_leave_the_other_clips_as_they_were():
    drawn = [worlds.clip_spec(7, index, forced=0.5) for index in range(120)]
    forces = [spec.force for spec in drawn if spec.force]
    assert 40 < len(forces) < 80
    for index, spec in enumerate(drawn):
        if not spec.force:
            assert spec == worlds.clip_spec(7, index)
        assert spec == worlds.clip_spec(7, index, forced=0.5)
    assert {(force.kind, force.at_rest, force.in_caption) for force in forces} == {
        (kind, rest, told) for kind in ("push", "wind") for rest in (True, False) for told in (True, False)
    }
    assert {int(force.angle // 90) for force in forces} == {0, 1, 2, 3}


@pytest.mark.parametrize("index", range(24))
def test_what_is_pushed_is_seen_where_the_prompt_says(index):
    spec = worlds.add_force(worlds.clip_spec(3, index), 3, index)
    scene, free = (worlds.simulate(one) for one in (spec, replace(spec, force=None)))
    frame, body = spec.force.frame, spec.force.body
    prompt = force_prompt(scene)
    if spec.force.kind == "wind":
        assert prompt.wind and not prompt.points
        assert spec.first_frame <= frame < 12
    else:
        (point,) = prompt.points
        assert point.time * worlds.FPS == frame - spec.first_frame >= 0
        assert worlds.is_visible(scene, body)[frame]
        assert np.allclose([point.x, point.y], scene.positions[frame, body] / worlds.SIZE, atol=1e-3)
    later = frame + 6
    assert np.abs(scene.positions[later] - free.positions[later]).max() > 0.1
    if spec.force.at_rest:
        assert np.ptp(scene.positions[: frame + 1], axis=0).max() < 0.01
    else:
        assert worlds.released(spec) <= spec.first_frame


def test_captions_tell_of_forces_or_not_and_fit_the_text_encoder_of_the_mini_preset():
    for index in range(300):
        spec = worlds.add_force(worlds.clip_spec(5, index), 5, index)
        text, force = worlds.caption(spec), spec.force
        assert len(text) < 96 and text.endswith(".")
        assert ("pushed" in text) == (force.in_caption and force.kind == "push")
        assert ("wind blows" in text) == (force.in_caption and force.kind == "wind")
        assert not force.at_rest or not any(word in text for word in ("falls", "rolls", "slides", "swings", "thrown"))
        id_ = worlds.clip_id(spec, index)
        assert id_.endswith("-forced") and worlds.find_spec(id_, text, 5) == spec


@pytest.mark.parametrize(("angle", "way"), [(0, "right"), (44, "up right"), (90, "up"), (200, "left"), (359, "right")])
def test_words_name_the_nearest_of_eight_ways(angle, way):
    assert replace(STILL, angle=angle).words("red ball") == f"red ball pushed {way}"


def test_the_manifest_states_the_force_of_each_clip(make_params, tmp_path):
    sizes = ("data.worlds.train_clips=12", "data.worlds.heldout_clips=2", "data.worlds.scenarios=1", "data.frames=9")
    clips = {}
    for forced in (0, 0.5):
        prepare(make_params(*sizes, f"data.worlds.forced={forced}"), tmp_path / str(forced))
        clips[forced] = read_manifest(tmp_path / str(forced) / CLIPS / MANIFEST)
    pushed = [clip for clip in clips[0.5] if clip.force]
    assert 2 < len(pushed) < 12 and all(clip.id.endswith("-forced") for clip in pushed)
    for clip in pushed:
        spec = worlds.find_spec(clip.id, clip.caption, 0)
        assert ForcePrompt.from_json(clip.force) == force_prompt(worlds.simulate(spec))
        assert (clip.moves_from is None) == spec.force.at_rest
    assert [clip for clip in clips[0.5] if not clip.force] == [
        free for free, clip in zip(clips[0], clips[0.5], strict=True) if not clip.force
    ]
    assert not any(clip.force for clip in clips[0])
