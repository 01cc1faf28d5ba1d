"""Checkpoint copies on a real S3 server: uploaded during training, tagged in MLflow, downloaded to resume."""

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
from tests.training.random_latents import write_latents
from tests.training.runs import same, weights


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
    assert not list((tmp_path / "checkpoints/uploads" / here.parent.name).iterdir())  # the outbox is empty


class UnreachableFolder(LocalFolder):
    """Fails every upload until `reachable` is set."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.reachable, self.attempts = False, 0

    def upload(self, source: Path, name: str) -> None:
        self.attempts += 1
        if not self.reachable:
            raise StageFailed("s3://x: the server cannot be reached")
        super().upload(source, name)


def checkpoint(folder: Path, step: int) -> Path:
    path = folder / f"run-1/step-{step:07d}"
    path.mkdir(parents=True)
    (path / "model.safetensors").write_text(f"weights {step}", encoding="utf-8")
    (path / "state.json").write_text(f"state {step}", encoding="utf-8")
    return path


def test_failed_uploads_are_resumed_by_the_next_process(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    target, outbox = UnreachableFolder(tmp_path / "s3"), tmp_path / "uploads/run-1"
    sent: list[UploadedCheckpoint] = []
    first = CheckpointUploader(target, outbox, sent.append)
    for step in (1, 2, 3):
        path = checkpoint(tmp_path, step)
        first.submit(path)
        for file in path.iterdir():  # training keeps only its newest
            file.unlink()
    first.close(wait=True)
    assert not sent and target.attempts
    assert "was not uploaded: s3://x: the server cannot be reached" in capsys.readouterr().err
    target.reachable = True
    CheckpointUploader(target, outbox, sent.append).close(wait=True)
    assert [upload.name for upload in sent] == ["step-0000003"]  # only the newest in the outbox
    assert (tmp_path / "s3/run-1/step-0000003/model.safetensors").read_text(encoding="utf-8") == "weights 3"
    assert sent[0].uri == f"{tmp_path}/s3/run-1/step-0000003"
    assert list(outbox.iterdir()) == []


# --- downloads --------------------------------------------------------------------------------------------------------


def upload_copies(params: Any, tmp_path: Path, *steps: int) -> None:
    """Uploads small checkpoints of the run `run-1`."""
    sent: list[UploadedCheckpoint] = []
    for step in steps:
        path = checkpoints.save(tmp_path / "run-1", step, {"model": {"weight": torch.full((3,), step)}}, {}, keep=9)
        target = open_folder(params.storage.checkpoints, tmp_path, params.storage)
        uploader = CheckpointUploader(target, tmp_path / "uploads/run-1", sent.append)
        uploader.submit(path)
        uploader.close(wait=True)
    assert [upload.name for upload in sent] == [f"step-{step:07d}" for step in steps]


def test_the_newest_intact_copy_is_downloaded(bucket: str, make_params: Any, tmp_path: Path, capsys: Any):  # noqa: F811
    params = make_params(f"storage.checkpoints=s3://{bucket}/runs/")
    storage, here = params.storage, tmp_path / "new/checkpoints/run-1"
    assert download_newest(here, storage, tmp_path, checkpoints.load_newest) is None  # no copies yet
    upload_copies(params, tmp_path, 1, 2, 3, 4)
    client = boto3.client("s3", region_name="us-east-1")
    client.delete_object(Bucket=bucket, Key="runs/run-1/step-0000004/state.json")  # an interrupted upload
    client.put_object(Bucket=bucket, Key="runs/run-1/step-0000003/model.safetensors", Body=b"damaged")
    found = download_newest(here, storage, tmp_path, checkpoints.load_newest)
    assert found and found.step == 2
    assert found.tensors("model")["weight"].tolist() == [2, 2, 2]
    assert [path.name for path in here.iterdir()] == ["step-0000002"]
    said = capsys.readouterr().err
    assert f"downloading s3://{bucket}/runs/run-1/step-0000003" in said and "wrong checksum" in said
    assert f"downloading s3://{bucket}/runs/run-1/step-0000002" in said
    # A damaged local checkpoint is replaced by its copy.
    (here / "step-0000002/model.safetensors").write_bytes(b"damaged")
    assert checkpoints.load_newest(here) is None
    found = download_newest(here, storage, tmp_path, checkpoints.load_newest)
    assert found and found.tensors("model")["weight"].tolist() == [2, 2, 2]


def test_unreadable_copies_do_not_restart_training_from_scratch(s3: Any, make_params: Any, tmp_path: Path):  # noqa: F811
    params = make_params("storage.checkpoints=s3://nowhere/runs")
    with pytest.raises(UserError, match=r"^s3://nowhere/runs/run-1: no such bucket$"):
        download_newest(tmp_path / "run-1", params.storage, tmp_path, checkpoints.load_newest)


@pytest.mark.slow
def test_training_resumes_from_its_copies_on_another_machine(
    bucket: str,  # noqa: F811
    make_params: Any,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
):
    """The same weights as without interruption, bit for bit, and one curve in MLflow."""

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
    assert "; downloading s3://" in said and "step-0000004" in said and "train phantom: continues after step 4" in said
    assert same(weights(tmp_path / "other"), weights(tmp_path / "whole"))
    client = mlflow.MlflowClient(params.tracking.uri)
    (state,) = tmp_path.glob("other/checkpoints/phantom-*/step-0000006/state.json")
    run_id = json.loads(json.loads(state.read_text(encoding="utf-8"))["state"])["mlflow_run"]
    assert [metric.step for metric in client.get_metric_history(run_id, "loss")] == [1, 2, 3, 4, 5, 6]
