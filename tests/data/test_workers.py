"""Parallel workers encode each clip exactly once, even if workers are killed or shards corrupted."""

from __future__ import annotations

import errno
import fcntl
import json
import multiprocessing
import os
import signal
import time

import pytest
import torch
from safetensors import SafetensorError

from phantom.data import encode as stage
from phantom.data import latent_index, shards
from phantom.data.encode import encode
from phantom.data.files import sha256
from phantom.data.latent_set import LatentSet
from phantom.data.prepare import prepare
from phantom.data.shards import LATENTS, ShardWriter
from phantom.data.workers import Partition
from phantom.errors import UserError
from tests.data.latents import SETTINGS, contents, write_clips

LENGTHS = (13, 9, 13, 13, 5, 13, 13, 9, 13, 13, 5, 9)
OF = 3


@pytest.fixture
def params(make_params, monkeypatch):
    """Settings with one batch, of at most two clips, per shard."""
    init = ShardWriter.__init__

    def smaller(self, *arguments):
        init(self, *arguments)
        self.limit = 1

    monkeypatch.setattr(ShardWriter, "__init__", smaller)
    return make_params(*SETTINGS, "encode.batch_size=2", "encode.prefixes_per_clip=1")


def start(params, root, worker, kill_at=0, merge=False):
    """Starts a worker process, which kills itself at its `kill_at`-th batch."""
    original = stage._encode_batch
    calls = []

    def call(*arguments):
        calls.append(1)
        if len(calls) == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*arguments)

    def work():
        stage._encode_batch = call
        encode(params, root, Partition(worker, OF), merge=merge)

    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    return process


def latents(root):
    sets = [LatentSet(root / LATENTS, split) for split in ("train", "heldout")]
    return {one.id: one for each in sets for one in (each[i] for i in range(len(each)))}


def shards_of(root):
    return sorted((root / "checkpoints/encode").glob("*/*/shard-*.safetensors"))


def assert_whole(root):
    """Asserts that every clip is there once, files match the index, and no intermediate files are left."""
    index = json.loads((root / LATENTS / "index.json").read_text(encoding="utf-8"))
    assert [clip["id"] for clip in index["clips"]] == [f"clip/{i:02d}" for i in range(len(LENGTHS))]
    for stated in (*index["shards"], index["empty_text"]):
        assert sha256(root / LATENTS / stated["file"]) == stated["sha256"]
    names = {stated["file"] for stated in (*index["shards"], index["empty_text"])} | {"index.json"}
    assert {path.name for path in (root / LATENTS).iterdir()} == names
    assert not contents(root / "checkpoints")
    assert sorted(latents(root)) == [f"clip/{i:02d}" for i in range(len(LENGTHS))]


def test_shares_are_apart_and_leave_nothing_out():
    ids = [f"clip {i}" for i in range(500)]
    taken = [[share for share in (Partition(i, 7) for i in range(7)) if share.contains(id_)] for id_ in ids]
    assert all(len(shares) == 1 for shares in taken)
    counts = [sum(shares == [Partition(i, 7)] for shares in taken) for i in range(7)]
    assert min(counts) > 40 and all(Partition().contains(id_) for id_ in ids)
    assert len({Partition(i, n).folder for n in range(1, 9) for i in range(n)}) == 36
    with pytest.raises(UserError, match=r"^--worker: found 3, accepted: 0 to 2 \(--of 3\)$"):
        Partition(3, 3)


def test_workers_together_make_what_one_process_makes(params, encoded_clips, tmp_path):
    for name in ("alone", "together"):
        write_clips(tmp_path / name, LENGTHS)
    encode(params, tmp_path / "alone")
    root = tmp_path / "together"
    encoded_clips.clear()
    results = [encode(params, root, Partition(i, OF)) for i in range(OF)]
    assert sum(r.clips for r in results) == len(encoded_clips) == len(LENGTHS) and all(r.clips for r in results)
    assert not (root / LATENTS).exists() and len({path.parent for path in shards_of(root)}) == OF
    result = encode(params, root, merge=True)
    assert (result.clips, result.kept) == (len(LENGTHS), len(LENGTHS)) and len(encoded_clips) == len(LENGTHS)
    assert_whole(root)
    expected = latents(tmp_path / "alone")
    for id_, one in latents(root).items():
        other = expected[id_]
        assert one.caption == other.caption and one.prefixes.keys() == other.prefixes.keys()
        for name in ("video", "physics", "text"):
            assert torch.allclose(getattr(one, name), getattr(other, name), atol=1e-4)


def test_a_killed_worker_goes_on_and_the_last_to_end_merges(params, encoded_clips, tmp_path):
    write_clips(tmp_path, LENGTHS)
    sizes = [sum(Partition(i, OF).contains(f"clip/{k:02d}") for k in range(len(LENGTHS))) for i in range(OF)]
    worker = sizes.index(max(sizes))
    process = start(params, tmp_path, worker, kill_at=2, merge=True)
    process.join(60)
    assert process.exitcode == -signal.SIGKILL and len(shards_of(tmp_path)) == 1
    for i in range(OF):
        encode(params, tmp_path, Partition(i, OF), merge=True)
        assert (tmp_path / LATENTS).exists() == (i == OF - 1)
    assert_whole(tmp_path)
    assert len(encoded_clips) < len(LENGTHS)  # the killed worker's first batch was not encoded again
    before = (tmp_path / LATENTS / "index.json").stat().st_mtime_ns
    encoded_clips.clear()
    assert encode(params, tmp_path, Partition(0, OF), merge=True).kept == sizes[0]  # its pod was restarted
    assert not encoded_clips and (tmp_path / LATENTS / "index.json").stat().st_mtime_ns > before
    assert_whole(tmp_path)


def test_workers_that_end_at_once_merge_once(params, tmp_path):
    write_clips(tmp_path, LENGTHS)
    processes = [start(params, tmp_path, i, merge=True) for i in range(OF)]
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0] * OF
    assert_whole(tmp_path)


def test_a_merger_that_is_killed_merges_when_it_is_started_again(params, tmp_path, monkeypatch):
    write_clips(tmp_path, LENGTHS)
    encode(params, tmp_path, Partition(0, OF), merge=True)
    encode(params, tmp_path, Partition(1, OF), merge=True)
    with monkeypatch.context() as patch:
        patch.setattr(latent_index, "replace_folder", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            encode(params, tmp_path, Partition(2, OF), merge=True)
    encode(params, tmp_path, Partition(1, OF), merge=True)  # another worker claimed the merge
    assert not (tmp_path / LATENTS).exists()
    encode(params, tmp_path, Partition(2, OF), merge=True)
    assert_whole(tmp_path)


def test_two_workers_of_one_number_do_not_both_work(params, tmp_path):
    write_clips(tmp_path, LENGTHS)
    process = multiprocessing.get_context("fork").Process(target=hold, args=(params, tmp_path))
    process.start()
    try:
        deadline = time.monotonic() + 60
        while not (tmp_path / "ready").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        with pytest.raises(UserError, match=r"^[^\n]*00003-00001: worker 1 of 3 is at work already; give each"):
            encode(params, tmp_path, Partition(1, OF))
        for merge in (False, True):
            with pytest.raises(UserError, match=r"00003-00001: a worker is at work there; run `phantom encode` when"):
                encode(params, tmp_path, merge=merge)
    finally:
        process.kill()
        process.join()
    encode(params, tmp_path, Partition(1, OF))
    encode(params, tmp_path)
    assert_whole(tmp_path)


@pytest.mark.parametrize("share", [None, Partition(1, OF)])
def test_a_volume_without_locks_is_named(params, tmp_path, monkeypatch, share):
    def flock(*_):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    write_clips(tmp_path, LENGTHS)
    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(
        UserError, match=rf"^{tmp_path}/checkpoints/[^\n]*lock: its file system has no locks \(Function"
    ):
        encode(params, tmp_path, share)


def hold(params, root):
    """Runs as worker 1 and hangs at its first batch."""

    def stay(*arguments):
        (root / "ready").touch()
        time.sleep(300)

    stage._encode_batch = stay
    encode(params, root, Partition(1, OF))


def test_a_merge_before_the_end_says_what_is_missing_and_a_plain_call_does_the_rest(params, encoded_clips, tmp_path):
    write_clips(tmp_path, LENGTHS)
    done = encode(params, tmp_path, Partition(0, OF)).clips
    left = len(LENGTHS) - done
    with pytest.raises(UserError, match=rf"^[^\n]*: {left} of 12 clips are not encoded yet; run their workers again"):
        encode(params, tmp_path, merge=True)
    assert not (tmp_path / LATENTS).exists()
    result = encode(params, tmp_path)
    assert (result.clips, result.kept) == (len(LENGTHS), done) and len(encoded_clips) == len(LENGTHS)
    assert_whole(tmp_path)


@pytest.mark.parametrize("spoil", ["flip", "cut", "remove"])
def test_a_damaged_shard_is_named_and_its_clips_encoded_again(params, encoded_clips, tmp_path, spoil, capsys):
    write_clips(tmp_path, LENGTHS)
    for i in range(OF):
        encode(params, tmp_path, Partition(i, OF))

    def damage():
        path = shards_of(tmp_path)[1]
        raw = bytearray(path.read_bytes())
        raw[-10] ^= 1
        path.write_bytes(raw if spoil == "flip" else raw[:-10])
        if spoil == "remove":
            path.unlink()
        return path, len(json.loads(path.with_suffix(".json").read_text())["clips"])

    path, count = damage()
    with pytest.raises(UserError, match=rf"{count} of 12 clips are not encoded yet \({path} was damaged\)"):
        encode(params, tmp_path, merge=True)
    path, second = damage()
    encoded_clips.clear()
    encode(params, tmp_path)
    assert len(encoded_clips) == count + second
    assert f"encode: {path} is damaged: its {second} clips are encoded again" in capsys.readouterr().err
    assert_whole(tmp_path)


def test_a_full_disk_is_an_error_that_names_the_file_and_the_rest_goes_on(params, encoded_clips, tmp_path, monkeypatch):
    write_clips(tmp_path, LENGTHS)
    original, calls = shards.save_file, []

    def full(tensors, path):
        calls.append(path)
        if len(calls) == 3:
            path.write_bytes(b"the beginning")
            raise SafetensorError(f"I/O error: No space left on device (os error {errno.ENOSPC})")
        original(tensors, path)

    with monkeypatch.context() as patch:
        patch.setattr(shards, "save_file", full)
        with pytest.raises(OSError, match="No space left on device") as error:
            encode(params, tmp_path)
    assert error.value.filename.endswith(".safetensors") and not list(tmp_path.rglob("*.part"))
    encoded_clips.clear()
    encode(params, tmp_path)
    assert 0 < len(encoded_clips) < len(LENGTHS)
    assert_whole(tmp_path)


def test_real_videos_through_prepare_and_two_workers(sample_videos, make_params, tmp_path):
    source = ("data.source=folder", f"data.path={sample_videos}", "data.frames=9", "data.buckets=[[64, 112]]")
    params = make_params(*source, "evaluate.physics_iq.benchmark=elsewhere", "encode.prefixes_per_clip=1")
    made = prepare(params, tmp_path)
    assert len(made.buckets) == 2 and made.kept["clips"] == 1
    for worker in range(2):
        encode(params, tmp_path, Partition(worker, 2))
    assert encode(params, tmp_path, merge=True).clips == made.train + made.heldout == 12
    found = latents(tmp_path).values()
    assert {one.video.shape[1:] for one in found} == {(3, 8, 8), (3, 8, 14)}
    assert {one.physics.shape[1:] for one in found} == {(5, 8, 8)}
