"""Checkpoints under s3://, on a real S3 server: written there directly, linked in MLflow, read to resume."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import boto3
import mlflow
import pytest
import torch

from phantom.data.storage import Folder, open_folder
from phantom.errors import UserError
from phantom.training import checkpoint
from phantom.training.checkpoint_writer import CheckpointWriter
from phantom.training.trainer import train
from tests.data.conftest import bucket, s3, s3_server  # noqa: F401
from tests.training.random_latents import write_latents
from tests.training.runs import same, weights


def write(folder: Folder, step: int, size: int = 3) -> None:
    """Writes a small checkpoint."""
    writer = CheckpointWriter(folder, 2, torch.device("cpu"))
    writer.save(step, {"model.weight": torch.full((size,), float(step))}, {"note": step})
    writer.wait()


def test_the_newest_intact_one_is_read(bucket: str, make_params: Any, tmp_path: Path, capsys: Any):  # noqa: F811
    storage = make_params().storage
    folder = open_folder(f"s3://{bucket}/runs/run-1", tmp_path, storage)
    assert checkpoint.find_newest(folder) is None
    for step in (1, 2, 3, 4, 5):
        write(folder, step, size=3 + step * 10**6)
        if step == 3:  # pruning keeps two
            client = boto3.client("s3", region_name="us-east-1")
            keys = [o["Key"] for o in client.list_objects_v2(Bucket=bucket)["Contents"]]
            assert {key.split("/")[2] for key in keys} == {"step-0000002", "step-0000003"}
    client.delete_object(Bucket=bucket, Key="runs/run-1/step-0000005/commit.json")  # an interrupted write
    found = checkpoint.find_newest(folder)
    assert found and found.step == 4 and found.state == {"note": 4}
    ((key, tensor),) = found.stream(found.keys)
    assert key == "model.weight" and tensor.tolist() == [4] * (3 + 4 * 10**6)
    assert capsys.readouterr().err == f"s3://{bucket}/runs/run-1/step-0000005: not committed, passed over\n"
    data = bytearray(client.get_object(Bucket=bucket, Key="runs/run-1/step-0000004/__0_0.distcp")["Body"].read())
    data[len(data) // 2] ^= 1
    client.put_object(Bucket=bucket, Key="runs/run-1/step-0000004/__0_0.distcp", Body=bytes(data))
    assert checkpoint.find_newest(folder) is None
    assert "step-0000004: damaged (__0_0.distcp: wrong checksum), passed over" in capsys.readouterr().err


def test_a_bucket_that_is_not_there_does_not_restart_training(s3: Any, make_params: Any, tmp_path: Path):  # noqa: F811
    folder = open_folder("s3://nowhere/runs/run-1", tmp_path, make_params().storage)
    with pytest.raises(UserError, match=r"^s3://nowhere/runs/run-1: no such bucket$"):
        checkpoint.find_newest(folder)


def test_a_write_that_fails_raises_in_one_line(bucket: str, make_params: Any, tmp_path: Path):  # noqa: F811
    folder = open_folder(f"s3://{bucket}/runs/run-1", tmp_path, make_params().storage)
    write(folder, 1)
    create = folder.create

    def elsewhere(name: str) -> Any:
        folder.bucket = "nowhere"  # the bucket is deleted while the checkpoint is written
        return create(name)

    folder.create = elsewhere  # type: ignore[method-assign]
    with pytest.raises(UserError, match=r"^s3://nowhere/runs/run-1/step-0000002/__0_0.distcp: no such bucket$"):
        write(folder, 2, size=5 * 10**7)  # larger than what is buffered


@pytest.mark.slow
def test_training_resumes_from_s3_on_another_machine(
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
            "train.keep_checkpoints=1",
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

    in_s3 = f"storage.checkpoints=s3://{bucket}/runs/"
    run("whole", 6)
    run("lost", 4, in_s3)
    assert not list(tmp_path.glob("lost/checkpoints/*/step-*"))
    shutil.copytree(tmp_path / "lost/data", tmp_path / "other/data")
    capsys.readouterr()
    params = run("other", 6, in_s3)
    assert f"train phantom: continues after step 4 (s3://{bucket}/runs/phantom-" in capsys.readouterr().err
    assert same(weights(tmp_path / "other"), weights(tmp_path / "whole"))
    client = mlflow.MlflowClient(params.tracking.uri)
    experiment = client.get_experiment_by_name(params.tracking.experiment).experiment_id
    (model,) = client.search_logged_models([experiment], "name = 'step-6' AND tags.uri LIKE 's3://%'")
    found = checkpoint.find_newest(open_folder(model.tags["uri"].rpartition("/")[0], tmp_path, params.storage))
    assert found and found.step == 6
    assert [m.step for m in client.get_metric_history(found.state["mlflow_run"], "loss")] == [1, 2, 3, 4, 5, 6]
