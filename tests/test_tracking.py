"""Curves in a real MLflow store: complete, continued without repeats, and never in the way."""

import time

import mlflow
import pytest

from phantom.tracking import Tracker


@pytest.fixture
def params(make_params, tmp_path):
    return make_params(f"tracking.uri=sqlite:///{tmp_path}/mlflow.db", f"tracking.artifacts={tmp_path}/artifacts")


def curve(params, run_id, key):
    client = mlflow.MlflowClient(params.tracking.uri)
    return [(m.step, m.value) for m in client.get_metric_history(run_id, key)]


def test_a_resumed_run_continues_its_curves_and_repeats_no_step(params, tmp_path):
    first = Tracker(params, "train phantom", tags={"stage": "train"})
    for step in range(1, 6):
        first.log(step, {"loss": 1 / step, "alpha": float("nan")})
    first.close("KILLED")
    second = Tracker(params, "train phantom", first.run_id)
    assert second.run_id == first.run_id
    for step in range(3, 9):  # from a checkpoint of step 2
        second.log(step, {"loss": 1 / step})
    file = tmp_path / "history.json"
    file.write_text("[]")
    second.artifact(file)
    second.close()
    assert curve(params, first.run_id, "loss") == [(s, 1 / s) for s in range(1, 9)]
    assert curve(params, first.run_id, "alpha") == []
    run = mlflow.MlflowClient(params.tracking.uri).get_run(first.run_id)
    assert run.info.status == "FINISHED"
    assert run.data.tags["stage"] == "train" and run.data.params["train.optimizer.clip_norm"] == "1.0"
    assert [a.path for a in mlflow.MlflowClient(params.tracking.uri).list_artifacts(first.run_id)] == ["history.json"]


def test_checkpoints_can_be_browsed(params, tmp_path):
    tracker = Tracker(params, "train phantom")
    tracker.log(10, {"loss": 0.5})
    tracker.checkpoint(10, tmp_path / "step-0000010", {"loss": 0.5, "loss_physics": 0.25})
    tracker.close()
    client = mlflow.MlflowClient(params.tracking.uri)
    experiment = client.get_experiment_by_name(params.tracking.experiment)
    (model,) = client.search_logged_models([experiment.experiment_id])
    assert model.name == "step-10" and model.params == {"step": "10"} and model.source_run_id == tracker.run_id
    assert model.tags["files"] == str(tmp_path / "step-0000010")
    assert {m.key: m.value for m in model.metrics} == {"checkpoint_loss": 0.5, "checkpoint_loss_physics": 0.25}


def test_an_absent_store_is_one_line_and_no_delay(make_params, capsys):
    params = make_params("tracking.uri=sqlite:////proc/nowhere/mlflow.db")
    tracker = Tracker(params, "train phantom")
    started = time.monotonic()
    for step in range(100):
        tracker.log(step, {"loss": 1.0})
    tracker.close()
    assert time.monotonic() - started < 5
    said = capsys.readouterr().err.strip().splitlines()
    assert len([line for line in said if "the work goes on" in line]) == 1


def test_a_store_that_fails_for_a_while_gets_everything(params, monkeypatch):
    tracker = Tracker(params, "train phantom")
    send, failures = tracker._client.log_batch, iter([True, True])

    def flaky(*args, **kwargs):
        if next(failures, False):
            raise ConnectionError("no route")
        return send(*args, **kwargs)

    monkeypatch.setattr(tracker._client, "log_batch", flaky)
    monkeypatch.setattr("phantom.tracking.RETRY_AFTER", 0.01)
    for step in range(1, 4):
        tracker.log(step, {"loss": float(step)})
    tracker.close()
    assert curve(params, tracker.run_id, "loss") == [(1, 1.0), (2, 2.0), (3, 3.0)]
