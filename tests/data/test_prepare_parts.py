"""`phantom prepare --index i --of n`: videos are looked at in parts, and `phantom prepare` makes data/clips of it."""

from __future__ import annotations

import threading

import pytest

from phantom.data.decode_workers import DecodeWorkers
from phantom.data.part import Part
from phantom.data.prefetch import prefetch
from phantom.data.prepare import prepare, prepare_part
from phantom.errors import StageFailed, UserError
from tests.data.latents import contents
from tests.data.prepared import CAPTIONS, write_captions
from tests.data.test_openvid import pack, row, video, write_csv


@pytest.fixture
def one_core(monkeypatch):
    monkeypatch.setattr("phantom.data.sources.clips.cores", lambda: 1)  # a process to start


@pytest.fixture
def decoded(monkeypatch):
    """A list that grows by one item per call of a decode worker."""
    seen, call = [], DecodeWorkers.call
    monkeypatch.setattr(DecodeWorkers, "call", lambda *arguments: seen.append(arguments[1]) or call(*arguments))
    return seen


@pytest.mark.parametrize("clips", ["references", "files"])
def test_parts_in_any_order_find_what_one_call_finds(folder_params, videos, tmp_path, one_core, decoded, clips):
    write_captions(videos, CAPTIONS)
    (videos / "c.mp4").write_bytes(b"no video")
    params = folder_params(f"data.clips={clips}")
    prepare(params, tmp_path / "at-once")
    decoded.clear()
    done = {index: prepare_part(params, Part(index, 3), tmp_path) for index in (2, 0, 0, 1)}
    assert [(done[i].videos, done[i].clips, done[i].refused) for i in range(3)] == [(1, 1, 0), (1, 1, 0), (2, 1, 1)]
    assert len(decoded) == 4
    prepare(params, tmp_path)
    assert len(decoded) == 5  # the refused one is looked at again
    assert contents(tmp_path / "data") == contents(tmp_path / "at-once/data")


def test_parts_of_openvid_are_neighbours_in_its_zips_and_know_the_filters(make_params, tmp_path, one_core, decoded):
    source = tmp_path / "openvid"
    names = [f"v{number}_0.mp4" for number in range(6)]
    captions = ["Der Hund läuft.", *["A dog runs in the park."] * 5]
    write_csv(source, [row(name, caption) for name, caption in zip(names, captions, strict=True)])
    for part in (1, 2):
        some = names[3 * (part - 1) : 3 * part]
        packed = pack({name: video(tmp_path, seed=names.index(name)) for name in some})
        (source / f"OpenVidHD_part_{part}.zip").write_bytes(packed)
    params = make_params(
        *("data.source=openvid", f"data.path={source}", "data.heldout=0.25", "data.openvid.language=en"),
        *("data.height=32", "data.width=32", "evaluate.physics_iq.benchmark=elsewhere"),
    )
    (source / "OpenVidHD_part_2.zip").rename(tmp_path / "away")
    first = prepare_part(params, Part(0, 1), tmp_path / "first")
    (tmp_path / "away").rename(source / "OpenVidHD_part_2.zip")
    assert (first.videos, first.clips) == (2, 2)
    decoded.clear()
    results = [prepare_part(params, Part(index, 2), tmp_path) for index in range(2)]
    assert [result.clips for result in results] == [2, 3] and len(decoded) == 5
    prepare(params, tmp_path)
    assert len(decoded) == 5
    prepare(params, tmp_path / "at-once")
    assert contents(tmp_path / "data") == contents(tmp_path / "at-once/data")


def test_a_part_fails_where_another_attempt_may_succeed(folder_params, videos, bucket, tmp_path, one_core, monkeypatch):
    write_captions(videos, CAPTIONS)

    def tidied(*_):
        (tmp_path / "checkpoints/prepare").rename(tmp_path / "gone")

    with monkeypatch.context() as patch:
        patch.setattr("phantom.data.sources.clips.fsync", tidied)
        with pytest.raises(StageFailed, match=r"\.part: has gone while a part was prepared; run again to go on$"):
            prepare_part(folder_params(), Part(), tmp_path)
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    with pytest.raises(StageFailed, match=r"^s3://[^\n]*: no credentials; set AWS_ACCESS_KEY_ID[^\n]*$"):
        prepare_part(folder_params(f"data.path=s3://{bucket}/videos"), Part(), tmp_path)
    with pytest.raises(UserError, match=r"^--index: found with data\.source worlds, .*; accepted: folder, openvid$"):
        prepare_part(folder_params("data.source=worlds"), Part(0, 2), tmp_path)


def test_an_item_that_takes_long_does_not_hold_up_those_behind_it():
    reached = threading.Event()

    def work(number: int) -> bool:
        return reached.wait(20) if number == 0 else (number == 5 and reached.set()) or True

    assert all(prefetch(work, range(8), workers=2, ahead=6))
