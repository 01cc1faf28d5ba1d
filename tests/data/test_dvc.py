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
from phantom.data.shards import INDEX, LATENTS
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


@pytest.mark.slow
def test_the_stage_finds_the_latents_of_before(tmp_path):
    write_stage(tmp_path, f"cp -r {LATENTS} found; mkdir -p {LATENTS} && cat clips > {LATENTS}/{INDEX}", deps=["clips"])
    dvc(tmp_path, "init", "--no-scm")
    for clips in ("former", "new"):
        (tmp_path / "clips").write_text(clips)
        dvc(tmp_path, "repro")
        assert (tmp_path / LATENTS / INDEX).read_text() == clips
    assert (tmp_path / "found" / INDEX).read_text() == "former"
