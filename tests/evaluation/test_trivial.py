"""Predictions without a model, on simulated worlds."""

from dataclasses import replace

import numpy as np
import pytest

from phantom.data.manifest import MANIFEST, Curation, read_manifest, write_manifest
from phantom.data.sources import worlds
from phantom.data.sources.worlds_files import (
    CONDITION_FRAMES,
    TEST_FRAMES,
    benchmark_spec,
    trajectory,
    write_benchmark,
    write_clips,
)
from phantom.data.video import read_frames
from phantom.errors import UserError
from phantom.evaluation import trajectories
from phantom.evaluation.physics_iq.requests import open_benchmark
from phantom.evaluation.trajectories import track_all
from phantom.evaluation.trivial import predictions, run
from tests.evaluation.test_provenance import IRRELEVANT, PACKAGE, closure

SINGLE, MULTI = 1, 9  # condition frames


def world(kind, seed=0, **changes):
    spec = replace(worlds.draw_spec(seed, 0, kind=kind), **changes)
    return spec, worlds.simulate(spec)


def condition(scene, frames):
    return worlds.render(scene, CONDITION_FRAMES - frames, frames)


def compare(frames, scene):
    assert frames.shape == (TEST_FRAMES, 64, 64, 3) and frames.dtype == np.uint8
    return trajectories.compare(track_all(frames, trajectory(scene)), worlds.FPS, trajectory(scene))


def test_the_last_frame_is_held():
    _, scene = world("projectile")
    given = condition(scene, MULTI)
    held = predictions.last_frame(given, TEST_FRAMES)
    assert (held == given[-1]).all() and compare(held, scene)["position_error"] > 10


def test_constant_velocity_is_right_for_a_rolling_ball_and_ignores_the_floor():
    spec, scene = world("occluder", release=2.0)
    found = compare(predictions.constant_velocity(condition(scene, MULTI), spec), scene)
    assert found["position_error"] < 0.2 and found["missing"] == found["lost"] == 0

    spec, scene = world("fall", release=2.0)
    assert compare(predictions.constant_velocity(condition(scene, MULTI), spec), scene)["position_error"] > 5


def test_what_rests_in_the_condition_stays_where_it_is():
    spec, scene = world("collision", release=2.0)
    moved = predictions.constant_velocity(condition(scene, MULTI), spec)
    still = trajectories.track(moved, trajectory(scene), 1).centres[:4]
    assert np.abs(still - scene.positions[0, 1]).max() < 0.2


def noise(frames, seed):
    return np.random.default_rng(seed).integers(0, 256, (frames, 8, 8, 3), np.uint8)


def test_the_nearest_clip_goes_on_from_where_it_is_like_the_condition():
    clips = [noise(29, seed) for seed in range(4)]
    shown = np.clip(clips[2][5:8].astype(int) + 3, 0, 255).astype(np.uint8)
    other = clips[1][0:3]
    found = predictions.nearest_continuations([shown, other], iter(clips), 29, TEST_FRAMES)
    assert (found[0] == clips[2][8:28]).all() and (found[1] == clips[1][3:23]).all()


def test_a_place_near_the_end_of_a_clip_is_not_used_unless_no_clip_is_longer():
    clips = [noise(29, seed) for seed in range(2)]
    (found,) = predictions.nearest_continuations([clips[0][20:21]], clips, 29, TEST_FRAMES)
    assert not (found[0] == clips[0][21]).all()

    short = [clip[:9] for clip in clips]
    (found,) = predictions.nearest_continuations([short[1][:3]], short, 9, TEST_FRAMES)
    assert (found[:6] == short[1][3:]).all() and (found[6:] == short[1][-1]).all()


@pytest.mark.parametrize("kind", worlds.KINDS)
def test_the_simulator_goes_on_from_what_it_is_shown(kind, monkeypatch):
    monkeypatch.setattr(predictions, "DRAWS", 64)
    for frames, share in ((SINGLE, 0.8), (MULTI, 0.5)):
        spec, scene = world(kind, seed=3, release=1.9)  # one of those that the benchmark has
        given = condition(scene, frames)
        error = compare(predictions.simulated_anew(given, spec, 0, 1), scene)["position_error"]
        assert error < share * compare(predictions.last_frame(given, TEST_FRAMES), scene)["position_error"]


@pytest.mark.parametrize("kind", worlds.KINDS)
def test_the_simulator_that_reads_pixels_and_the_one_that_knows_the_state(kind):
    spec, scene = world(kind, seed=3, release=1.9)
    given = condition(scene, MULTI)
    held = compare(predictions.last_frame(given, TEST_FRAMES), scene)["position_error"]
    assert compare(predictions.simulated_from_pixels(given, worlds.FPS), scene)["position_error"] < 0.6 * held
    assert compare(predictions.simulated_from_state(given, spec), scene)["position_error"] < 0.4


def test_what_cannot_be_read_is_held():
    given = np.full((3, 64, 64, 3), 200, np.uint8)
    assert (predictions.simulated_from_pixels(given, worlds.FPS) == given[-1]).all()


@pytest.mark.parametrize(
    ("kind", "release", "hidden"),
    [("fall", 2.75, {"gravity": 16.0, "restitution": 0.9}), ("occluder", 3.0, {"speed": 15.0})],
)
def test_the_simulator_does_not_know_what_the_condition_does_not_show(kind, release, hidden, monkeypatch):
    monkeypatch.setattr(predictions, "DRAWS", 8)
    spec, scene = world(kind, release=release)  # at rest up to the last condition frame
    other = replace(spec, **hidden)
    later = worlds.simulate(other)
    for frames in (SINGLE, MULTI):
        given = condition(scene, frames)
        assert (condition(later, frames) == given).all()
        assert (predictions.simulated_anew(given, spec, 0, 1) == predictions.simulated_anew(given, other, 0, 1)).all()
    assert not (worlds.render(later, CONDITION_FRAMES, 20) == worlds.render(scene, CONDITION_FRAMES, 20)).all()


def test_a_scenario_of_the_benchmark_is_the_one_that_is_written(tmp_path, make_params):
    write_benchmark(tmp_path, make_params("data.worlds.scenarios=8"))
    _, rows = open_benchmark(tmp_path, "original")
    for row in rows:
        spec = benchmark_spec(0, row.name.id - 1)
        assert (worlds.caption(spec), spec.unseen) == (row.description, "-unseen-" in row.name.scenario)


@pytest.fixture
def checkout(tmp_path, make_params, monkeypatch):
    monkeypatch.setattr(predictions, "DRAWS", 2)
    params = make_params("data.worlds.scenarios=2", "data.worlds.train_clips=4", "data.worlds.heldout_clips=1")
    write_benchmark(tmp_path / "data/benchmark", params)
    write_training_clips(tmp_path, params)
    return tmp_path, params


def write_training_clips(root, params):
    (root / "data/clips").mkdir(parents=True, exist_ok=True)
    write_manifest(root / "data/clips" / MANIFEST, write_clips(root / "data/clips", params)[0])


def predict(root, params):
    return run.predict(params, root, *open_benchmark(root / "data/benchmark", "original"), root / "work")


def test_videos_are_made_once_and_again_when_what_they_depend_on_changes(checkout, make_params, monkeypatch):
    root, params = checkout
    found = predict(root, params)
    simulators = ["simulator", "simulator_pixels", "simulator_state"]
    assert list(found["single"]) == ["last_frame", "nearest_clip", *simulators, "other_take"]
    assert list(found["multi"]) == ["last_frame", "constant_velocity", "nearest_clip", *simulators, "other_take"]
    for folders in found.values():
        for folder in folders.values():
            videos = [read_frames(path) for path in sorted(folder.glob("*.mp4"))]
            assert [(frames.shape, fps) for frames, fps in videos] == [((20, 64, 64, 3), 4.0)] * 2

    lost = next(found["multi"]["simulator"].glob("*.mp4"))
    before = lost.read_bytes()
    lost.unlink()
    assert predict(root, params) == found and lost.read_bytes() == before
    with monkeypatch.context() as patch:
        patch.setattr(run, "write_mp4", None)  # all videos are there
        assert predict(root, params) == found

    more = make_params("data.worlds.scenarios=2", "data.worlds.train_clips=5", "data.worlds.heldout_clips=1")
    write_training_clips(root, more)
    again = predict(root, more)
    assert {name for name in found["multi"] if again["multi"][name] != found["multi"][name]} == {"nearest_clip"}
    folder = make_params("data.source=folder", "data.path=videos", "data.worlds.scenarios=2")
    assert "nearest_clip" not in predict(root, folder)["multi"]


def test_worlds_of_more_balls_at_eight_frames_per_second_are_continued_too(tmp_path, make_params, monkeypatch):
    monkeypatch.setattr(predictions, "DRAWS", 2)
    changes = ("data.worlds.fps=8", "data.fps=8", "evaluate.physics_iq.fps=8", "data.worlds.more_balls=2")
    sizes = ("data.frames=57", "evaluate.physics_iq.prefix_frames=17", "data.worlds.scenarios=1")
    params = make_params(*changes, *sizes, "data.worlds.train_clips=2", "data.worlds.heldout_clips=0")
    write_benchmark(tmp_path / "data/benchmark", params)
    write_training_clips(tmp_path, params)
    found = predict(tmp_path, params)["multi"]
    known = trajectory(worlds.simulate(benchmark_spec(0, 0, fps=8, more_balls=2)))
    assert known["fps"] == 8 and len(known["bodies"]) == 3 and "simulator_pixels" not in found
    errors = {}
    for name, folder in found.items():
        (path,) = folder.glob("*.mp4")
        frames, fps = read_frames(path)
        assert frames.shape == (40, 64, 64, 3) and fps == 8
        errors[name] = trajectories.compare(track_all(frames, known), 8, known)["position_error"]
    assert max(errors["simulator_state"], errors["other_take"]) < 3 < errors["last_frame"]


def test_the_nearest_clip_is_one_that_was_trained_on(checkout, make_params):
    root, params = checkout
    path = root / "data/clips" / MANIFEST
    filtered = make_params("data.worlds.scenarios=2", "data.filter='motion > 1'")
    with pytest.raises(UserError, match=r"manifest\.parquet: states no columns, which data.filter needs"):
        predict(root, filtered)
    clips = [replace(clip, curation=Curation(0, float(i), False, 0.0)) for i, clip in enumerate(read_manifest(path))]
    write_manifest(path, clips)
    everything = predict(root, params)["multi"]
    kept = predict(root, filtered)["multi"]["nearest_clip"]
    assert kept != everything["nearest_clip"]
    write_manifest(path, clips[2:])
    assert predict(root, params)["multi"]["nearest_clip"] == kept


def test_every_module_that_decides_on_a_prediction_is_digested():
    needed = closure(PACKAGE / "evaluation/trivial/run.py") - {PACKAGE / part for part in run.CODE}
    others = {path.relative_to(PACKAGE).as_posix() for path in needed}
    without_influence = {  # frames are what the manifest says, or an error
        *("data/clip_frames.py", "data/curation.py", "data/files.py", "data/physics_iq/masks.py", "data/references.py"),
        *("data/shots.py", "data/sources/__init__.py"),
        *(f"data/storage/{name}.py" for name in ("__init__", "files", "local", "pinned", "s3")),
    }
    assert {path for path in others if path.startswith(("data/", "evaluation/"))} <= IRRELEVANT | without_influence
