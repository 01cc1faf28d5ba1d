"""GPU-hours: of a process, in its outcome, in the run's summary, and in the pipeline run in MLflow."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import mlflow
import pytest

from phantom import cost
from phantom.cli import shared
from phantom.config import preset_path
from phantom.cost import processes_with_gpus
from phantom.errors import OUTCOME_ENV, StageFailed, write_outcome
from phantom.orchestration.run import StageRun, as_text, describe
from phantom.tracking.lineage import PIPELINE_ENV


def test_a_process_holds_a_gpu_from_its_start_if_it_uses_one(monkeypatch: pytest.MonkeyPatch):
    uses = SimpleNamespace(cuda=SimpleNamespace(is_initialized=lambda: True))
    monkeypatch.setattr(cost, "_elsewhere", 0.0)
    monkeypatch.setattr(cost, "_started", cost.time.monotonic() - 7200)
    monkeypatch.setitem(sys.modules, "torch", uses)
    assert cost.gpu_hours() == pytest.approx(2.0, abs=0.1)
    monkeypatch.delitem(sys.modules, "torch")
    assert cost.gpu_hours() == 0
    cost.add_gpu_hours(1.5)
    assert cost.gpu_hours() == 1.5


def test_the_outcome_has_the_cost_if_there_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for hours, more in ((0.0, {}), (1.23456, {"gpu_hours": 1.2346})):
        monkeypatch.setenv(OUTCOME_ENV, str(tmp_path / f"{hours}"))
        write_outcome(0, "", hours)
        assert json.loads((tmp_path / f"{hours}").read_text()) == {"code": 0, "error": "", **more}


def test_processes_are_counted_for_as_long_as_they_work(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(cost, "_elsewhere", 0.0)
    clock = iter([100.0, 1900.0])
    monkeypatch.setattr(cost, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    with pytest.raises(StageFailed), processes_with_gpus(8):
        raise StageFailed("killed")
    assert cost._elsewhere == 4.0  # half an hour of eight


def test_the_summary_names_the_cost():
    assert describe(StageRun("train", True, 3600.0, 8.0)) == "train: done in 3600 s, 8.00 GPU-hours"
    assert describe(StageRun("train", True, 3600.0)) == "train: done in 3600 s"
    stages = {"prepare": 0.0, "train": 8.0, "evaluate": 0.5}
    result = {
        "stages": {name: {"ran": True, "seconds": 1.0, "gpu_hours": hours} for name, hours in stages.items()},
        "scores": [],
        "verdict": [],
        "registered": {"name": "phantom", "version": 1, "champion": True},
        "report": "reports/index.html",
        "mlflow": "open",
    }
    assert as_text({**result, "gpu_hours": 8.5}).endswith("\nCost    8.50 GPU-hours (train 8.00, evaluate 0.50)")
    assert "GPU-hours" not in as_text({**result, "gpu_hours": 0})


def test_a_stage_adds_its_cost_to_the_pipeline_run_also_if_it_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(PIPELINE_ENV, "pipeline 1")
    monkeypatch.setattr(shared, "gpu_hours", lambda: 1.5)
    context = SimpleNamespace(obj=(None, [f"tracking.uri={uri}"]))

    def run(stage: str) -> None:
        with pytest.raises(StageFailed), shared.stage(stage, context, preset_path("mini"), None):  # type: ignore[arg-type]
            raise StageFailed("no")

    for stage in ("encode", "train", "train"):
        run(stage)
    monkeypatch.setenv("RANK", "0")  # the process that started it counts
    run("train")
    client = mlflow.MlflowClient(uri)
    (found,) = client.search_runs([client.get_experiment_by_name("phantom").experiment_id])
    assert found.info.run_name == "pipeline 1"
    assert found.data.metrics == {"gpu_hours_encode": 1.5, "gpu_hours_train": 3.0, "gpu_hours": 4.5}
