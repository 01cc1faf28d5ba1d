import hashlib
from dataclasses import replace

import numpy as np
import pytest

from phantom.data.sources import worlds
from phantom.data.sources.worlds_files import CONDITION_FRAMES, benchmark_spec, scenario_name, trajectory
from phantom.evaluation.trajectories import track_all


@pytest.mark.parametrize("index", range(len(worlds.KINDS)))
def test_the_same_seed_draws_the_same_picture(index):
    first, again = (worlds.simulate(worlds.draw_spec(3, index)) for _ in range(2))
    assert np.array_equal(worlds.render(first, 8, 6), worlds.render(again, 8, 6))
    other = worlds.simulate(worlds.draw_spec(4, index))
    assert not np.array_equal(worlds.render(first, 8, 6), worlds.render(other, 8, 6))


def test_kinds_take_turns_and_captions_say_what_is_seen():
    for index in range(12):
        spec = worlds.draw_spec(0, index)
        text = worlds.caption(spec)
        assert spec.kind == worlds.KINDS[index % 6]
        assert spec.colour in text and spec.background in text
        assert (spec.second_colour in text) == (spec.kind == "collision")


@pytest.mark.parametrize("unseen", [False, True])
def test_a_clips_id_and_caption_name_its_world(unseen):
    spec = worlds.clip_spec(7, 31, unseen=unseen)
    id_, caption = worlds.clip_id(spec, 31), worlds.caption(spec)
    assert worlds.find_spec(id_, caption, 7) == spec
    for other in ((id_, caption, 8), (id_, caption + "!", 7), (f"1{id_}", caption, 7), ("holiday-2", caption, 7)):
        assert worlds.find_spec(*other) is None


@pytest.mark.parametrize(
    ("unseen", "digest"),
    [
        (False, "5e3804eda8784878fa493fe7048200236a388dd4e3efe05a380f50fe9c98dd33"),
        (True, "2b03f2fa3eb093349e71186777f275a1a0cd06f4f7ad420ffec198cdd83dac2c"),
    ],
)
def test_the_worlds_of_clips_are_those_that_the_shipped_parts_were_trained_on(unseen, digest):
    drawn = [worlds.draw_spec(seed, index, unseen=unseen) for seed in (0, 1000, 2000) for index in range(60)]
    assert hashlib.sha256(repr(drawn).encode()).hexdigest() == digest


@pytest.mark.parametrize("index", range(12))
def test_at_another_rate_it_is_the_same_world(index):
    slow, fast = worlds.clip_spec(7, index), worlds.clip_spec(7, index, fps=8)
    positions = [worlds.simulate(spec).positions for spec in (slow, fast)]
    assert len(positions[1]) == 80 and np.array_equal(positions[0], positions[1][::2])
    assert abs(fast.first_frame / 8 - slow.first_frame / 4) <= 1 / 8
    assert worlds.find_spec(worlds.clip_id(fast, index), worlds.caption(fast), 7, fps=8) == fast != slow


@pytest.mark.parametrize("index", range(12))
def test_further_balls_hang_free_of_everything_and_fall_with_the_rest(index):
    plain, spec = worlds.clip_spec(7, index), worlds.clip_spec(7, index, more_balls=3)
    assert replace(spec, others=()) == plain and len(spec.others) == 3
    scene = worlds.simulate(spec)
    known = trajectory(scene, 0, worlds.SCENE_FRAMES)
    assert len({tuple(body["colour"]) for body in known["bodies"]}) == len(known["bodies"]) == scene.positions.shape[1]
    gaps = np.linalg.norm(scene.positions[0, :, None] - scene.positions[0], axis=-1)
    radii = np.array([body["radius"] for body in known["bodies"]])
    assert (gaps > radii[:, None] + radii).sum() == len(radii) * (len(radii) - 1)
    still, last = int(spec.release * worlds.FPS), scene.positions[:, -1]
    assert (last[: still + 1] == last[0]).all() and last[still + 4, 1] > last[0, 1] + 3
    tracked = track_all(worlds.render(scene, 0, 1), known)
    assert np.abs([of.centres[0] for of in tracked[-3:]] - scene.positions[0, -3:]).max() < 0.5
    caption = worlds.caption(spec)
    assert "3 more fall" in caption and len(caption.encode()) < 96  # what the mini preset reads, with an end
    assert worlds.find_spec(worlds.clip_id(spec, index), caption, 7, more_balls=3) == spec
    assert worlds.find_spec(worlds.clip_id(spec, index), caption, 7) is None


@pytest.mark.parametrize("seed", range(2))
def test_a_scenario_beyond_training_changes_one_parameter_and_that_changes_its_motion(seed):
    changed = {kind: set() for kind in worlds.KINDS}
    for index in range(72):
        spec = benchmark_spec(seed, index)
        outside = worlds.unseen_parameters(spec)
        assert len(outside) == spec.unseen == (index // 6) % 2
        assert scenario_name(spec, index).split("-")[2:] == ["unseen", *outside][: 2 * len(outside)]
        changed[spec.kind].update(outside)
    assert changed == {kind: set(acting) for kind, acting in worlds.ACTING.items()}


def test_pairs_differ_in_one_factor_and_in_what_it_does():
    for index in range(36):
        first, second = (benchmark_spec(3, number, pairs=True, more_balls=1) for number in (index, index + 6))
        if index // 6 % 2:
            continue
        assert first == benchmark_spec(3, index, more_balls=1)
        (factor,) = worlds.unseen_parameters(second)
        same = replace(second, **{factor: getattr(first, factor)}, start=first.start, unseen=False)
        assert factor in worlds.ACTING[second.kind] and same == first
        ways = [worlds.simulate(spec) for spec in (first, second)]
        assert np.abs(ways[0].positions - ways[1].positions).max() > 0.5
        resting = [way.positions[0, 0, 1] + spec.radius for way, spec in zip(ways, (first, second), strict=True)]
        assert second.kind != "collision" or resting[0] == pytest.approx(resting[1])


@pytest.mark.parametrize("kind", worlds.KINDS)
def test_what_acts_in_a_kind_of_world_moves_its_bodies(kind):
    for name in worlds.TRAINED:
        gaps = []
        for index in range(4):
            spec = worlds.draw_spec(77, index, kind=kind)
            other = replace(spec, **{name: float(np.mean(worlds.UNSEEN[name][index % 2]))})
            ways = [worlds.simulate(one, 32).positions for one in (spec, other)]
            gaps.append(np.linalg.norm(np.diff([way - way[:1] for way in ways], axis=0), axis=-1).mean())
        assert name not in worlds.ACTING[kind] or np.mean(gaps) > 1


def test_at_least_three_condition_frames_of_the_benchmark_show_motion():
    for index in range(48):
        scene = worlds.simulate(benchmark_spec(0, index), CONDITION_FRAMES)
        steps = np.linalg.norm(np.diff(scene.positions[:, 0], axis=0), axis=1)
        assert (steps > 1e-3).sum() >= 3 and steps[-1] > 0.25


@pytest.mark.parametrize("index", range(60))
def test_unseen_worlds_leave_the_trained_ranges_and_seen_ones_do_not(index):
    def outside(spec):
        return [n for n, (low, high) in worlds.TRAINED.items() if not low <= getattr(spec, n) <= high]

    assert len(outside(worlds.draw_spec(1, index, unseen=True))) == 2
    assert outside(worlds.draw_spec(1, index)) == []


@pytest.mark.parametrize("index", range(6))
def test_everything_rests_until_its_release_and_then_moves(index):
    spec = worlds.draw_spec(5, index)
    scene = worlds.simulate(spec)
    still = int(spec.release * worlds.FPS)
    assert np.allclose(scene.positions[: still + 1], scene.positions[0])
    assert np.abs(scene.positions[still + 8, 0] - scene.positions[0, 0]).max() > 1.5


def test_a_falling_ball_obeys_gravity_until_it_touches_the_floor():
    spec = worlds.draw_spec(0, 0, kind="fall")
    scene = worlds.simulate(spec)
    t = np.arange(worlds.SCENE_FRAMES) / worlds.FPS - spec.release
    expected = scene.positions[0, 0, 1] + 0.5 * spec.gravity * np.maximum(t, 0) ** 2
    before = expected < spec.floor - spec.radius - 1
    assert before.sum() > np.ceil(spec.release * worlds.FPS) + 2
    assert np.abs(scene.positions[before, 0, 1] - expected[before]).max() < 0.15


def test_a_collision_keeps_momentum_and_a_pendulum_its_energy():
    spec = worlds.draw_spec(0, 2, kind="collision")
    scene = worlds.simulate(spec)
    moving = scene.velocities[int(np.ceil(spec.release * worlds.FPS)) :, :, 0]
    masses = np.array([spec.radius**2, spec.second_radius**2])
    momentum = (moving * masses).sum(1)
    assert np.abs(momentum / momentum[0] - 1).max() < 0.02
    assert np.abs(moving[-1] - moving[0]).min() > 1  # and they did collide

    spec = worlds.draw_spec(0, 3, kind="pendulum")
    scene = worlds.simulate(spec)
    height, speed = spec.floor - scene.positions[:, 0, 1], np.linalg.norm(scene.velocities[:, 0], axis=1)
    energy = spec.gravity * height + speed**2 / 2
    swing = np.ptp(spec.gravity * height)
    assert np.ptp(energy) < 0.05 * swing


def test_the_wall_hides_the_ball_for_a_while():
    spec = worlds.draw_spec(0, 5, kind="occluder")
    scene = worlds.simulate(spec)
    seen = worlds.is_visible(scene)
    assert seen[0] and not seen.all()
    hidden = int(np.flatnonzero(~seen)[len(np.flatnonzero(~seen)) // 2])
    frame = worlds.render(scene, hidden, 1)[0].astype(int)
    colour = np.array(worlds.COLOURS[spec.colour])
    near = (np.abs(frame - colour).sum(-1) < 60).sum()
    assert near < np.pi * spec.radius**2 / 2


def test_the_second_take_is_close_to_the_first_and_not_the_same():
    spec = worlds.draw_spec(7, 1)
    first, second = worlds.simulate(spec), worlds.simulate(worlds.second_take(spec, 7, 1))
    gap = np.abs(first.positions - second.positions)
    assert 0 < gap[0].max() <= 1.2 and gap[:16].max() < 6
