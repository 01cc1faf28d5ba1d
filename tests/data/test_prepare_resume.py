"""`phantom prepare` after an interruption, a change of the source or a disk error."""

import errno
import os
import shutil
from pathlib import Path

import pytest

from phantom.data.decode_workers import DecodeWorkers
from phantom.data.files import sha256
from phantom.data.prepare import prepare
from phantom.data.sources import clips
from phantom.errors import StageFailed, UserError
from tests.data.latents import contents
from tests.data.prepared import CAPTIONS, read_result, write_captions
from tests.data.videos import every, moving, write_video


def test_an_interrupted_run_does_not_make_its_clips_twice(folder_params, videos, tmp_path, monkeypatch):
    write_captions(videos, CAPTIONS)
    made = []

    call = DecodeWorkers.call

    def make_or_stop(*arguments):
        if len(made) == 2:
            raise KeyboardInterrupt
        made.append(arguments)
        return call(*arguments)

    monkeypatch.setattr(clips, "cores", lambda: 1)
    monkeypatch.setattr(DecodeWorkers, "call", make_or_stop)
    with pytest.raises(KeyboardInterrupt):
        prepare(folder_params(), tmp_path)
    assert not (tmp_path / "data/clips").exists()
    made.clear()
    read_again = []
    monkeypatch.setattr(DecodeWorkers, "call", lambda *a: made.append(a) or call(*a))
    monkeypatch.setattr(clips, "sha256", lambda path: read_again.append(path) or sha256(path))
    prepare(folder_params(), tmp_path)
    assert len(made) == 2
    assert [path for path in read_again if path.is_relative_to(videos)] == [videos / "c.mp4", videos / "more/d.mp4"]
    prepare(folder_params(), tmp_path / "unbroken")
    assert contents(tmp_path / "data") == contents(tmp_path / "unbroken/data")


def test_a_finished_folder_is_looked_at_again_only_where_it_changed(folder_params, videos, tmp_path, monkeypatch):
    write_captions(videos, CAPTIONS)
    prepare(folder_params(), tmp_path)
    made, call = [], DecodeWorkers.call
    monkeypatch.setattr(DecodeWorkers, "call", lambda *a: made.append(a[2].name) or call(*a))

    def made_anew():
        prepare(folder_params(), tmp_path)
        found, made[:] = sorted(made), []
        prepare(folder_params(), tmp_path / "fresh")
        made.clear()
        assert contents(tmp_path / "data") == contents(tmp_path / "fresh/data")
        shutil.rmtree(tmp_path / "fresh")
        return found

    assert made_anew() == []
    write_captions(videos, CAPTIONS | {"a.mp4": "Another caption."})
    assert made_anew() == []
    write_video(videos / "new.mp4", moving(9, seed=77, height=48, width=64), every(0.25, 9))
    write_captions(videos, CAPTIONS | {"new.mp4": "A new one."})
    assert made_anew() == ["new.mp4"]
    write_video(videos / "b.mp4", moving(9, seed=78, height=48, width=64), every(0.25, 9))
    assert made_anew() == ["b.mp4"]
    (tmp_path / "data/clips/c.mp4").unlink()
    (tmp_path / "data/clips/a.mp4").write_bytes(b"damaged")
    assert made_anew() == ["a.mp4", "c.mp4"]
    (videos / "new.mp4").unlink()
    write_captions(videos, CAPTIONS)
    assert made_anew() == []
    assert len([*(tmp_path / "checkpoints/prepare").rglob("*.json")]) == len(CAPTIONS)
    prepare(folder_params("data.frames=5"), tmp_path)
    assert len(made) == len(CAPTIONS) == len([*(tmp_path / "checkpoints/prepare").rglob("*.json")])


def test_a_source_that_changed_meanwhile_is_read_again(folder_params, videos, tmp_path):
    (videos / "text.mp4").write_text("no video")
    write_captions(videos, {**CAPTIONS, "text.mp4": "A caption."})
    with pytest.raises(UserError, match="1 of 5 clips cannot be used"):
        prepare(folder_params("data.max_quarantine=0"), tmp_path)
    (videos / "text.mp4").unlink()
    shutil.copyfile(videos / "b.mp4", videos / "new.mp4")
    (videos / "new.mp4").replace(videos / "a.mp4")
    write_captions(videos, CAPTIONS)
    prepare(folder_params("data.max_quarantine=0.5"), tmp_path)
    assert read_result(tmp_path)[1] == {"b.mp4": "duplicate: the same video as a.mp4"}
    prepare(folder_params("data.max_quarantine=0.5"), tmp_path / "unbroken")
    assert contents(tmp_path / "data") == contents(tmp_path / "unbroken/data")


def test_what_a_failing_disk_does_not_give_is_no_fault_of_the_clip(folder_params, videos, tmp_path, monkeypatch):
    """The disk error is simulated."""
    write_captions(videos, CAPTIONS)
    made, call = [], DecodeWorkers.call
    monkeypatch.setattr(clips, "cores", lambda: 1)
    monkeypatch.setattr(DecodeWorkers, "call", lambda *a: made.append(a) or call(*a))

    def fail(path: Path) -> str:
        if path == videos / "c.mp4":
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
        return sha256(path)

    monkeypatch.setattr(clips, "sha256", fail)
    with pytest.raises(StageFailed, match=r"^c\.mp4: Input/output error; run again to go on[^\n]*$"):
        prepare(folder_params(), tmp_path)
    monkeypatch.setattr(clips, "sha256", sha256)
    result = prepare(folder_params(), tmp_path)
    assert result.train + result.heldout == 4 and result.quarantined == 0 and len(made) == 4
