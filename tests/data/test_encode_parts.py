"""Parts, encoded by any number of processes in any order, together make what one process makes."""

from __future__ import annotations

import errno
import fcntl
import json
import multiprocessing
import os
import signal
import time
from dataclasses import replace

import pytest
import torch
from safetensors import SafetensorError

from phantom import logs
from phantom.cost import gpu_hours
from phantom.data import encode as stage
from phantom.data import encode_processes, latent_index, shards
from phantom.data.encode import encode, encode_part, merge_parts
from phantom.data.encode_job import describe_job
from phantom.data.encode_processes import encode_in_processes
from phantom.data.files import exclusive, sha256
from phantom.data.latent_set import LatentSet
from phantom.data.manifest import CLIPS
from phantom.data.part import Part
from phantom.data.prepare import prepare
from phantom.data.shards import LATENTS, ShardWriter, index_entry
from phantom.errors import InvalidData, StageFailed, Terminated, UserError, raise_terminated
from tests.data.latents import SETTINGS, contents, read_index, write_clips
from tests.data.misbehaving_parts import part_0_fails, part_1_is_killed, speaks, stays_until_stopped

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


def start(params, root, part, stop_at=0, number=signal.SIGKILL):
    """Starts a process that encodes a part, and sends itself a signal at its batch `stop_at`."""
    original, calls = stage._encode_batch, []

    def call(*arguments):
        calls.append(1)
        if len(calls) == stop_at:
            time.sleep(0.5)  # the shard before is written meanwhile
            os.kill(os.getpid(), number)
        return original(*arguments)

    def work():
        stage._encode_batch = call
        signal.signal(signal.SIGTERM, raise_terminated)
        try:
            encode_part(params, part, root)
        except Terminated:
            os._exit(75)

    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    return process


def latents(root):
    sets = [LatentSet(root / LATENTS, split) for split in ("train", "heldout")]
    return {one.id: one for each in sets for one in (each[i] for i in range(len(each)))}


def records(root):
    return sorted((root / "checkpoints/encode").glob("*/*.json"))


def size_of(params, root, part):
    return len(describe_job(params, root, part).clips)


def assert_whole(root):
    """Asserts that every clip is there once, files match the index, and no intermediate files are left."""
    index = read_index(root / LATENTS)
    assert [clip["id"] for clip in index["clips"]] == [f"clip/{i:02d}" for i in range(len(LENGTHS))]
    for stated in (*index["shards"], index["empty_text"]):
        assert sha256(root / LATENTS / stated["file"]) == stated["sha256"]
    assert all(stated["file"] == f"{stated['sha256']}.safetensors" for stated in index["shards"])
    names = {stated["file"] for stated in (*index["shards"], index["empty_text"])} | {"index.json", "clips.arrow"}
    assert {path.name for path in (root / LATENTS).iterdir()} == names
    assert not contents(root / "checkpoints") and {path.name for path in (root / "data").iterdir()} <= {
        "clips",
        "latents",
    }
    assert sorted(latents(root)) == [f"clip/{i:02d}" for i in range(len(LENGTHS))]


def test_parts_are_apart_and_leave_nothing_out():
    keys = [f"{i:032x}" for i in range(10**18, 10**18 + 500 * 10**15, 10**15)]
    keys = [key[::-1] for key in keys]
    taken = [[part for part in (Part(i, 7) for i in range(7)) if part.contains(key)] for key in keys]
    assert all(len(parts) == 1 for parts in taken) and all(Part().contains(key) for key in keys)
    assert len({Part(i, n).name for n in range(1, 9) for i in range(n)}) == 36
    with pytest.raises(UserError, match=r"^--index: found 3, accepted: 0 to 2 \(--of 3\)$"):
        Part(3, 3)


def test_parts_together_make_what_one_process_makes(params, encoded_clips, tmp_path):
    for name in ("alone", "together"):
        write_clips(tmp_path / name, LENGTHS)
    encode(params, tmp_path / "alone")
    root = tmp_path / "together"
    encoded_clips.clear()
    results = [encode_part(params, Part(i, OF), root) for i in reversed(range(OF))]
    assert sum(r.clips for r in results) == len(encoded_clips) == len(LENGTHS) and all(r.clips for r in results)
    assert not (root / LATENTS).exists()
    result = merge_parts(params, root)
    assert (result.clips, result.kept) == (len(LENGTHS), len(LENGTHS)) and len(encoded_clips) == len(LENGTHS)
    assert_whole(root)
    expected = latents(tmp_path / "alone")
    for id_, one in latents(root).items():
        other = expected[id_]
        assert one.caption == other.caption and one.prefixes.keys() == other.prefixes.keys()
        for name in ("video", "physics", "text"):
            assert torch.allclose(getattr(one, name), getattr(other, name), atol=1e-4)


@pytest.mark.parametrize(("number", "kept"), [(signal.SIGKILL, 1), (signal.SIGTERM, 2)])
def test_a_part_that_is_stopped_keeps_what_is_whole(params, encoded_clips, tmp_path, monkeypatch, number, kept):
    write_clips(tmp_path, LENGTHS)
    part = max((Part(i, 2) for i in range(2)), key=lambda part: size_of(params, tmp_path, part))
    if number == signal.SIGTERM:  # which also keeps the shard that is not full
        batches, extend = [], ShardWriter._extend
        monkeypatch.setattr(
            ShardWriter,
            "_extend",
            lambda self, some: (
                setattr(self, "limit", 1 if not batches else 10**9),
                batches.append(1),
                extend(self, some),
            ),
        )
    process = start(params, tmp_path, part, stop_at=3 if number == signal.SIGTERM else 2, number=number)
    process.join(60)
    assert process.exitcode == (75 if number == signal.SIGTERM else -signal.SIGKILL)
    assert len(records(tmp_path)) == kept
    found = [json.loads(path.read_text()) for path in records(tmp_path)]
    done = sum(len(record["clips"]) for record in found)
    result = encode_part(params, part, tmp_path)
    assert result.kept == done and len(encoded_clips) == result.clips - done > 0
    for i in range(2):
        encode_part(params, Part(i, 2), tmp_path)
    merge_parts(params, tmp_path)
    assert_whole(tmp_path)


def test_a_part_that_runs_twice_at_once_is_harmless(params, tmp_path):
    write_clips(tmp_path, LENGTHS)
    processes = [start(params, tmp_path, Part(i, 2)) for i in (0, 0, 1)]
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0] * 3
    assert encode_part(params, Part(0, 2), tmp_path).shards == 0  # once more, for nothing
    merge_parts(params, tmp_path)
    assert_whole(tmp_path)


def test_parts_of_another_size_are_taken_over(params, encoded_clips, tmp_path):
    write_clips(tmp_path, LENGTHS)
    done = encode_part(params, Part(0, 2), tmp_path).clips
    encoded_clips.clear()
    for i in range(5):
        encode_part(params, Part(i, 5), tmp_path)
    assert len(encoded_clips) == len(LENGTHS) - done
    merge_parts(params, tmp_path)
    assert_whole(tmp_path)


def test_a_part_that_is_run_after_the_merge_does_nothing(params, encoded_clips, tmp_path):
    write_clips(tmp_path, LENGTHS)
    encode(params, tmp_path)
    encoded_clips.clear()
    assert encode_part(params, Part(1, OF), tmp_path).shards == 0 and not encoded_clips
    assert_whole(tmp_path)


def test_a_merge_that_is_killed_is_done_by_the_next(params, encoded_clips, tmp_path, monkeypatch):
    write_clips(tmp_path, LENGTHS)
    for i in range(OF):
        encode_part(params, Part(i, OF), tmp_path)
    for name in ("replace_folder", "delete_records"):
        with monkeypatch.context() as patch:
            patch.setattr(latent_index, name, lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
            with pytest.raises(KeyboardInterrupt):
                merge_parts(params, tmp_path)
    encoded_clips.clear()
    merge_parts(params, tmp_path)
    assert_whole(tmp_path)
    assert not encoded_clips


def test_a_folder_that_goes_while_it_is_made_is_not_published(params, tmp_path, monkeypatch):
    write_clips(tmp_path, LENGTHS)
    encode_part(params, Part(), tmp_path)
    original = latent_index._statistics

    def lose(job, sums, new):
        next(new.glob("*.safetensors")).unlink()
        return original(job, sums, new)

    monkeypatch.setattr(latent_index, "_statistics", lose)
    with pytest.raises(
        StageFailed, match=r"^[^\n]*latents\.new-\w+/\w+\.safetensors: has gone while [^\n]*; run again$"
    ):
        merge_parts(params, tmp_path)
    assert not (tmp_path / LATENTS).exists() and records(tmp_path)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda path: path.unlink(), r"00\.mp4: no such file"),
        (lambda path: path.write_bytes(b"no video"), r"00\.mp4: not the file that manifest"),
    ],
)
def test_a_clip_that_is_not_the_manifests_fails_its_part_alone(params, tmp_path, damage, said):
    write_clips(tmp_path, LENGTHS)
    damage(tmp_path / CLIPS / "00.mp4")
    parts = [Part(i, OF) for i in range(OF)]
    digest = describe_job(params, tmp_path).clips[0].clip.sha256
    for part in parts:
        if part.contains(digest):
            with pytest.raises(InvalidData, match=said):
                encode_part(params, part, tmp_path)
        else:
            encode_part(params, part, tmp_path)
    assert InvalidData.exit_code not in (0, 1, 2, 75)


def test_two_plain_calls_do_not_both_work(params, tmp_path, monkeypatch):
    write_clips(tmp_path, LENGTHS)
    monkeypatch.setattr(stage, "intact_shards", lambda *_, **__: encode(params, tmp_path))
    with pytest.raises(UserError, match=r"^[^\n]*encode\.lock: another process makes data/latents just now; run again"):
        encode(params, tmp_path)


def test_a_volume_without_locks_is_named_and_is_enough_for_parts(params, tmp_path, monkeypatch):
    def flock(*_):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    write_clips(tmp_path, LENGTHS)
    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(UserError, match=rf"^{tmp_path}/checkpoints/[^\n]*lock: its file system has no locks"):
        encode(params, tmp_path)
    for i in range(2):
        encode_part(params, Part(i, 2), tmp_path)
    merge_parts(params, tmp_path)
    assert_whole(tmp_path)


def test_several_processes_by_one_command_make_the_same(make_params, tmp_path):
    params = make_params(*SETTINGS, "encode.batch_size=2", "encode.prefixes_per_clip=1", "encode.processes=2")
    for name in ("alone", "together"):
        write_clips(tmp_path / name, LENGTHS)
    expected = encode(make_params(*SETTINGS, "encode.batch_size=2", "encode.prefixes_per_clip=1"), tmp_path / "alone")
    found = encode(params, tmp_path / "together")
    assert (found.clips, found.kept) == (expected.clips, expected.kept) == (len(LENGTHS), 0) and found.shards >= 2
    assert_whole(tmp_path / "together")
    one, other = latents(tmp_path / "alone"), latents(tmp_path / "together")
    for id_ in one:
        assert torch.allclose(one[id_].video, other[id_].video, atol=1e-4), id_
    assert encode(params, tmp_path / "together").kept == len(LENGTHS)


def test_a_process_that_is_killed_or_fails_is_told_when_the_others_have_ended(params, tmp_path):
    with pytest.raises(StageFailed, match=r"^a process that encodes was killed \(exit code -9\); run again to go on"):
        encode_in_processes(part_1_is_killed, params, tmp_path, 2)
    assert (tmp_path / "done").exists()
    (tmp_path / "done").unlink()
    with pytest.raises(InvalidData, match=r"^00\.mp4: no such file$"):
        encode_in_processes(part_0_fails, params, tmp_path, 2)
    assert (tmp_path / "done").exists()


def test_an_interruption_stops_all_processes_which_save(params, tmp_path, monkeypatch):
    def interrupt(*_):
        deadline = time.monotonic() + 400
        while len([*tmp_path.glob("started-*")]) < 2 and time.monotonic() < deadline:
            time.sleep(0.05)
        raise KeyboardInterrupt

    monkeypatch.setattr(encode_processes, "_wait", interrupt)
    with pytest.raises(KeyboardInterrupt):
        encode_in_processes(stays_until_stopped, params, tmp_path, 2)
    assert len([*tmp_path.glob("saved-*")]) == 2


def test_lines_and_gpu_hours_of_all_processes_are_as_those_of_one(params, tmp_path, monkeypatch, capfd):
    monkeypatch.setenv(logs.LOG_ENV, "json")
    monkeypatch.setitem(logs.context, "stage", "encode")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    before, began = gpu_hours(), time.monotonic()
    encode_in_processes(speaks, params, tmp_path, 2)
    seconds = 3600 * (gpu_hours() - before)
    assert 0 < seconds <= time.monotonic() - began  # both processes have the one GPU
    found = [json.loads(line) for line in capfd.readouterr().err.splitlines()]
    assert sorted((line["message"], line["stage"]) for line in found) == [("part 0", "encode"), ("part 1", "encode")]


def test_a_merge_beside_another_or_a_plain_call_leaves_it_alone(params, tmp_path):
    write_clips(tmp_path, LENGTHS)
    encode_part(params, Part(), tmp_path)
    with (
        exclusive(tmp_path / stage.LOCK, "makes data/latents"),
        pytest.raises(
            StageFailed, match=r"^[^\n]*encode\.lock: another process makes data/latents just now; run again"
        ),
    ):
        merge_parts(params, tmp_path)
    merge_parts(params, tmp_path)
    assert_whole(tmp_path)


def test_a_part_that_still_runs_while_the_merge_publishes_ends_well(params, tmp_path, monkeypatch):
    write_clips(tmp_path, LENGTHS)
    for i in range(2):
        encode_part(params, Part(i, 2), tmp_path)
    part = max((Part(i, 2) for i in range(2)), key=lambda part: size_of(params, tmp_path, part))
    original, calls = stage._encode_batch, []

    def merge_meanwhile(*arguments):
        calls.append(1)
        if len(calls) == 2:
            merge_parts(params, tmp_path)
        return original(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(stage, "finished_keys", lambda *_: set())  # it began before the other one had finished
        patch.setattr(stage, "_encode_batch", merge_meanwhile)
        encode_part(params, part, tmp_path)
    assert len(calls) > 2 and len(latents(tmp_path)) == len(LENGTHS)
    merge_parts(params, tmp_path)
    assert_whole(tmp_path)


def test_what_a_killed_process_was_writing_into_a_shared_folder_is_deleted_later(make_params, tmp_path):
    store = tmp_path / "store"
    params = make_params(*SETTINGS, f"storage.latents={store}")
    for name, age in ((".killed.safetensors", 7200), ("records/x/.killed.part", 7200), (".written.safetensors", 0)):
        (store / name).parent.mkdir(parents=True, exist_ok=True)
        (store / name).touch()
        os.utime(store / name, (time.time() - age,) * 2)
    write_clips(tmp_path, LENGTHS[:2])
    encode(params, tmp_path)
    assert [path.name for path in store.rglob(".*")] == [".written.safetensors"]
    assert len([*store.glob("[!.]*.safetensors")]) == len(read_index(tmp_path / LATENTS)["shards"]) + 1


def test_a_merge_before_the_end_says_what_is_missing_and_a_plain_call_does_the_rest(params, encoded_clips, tmp_path):
    write_clips(tmp_path, LENGTHS)
    done = encode_part(params, Part(0, OF), tmp_path).clips
    left = len(LENGTHS) - done
    with pytest.raises(StageFailed, match=rf"^[^\n]*: {left} of 12 clips are not encoded yet; run their parts again"):
        merge_parts(params, tmp_path)
    assert not (tmp_path / LATENTS).exists()
    result = encode(params, tmp_path)
    assert (result.clips, result.kept) == (len(LENGTHS), done) and len(encoded_clips) == len(LENGTHS)
    assert_whole(tmp_path)


@pytest.mark.parametrize("spoil", ["flip", "cut", "remove"])
def test_a_damaged_shard_is_named_and_its_clips_encoded_again(params, encoded_clips, tmp_path, spoil, capsys):
    write_clips(tmp_path, LENGTHS)
    for i in range(OF):
        encode_part(params, Part(i, OF), tmp_path)
    record = json.loads(records(tmp_path)[1].read_text())
    path, count = records(tmp_path)[1].parent / record["file"], len(record["clips"])
    raw = bytearray(path.read_bytes())
    raw[-10] ^= 1
    path.write_bytes(raw if spoil == "flip" else raw[:-10])
    if spoil == "remove":
        path.unlink()
    with pytest.raises(StageFailed, match=rf"{count} of 12 clips are not encoded yet"):
        merge_parts(params, tmp_path)
    said = f"encode: {path.name} is damaged or missing: its {count} clips are encoded again"
    assert said in capsys.readouterr().err
    encoded_clips.clear()
    encode(params, tmp_path)
    assert len(encoded_clips) == count
    assert_whole(tmp_path)


def test_parts_make_a_damaged_shard_of_the_latents_again(params, encoded_clips, tmp_path):
    write_clips(tmp_path, LENGTHS)
    encode(params, tmp_path)
    stated = read_index(tmp_path / LATENTS)["shards"][1]["file"]
    path, count = (
        tmp_path / LATENTS / stated,
        sum(c["shard"] == stated for c in read_index(tmp_path / LATENTS)["clips"]),
    )
    raw = bytearray(path.read_bytes())
    raw[-10] ^= 1
    path.write_bytes(raw)
    with pytest.raises(StageFailed, match=rf"{count} of 12 clips are not encoded yet; run their parts again"):
        merge_parts(params, tmp_path)
    encoded_clips.clear()
    for i in range(OF):
        encode_part(params, Part(i, OF), tmp_path)
    merge_parts(params, tmp_path)
    assert len(encoded_clips) == count
    assert_whole(tmp_path)


def test_a_lost_shard_is_made_again_though_it_has_a_record(params, tmp_path, monkeypatch):
    write_clips(tmp_path, LENGTHS)
    encode_part(params, Part(0, 2), tmp_path)
    original = stage._encode_batch
    (records(tmp_path)[0].parent / json.loads(records(tmp_path)[0].read_text())["file"]).unlink()
    monkeypatch.setattr(  # to other bits, as on another GPU
        stage, "_encode_batch", lambda *given: [replace(one, video=one.video + 1e-3) for one in original(*given)]
    )
    for i in range(2):
        encode_part(params, Part(i, 2), tmp_path)
    merge_parts(params, tmp_path)
    assert_whole(tmp_path)


def test_what_version_0_1_had_finished_is_made_anew(params, encoded_clips, tmp_path):
    """Where it was killed, its records are of shards of data/latents, and do not say where tensors are."""
    write_clips(tmp_path, LENGTHS)
    job = describe_job(params, tmp_path)
    shard = tmp_path / LATENTS / "shard-00000.safetensors"
    shard.parent.mkdir()
    shard.write_bytes(b"latents")
    clips = [
        {"key": one.key, "video": [16, 3, 4, 4], "prefixes": [], "xxh3": "", "physics_error": 0} for one in job.clips
    ]
    texts = [{"text_key": one.text_key, "text": f"{one.key}/text", "text_xxh3": ""} for one in job.clips]
    record = job.work / "00001-00000/shard-00000.json"
    record.parent.mkdir(parents=True)
    record.write_text(json.dumps({**index_entry(shard), "clips": clips, "texts": texts}))
    encode(params, tmp_path)
    assert len(encoded_clips) == len(LENGTHS)
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


def test_real_videos_through_prepare_and_two_parts(sample_videos, make_params, tmp_path):
    source = ("data.source=folder", f"data.path={sample_videos}", "data.frames=9", "data.buckets=[[64, 112]]")
    params = make_params(*source, "evaluate.physics_iq.benchmark=elsewhere", "encode.prefixes_per_clip=1")
    made = prepare(params, tmp_path)
    assert len(made.buckets) == 2 and made.kept["clips"] == 1
    for index in range(2):
        encode_part(params, Part(index, 2), tmp_path)
    assert merge_parts(params, tmp_path).clips == made.train + made.heldout == 12
    found = latents(tmp_path).values()
    assert {one.video.shape[1:] for one in found} == {(3, 8, 8), (3, 8, 14)}
    assert {one.physics.shape[1:] for one in found} == {(5, 8, 8)}
