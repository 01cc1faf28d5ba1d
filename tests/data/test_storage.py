"""Local and S3 folders, against a real S3 server process and a proxy that injects faults."""

from __future__ import annotations

import io
import os
import zipfile
from pathlib import Path

import boto3
import pytest

from phantom.cli import shared
from phantom.config import PRESETS, Storage, load_params
from phantom.data.storage import ConcatenatedFile, LocalFolder, fingerprint, open_folder
from phantom.errors import StageFailed, UserError

CONTENTS = bytes(range(256)) * 40_000  # 10 MB
NAMES = ("a.mp4", "sub folder/b.mp4", "ünïcode +%20.mp4")


@pytest.fixture
def local(tmp_path: Path) -> LocalFolder:
    folder = tmp_path / "source"
    for i, name in enumerate(NAMES):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(CONTENTS[i : 1000 * (i + 1)])
    (folder / ".hidden").write_text("not looked at")
    return LocalFolder(folder)


def storage() -> Storage:
    return load_params(PRESETS / "mini.yaml").storage


def remote(bucket: str, root: Path, prefix: str = "in/here"):
    return open_folder(f"s3://{bucket}/{prefix}", root, storage())


def put(bucket: str, name: str, contents: bytes) -> None:
    boto3.client("s3").put_object(Bucket=bucket, Key=f"in/here/{name}", Body=contents)


def read(folder, name: str) -> bytes:
    with folder.local_path(name) as path:
        return path.read_bytes()


# --- the same interface, local and remote ---------------------------------------------------------------------------


def test_a_folder_in_s3_is_a_folder_like_any_other(local, bucket, tmp_path):
    for name in NAMES:
        remote(bucket, tmp_path).upload(local.path / name, name)
    boto3.client("s3").put_object(Bucket=bucket, Key="in/hereabouts.mp4", Body=b"of another folder")
    there = remote(bucket, tmp_path)
    assert [(e.name, e.size) for e in there.list()] == [(e.name, e.size) for e in local.list()]
    assert [e.name for e in local.list()] == sorted(NAMES)
    for name in NAMES:
        whole = (local.path / name).read_bytes()
        for folder in (local, there):
            assert read(folder, name) == whole and folder.why_unreadable(name) is None
            with folder.open(name) as file:
                file.seek(-7, io.SEEK_END)
                assert file.read() == whole[-7:]
                file.seek(3)
                assert (file.read(5), file.tell()) == (whole[3:8], 8)
    for folder in (local, there):
        assert folder.why_unreadable("absent.mp4") == "no such file"
        assert folder.why_unreadable("../a.mp4") == folder.why_unreadable("/a.mp4") == "its path leaves the folder"


def test_a_fingerprint_changes_with_the_files(local, bucket, tmp_path):
    put(bucket, "a.mp4", b"one")
    prints = [fingerprint(local), fingerprint(remote(bucket, tmp_path))]
    assert prints == [fingerprint(local), fingerprint(remote(bucket, tmp_path))]
    (local.path / "a.mp4").write_bytes(b"other")
    put(bucket, "a.mp4", b"two")
    assert fingerprint(local) != prints[0] and fingerprint(remote(bucket, tmp_path)) != prints[1]


def test_a_zip_in_pieces_is_read_in_place_and_only_as_far_as_needed(s3, bucket, tmp_path):
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        for i in range(8):
            archive.writestr(f"{i}.mp4", CONTENTS[i : 3_000_000 + i])
    whole = packed.getvalue()
    cuts = [0, 7_000_000, 13_000_001, len(whole)]
    for name, start, stop in zip(("aa", "ab", "ac"), cuts, cuts[1:], strict=False):
        put(bucket, f"part_{name}", whole[start:stop])
    folder = remote(bucket, tmp_path)
    joined = io.BufferedReader(ConcatenatedFile([folder.open(f"part_{name}") for name in ("aa", "ab", "ac")]), 2**20)
    with zipfile.ZipFile(joined) as archive:
        assert archive.read("4.mp4") == CONTENTS[4:3_000_004]  # spans two parts
        assert archive.read("7.mp4") == CONTENTS[7:3_000_007]
    assert not (tmp_path / "checkpoints").exists()
    assert 3 <= len(s3.reads) < 16


# --- faults ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", ["500", "503", "reset", "reset-later", "truncate", "slow"])
def test_a_fault_that_passes_is_waited_out(s3, bucket, tmp_path, fault):
    put(bucket, "a.mp4", CONTENTS)
    s3.faults = [fault]
    assert read(remote(bucket, tmp_path), "a.mp4") == CONTENTS
    assert len(s3.reads) == (1 if fault == "slow" else 2) and not s3.faults


def test_a_body_that_breaks_off_again_and_again_is_read_to_its_end(s3, bucket, tmp_path):
    put(bucket, "a.mp4", CONTENTS)
    s3.faults = ["truncate", "reset-later", "truncate", "truncate"]
    assert read(remote(bucket, tmp_path), "a.mp4") == CONTENTS
    assert len(s3.reads) == 5


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("500", r"the server answered 500 \(500\) 2 times; run again to go on"),
        ("503", r"the server answered 503 \(503\) 2 times; run again to go on"),
        ("reset", r"the server cannot be reached: .*; run again to go on"),
    ],
)
def test_a_fault_that_stays_is_one_line_and_the_next_call_goes_on(s3, bucket, tmp_path, fault, said):
    put(bucket, "a.mp4", CONTENTS)
    s3.faults = [fault] * 2
    with pytest.raises(StageFailed, match=rf"^s3://{bucket}/in/here/a\.mp4: {said}$"):
        read(remote(bucket, tmp_path), "a.mp4")
    assert not list((tmp_path / "checkpoints/cache").iterdir())
    assert read(remote(bucket, tmp_path), "a.mp4") == CONTENTS


def test_a_body_of_which_nothing_arrives_ends_in_one_line(s3, bucket, tmp_path):
    put(bucket, "a.mp4", b"x")
    s3.faults = ["truncate"] * 3
    with pytest.raises(StageFailed, match=r"a\.mp4: broke off 3 times at byte 0 \([^\n]*\); run again to go on$"):
        read(remote(bucket, tmp_path), "a.mp4")


def test_expired_credentials_are_named(s3, bucket, tmp_path):
    put(bucket, "a.mp4", b"x")
    s3.faults = ["expired"]
    with pytest.raises(UserError, match=r"a\.mp4: the credentials have expired; renew them and run again$"):
        read(remote(bucket, tmp_path), "a.mp4")


def test_what_is_not_there_is_named(s3, bucket, tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"^s3://no-such-bucket/in: no such bucket$"):
        open_folder("s3://no-such-bucket/in", tmp_path, storage()).list()
    with pytest.raises(UserError, match=rf"^s3://{bucket}/in/here: nothing there$"):
        remote(bucket, tmp_path).list()
    put(bucket, "a.mp4", b"x")
    folder = remote(bucket, tmp_path)
    with pytest.raises(UserError, match=r"here/b\.mp4: no such key$"):
        folder.open("b.mp4")
    folder.list()
    boto3.client("s3").delete_object(Bucket=bucket, Key="in/here/a.mp4")
    with pytest.raises(UserError, match=r"here/a\.mp4: no such key$"):
        read(folder, "a.mp4")
    (tmp_path / "file").write_bytes(b"x")
    with pytest.raises(UserError, match=r"^s3://no-such-bucket/x: no such bucket$"):
        open_folder("s3://no-such-bucket", tmp_path, storage()).upload(tmp_path / "file", "x")
    with pytest.raises(UserError, match=r"^s3://: no bucket named"):
        open_folder("s3://", tmp_path, storage())
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    with pytest.raises(UserError, match=r": no credentials; set AWS_ACCESS_KEY_ID"):
        remote(bucket, tmp_path).list()


def test_a_server_that_is_not_there_is_named(s3, bucket, tmp_path, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(StageFailed, match=r"the server cannot be reached: [^\n]*run again to go on$"):
        remote(bucket, tmp_path).list()
    monkeypatch.setenv("AWS_ENDPOINT_URL", "127.0.0.1:9")
    with pytest.raises(UserError, match=r"here: the settings of the AWS tools: [^\n]*127\.0\.0\.1:9"):
        remote(bucket, tmp_path)


def test_a_file_that_changes_while_it_is_read_is_not_mixed(s3, bucket, tmp_path):
    put(bucket, "a.mp4", CONTENTS)
    folder = remote(bucket, tmp_path)
    folder.list()
    put(bucket, "a.mp4", CONTENTS[::-1])
    with pytest.raises(UserError, match=r"a\.mp4: changed while it was read; run again$"):
        read(folder, "a.mp4")
    assert read(remote(bucket, tmp_path), "a.mp4") == CONTENTS[::-1]


# --- ranges and copies ----------------------------------------------------------------------------------------------


def test_ranges_are_read_to_memory_and_near_ones_at_once(local, s3, bucket, tmp_path, monkeypatch):
    put(bucket, "a.mp4", CONTENTS)
    (local.path / "a.mp4").write_bytes(CONTENTS)
    ranges = [(7, 7), (500, 1000), (0, 100), (9_000_000, 9_000_005), (1000, 1500)]
    there = remote(bucket, tmp_path)
    assert there.version("a.mp4")
    monkeypatch.setattr(there, "list", None)  # the listing, of maybe 20,000 shards, is not made again
    for folder in (local, there):
        found = folder.read_ranges("a.mp4", ranges)
        assert [raw.tobytes() for raw in found] == [CONTENTS[start:stop] for start, stop in ranges]
    assert len(s3.reads) == 2


def test_a_copy_is_here_while_it_is_used(s3, bucket, tmp_path):
    put(bucket, "a.mp4", CONTENTS)
    folder = remote(bucket, tmp_path)
    with folder.local_path("a.mp4") as path:
        assert path.read_bytes() == CONTENTS and path.parent == tmp_path / "checkpoints/cache"
    s3.faults = ["expired"]
    with pytest.raises(UserError, match="the credentials have expired"), folder.local_path("a.mp4"):
        pass
    assert not list((tmp_path / "checkpoints/cache").iterdir())


def test_a_file_is_written_once_unless_it_is_there(local, bucket, tmp_path):
    for folder in (local, remote(bucket, tmp_path)):
        assert folder.write_new("new/a", b"1") and not folder.write_new("new/a", b"2")
        assert folder.read("new/a") == b"1"
    assert [path.name for path in (local.path / "new").iterdir()] == ["a"]


def test_a_full_disk_ends_a_stage_in_one_line(monkeypatch):
    monkeypatch.setattr(shared, "settings", lambda *arguments: None)
    with (
        pytest.raises(StageFailed, match=r"^data/clips\.new/a\.mp4: no space left on the disk; make some and run"),
        shared.stage("prepare", None, None, None),
    ):
        raise OSError(28, os.strerror(28), "data/clips.new/a.mp4")
    with pytest.raises(PermissionError), shared.stage("prepare", None, None, None):
        raise PermissionError(13, os.strerror(13), "a")
