"""Checkpoints in a real S3 server: sent while training goes on, linked in MLflow, and never lost on the way."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import boto3
import mlflow
import pytest

from phantom.data.storage import LocalFolder
from phantom.errors import StageFailed
from phantom.training.trainer import train
from phantom.uploads import Uploaded, Uploads
from tests.data.conftest import bucket, s3, s3_server  # noqa: F401
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
    sent: list[Uploaded] = []
    first = Uploads(to, outbox, sent.append)
    for step in (1, 2, 3):
        path = checkpoint(tmp_path, step)
        first.put(path)
        for file in path.iterdir():  # the run keeps only its newest
            file.unlink()
    first.close(wait=True)
    assert not sent and to.tried
    assert "is not copied: s3://x: the server cannot be reached" in capsys.readouterr().err
    to.open_ = True
    Uploads(to, outbox, sent.append).close(wait=True)
    assert [upload.name for upload in sent] == ["step-0000003"]  # the newest of those that waited
    assert (tmp_path / "s3/run-1/step-0000003/model.safetensors").read_text(encoding="utf-8") == "weights 3"
    assert sent[0].uri == f"{tmp_path}/s3/run-1/step-0000003"
    assert list(outbox.iterdir()) == []
