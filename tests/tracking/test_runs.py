"""Runs in a real MLflow store: complete curves, resumed without repeated steps, and a store that fails."""

import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from datetime import datetime
from types import SimpleNamespace

import mlflow
import pytest
import yaml

from phantom.tracking import lineage
from phantom.tracking.records import log_stage
from phantom.tracking.runs import Tracker


@pytest.fixture
def params(make_params, tmp_path):
    return make_params(f"tracking.uri=sqlite:///{tmp_path}/mlflow.db", f"tracking.artifacts={tmp_path}/artifacts")


def curve(params, run_id, key):
    client = mlflow.MlflowClient(params.tracking.uri)
    return [(m.step, m.value) for m in client.get_metric_history(run_id, key)]


def test_a_resumed_run_continues_its_curves_and_repeats_no_step(params, tmp_path):
    first = Tracker(params, "train phantom", tags={"stage": "train"})
    for step in range(1, 6):
        first.log_metrics(step, {"loss": 1 / step, "alpha": float("nan")})
    first.close("KILLED")
    second = Tracker(params, "train phantom", first.run_id)
    assert second.run_id == first.run_id
    for step in range(3, 9):  # from a checkpoint of step 2
        second.log_metrics(step, {"loss": 1 / step})
    file = tmp_path / "history.json"
    file.write_text("[]")
    second.log_artifact(file)
    second.close()
    assert curve(params, first.run_id, "loss") == [(s, 1 / s) for s in range(1, 9)]
    assert curve(params, first.run_id, "alpha") == []
    run = mlflow.MlflowClient(params.tracking.uri).get_run(first.run_id)
    assert run.info.status == "FINISHED"
    assert run.data.tags["stage"] == "train" and run.data.params["train.optimizer.clip_norm"] == "1.0"
    assert [a.path for a in mlflow.MlflowClient(params.tracking.uri).list_artifacts(first.run_id)] == ["history.json"]


def test_checkpoints_can_be_browsed(params, tmp_path):
    tracker = Tracker(params, "train phantom")
    tracker.log_metrics(10, {"loss": 0.5})
    tracker.log_checkpoint(10, f"{tmp_path}/step-0000010", {"loss": 0.5, "loss_physics": 0.25})
    tracker.close()
    client = mlflow.MlflowClient(params.tracking.uri)
    experiment = client.get_experiment_by_name(params.tracking.experiment)
    (model,) = client.search_logged_models([experiment.experiment_id])
    assert model.name == "step-10" and model.params == {"step": "10"} and model.source_run_id == tracker.run_id
    assert model.tags["files"] == str(tmp_path / "step-0000010")
    assert {m.key: m.value for m in model.metrics} == {"checkpoint_loss": 0.5, "checkpoint_loss_physics": 0.25}


def test_an_unreachable_store_costs_one_line_and_no_time(make_params, capsys):
    params = make_params("tracking.uri=sqlite:////proc/nowhere/mlflow.db")
    tracker = Tracker(params, "train phantom")
    started = time.monotonic()
    for step in range(100):
        tracker.log_metrics(step, {"loss": 1.0})
    tracker.close()
    assert time.monotonic() - started < 5
    said = capsys.readouterr().err.strip().splitlines()
    assert len([line for line in said if "continuing without it" in line]) == 1


def test_metrics_are_sent_again_after_failed_requests(params, monkeypatch):
    tracker = Tracker(params, "train phantom")
    send, failures = tracker._client.log_batch, iter([True, True])

    def flaky(*args, **kwargs):
        if next(failures, False):
            raise ConnectionError("no route")
        return send(*args, **kwargs)

    monkeypatch.setattr(tracker._client, "log_batch", flaky)
    monkeypatch.setattr("phantom.tracking.runs.RETRY_SECONDS", 0.01)
    for step in range(1, 4):
        tracker.log_metrics(step, {"loss": float(step)})
    tracker.close()
    assert curve(params, tracker.run_id, "loss") == [(1, 1.0), (2, 2.0), (3, 3.0)]


@dataclass(frozen=True)
class Prepared:
    """Like the result of a stage."""

    train: int = 9
    folder: str = "data/clips"


def test_the_stages_of_a_pipeline_are_the_children_of_its_run(params, tmp_path, monkeypatch):
    (tmp_path / "data/clips").mkdir(parents=True)
    (tmp_path / "data/clips/manifest.jsonl").write_text("{}\n")
    (tmp_path / "reports").mkdir()
    (tmp_path / "reports/evaluation.json").write_text(json.dumps({"physics_iq": {"single": {"phantom": {"score": 2}}}}))
    (tmp_path / "reports/index.html").write_text("<p>")
    for mode in ("single", "multi"):
        folder = tmp_path / "checkpoints/evaluate/phantom-abc" / mode
        folder.mkdir(parents=True)
        for number in range(6):
            (folder / f"{number}.mp4").write_bytes(b"video")
    monkeypatch.setenv(lineage.COMMIT_ENV, "abc123")
    monkeypatch.setenv(lineage.PIPELINE_ENV, "pipeline one")
    log_stage("prepare", params, Prepared(), tmp_path)
    tracker = Tracker(params, "train phantom", tags={"stage": "train"}, root=tmp_path)
    tracker.close()
    log_stage("evaluate", params, SimpleNamespace(scores={"single": {}, "multi": {}}), tmp_path)
    monkeypatch.setenv(lineage.PIPELINE_ENV, "pipeline two")
    Tracker(params, "train phantom", root=tmp_path).close("KILLED")
    monkeypatch.delenv(lineage.PIPELINE_ENV)
    log_stage("prepare", params, Prepared(), tmp_path)  # not logged outside a pipeline
    Tracker(params, "train phantom", root=tmp_path).close()

    client = mlflow.MlflowClient(params.tracking.uri)
    runs = {run.info.run_id: run for run in client.search_runs([tracker._experiment_id], order_by=["start_time"])}
    tree = {}
    for run in runs.values():
        above = run.data.tags.get(lineage.PARENT_TAG)
        tree.setdefault(runs[above].info.run_name if above else None, []).append(run.info.run_name)
    assert tree == {
        None: ["pipeline one", "pipeline two", "train phantom"],
        "pipeline one": ["prepare", "train phantom", "evaluate"],
        "pipeline two": ["train phantom"],
    }
    statuses = {run.info.run_name: run.info.status for run in runs.values()}
    assert (statuses["pipeline one"], statuses["pipeline two"]) == ("FINISHED", "KILLED")
    for run in runs.values():
        if "pipeline" not in run.data.tags:
            assert len(run.data.tags["data_sha256"]) == 64 and run.data.tags["git_commit"] == "abc123"
            assert run.inputs.dataset_inputs[0].dataset.digest == run.data.tags["data_sha256"][:36]
    by_name = {run.info.run_name: run for run in runs.values()}
    assert by_name["prepare"].data.metrics == {"train": 9}
    assert by_name["evaluate"].data.metrics == {"physics_iq.single.phantom.score": 2.0}
    evaluated = by_name["evaluate"].info.run_id
    assert {file.path for file in client.list_artifacts(evaluated)} == {"evaluation.json", "index.html", "samples"}
    samples = client.list_artifacts(evaluated, "samples/multi")
    assert [file.path for file in samples] == [f"samples/multi/{number}.mp4" for number in range(4)]


def test_stages_of_a_plain_dvc_repro_get_a_parent_run(tmp_path, make_params):
    """Real DVC, without the name that `phantom run` and the flow pass on."""
    params = make_params(f"tracking.uri=sqlite:///{tmp_path}/mlflow.db", f"tracking.artifacts={tmp_path}/artifacts")
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(params.model_dump(mode="json", by_alias=True)))
    (tmp_path / "stage.py").write_text(
        "from pathlib import Path\n"
        "import sys, typer\n"
        "from phantom.cli.shared import app, stage\n"
        "from phantom.tracking.runs import Tracker\n"
        "@app.command()\n"
        "def track(context: typer.Context, name: str):\n"
        "    with stage(name, context, Path('params.yaml'), None) as params:\n"
        "        Tracker(params, name).close()\n"
        "app(['track', sys.argv[1]])\n"
    )
    stages = {
        "one": {"cmd": f"{sys.executable} stage.py one > one", "outs": ["one"]},
        "two": {"cmd": f"{sys.executable} stage.py two > two", "deps": ["one"], "outs": ["two"]},
    }
    (tmp_path / "dvc.yaml").write_text(yaml.safe_dump({"stages": stages}))
    environment = {k: v for k, v in os.environ.items() if k != lineage.PIPELINE_ENV}
    dvc = [sys.executable, "-m", "dvc"]
    subprocess.run([*dvc, "init", "--no-scm", "--quiet"], cwd=tmp_path, check=True)
    before = time.time()
    subprocess.run([*dvc, "repro", "--quiet"], cwd=tmp_path, env=environment, check=True, start_new_session=True)
    client = mlflow.MlflowClient(params.tracking.uri)
    experiment = client.get_experiment_by_name(params.tracking.experiment)
    above, first, second = client.search_runs([experiment.experiment_id], order_by=["start_time"])
    assert [run.info.run_name for run in (first, second)] == ["one", "two"]
    assert {run.data.tags[lineage.PARENT_TAG] for run in (first, second)} == {above.info.run_id}
    started = datetime.strptime(above.info.run_name, "dvc repro %Y-%m-%d %H:%M:%S").timestamp()
    assert started == pytest.approx(before, abs=5) and above.info.status == "FINISHED"
