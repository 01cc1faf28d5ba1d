"""Clips of several sizes and lengths."""

from __future__ import annotations

import json
import multiprocessing
import time

import numpy as np
import pytest

from phantom.data import prepare as stage
from phantom.data.manifest import read_manifest
from phantom.data.prepare import prepare
from phantom.data.video import fit_clip, kept_share, read_frames
from phantom.errors import UserError
from tests.data.videos import RIGHT_ANGLES, every, moving, turn, write_video

SIZES = "data.buckets=[[64, 32], [48, 48]]"


@pytest.fixture
def source(tmp_path):
    """A wide, a tall, a square and a rotated video of 9, 13, 9 and 17 frames at 4 per second."""
    folder = tmp_path / "source"
    folder.mkdir()
    for name, count, height, width in (("a", 9, 48, 96), ("b", 13, 96, 48), ("c", 9, 64, 64), ("d", 17, 48, 96)):
        write_video(folder / f"{name}.mp4", moving(count, ord(name), height, width), every(0.25, count))
        (folder / f"{name}.txt").write_text(f"Square {name}.")
    turn(folder / "d.mp4", RIGHT_ANGLES[90])
    return folder


@pytest.fixture
def settings(make_params, source):
    def make(*overrides):
        main = ("data.source=folder", f"data.path={source}", "data.height=32", "data.width=64", "data.frames=13")
        return make_params(*main, "data.clips=files", "evaluate.physics_iq.benchmark=elsewhere", *overrides)

    return make


def test_each_clip_takes_the_size_that_keeps_most_of_it(settings, tmp_path):
    result = prepare(settings(SIZES), tmp_path)
    clips = {clip.id: clip for clip in read_manifest(tmp_path / "data/clips/manifest.parquet")}
    shapes = {id_: read_frames(tmp_path / "data/clips" / clip.path)[0].shape[:3] for id_, clip in clips.items()}
    assert shapes == {"a": (9, 32, 64), "b": (13, 64, 32), "c": (9, 48, 48), "d": (13, 64, 32)}
    # The manifest states no size of clips of the main size.
    assert [(c.height, c.width) for c in clips.values()] == [(None, None), (64, 32), (48, 48), (64, 32)]
    assert result.buckets == {"9x32x64": 1, "9x48x48": 1, "13x64x32": 2}
    size, lengths = 48 * 96, (9, 13, 17)
    whole = size * sum(lengths) + 64 * 64 * 9
    assert result.kept == {"clips": 1.0, "pixels": pytest.approx((whole - 4 * size) / whole, abs=1e-4)}
    report = json.loads((tmp_path / "data/clips/report.json").read_text())
    assert (report["kept"], report["buckets"]) == (result.kept, result.buckets)


def test_one_size_crops_more_and_the_report_says_how_much(settings, tmp_path):
    many, one = (
        prepare(settings(SIZES), tmp_path / "many"),
        prepare(settings("data.max_quarantine=1"), tmp_path / "one"),
    )
    assert set(one.buckets) == {"9x32x64", "13x32x64"} and one.kept["pixels"] < 0.7 < many.kept["pixels"]
    clips = read_manifest(tmp_path / "one/data/clips/manifest.parquet")
    assert {clip.height for clip in clips} == {None}
    with pytest.raises(UserError, match=r"^data\.buckets: found 33, accepted: even numbers; nearest valid: 34$"):
        prepare(settings("data.buckets=[[32, 33]]"), tmp_path / "odd")


def test_a_clip_that_is_taken_up_again_counts_as_before(settings, tmp_path, monkeypatch):
    unbroken = prepare(settings(SIZES), tmp_path / "unbroken")
    with monkeypatch.context() as patch:
        patch.setattr(stage, "write_manifest", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            prepare(settings(SIZES), tmp_path / "broken")
    again = prepare(settings(SIZES), tmp_path / "broken")
    assert (again.kept, again.buckets) == (unbroken.kept, unbroken.buckets)


def test_what_is_kept_of_a_picture():
    assert kept_share((480, 832), (480, 832)) == kept_share((960, 1664), (480, 832)) == pytest.approx(1)
    assert kept_share((832, 480), (480, 832)) == pytest.approx((480 / 832) ** 2)
    assert kept_share((100, 400), (100, 100)) == pytest.approx(0.25)


def test_a_length_that_is_not_decoded_is_known_from_the_file(tmp_path):
    path = write_video(tmp_path / "a.mp4", moving(40), every(0.25, 40))
    fitted = fit_clip(path, 4, [(64, 64)], 9)
    assert fitted.pixels == pytest.approx(64 * 64 * 40) and fitted.kept == pytest.approx(9 / 40)
    assert np.array_equal(fitted.frames, fit_clip(path, 4, [(64, 64), (32, 64)], 9).frames)


def test_two_at_a_time_are_refused_and_the_first_is_left_alone(settings, tmp_path):
    def work():
        def stay(*arguments):
            (tmp_path / "ready").touch()
            time.sleep(300)

        stage._make_clips = stay
        prepare(settings(), tmp_path)

    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    try:
        deadline = time.monotonic() + 60
        while not (tmp_path / "ready").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        said = r"^[^\n]*prepare\.lock: another process makes data/clips just now; run again when it has ended$"
        with pytest.raises(UserError, match=said):
            prepare(settings(), tmp_path)
        assert (tmp_path / "data/clips.new").is_dir()
    finally:
        process.kill()
        process.join()
    assert prepare(settings("data.max_quarantine=1"), tmp_path).train
    assert not [*tmp_path.glob("checkpoints/*.lock")] and not (tmp_path / "data/clips.new").exists()
