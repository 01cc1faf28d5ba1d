"""The outs of `encode` in dvc.yaml: `dvc push` and `dvc pull` of shards, and what `dvc repro` leaves for the stage."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import boto3
import pytest
import yaml

from phantom.data.encode import encode
from phantom.data.latent_set import LatentSet
from phantom.data.manifest import CLIPS
from phantom.data.shards import INDEX, LATENTS
from phantom.data.storage import open_latent_store
from tests.conftest import ROOT
from tests.data.latents import SETTINGS, contents, write_clips

LENGTHS = (9, 5, 9, 9, 5, 9, 9, 9)


def dvc(root, *arguments):
    environment = {**os.environ, "DVC_NO_ANALYTICS": "1", "DVC_SITE_CACHE_DIR": str(root / "site")}
    command = [sys.executable, "-m", "dvc", *arguments, "--quiet"]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


def write_stage(root, command, **entries):
    """Writes a dvc.yaml with `encode` and its outs, but another command."""
    outs = yaml.safe_load((ROOT / "dvc.yaml").read_text(encoding="utf-8"))["stages"]["encode"]["outs"]
    stages = {"encode": {"cmd": command, "outs": outs, **entries}}
    (root / "dvc.yaml").write_text(yaml.safe_dump({"stages": stages}))


@pytest.mark.slow
def test_push_and_pull_move_shards_not_clips(make_params, encode_params, s3, bucket, tmp_path):
    write_clips(tmp_path, LENGTHS)
    encode(encode_params(*SETTINGS), tmp_path)
    write_stage(tmp_path, "true")
    dvc(tmp_path, "init", "--no-scm")
    dvc(tmp_path, "remote", "add", "--default", "there", f"s3://{bucket}/dvc")
    dvc(tmp_path, "remote", "modify", "there", "endpointurl", s3.url)
    dvc(tmp_path, "commit", "--force", "encode")
    dvc(tmp_path, "push")
    before = contents(tmp_path / LATENTS)
    shards = json.loads(before[INDEX])["shards"]
    pushed = boto3.client("s3").list_objects_v2(Bucket=bucket, Prefix="dvc/")["Contents"]
    assert len(pushed) == len(before) + 1 < len(LENGTHS)  # shards, index, empty caption, and DVC's directory listing
    assert sorted(found["Size"] for found in pushed)[-len(shards) :] == sorted(shard["bytes"] for shard in shards)
    shutil.rmtree(tmp_path / LATENTS)
    shutil.rmtree(tmp_path / ".dvc/cache")
    dvc(tmp_path, "pull")
    assert contents(tmp_path / LATENTS) == before
    assert len(LatentSet(tmp_path / LATENTS, "train")) == 6


def git(root, *arguments):
    name = ("-c", "user.name=n", "-c", "user.email=n@example.com")
    subprocess.run(["git", "-C", root, *name, *arguments], check=True, capture_output=True, timeout=60)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_checkout_of_an_old_commit_trains_on_the_old_data(encode_params, s3, bucket, tmp_path):
    params = encode_params(*SETTINGS, f"storage.latents=s3://{bucket}/latents")
    git(tmp_path, "init")
    write_stage(tmp_path, "true")
    dvc(tmp_path, "init")
    remote = f"[core]\nremote = there\n['remote \"there\"']\nurl = s3://{bucket}/dvc\nendpointurl = {s3.url}\n"
    (tmp_path / ".dvc/config").write_text(remote)

    def read():
        latents = LatentSet(tmp_path / LATENTS, "train", open_latent_store(tmp_path, params.storage))
        return {clip.id: (clip.video.tolist(), clip.physics.tolist()) for clip in map(latents.__getitem__, range(3))}

    seen = []
    for lengths in (LENGTHS[:4], LENGTHS[4:7]):
        shutil.rmtree(tmp_path / CLIPS, ignore_errors=True)
        write_clips(tmp_path, lengths)
        encode(params, tmp_path)
        dvc(tmp_path, "commit", "--force", "encode")
        dvc(tmp_path, "push")
        git(tmp_path, "add", "dvc.yaml", "dvc.lock")
        git(tmp_path, "commit", "-m", "Encode")
        seen.append(read())
    shutil.rmtree(tmp_path / LATENTS)
    shutil.rmtree(tmp_path / ".dvc/cache")
    git(tmp_path, "checkout", "HEAD~1")
    dvc(tmp_path, "pull")
    assert read() == seen[0] != seen[1]
    pushed = boto3.client("s3").list_objects_v2(Bucket=bucket, Prefix="dvc/")["Contents"]
    shard = min(one["bytes"] for one in json.loads((tmp_path / LATENTS / INDEX).read_text())["shards"])
    assert max(found["Size"] for found in pushed) < shard  # the index alone is DVC's


@pytest.mark.slow
def test_the_stage_finds_the_latents_of_before(tmp_path):
    write_stage(tmp_path, f"cp -r {LATENTS} found; mkdir -p {LATENTS} && cat clips > {LATENTS}/{INDEX}", deps=["clips"])
    dvc(tmp_path, "init", "--no-scm")
    for clips in ("former", "new"):
        (tmp_path / "clips").write_text(clips)
        dvc(tmp_path, "repro")
        assert (tmp_path / LATENTS / INDEX).read_text() == clips
    assert (tmp_path / "found" / INDEX).read_text() == "former"
