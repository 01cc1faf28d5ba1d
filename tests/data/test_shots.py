"""`data.shots`: a clip with hard cuts is kept, cut into its shots, or dropped."""

from __future__ import annotations

import numpy as np
import pytest

from phantom.data.clip_frames import ClipReader
from phantom.data.manifest import CLIPS
from phantom.data.prepare import prepare
from phantom.data.shots import find_cuts
from phantom.data.video import fit_clip
from phantom.errors import UserError
from tests.data.prepared import read_result, write_captions
from tests.data.test_curation import scene
from tests.data.videos import every, write_video


@pytest.fixture
def source(tmp_path):
    """`cut`: shots of 6, 3 and 16 frames. `one` and `other`: a shot of 9 frames each."""
    folder = tmp_path / "source"
    folder.mkdir()
    cut = np.concatenate([scene(1, count=6), scene(2, count=3), scene(3, count=16)])
    for name, frames in {"cut": cut, "one": scene(4, count=9), "other": scene(5, count=9)}.items():
        write_video(folder / f"{name}.mp4", frames, every(0.25, len(frames)))
    write_captions(folder, {f"{name}.mp4": f"A disc moves: {name}." for name in ("cut", "one", "other")})
    return folder


@pytest.fixture
def settings(make_params, source, monkeypatch):
    monkeypatch.setattr("phantom.data.sources.clips.cores", lambda: 1)  # a process to start

    def make(*overrides):
        return make_params(
            *("data.source=folder", f"data.path={source}", "data.height=32", "data.width=48", "data.min_frames=5"),
            *("data.heldout=0", "evaluate.physics_iq.benchmark=elsewhere", *overrides),
        )

    return make


def test_a_cut_is_found_wherever_it_is_in_a_clip():
    one, two = scene(1), scene(2)
    for before, after in ((1, 11), (2, 2), (6, 6), (11, 1)):
        assert find_cuts(np.concatenate([one[:before], two[:after]])) == [before]
    assert find_cuts(one) == find_cuts(one[:1]) == []


@pytest.mark.parametrize("kind", ["references", "files"])
def test_a_clip_is_cut_into_its_shots(settings, source, tmp_path, kind):
    params = settings("data.shots=split", f"data.clips={kind}")
    result = prepare(params, tmp_path)
    clips, refused = read_result(tmp_path)
    assert refused == {} and result.removed == {} and result.train == 4
    found = {id_: (clip.first_frame, clip.frames, clip.curation.cuts) for id_, clip in clips.items()}
    assert found == {"cut-shot-1": (0, 5, 0), "cut-shot-2": (9, 13, 0), "one": (0, 9, 0), "other": (0, 9, 0)}
    assert {clips[id_].caption for id_ in ("cut-shot-1", "cut-shot-2")} == {"A disc moves: cut."}
    whole, reader = fit_clip(source / "cut.mp4", 4, [(32, 48)], 29).frames, ClipReader(tmp_path / CLIPS, params)
    for id_, start, stop in (("cut-shot-1", 0, 5), ("cut-shot-2", 9, 22)):
        difference = np.abs(reader.read(clips[id_]).astype(int) - whole[start:stop]).mean()
        assert difference == 0 if kind == "references" else difference < 8, id_
    assert (clips["cut-shot-2"].path is None) == (kind == "references")
    before = clips
    prepare(params, tmp_path)
    assert read_result(tmp_path)[0] == before
    assert 0 < result.kept["pixels"] < 1


def test_a_clip_with_cuts_is_dropped_or_kept(settings, tmp_path):
    result = prepare(settings("data.shots=drop"), tmp_path / "drop")
    assert result.removed == {"cuts": 1} and [*read_result(tmp_path / "drop")[0]] == ["one", "other"]
    prepare(settings(), tmp_path / "keep")
    clips = read_result(tmp_path / "keep")[0]
    assert {id_: clip.curation.cuts for id_, clip in clips.items()} == {"cut": 2, "one": 0, "other": 0}
    with pytest.raises(UserError, match=r"data\.shots: found 'cut', accepted: keep, split, drop"):
        settings("data.shots=cut")


def test_shots_of_a_video_are_in_one_split_and_no_two_clips_have_one_name(settings, source, tmp_path):
    write_video(source / "cut-shot-2.mp4", scene(7, count=9), every(0.25, 9))
    names = ("cut", "one", "other", "cut-shot-2")
    write_captions(source, {f"{name}.mp4": f"A disc moves: {name}." for name in names})
    prepare(settings("data.shots=split", "data.heldout=0.5", "data.max_quarantine=0.5"), tmp_path)
    clips, refused = read_result(tmp_path)
    assert refused == {"cut.mp4": "duplicate: another video is named as its shot 2"}
    assert [*clips] == ["cut-shot-1", "cut-shot-2", "one", "other"]
    (source / "cut-shot-2.mp4").unlink()
    write_captions(source, {f"{name}.mp4": f"A disc moves: {name}." for name in names[:3]})
    for share in ("0.3", "0.5", "0.7"):
        prepare(settings("data.shots=split", f"data.heldout={share}"), tmp_path)
        clips, _ = read_result(tmp_path)
        assert clips["cut-shot-1"].split == clips["cut-shot-2"].split
