"""`phantom prepare` from simulated worlds."""

import hashlib
import json

import numpy as np
import pytest

from phantom.data.prepare import prepare
from phantom.data.sources import worlds_files
from phantom.data.video import read_frames
from phantom.errors import UserError
from tests.data.latents import contents
from tests.data.prepared import read_result

WORLDS = ("data.worlds.train_clips=6", "data.worlds.heldout_clips=2", "data.worlds.scenarios=1", "data.frames=9")


def test_worlds_give_the_same_bytes_twice(make_params, tmp_path):
    params = make_params(*WORLDS)
    results = [prepare(params, tmp_path / name) for name in ("one", "two")]
    assert (results[0].train, results[0].heldout, results[0].quarantined) == (6, 2, 0)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    clips, left_out = read_result(tmp_path / "one")
    assert left_out == {} and [c.split for c in clips.values()] == ["train"] * 6 + ["heldout"] * 2
    for clip in clips.values():
        path = tmp_path / "one/data/clips" / clip.path
        assert hashlib.sha256(path.read_bytes()).hexdigest() == clip.sha256
        frames, fps = read_frames(path)
        assert frames.shape == (clip.frames, 64, 64, 3) and clip.frames == 9 and fps == clip.fps == 4
    assert (tmp_path / "one/data/benchmark/descriptions.csv").is_file()
    prepare(make_params(*WORLDS, "data.worlds.seed=1"), tmp_path / "two")
    assert contents(tmp_path / "one") != contents(tmp_path / "two")


def test_the_manifest_says_from_when_on_bodies_move(make_params, tmp_path):
    prepare(make_params(*WORLDS, "data.worlds.train_clips=12", "data.frames=29"), tmp_path)
    clips = [clip for clip in read_result(tmp_path)[0].values() if clip.split == "train"]
    for clip in clips:
        frames = read_frames(tmp_path / "data/clips" / clip.path)[0].astype(int)
        changed = np.abs(frames[1:] - frames[:-1]).max((1, 2, 3)) > 40  # more than codec noise
        assert not changed[: max(clip.moves_from - 1, 0)].any() and changed[: clip.moves_from + 3].any()
    assert any(clip.moves_from > 0 for clip in clips[:6]) and all(clip.moves_from == 0 for clip in clips[6:])


def test_long_worlds_have_4m_plus_1_frames(make_params, tmp_path):
    prepare(make_params(*WORLDS, "data.frames=37"), tmp_path)
    lengths = {clip.frames for clip in read_result(tmp_path)[0].values()}
    assert len(lengths) > 1 and all(n % 4 == 1 and 29 <= n <= 37 for n in lengths)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ("data.fps=8", "data.fps: found 8"),
        ("data.width=96", "data.width: found 96"),
        ("data.height=63", "data.height: found 63"),
        ("data.min_frames=33", "data.min_frames: found 33"),
    ],
)
def test_what_worlds_cannot_be_is_refused_and_earlier_clips_stay(make_params, tmp_path, change, field):
    prepare(make_params(*WORLDS), tmp_path)
    before = contents(tmp_path)
    with pytest.raises(UserError, match=f"^{field}[^\n]*$"):
        prepare(make_params(*WORLDS, "data.frames=37", "data.path=videos", change), tmp_path)
    assert contents(tmp_path) == before


def test_clips_and_benchmark_have_the_rate_and_the_balls_that_are_asked_for(make_params, tmp_path):
    more = ("data.worlds.fps=8", "data.fps=8", "data.worlds.more_balls=1", "data.frames=57")
    prepare(make_params(*WORLDS, *more), tmp_path)
    for clip in read_result(tmp_path)[0].values():
        frames, fps = read_frames(tmp_path / "data/clips" / clip.path)
        assert len(frames) == clip.frames == 57 and fps == clip.fps == 8 and "1 more falls" in clip.caption
    (path,) = (tmp_path / "data/benchmark/full-videos/take-1").glob("*/*.mp4")
    assert path.parent.name == "8FPS" and len(read_frames(path)[0]) == 64
    (known,) = json.loads((tmp_path / "data/benchmark" / worlds_files.TRAJECTORIES).read_text()).values()
    assert known["fps"] == 8 and [len(body["positions"]) for body in known["bodies"]] == [40, 40]


def test_a_failure_at_the_last_step_leaves_the_earlier_clips(make_params, tmp_path, monkeypatch):
    prepare(make_params(*WORLDS), tmp_path)
    before = contents(tmp_path)
    monkeypatch.setattr(worlds_files, "write_benchmark", lambda *a: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        prepare(make_params(*WORLDS, "data.worlds.seed=1"), tmp_path)
    assert contents(tmp_path) == before
