"""Shards in a bucket: uploaded by encode, read by training straight to memory, with injected faults."""

from __future__ import annotations

import json
import re
from dataclasses import fields
from pathlib import Path

import boto3
import pytest
import torch

from phantom.data import shards
from phantom.data.encode import encode, encode_part, merge_parts
from phantom.data.latent_set import LatentSet
from phantom.data.part import Part
from phantom.data.shards import INDEX, LATENTS
from phantom.data.storage import PinnedFolder, Refused, S3Folder, open_folder, open_latent_store
from phantom.data.storage import s3 as s3_folder
from phantom.data.storage.s3 import ERROR_MESSAGES
from phantom.errors import StageFailed, UserError
from phantom.training.conditioning import Batch, TrainingSet
from phantom.training.data_loader import open_latents, read_batches
from phantom.training.sampler import DistributedBatchSampler
from tests.data.latents import SETTINGS, contents, read_index, write_clips

LENGTHS = (9, 5, 9, 9, 5, 9)


@pytest.fixture
def params(make_params, bucket):
    """Settings that store shards in the bucket."""

    def make(*overrides):
        return make_params(*SETTINGS, "encode.batch_size=2", f"storage.latents=s3://{bucket}/latents", *overrides)

    return make


@pytest.fixture
def root(params, tmp_path, monkeypatch):
    """A checkout whose clips are encoded into the bucket, one batch per shard."""
    init = shards.ShardWriter.__init__

    def smaller(self, *arguments):
        init(self, *arguments)
        self.limit = 1

    with monkeypatch.context() as patch:
        patch.setattr(shards.ShardWriter, "__init__", smaller)
        write_clips(tmp_path, LENGTHS)
        encode(params(), tmp_path)
    return tmp_path


def keys(bucket):
    return [found["Key"] for found in boto3.client("s3").list_objects_v2(Bucket=bucket).get("Contents", [])]


def shard_keys(bucket):
    """The keys of the shards, whose names are the sha256 of their contents."""
    return sorted(key for key in keys(bucket) if re.search(r"/\w{64}\.safetensors$", key))


def read(params, root, split="train"):
    latents = open_latents(params, root, split, torch.device("cpu"))
    return [latents[i] for i in range(len(latents))]


def same(one, other):
    states = zip(one.prefixes.values(), other.prefixes.values(), strict=True)
    pairs = [*((getattr(one, n), getattr(other, n)) for n in ("video", "physics", "text")), *states]
    return one.id == other.id and all(torch.equal(a, b) for a, b in pairs)


def flip(bucket, key):
    client = boto3.client("s3")
    raw = bytearray(client.get_object(Bucket=bucket, Key=key)["Body"].read())
    raw[-2000] ^= 64
    client.put_object(Bucket=bucket, Key=key, Body=bytes(raw))


def test_shards_go_to_the_bucket_and_are_read_there_as_from_the_disk(params, root, bucket, make_params, s3):
    index = read_index(root / LATENTS)
    assert {path.name for path in (root / LATENTS).iterdir()} == {"index.json", "clips.arrow", "empty_text.safetensors"}
    assert shard_keys(bucket) == sorted(f"latents/{shard['sha256']}.safetensors" for shard in index["shards"])
    assert len(keys(bucket)) == len(index["shards"]) + 1  # the embedding of the empty caption
    assert not contents(root / "checkpoints")
    here = root / "here"
    write_clips(here, LENGTHS)
    encode(make_params(*SETTINGS, "encode.batch_size=2"), here)
    for split in ("train", "heldout"):
        local = LatentSet(here / LATENTS, split)
        there = read(params(), root, split)
        assert all(same(there[i], local[i]) for i in range(len(local))) and len(there) == len(local) > 0
    s3.reads.clear()
    latents = open_latents(params(), root, "train", torch.device("cpu"))
    assert latents[0].prefixes and len(s3.reads) == 1  # near ranges are one request
    assert latents[0].prefixes[1].shape[1] == 1 and len(s3.reads) == 3  # a prefix is another, when it is used
    assert not list(root.glob("checkpoints/cache/*"))


def bytes_in(folder):
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def test_a_pinned_share_stays_within_its_bound_and_is_not_fetched_again(params, root, s3, capsys):
    sizes = {shard["sha256"]: shard["bytes"] for shard in read_index(root / LATENTS)["shards"]}
    bound = 100 + max(sizes.values())
    plain, pinned = read(params(), root), params(f"storage.pin_gb={bound / 2**30}")
    store = open_folder(params().storage.latents, root, params().storage)
    store.write(f"{'0' * 64}.safetensors", bytes(bound))  # of other clips: first by name, and as large as the share
    read(pinned, root)
    (place,) = (root / "checkpoints/cache/pinned").iterdir()
    (place / "shard of before").mkdir()
    requests = []
    for _ in range(2):
        s3.reads.clear()
        found = read(pinned, root)
        assert all(same(*pair) for pair in zip(found, plain, strict=True))
        assert 0 < bytes_in(place) <= bound
        assert {path.name.partition(".")[0] for path in place.glob("[!.]*")} < set(sizes)
        requests.append(len(s3.reads))
    assert requests[1] < requests[0]
    for path in place.rglob("*-*"):  # as a bad disk would
        raw = bytearray(path.read_bytes())
        raw[-10] ^= 1
        path.write_bytes(raw)
    assert all(same(*pair) for pair in zip(read(pinned, root), plain, strict=True))
    assert "damaged: clip 'clip/" in capsys.readouterr().err


def test_data_sets_that_are_in_use_keep_their_shares_and_others_are_deleted(params, root):
    settings = params("storage.pin_gb=1")
    place, shards_ = root / "checkpoints/cache/pinned", read_index(root / LATENTS)["shards"]
    names = [f"{shard['sha256']}.safetensors" for shard in shards_]
    used = []
    for some in (names[:2], names[2:]):  # two data sets in one store
        used.append(open_latent_store(root, settings.storage))
        used[-1].pin(some)
        for name in some:
            used[-1].read_ranges(name, [(0, 100)])
    kept = {path.parent.name for path in place.rglob("*-*")}
    assert kept == set(names)
    used.clear()
    last = open_latent_store(root, settings.storage)
    last.pin(names[2:])
    assert {path.parent.name for path in place.rglob("*-*")} == set(names[2:]) and len([*place.iterdir()]) == 1


def test_a_pinned_shard_that_another_process_drops_meanwhile_is_read_all_the_same(params, root, monkeypatch):
    plain, original = read(params(), root), PinnedFolder._write

    def write(self, name, *given):
        with monkeypatch.context() as patch:
            patch.setattr(Path, "mkdir", lambda *_, **__: None)  # as if it were removed right after
            original(self, name, *given)

    monkeypatch.setattr(PinnedFolder, "_write", write)
    assert all(same(*pair) for pair in zip(read(params("storage.pin_gb=1"), root), plain, strict=True))


def test_the_order_is_that_of_one_reader(params, root):
    runs = []
    for prefetch in (0, 6):
        latents = open_latents(params("train.batch_size=2"), root, "train", torch.device("cpu"))
        sampler = DistributedBatchSampler(latents.shapes, 2, 0, range(9))
        runs.append([*read_batches(TrainingSet(latents, params()), sampler, prefetch)])
    assert len(runs[0]) == len(runs[1]) == 9
    assert all(
        torch.equal(a.video, b.video) and torch.equal(a.noise_physics, b.noise_physics)
        for a, b in zip(*runs, strict=True)
    )


@pytest.mark.parametrize("fault", ["500", "503", "reset", "reset-later", "truncate", "slow"])
def test_faults_that_pass_are_waited_out(params, root, s3, fault):
    before = read(params(), root)
    s3.faults = ["", fault, "", fault]
    assert all(same(a, b) for a, b in zip(before, read(params(), root), strict=True)) and not s3.faults


def test_faults_that_stay_are_one_line_and_the_next_call_goes_on(params, root, s3):
    for fault, kind, said in (
        ("503", StageFailed, r"the server answered 503"),
        ("expired", UserError, r"the credentials have expired; renew them and run again"),
    ):
        s3.faults = [fault] * 2
        with pytest.raises(kind, match=rf"^s3://[^\n]*\.safetensors: {said}[^\n]*$"):
            read(params(), root)
        s3.faults = []
    assert len(read(params(), root)) == 5


def test_a_clip_that_arrives_damaged_is_named_and_fetched_again(params, root, monkeypatch, capsys):
    before, original, spoilt = read(params(), root), S3Folder.read_ranges, []

    def read_ranges(self, *given):  # as a bad network would
        found = original(self, *given)
        if not spoilt:
            spoilt.append(1)
            found[0][-1] ^= 1
        return found

    monkeypatch.setattr(S3Folder, "read_ranges", read_ranges)
    assert all(same(a, b) for a, b in zip(before, read(params(), root), strict=True)) and spoilt
    said = capsys.readouterr().err
    assert ".safetensors: damaged: clip 'clip/" in said and "; it is fetched again\n" in said


def test_a_shard_that_stays_damaged_is_an_error_after_one_more_try(params, root, bucket, s3, capsys):
    key = shard_keys(bucket)[0]
    flip(bucket, key)
    with pytest.raises(UserError, match=rf"^s3://{bucket}/{key}: damaged: clip '[^\n]*$"):
        read(params(), root), read(params(), root, "heldout")
    assert capsys.readouterr().err.count("it is fetched again") == 1


def test_the_error_names_the_command_that_makes_the_shard_again(params, root, bucket):
    before, key = read(params(), root), shard_keys(bucket)[1]
    index = (root / LATENTS / INDEX).read_bytes()
    flip(bucket, key)
    with pytest.raises(UserError) as error:
        read(params(), root), read(params(), root, "heldout")
    command = re.search(r"; `phantom encode --shard (\w{64}\.safetensors)` makes that shard again$", str(error.value))
    assert command
    result = encode(params(), root, shard=command[1])
    assert 0 < result.clips - result.kept < len(LENGTHS)
    assert (root / LATENTS / INDEX).read_bytes() == index and len(shard_keys(bucket)) == len(
        json.loads(index)["shards"]
    )
    assert all(same(a, b) for a, b in zip(before, read(params(), root), strict=True))


def test_a_shard_that_is_missing_or_cut_is_named_at_once(params, root, bucket, make_params):
    client, key = boto3.client("s3"), shard_keys(bucket)[0]
    client.put_object(Bucket=bucket, Key=key, Body=b"cut")
    with pytest.raises(UserError, match=rf"^s3://{bucket}/{key}: damaged: 3 bytes, \d+ were written;"):
        open_latents(params(), root, "train", torch.device("cpu"))
    client.delete_object(Bucket=bucket, Key=key)
    with pytest.raises(UserError, match=rf"^s3://{bucket}/{key}: damaged: no such file; `phantom encode --shard"):
        open_latents(params(), root, "train", torch.device("cpu"))
    with pytest.raises(UserError, match=r"/\w{64}\.safetensors: no such file, and storage\.latents is null; run"):
        open_latents(make_params(*SETTINGS), root, "train", torch.device("cpu"))


def test_latents_of_another_recipe_are_refused_with_the_difference(params, root):
    for change, said in (
        ("data.fps=8", "made with data.fps 4, the settings say 8"),
        ("encode.physics_storage=int8", "made with encode.physics_storage 'raw', the settings say 'int8'"),
        ("train.physics_latents=online", "made with train.physics_latents 'stored', the settings say 'online'"),
        ("data.buckets=[[64, 32]]", r"made with data.buckets \[\], the settings say \[\[64, 32\]\]"),
    ):
        with pytest.raises(UserError, match=rf"^data/latents: {said}; run `phantom encode` again, or change"):
            open_latents(params(change), root, "train", torch.device("cpu"))
    index = json.loads((root / LATENTS / INDEX).read_text())
    (root / LATENTS / INDEX).write_text(json.dumps(index | {"recipe": index["recipe"] | {"encoding": 0}}))
    with pytest.raises(UserError, match=r"^data/latents: made by encoding 0, this version has 1; run `phantom encode`"):
        open_latents(params(), root, "train", torch.device("cpu"))
    index["recipe"]["resize"] = "nearest"
    (root / LATENTS / INDEX).write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"^data/latents: made with resize 'nearest', this version has 'clips: bicubic"):
        open_latents(params(), root, "train", torch.device("cpu"))


def test_parts_put_their_shards_into_the_bucket_and_the_merge_looks_for_them(params, bucket, tmp_path, s3):
    for i, root in enumerate((tmp_path, tmp_path / "elsewhere")):
        write_clips(root, LENGTHS)
        encode_part(params(), Part(i, 2), root)
    assert not contents(tmp_path / "checkpoints") and len([k for k in keys(bucket) if "/records/" in k]) == 2
    (lost, *_) = shard_keys(bucket)
    boto3.client("s3").delete_object(Bucket=bucket, Key=lost)
    with pytest.raises(StageFailed, match=r"^s3://[^\n]*: \d of 6 clips are not encoded yet; run their parts again"):
        merge_parts(params(), tmp_path)
    result = encode(params(), tmp_path)
    assert 0 < result.kept < 6 and len(read(params(), tmp_path)) == 5
    assert not [key for key in keys(bucket) if "/records/" in key]
    assert open_folder(f"s3://{bucket}/latents", tmp_path, params().storage).size("absent") is None


def test_clips_are_added_to_those_in_the_bucket(params, bucket, tmp_path, s3):
    write_clips(tmp_path, LENGTHS[:4])
    encode(params(), tmp_path)
    write_clips(tmp_path, LENGTHS)
    assert encode(params(), tmp_path).kept == 4  # z is standardised by clips of both calls
    assert len(read(params(), tmp_path)) == 5


def test_two_sets_of_clips_share_a_bucket(params, bucket, tmp_path, s3):
    roots = tmp_path / "one", tmp_path / "other"
    write_clips(roots[0], LENGTHS[:3])
    write_clips(roots[1], (13, 13))
    for root in roots:
        encode_part(params("data.frames=13"), Part(), root)
    for root, left in zip(roots, (1, 0), strict=True):
        merge_parts(params("data.frames=13"), root)
        assert len([key for key in keys(bucket) if "/records/" in key]) == left


def test_a_record_that_goes_while_it_is_read_is_none(params, bucket, tmp_path, s3, monkeypatch):
    write_clips(tmp_path, LENGTHS)
    encode_part(params(), Part(0, 2), tmp_path)
    original = S3Folder.read

    def read_later(self, name):  # another checkout has merged
        self.delete([name])
        return original(self, name)

    monkeypatch.setattr(S3Folder, "read", read_later)
    assert encode_part(params(), Part(0, 2), tmp_path).shards == 1


@pytest.mark.parametrize("code", ["ExpiredToken", "AccessDenied"])
def test_a_part_that_loses_its_credentials_may_be_tried_again(params, bucket, tmp_path, s3, monkeypatch, code):
    write_clips(tmp_path, LENGTHS)
    upload = S3Folder.upload

    def refused(self, source, name):
        raise Refused(f"{self}/{name}: {ERROR_MESSAGES[code]}")

    monkeypatch.setattr(S3Folder, "upload", refused)
    with pytest.raises(StageFailed, match=r"^s3://[^\n]*: the credentials "):
        encode_part(params(), Part(), tmp_path)
    monkeypatch.setattr(S3Folder, "upload", upload)
    assert encode_part(params(), Part(), tmp_path).shards == 1


def test_a_store_without_conditional_requests_is_enough(params, bucket, s3, tmp_path):
    folder = open_folder(f"s3://{bucket}/new", tmp_path, params().storage)
    assert folder.write_new("a", b"1") and not folder.write_new("a", b"2") and folder.read("a") == b"1"
    s3.refuse_conditions = True
    assert folder.write_new("a", b"3") and folder.read("a") == b"3"


def test_a_conditional_write_that_conflicts_with_another_request_is_tried_again(
    params, bucket, s3, tmp_path, monkeypatch
):
    monkeypatch.setattr(s3_folder, "RETRY_DELAYS_SECONDS", (0.01, 0.01))
    folder = open_folder(f"s3://{bucket}/new", tmp_path, params().storage)
    s3.conflicts = 2
    assert folder.write_new("a", b"1") and folder.read("a") == b"1" and not s3.conflicts
    s3.conflicts = 1
    assert not folder.write_new("a", b"2") and folder.read("a") == b"1"
    s3.conflicts = 9
    with pytest.raises(StageFailed, match=r"/b: other requests for it do not end; run again$"):
        folder.write_new("b", b"1")
    s3.conflicts = 0


def test_batches_are_cut_as_the_sampler_says():
    class Numbers:
        def __getitem__(self, key):
            return Batch(*(torch.tensor([key[0]]) for _ in fields(Batch)))

    sampler = DistributedBatchSampler([(1,)] * 8, 4, 0, range(3), 2, 0, 1)
    assert [b.video.tolist() for b in read_batches(Numbers(), sampler, 5)] == [[k for k, _ in keys] for keys in sampler]
