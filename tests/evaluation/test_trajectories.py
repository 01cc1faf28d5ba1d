from dataclasses import replace

import numpy as np
import pytest

from phantom.data.sources import worlds
from phantom.data.sources.worlds_files import CONDITION_FRAMES, TEST_FRAMES, benchmark_spec, trajectory
from phantom.evaluation import trajectories
from phantom.evaluation.trajectories import track_all


def world(kind, seed=0):
    return world_of(worlds.draw_spec(seed, 0, kind=kind))


def world_of(spec):
    scene = worlds.simulate(spec)
    return worlds.render(scene, CONDITION_FRAMES, TEST_FRAMES), trajectory(scene)


def drift(frames, known):
    return trajectories.compare(track_all(frames, known), worlds.FPS, known)["energy_drift"]


@pytest.mark.parametrize("size", [64, 128])
@pytest.mark.parametrize("kind", worlds.KINDS)
def test_the_rendered_truth_is_found_where_the_simulator_has_it(kind, size):
    scene = worlds.simulate(worlds.draw_spec(5, 0, kind=kind))
    frames = worlds.render(scene, CONDITION_FRAMES, TEST_FRAMES, size)
    found = trajectories.compare(track_all(frames, trajectory(scene)), worlds.FPS, trajectory(scene))
    assert found["position_error"] < 0.2
    assert found["missing"] == found["vanished"] == found["lost"] == 0
    assert found["bodies"] == (2 if kind == "collision" else 1)
    assert (found["energy_drift"] is not None) == (kind in trajectories.CONSERVED)
    assert (found["momentum_drift"] is not None) == (kind == "collision")
    assert (found["energy_drift"] or 0) < 0.08 and (found["momentum_drift"] or 0) < 0.05
    assert found["hidden"] == (kind == "occluder")


def test_a_shifted_picture_is_off_by_the_shift():
    frames, known = world("fall")
    found = trajectories.compare(track_all(np.roll(frames, 3, axis=2), known), worlds.FPS, known)
    assert found["position_error"] == pytest.approx(3, abs=0.1)


def test_a_frozen_ball_has_neither_the_energy_nor_the_way_of_a_rolling_one():
    frames, known = world("occluder")
    found = trajectories.compare(track_all(np.repeat(frames[:1], len(frames), 0), known), worlds.FPS, known)
    assert found["position_error"] > 10
    assert found["energy_drift"] == pytest.approx(1, abs=0.05)  # all of it is kinetic
    assert found["missing"] == 0 and found["lost"] == 1  # it is seen, but never beyond the wall

    frames, known = world("collision")
    found = trajectories.compare(track_all(np.repeat(frames[:1], len(frames), 0), known), worlds.FPS, known)
    assert found["momentum_drift"] == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize("kind", ["fall", "projectile", "pendulum"])
def test_energy_is_kept_under_another_gravity_but_not_by_what_hangs_or_drifts_in_the_air(kind):
    spec = replace(worlds.draw_spec(0, 0, kind=kind), release=2.2, gravity=15.0)
    frames, known = world_of(spec)
    assert drift(frames, known) < 0.05
    assert drift(world_of(replace(spec, gravity=8.0))[0], known) < 0.05  # another world, of which all laws hold
    assert drift(np.repeat(frames[:1], len(frames), 0), known) == 1
    assert drift(np.full_like(frames, 236), known) == 1  # an empty picture
    scene = worlds.simulate(spec, CONDITION_FRAMES)
    step = scene.positions[-1] - scene.positions[-2]
    moved = scene.positions[-1] + step * np.arange(1, TEST_FRAMES + 1)[:, None, None]
    straight = worlds.Scene(spec, moved, np.zeros(moved.shape[:2]), np.zeros_like(moved))
    assert drift(worlds.render(straight, 0, TEST_FRAMES), known) > 0.15


def test_a_bounce_between_two_frames_ends_the_measurement():
    for index in range(0, 60):
        spec = benchmark_spec(0, index)
        if spec.kind in ("fall", "projectile"):
            scene = worlds.simulate(spec, CONDITION_FRAMES + TEST_FRAMES)
            centres = scene.positions[CONDITION_FRAMES:, 0]
            tracked = trajectories.Track(centres, np.ones(TEST_FRAMES), np.zeros((TEST_FRAMES, 3)))
            assert (trajectories.compare([tracked], worlds.FPS, trajectory(scene))["energy_drift"] or 0) < 0.05


def test_a_ball_that_speeds_up_gains_energy():
    scene = worlds.simulate(worlds.draw_spec(0, 0, kind="pendulum"), frames=2 * worlds.SCENE_FRAMES)
    known = trajectory(scene)
    fast = worlds.render(scene, 0, 80)[CONDITION_FRAMES::2][:TEST_FRAMES]
    assert drift(fast, known) > 0.2


def test_a_ball_that_does_not_come_back_from_behind_the_wall_is_lost():
    scene = worlds.simulate(worlds.draw_spec(0, 0, kind="occluder"))
    known, visible = trajectory(scene), np.array(trajectory(scene)["bodies"][0]["visible"])
    frames = worlds.render(scene, CONDITION_FRAMES, TEST_FRAMES)
    hidden = int(np.flatnonzero(~visible)[visible[~visible].size // 2])
    frames[hidden:] = frames[hidden]
    found = trajectories.compare(track_all(frames, known), worlds.FPS, known)
    assert (found["hidden"], found["lost"]) == (1, 1)
    assert found["vanished"] == visible[-4:].any()


def test_a_ball_that_vanishes_or_changes_its_colour_is_missed():
    frames, known = world("fall")
    gone = frames.copy()
    gone[10:] = (236, 236, 232)
    found = trajectories.compare(track_all(gone, known), worlds.FPS, known)
    assert found["missing"] == 0.5 and found["vanished"] == 1
    assert found["position_error"] == pytest.approx(trajectories.MISS / 2, abs=0.1)  # half of the frames are misses

    colour = np.array(known["bodies"][0]["colour"])
    other = next(c for c in worlds.COLOURS.values() if np.abs(np.array(c) - colour).sum() > 300)
    recoloured = np.where((np.abs(frames.astype(int) - colour).sum(-1) < 90)[..., None], np.uint8(other), frames)
    assert trajectories.compare(track_all(recoloured, known), worlds.FPS, known)["missing"] == 1.0


def test_noise_far_from_the_ball_does_not_move_it():
    frames, known = world("projectile")
    frames[:, :2, :8] = known["bodies"][0]["colour"]
    assert trajectories.compare(track_all(frames, known), worlds.FPS, known)["position_error"] < 0.2


def test_a_video_at_another_rate_is_compared_at_the_same_times():
    frames, known = world("incline")
    found = trajectories.compare(track_all(np.repeat(frames, 2, axis=0), known), 2 * worlds.FPS, known)
    assert found["position_error"] < 0.2


def test_the_summary_parts_what_training_has_seen_from_what_it_has_not():
    rows = []
    for unseen, shift in ((False, 0), (True, 4)):
        spec = worlds.draw_spec(1, 0, kind="fall", unseen=unseen)
        scene = worlds.simulate(spec)
        frames = np.roll(worlds.render(scene, CONDITION_FRAMES, TEST_FRAMES), shift, axis=2)
        rows.append(trajectories.compare(track_all(frames, trajectory(scene)), worlds.FPS, trajectory(scene)))
    found = trajectories.summary(rows)
    assert found["position_error_trained"] < 0.2
    assert found["position_error_unseen"] == pytest.approx(4, abs=0.2)
    assert found["position_error"] == pytest.approx(2, abs=0.2)
    assert (found["bodies"], found["lost"], found["momentum_drift"]) == (2, 0, None)
    assert len(found["per_scenario"]) == 2
