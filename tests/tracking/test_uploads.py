"""Checkpoints in a real S3 server: sent while training goes on, linked in MLflow, and never lost on the way."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import boto3
import mlflow
import pytest
import torch

from phantom.data.storage import LocalFolder, open_folder
from phantom.errors import StageFailed, UserError
from phantom.tracking.uploads import CheckpointUploader, UploadedCheckpoint, download_newest
from phantom.training import checkpoint as checkpoints
from phantom.training.trainer import train
from tests.data.conftest import bucket, s3, s3_server  # noqa: F401
from tests.training.runs import same, weights
from tests.training.worlds import write_latents


@pytest.mark.slow
def test_a_training_run_leaves_its_checkpoints_in_s3(bucket: str, make_params: Any, tmp_path: Path):  # noqa: F811
    params = make_params(
        "train.steps=4",
        "train.batch_size=2",
        "train.checkpoint_every=2",
        "train.keep_checkpoints=1",
        "train.validate_every=0",
        "train.control=false",
        f"storage.checkpoints=s3://{bucket}/runs",
        f"tracking.uri=sqlite:///{tmp_path}/mlflow.db",
        f"tracking.artifacts={tmp_path}/artifacts",
    )
    write_latents(tmp_path, params)
    train(params, tmp_path)
    (here,) = tmp_path.glob("checkpoints/phantom-*/step-0000004")
    client = mlflow.MlflowClient(params.tracking.uri)
    experiment = client.get_experiment_by_name(params.tracking.experiment).experiment_id
    (model,) = client.search_logged_models([experiment], "name = 'step-4'")
    assert model.tags["uri"] == f"s3://{bucket}/runs/{here.parent.name}/step-0000004"
    store = boto3.client("s3", region_name="us-east-1")
    for file in here.iterdir():
        key = f"runs/{here.parent.name}/step-0000004/{file.name}"
        sent = store.get_object(Bucket=bucket, Key=key)["Body"].read()
        assert sent == file.read_bytes()
        assert model.tags[f"sha256/{file.name}"] == hashlib.sha256(sent).hexdigest()
    assert len([tag for tag in model.tags if tag.startswith("sha256/")]) == len(list(here.iterdir()))
    assert not list((tmp_path / "checkpoints/uploads" / here.parent.name).iterdir())  # nothing waits any more


class Refusing(LocalFolder):
    """Takes nothing until it is told to."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.open_, self.tried = False, 0

    def upload(self, source: Path, name: str) -> None:
        self.tried += 1
        if not self.open_:
            raise StageFailed("s3://x: the server cannot be reached")
        super().upload(source, name)


def checkpoint(folder: Path, step: int) -> Path:
    path = folder / f"run-1/step-{step:07d}"
    path.mkdir(parents=True)
    (path / "model.safetensors").write_text(f"weights {step}", encoding="utf-8")
    (path / "state.json").write_text(f"state {step}", encoding="utf-8")
    return path


def test_what_could_not_be_sent_is_sent_by_the_next_process(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    to, outbox = Refusing(tmp_path / "s3"), tmp_path / "uploads/run-1"
    sent: list[UploadedCheckpoint] = []
    first = CheckpointUploader(to, outbox, sent.append)
    for step in (1, 2, 3):
        path = checkpoint(tmp_path, step)
        first.submit(path)
        for file in path.iterdir():  # the run keeps only its newest
            file.unlink()
    first.close(wait=True)
    assert not sent and to.tried
    assert "is not copied: s3://x: the server cannot be reached" in capsys.readouterr().err
    to.open_ = True
    CheckpointUploader(to, outbox, sent.append).close(wait=True)
    assert [upload.name for upload in sent] == ["step-0000003"]  # the newest of those that waited
    assert (tmp_path / "s3/run-1/step-0000003/model.safetensors").read_text(encoding="utf-8") == "weights 3"
    assert sent[0].uri == f"{tmp_path}/s3/run-1/step-0000003"
    assert list(outbox.iterdir()) == []


# --- back again -------------------------------------------------------------------------------------------------------


def copied(params: Any, tmp_path: Path, *steps: int) -> None:
    """Leaves copies of small checkpoints of the run `run-1`."""
    sent: list[UploadedCheckpoint] = []
    for step in steps:
        path = checkpoints.save(tmp_path / "run-1", step, {"model": {"weight": torch.full((3,), step)}}, {}, keep=9)
        to = open_folder(params.storage.checkpoints, tmp_path, params.storage)
        uploader = CheckpointUploader(to, tmp_path / "uploads/run-1", sent.append)
        uploader.submit(path)
        uploader.close(wait=True)
    assert [upload.name for upload in sent] == [f"step-{step:07d}" for step in steps]


def test_the_newest_whole_copy_is_brought_back(bucket: str, make_params: Any, tmp_path: Path, capsys: Any):  # noqa: F811
    params = make_params(f"storage.checkpoints=s3://{bucket}/runs/")
    storage, here = params.storage, tmp_path / "new/checkpoints/run-1"
    assert download_newest(here, storage, tmp_path, checkpoints.newest) is None  # none was sent yet
    copied(params, tmp_path, 1, 2, 3, 4)
    client = boto3.client("s3", region_name="us-east-1")
    client.delete_object(Bucket=bucket, Key="runs/run-1/step-0000004/state.json")  # broken off while it was sent
    client.put_object(Bucket=bucket, Key="runs/run-1/step-0000003/model.safetensors", Body=b"damaged")
    found = download_newest(here, storage, tmp_path, checkpoints.newest)
    assert found and found.step == 2
    assert found.tensors("model")["weight"].tolist() == [2, 2, 2]
    assert [path.name for path in here.iterdir()] == ["step-0000002"]
    said = capsys.readouterr().err
    assert f"s3://{bucket}/runs/run-1/step-0000003 is brought back" in said and "is not what was written" in said
    assert f"s3://{bucket}/runs/run-1/step-0000002 is brought back" in said
    # One that is damaged here too gives way to its copy.
    (here / "step-0000002/model.safetensors").write_bytes(b"damaged")
    assert checkpoints.newest(here) is None
    found = download_newest(here, storage, tmp_path, checkpoints.newest)
    assert found and found.tensors("model")["weight"].tolist() == [2, 2, 2]


def test_copies_that_cannot_be_asked_for_are_no_reason_to_begin_anew(s3: Any, make_params: Any, tmp_path: Path):  # noqa: F811
    params = make_params("storage.checkpoints=s3://nowhere/runs")
    with pytest.raises(UserError, match=r"^s3://nowhere/runs/run-1: no such bucket$"):
        download_newest(tmp_path / "run-1", params.storage, tmp_path, checkpoints.newest)


@pytest.mark.slow
def test_training_goes_on_from_its_copies_on_another_machine(
    bucket: str,  # noqa: F811
    make_params: Any,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
):
    """As if it had never stopped: the same weights, bit for bit, and one curve in MLflow."""

    def run(folder: str, steps: int, *overrides: str) -> Any:
        params = make_params(
            f"train.steps={steps}",
            "train.batch_size=2",
            "train.log_every=1",
            "train.checkpoint_every=2",
            "train.validate_every=0",
            "train.control=false",
            "train.optimizer.decay=constant",
            f"tracking.uri=sqlite:///{tmp_path}/mlflow.db",
            f"tracking.artifacts={tmp_path}/artifacts",
            *overrides,
        )
        if not (tmp_path / folder).is_dir():
            write_latents(tmp_path / folder, params)
        train(params, tmp_path / folder)
        return params

    copies = f"storage.checkpoints=s3://{bucket}/runs"
    run("whole", 6)
    run("lost", 4, copies)
    shutil.copytree(tmp_path / "lost/data", tmp_path / "other/data")
    capsys.readouterr()
    params = run("other", 6, copies)
    said = capsys.readouterr().err
    assert "step-0000004 is brought back" in said and "train phantom: continues after step 4" in said
    assert same(weights(tmp_path / "other"), weights(tmp_path / "whole"))
    client = mlflow.MlflowClient(params.tracking.uri)
    (state,) = tmp_path.glob("other/checkpoints/phantom-*/step-0000006/state.json")
    run_id = json.loads(json.loads(state.read_text(encoding="utf-8"))["state"])["mlflow_run"]
    assert [metric.step for metric in client.get_metric_history(run_id, "loss")] == [1, 2, 3, 4, 5, 6]
