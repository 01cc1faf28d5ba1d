"""The outputs of a job: kept aside in its pod, and adopted by the next call for the same work."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from phantom.cluster import outputs
from phantom.cluster.submit import run_job
from phantom.errors import StageFailed
from tests.cluster.conftest import Cluster
from tests.cluster.jobs import DONE, KEEPS, phantom, until


def test_outputs_that_do_not_arrive_here_are_reported(cluster: Cluster, capfd: Any, monkeypatch: pytest.MonkeyPatch):
    cluster.image(torchrun="true")
    assert not run_job("train", cluster.params(), cluster.root).here
    assert "on the volume phantom-workspace, on which this checkout does not lie" in capfd.readouterr().err
    monkeypatch.setenv("PHANTOM_OUTCOME", str(cluster.root / "outcome.json"))
    monkeypatch.setattr("phantom.cluster.submit.FILES_VISIBLE_SECONDS", 0.1)
    with pytest.raises(StageFailed, match="has succeeded, but the outputs are on the volume"):
        run_job("train", cluster.params(), cluster.root)


def test_a_finished_job_is_adopted_while_its_outputs_exist(cluster: Cluster):
    cluster.image(torchrun=f"echo x >> runs; {DONE}")
    run_job("train", cluster.params(), cluster.root)
    assert run_job("train", cluster.params(), cluster.root).adopted
    (cluster.root / "models/phantom/result.json").unlink()
    assert not run_job("train", cluster.params(), cluster.root).adopted
    assert (cluster.root / "runs").read_text(encoding="utf-8") == "x\nx\n"


def test_outputs_of_a_job_that_finished_unwatched_are_adopted(cluster: Cluster, capfd: Any):
    """The flow dies, its job finishes, and DVC clears the stage's outputs before it runs the stage again."""
    merge = f"until test -e go; do sleep 0.05; done; {KEEPS}"
    cluster.image(python=f'case "$4" in --merge) touch merging; {merge};; esac')
    cluster.write_params("compute.encode=kubernetes")
    first = phantom(cluster, "encode")
    until((cluster.root / "merging").exists)
    first.kill()
    first.communicate()
    (cluster.root / "go").touch()
    until(lambda: (cluster.api.find("jobs")[1]["status"]["conditions"] or [{}])[-1].get("type") == "Complete")
    shutil.rmtree(cluster.root / "data/latents")
    result = run_job("encode", cluster.params(), cluster.root)
    assert result.here and result.adopted
    assert "finished while nobody watched it: adopting its outputs" in capfd.readouterr().err
    assert (cluster.root / "runs").read_text(encoding="utf-8") == "x\n"
    assert (cluster.root / "data/latents/index.json").read_text(encoding="utf-8") == '{"by": "job"}\n'
    assert (cluster.root / "data/latents/shard-00000.safetensors").is_file()
    assert not list((cluster.root / "checkpoints/kept/encode").glob("phantom-*"))  # what is taken is not kept


def test_outputs_of_another_job_are_not_adopted(cluster: Cluster):
    cluster.image(python=f'case "$4" in --merge) {KEEPS};; esac')
    assert not run_job("encode", cluster.params(), cluster.root).adopted
    assert not run_job("encode", cluster.params("encode.seed=1"), cluster.root).adopted
    assert not run_job("encode", cluster.params(), cluster.root).adopted  # what lies there is the second one's
    assert run_job("encode", cluster.params(), cluster.root).adopted
    assert not run_job("encode", cluster.params("cluster.image=phantom-train:0.0.1"), cluster.root).adopted
    assert (cluster.root / "runs").read_text(encoding="utf-8").count("x") == 4


def test_latents_that_lack_a_file_are_not_adopted(cluster: Cluster):
    """DVC leaves data/latents in place, so that the job is to make what is missing there."""
    cluster.image(python=f'case "$4" in --merge) {KEEPS};; esac')
    run_job("encode", cluster.params(), cluster.root)
    (cluster.root / "data/latents/shard-00000.safetensors").unlink()
    assert not run_job("encode", cluster.params(), cluster.root).adopted
    assert run_job("encode", cluster.params(), cluster.root).adopted


def test_what_a_stage_keeps_in_its_pod(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for name in ("models/phantom/result.json", "models/phantom/a/b.safetensors", "models/control/README.md"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name, encoding="utf-8")
    outputs.keep("train", tmp_path)
    assert not (tmp_path / "checkpoints").exists()  # not in a pod
    for key in ("first", "second"):
        monkeypatch.setenv(outputs.KEEP_ENV, f"checkpoints/kept/train/{key}")
        outputs.keep("train", tmp_path)
        outputs.keep("train", tmp_path)
    kept = tmp_path / "checkpoints/kept/train"
    assert [path.name for path in kept.iterdir() if path.is_dir()] == ["second"]
    for name in ("models/phantom", "models/control"):
        shutil.rmtree(tmp_path / name)
    (tmp_path / "models/phantom").mkdir()
    (tmp_path / "models/phantom/stale.json").touch()
    assert not outputs.restore("train", "first", tmp_path) and outputs.restore("train", "second", tmp_path)
    assert (tmp_path / "models/phantom/a/b.safetensors").read_text(encoding="utf-8").endswith("b.safetensors")
    assert (tmp_path / "models/control/README.md").is_file() and not (tmp_path / "models/phantom/stale.json").exists()
