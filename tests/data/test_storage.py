"""Local and S3 folders, against a real S3 server process and a proxy that injects faults."""

from __future__ import annotations

import io
import multiprocessing
import os
import signal
import threading
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import boto3
import pytest

from phantom.cli import shared
from phantom.config import PRESETS, Storage, load_params
from phantom.data.storage import ConcatenatedFile, LocalFolder, fingerprint, open_folder
from phantom.data.storage import cache as caching
from phantom.data.storage.cache import Cache
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


def storage(cache_gb: float = 1) -> Storage:
    return load_params(PRESETS / "mini.yaml").storage.model_copy(update={"cache_gb": cache_gb})


def remote(bucket: str, root: Path, prefix: str = "in/here", cache_gb: float = 1):
    return open_folder(f"s3://{bucket}/{prefix}", root, storage(cache_gb))


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
    assert {path.name for path in (tmp_path / "checkpoints/cache").iterdir()} <= {"lock"}
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


# --- the cache ------------------------------------------------------------------------------------------------------


def test_a_file_is_fetched_once_and_the_oldest_ones_make_room(s3, bucket, tmp_path):
    for name in ("a", "b", "c"):
        put(bucket, name, CONTENTS)
    folder = remote(bucket, tmp_path, cache_gb=2.2 * len(CONTENTS) / 2**30)
    for name in ("a", "b", "a", "c", "a", "b"):
        assert read(folder, name) == CONTENTS
        stored = sum(path.stat().st_size for path in (tmp_path / "checkpoints/cache").iterdir())
        assert stored <= folder.cache.limit
    assert [path[-1] for path in s3.reads] == ["a", "b", "c", "b"]
    with pytest.raises(UserError, match=r"here/a: 0\.00954 GiB, more than storage\.cache_gb 0\.00477 can hold$"):
        read(remote(bucket, tmp_path, cache_gb=0.5 * len(CONTENTS) / 2**30), "a")


def test_files_in_use_stay_and_others_wait_for_room(tmp_path):
    cache = Cache(tmp_path, 25)
    seen = []

    def use(key, seconds):
        with cache.fetch(key, 10, key, [key.encode() * 10]) as path:
            time.sleep(seconds)
            seen.append((key, path.read_bytes() == key.encode() * 10))

    threads = [threading.Thread(target=use, args=(key, 0.2)) for key in "abcdefaab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert len(seen) == 9 and all(whole for _, whole in seen)
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= 25


def test_a_file_that_is_finished_while_others_count_is_counted(tmp_path, monkeypatch):
    cache, iterdir = Cache(tmp_path, 25), Path.iterdir
    counting, release = threading.Event(), threading.Event()

    def list_slowly(folder):
        found = list(iterdir(folder))
        if any(path.suffix == ".part" for path in found):
            counting.set()
            time.sleep(0.2)
        return iter(found)

    def pieces():
        assert counting.wait(30)
        yield b"a" * 10

    def use(key, size, pieces):
        with cache.fetch(key, size, key, pieces):
            assert release.wait(30)

    monkeypatch.setattr(Path, "iterdir", list_slowly)
    with ThreadPoolExecutor(2) as pool:
        uses = [pool.submit(use, "a", 10, pieces())]
        while not list(tmp_path.glob("*.part")):
            time.sleep(0.01)
        uses.append(pool.submit(use, "b", 20, [b"b" * 20]))
        time.sleep(0.6)
        there = sum(path.stat().st_size for path in iterdir(tmp_path))
        release.set()
        for each in uses:
            each.result()
    assert there == 10


def test_what_a_killed_process_leaves_makes_room_for_others(tmp_path):
    def fetch():
        def pieces():
            yield b"x" * 10
            os.kill(os.getpid(), signal.SIGKILL)

        with Cache(tmp_path, 25).fetch("a", 20, "a", pieces()):
            pass

    process = multiprocessing.get_context("fork").Process(target=fetch)
    process.start()
    process.join(30)
    assert process.exitcode == -signal.SIGKILL and len(list(tmp_path.glob("*.part"))) == 1
    with Cache(tmp_path, 25).fetch("a", 20, "a", [b"y" * 20]) as path:
        assert path.read_bytes() == b"y" * 20
    assert not list(tmp_path.glob("*.part"))


def test_no_space_is_one_line_and_leaves_nothing(tmp_path, monkeypatch):
    def full(*arguments):
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(caching.os, "posix_fallocate", full)
    with (
        pytest.raises(StageFailed, match=rf"^{tmp_path}: No space left on device \(0 MiB for s3://b/a\); make some"),
        Cache(tmp_path, 25).fetch("a", 20, "s3://b/a", [b"y" * 20]),
    ):
        pass
    assert {path.name for path in tmp_path.iterdir()} == {"lock"}


def test_a_full_disk_ends_a_stage_in_one_line(monkeypatch):
    monkeypatch.setattr(shared, "settings", lambda *arguments: None)
    with (
        pytest.raises(StageFailed, match=r"^data/clips\.new/a\.mp4: no space left on the disk; make some and run"),
        shared.stage("prepare", None, None, None),
    ):
        raise OSError(28, os.strerror(28), "data/clips.new/a.mp4")
    with pytest.raises(PermissionError), shared.stage("prepare", None, None, None):
        raise PermissionError(13, os.strerror(13), "a")
