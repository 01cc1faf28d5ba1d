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
