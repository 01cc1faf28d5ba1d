"""`data.clips: references`: prepare writes no pixels, and clips are decoded from the source where they are needed."""

from __future__ import annotations

import csv
import shutil
import zipfile
from collections import Counter

import numpy as np
import pytest
import torch

from phantom.data.clip_frames import ClipReader
from phantom.data.decode_workers import DecodeWorkers
from phantom.data.encode import encode
from phantom.data.files import sha256
from phantom.data.latent_set import LatentSet
from phantom.data.manifest import CLIPS, MANIFEST, Scores, read_manifest
from phantom.data.prepare import prepare
from phantom.data.references import InvalidClip
from phantom.data.shards import LATENTS
from phantom.data.storage import S3Folder, open_folder
from phantom.data.video import fit_clip, read_span
from phantom.errors import UserError
from phantom.training.data_loader import open_latents
from tests.data.latents import contents
from tests.data.prepared import CAPTIONS, read_result, write_captions
from tests.data.test_openvid import pack, row, video, write_csv
from tests.data.videos import every, moving, write_video


@pytest.fixture
def settings(make_params, videos, monkeypatch):
    monkeypatch.setattr("phantom.data.sources.clips.cores", lambda: 1)  # a process to start
    write_captions(videos, CAPTIONS)

    def make(*overrides):
        return make_params(
            *("data.source=folder", f"data.path={videos}", "data.heldout=0.25", "data.max_quarantine=0.9"),
            *("data.height=32", "data.width=32", "evaluate.physics_iq.benchmark=elsewhere", "encode.batch_size=2"),
            *overrides,
        )

    return make


def frames_of(params, root):
    """The frames of each clip of data/clips by id."""
    reader = ClipReader(root / CLIPS, params)
    return {clip.id: reader.read(clip) for clip in read_manifest(root / CLIPS / MANIFEST)}


def upload(source, where, params, tmp_path):
    there = open_folder(where, tmp_path, params.storage)
    for name in contents(source):
        there.upload(source / name, name)


def test_a_folder_gives_references_without_pixels_that_are_decoded_as_files_are(settings, videos, tmp_path):
    result = prepare(settings(), tmp_path)
    assert result.train + result.heldout == 4
    assert contents(tmp_path / CLIPS).keys() == {MANIFEST, "quarantine.jsonl", "report.json"}
    assert not [*(tmp_path / "checkpoints/prepare").rglob("*.mp4")]
    clips, _ = read_result(tmp_path)
    one = clips["more/d"]
    assert (one.path, one.sha256, one.caption_origin) == (None, sha256(videos / "more/d.mp4"), "captions.csv")
    (segment,) = one.reference.segments
    assert (one.reference.source, segment.file) == (str(videos), "more/d.mp4")
    assert (segment.start, segment.stop) == (0, (videos / "more/d.mp4").stat().st_size)
    assert (one.probe.frames, one.probe.fps) == (17, 8) and one.probe.codec in ("mpeg4", "h264")
    assert (one.probe.height, one.probe.width, one.probe.seconds) == (48, 64, pytest.approx(17 / 8))
    for id_, frames in frames_of(settings(), tmp_path).items():
        assert np.array_equal(frames, fit_clip(videos / f"{id_}.mp4", 4, [(32, 32)], 29).frames), id_
    prepare(settings("data.clips=files"), tmp_path / "files")
    files, _ = read_result(tmp_path / "files")
    for id_, clip in files.items():
        assert clip.path == f"{id_}.mp4" and clip.reference == clips[id_].reference
        assert (clip.curation, clip.split, clip.probe) == (clips[id_].curation, clips[id_].split, clips[id_].probe)


def test_a_source_relative_to_the_checkout_gives_one_manifest_in_any_and_is_found_from_a_studys_folder(
    settings, videos, tmp_path
):
    params = settings("data.path=videos")
    prepare(params, tmp_path)
    copy = tmp_path / "copy"
    shutil.copytree(videos, copy / "videos")  # in another checkout: other times and inodes
    prepare(params, copy)
    assert (copy / CLIPS / MANIFEST).read_bytes() == (tmp_path / CLIPS / MANIFEST).read_bytes()
    place = tmp_path / "checkpoints/studies/latents/x/data"
    place.mkdir(parents=True)
    (place / "clips").symlink_to(tmp_path / CLIPS)
    expected = frames_of(params, tmp_path)
    found = frames_of(params, place.parent)
    assert expected.keys() == found.keys() and all(np.array_equal(found[id_], expected[id_]) for id_ in found)


def test_an_interrupted_call_goes_on_and_a_source_that_changed_is_looked_at_again_alone(
    settings, videos, tmp_path, monkeypatch
):
    made, call = [], DecodeWorkers.call
    monkeypatch.setattr(DecodeWorkers, "call", lambda *a: made.append(a[2].name) or call(*a))
    prepare(settings(), tmp_path)
    before = contents(tmp_path / CLIPS)
    assert sorted(made) == ["a.mp4", "b.mp4", "c.mp4", "d.mp4"]
    made.clear()
    shutil.rmtree(tmp_path / CLIPS)
    prepare(settings(), tmp_path)
    assert not made and contents(tmp_path / CLIPS) == before
    write_video(videos / "b.mp4", moving(9, seed=78, height=48, width=64), every(0.25, 9))
    with pytest.raises(InvalidClip, match=rf"^{videos}/b\.mp4: has changed since it was prepared; run `phantom prep"):
        frames_of(settings(), tmp_path)
    prepare(settings(), tmp_path)
    assert made == ["b.mp4"] and len(frames_of(settings(), tmp_path)) == 4
    (videos / "c.mp4").unlink()
    with pytest.raises(InvalidClip, match=rf"^{videos}/c\.mp4: is gone since it was prepared; run `phantom prepare`"):
        frames_of(settings(), tmp_path)


@pytest.fixture
def openvid(tmp_path, make_params, monkeypatch):
    """Zips of six clips: deflated, by bzip2, and stored in one that was split into three files; and settings."""
    monkeypatch.setattr("phantom.data.sources.clips.cores", lambda: 1)
    source = tmp_path / "openvid"
    (source / "in").mkdir(parents=True)
    videos = {f"{name}.mp4": video(tmp_path, i) for i, name in enumerate("abcdef")}
    some = [dict([*videos.items()][i : i + 2]) for i in (0, 2, 4)]
    (source / "OpenVidHD_part_1.zip").write_bytes(pack(some[0], zipfile.ZIP_DEFLATED))
    (source / "OpenVidHD_part_2.zip").write_bytes(pack(some[1], zipfile.ZIP_BZIP2))
    third = pack({f"inside/{name}": data for name, data in some[2].items()})
    for letters, start, stop in (("aa", 0, 300), ("ab", 300, 500), ("ac", 500, None)):
        (source / f"in/OpenVidHD_part_10_part_{letters}").write_bytes(third[start:stop])
    write_csv(source, [row(f"{name}.mp4", aesthetic=i, motion="none") for i, name in enumerate("abcdef")])

    def make(*overrides, path=source):
        return make_params(
            *("data.source=openvid", f"data.path={path}", "data.heldout=0.2", "data.height=32", "data.width=32"),
            *("evaluate.physics_iq.benchmark=elsewhere", *overrides),
        )

    return source, videos, make


def test_openvid_gives_byte_ranges_of_zips_and_their_pieces(openvid, tmp_path):
    source, videos, make = openvid
    prepare(make(), tmp_path / "run")
    clips = {clip.id: clip for clip in read_manifest(tmp_path / "run" / CLIPS / MANIFEST)}
    assert list(clips) == [*"abcdef"]
    assert Counter(clip.reference.compression for clip in clips.values()) == {"deflated": 2, "bzip2": 2, "stored": 2}
    for id_, clip in clips.items():
        assert clip.scores == Scores(float("abcdef".index(id_)), None, 0.99, "static"), id_
        assert clip.caption_origin == "OpenVidHD.csv" and clip.path is None
    pieces = clips["e"].reference.segments
    assert [one.file[-2:] for one in pieces] == ["aa", "ab", "ac"] and clips["e"].reference.member == "inside/e.mp4"
    raw = b"".join((source / one.file).read_bytes()[one.start : one.stop] for one in pieces)
    assert raw == videos["e.mp4"]
    assert len(clips["f"].reference.segments) == 1
    for id_, frames in frames_of(make(), tmp_path / "run").items():
        assert np.array_equal(frames, fit_clip(videos[f"{id_}.mp4"], 4, [(32, 32)], 29).frames), id_
    (source / "OpenVidHD_part_1.zip").write_bytes(pack({"a.mp4": videos["b.mp4"], "b.mp4": videos["a.mp4"]}))
    with pytest.raises(InvalidClip, match=rf"^{source}/OpenVidHD_part_1\.zip: a\.mp4: has changed since it was prep"):
        frames_of(make(), tmp_path / "run")


def test_a_clip_compressed_otherwise_is_refused_where_it_would_be_read_in_place(openvid, tmp_path):
    source, videos, make = openvid
    (source / "OpenVidHD_part_2.zip").write_bytes(
        pack({name: videos[name] for name in ("c.mp4", "d.mp4")}, zipfile.ZIP_LZMA)
    )
    result = prepare(make("data.max_quarantine=0.5"), tmp_path / "run")
    assert result.quarantined == 2
    said = read_result(tmp_path / "run")[1]["part_002/c.mp4"]
    assert said == "compressed by method 14 in its zip, accepted: stored, deflated, bzip2"
    assert prepare(make("data.clips=files"), tmp_path / "files").quarantined == 0


def test_in_a_bucket_ranges_are_read_without_listing_and_of_the_version_that_was_prepared(
    openvid, settings, videos, s3, bucket, tmp_path, monkeypatch
):
    source, _, make = openvid
    where = f"s3://{bucket}/openvid"
    params = make(path=where)
    upload(source, where, params, tmp_path)
    prepare(params, tmp_path / "run")
    prepare(make(), tmp_path / "here")
    expected = frames_of(make(), tmp_path / "here")
    s3.reads.clear()
    with monkeypatch.context() as patch:
        patch.setattr(S3Folder, "list", lambda *_: pytest.fail("listed"))
        found = frames_of(params, tmp_path / "run")
    assert all(np.array_equal(found[id_], expected[id_]) for id_ in expected)
    assert len(s3.reads) == 4 + 3 + 1  # one for each segment
    s3.faults = ["truncate", "500", ""]
    assert len(frames_of(params, tmp_path / "run")) == 6
    open_folder(where, tmp_path, params.storage).upload(source / "OpenVidHD_part_2.zip", "OpenVidHD_part_1.zip")
    with pytest.raises(InvalidClip, match=rf"^{where}/OpenVidHD_part_1\.zip: a\.mp4: has changed since it was prep"):
        frames_of(params, tmp_path / "run")
    folder = f"s3://{bucket}/videos"
    params = settings(f"data.path={folder}")
    upload(videos, folder, params, tmp_path)
    prepare(params, tmp_path / "folder")
    assert len(frames_of(params, tmp_path / "folder")) == 4
    open_folder(folder, tmp_path, params.storage).delete(["a.mp4"])
    with pytest.raises(InvalidClip, match=rf"^{folder}/a\.mp4: is gone since it was prepared"):
        frames_of(params, tmp_path / "folder")


def test_references_are_encoded_and_one_added_clip_encodes_one(settings, videos, encoded_clips, tmp_path):
    prepare(settings(), tmp_path)
    found = encode(settings(), tmp_path)
    assert (found.clips, found.kept, len(encoded_clips)) == (4, 0, 4)
    encoded_clips.clear()
    write_video(videos / "new.mp4", moving(9, seed=77, height=48, width=64), every(0.25, 9))
    write_captions(videos, {**CAPTIONS, "a.mp4": "Another.", "new.mp4": "A new one."})
    prepare(settings(), tmp_path)
    found = encode(settings(), tmp_path)
    assert (found.clips, found.kept, found.captions, len(encoded_clips)) == (5, 3, 1, 1)
    encoded_clips.clear()
    prepare(settings("data.frames=5"), tmp_path)  # other frames of the same videos
    assert encode(settings("data.frames=5"), tmp_path).kept == 0 and len(encoded_clips) == 5
    latents = LatentSet(tmp_path / LATENTS, "train")
    assert len(latents) + len(LatentSet(tmp_path / LATENTS, "heldout")) == 5


def test_a_video_that_changed_ends_encode_with_one_line(settings, videos, tmp_path):
    prepare(settings(), tmp_path)
    shutil.copy(videos / "a.mp4", videos / "b.mp4")
    with pytest.raises(UserError, match=rf"^{videos}/b\.mp4: has changed since it was prepared[^\n]*$"):
        encode(settings(), tmp_path)


def test_physics_latents_are_computed_online_from_the_source(settings, tmp_path):
    online, stored = settings("train.physics_latents=online"), settings()
    prepare(stored, tmp_path)
    encode(stored, tmp_path)
    expected = open_latents(stored, tmp_path, "train", torch.device("cpu"))[0]
    encode(online, tmp_path)
    found = open_latents(online, tmp_path, "train", torch.device("cpu"))[0]
    assert found.id == expected.id and torch.allclose(found.physics, expected.physics, atol=1e-5)


def test_a_span_is_the_same_frames_as_in_the_whole(tmp_path):
    path = write_video(tmp_path / "a.mp4", moving(17, 3, 48, 64), every(0.125, 17))
    whole = fit_clip(path, 12, [(32, 32)], 25).frames  # more frames than the file has: some are repeated
    for first, count in ((0, 5), (3, 9), (16, 9)):
        assert np.array_equal(read_span(path, 12, (32, 32), first, count), whole[first : first + count])


def test_real_videos_pass_prepare_and_encode(sample_videos, make_params, tmp_path):
    params = make_params(
        *("data.source=folder", f"data.path={sample_videos}", "data.frames=5", "data.height=32", "data.width=32"),
        *("evaluate.physics_iq.benchmark=elsewhere", "encode.batch_size=4"),
    )
    prepare(params, tmp_path)
    with (sample_videos / "captions.csv").open(encoding="utf-8") as file:
        stated = {row["file"][:-4]: row["caption"] for row in csv.DictReader(file)}
    clips, left_out = read_result(tmp_path)
    assert {id_: c.caption for id_, c in clips.items()} == stated and left_out == {}
    assert all(clip.path is None and clip.probe.codec and clip.probe.fps > 0 for clip in clips.values())
    assert encode(params, tmp_path).clips == len(stated)
    for id_, frames in frames_of(params, tmp_path).items():
        assert frames.shape == (5, 32, 32, 3) and np.ptp(frames) > 50, id_
