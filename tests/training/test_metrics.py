"""The metrics of a training run for Prometheus, as they are scraped while it trains."""

from __future__ import annotations

import math
import shutil
import time
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from phantom import logs
from phantom.training.metrics import HELP, METRICS_PORT_ENV, PREFIX, Metrics
from phantom.training.trainer import Trainer, train
from tests.orchestration.prefect_server import free_port
from tests.training.runs import same, weights


def scrape(port: int) -> dict[tuple[str, str], float]:
    """(name without its prefix, model) -> value."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=60) as answer:
        families = text_string_to_metric_families(answer.read().decode())
    samples = [sample for family in families for sample in family.samples]
    assert all(sample.name.startswith(PREFIX) for sample in samples)
    return {(sample.name.removeprefix(PREFIX), sample.labels["model"]): sample.value for sample in samples}


def test_a_run_is_seen_while_it_trains_and_is_not_changed_by_it(run_params, monkeypatch: pytest.MonkeyPatch):
    params = run_params("train.control=true", "train.steps=4")
    train(params)
    assert logs.context["step"] is None  # lines after the run are of none of its steps
    unseen = weights(), weights(name="control")
    for folder in ("checkpoints", "models"):
        shutil.rmtree(folder)
    port, seen, step = free_port(), list[dict[tuple[str, str], float]](), Trainer.train_step
    monkeypatch.setenv(METRICS_PORT_ENV, str(port))

    def watched(self: Trainer, batches: Any) -> dict[str, Any]:
        seen.append(scrape(port))
        return step(self, batches)

    began = time.time()
    monkeypatch.setattr(Trainer, "train_step", watched)
    train(params)
    assert same(weights(), unseen[0]) and same(weights(name="control"), unseen[1])
    assert len(seen) == 8
    for model, steps in (("phantom", seen[:4]), ("control", seen[4:])):
        assert {found for each in steps for _, found in each} == {model}
        assert [each.get(("step", model)) for each in steps] == [None, 1, 2, 3]
        times = [each["last_progress_timestamp_seconds", model] for each in steps]
        assert began < times[0] < times[1] < times[2] < times[3] < time.time()
        last = {name: value for (name, _), value in steps[-1].items()}
        assert set(last) == set(HELP) - {"mfu"}  # which a CPU has none of
        assert last["steps"] == 4 and last["alpha"] == (0.5 if model == "phantom" else 0)
        assert last["bad_steps"] == last["alpha_stalled"] == 0
        assert last["loss"] == pytest.approx(last["loss_video"] + last["alpha"] * last["loss_physics"], rel=1e-4)
        assert last["tokens_per_second"] > last["samples_per_second"] > 0 and last["save_stall_seconds"] > 0
    with pytest.raises(OSError):
        scrape(port)
    assert Path("models/control").is_dir()


def test_what_goes_wrong_is_seen(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(METRICS_PORT_ENV, str(port := free_port()))
    metrics = Metrics("phantom", 10)
    metrics.show(loss=math.nan, bad_steps=2, alpha_stalled=True, unknown=1.0)
    found = {name: value for (name, _), value in scrape(port).items()}
    metrics.close()
    assert math.isnan(found["loss"]) and (found["bad_steps"], found["alpha_stalled"]) == (2, 1)
    assert "unknown" not in found


@pytest.mark.parametrize("port", ["70000", "-1", "tcp://10.0.0.1:9400"])
def test_a_port_that_is_none_stops_nothing(port: str, monkeypatch: pytest.MonkeyPatch, capsys: Any):
    monkeypatch.setenv(METRICS_PORT_ENV, port)
    Metrics("phantom", 10).progress(3)
    assert f"{METRICS_PORT_ENV}: {port}:" in capsys.readouterr().err


def test_one_process_of_a_pod_serves_and_a_port_in_use_stops_nothing(monkeypatch: pytest.MonkeyPatch, capsys: Any):
    monkeypatch.setenv(METRICS_PORT_ENV, str(port := free_port()))
    first, second = Metrics("phantom", 10), Metrics("phantom", 10)
    second.progress(3)
    assert f"{METRICS_PORT_ENV}: {port}:" in capsys.readouterr().err
    assert ("step", "phantom") not in scrape(port)
    first.close()
    monkeypatch.setenv("LOCAL_RANK", "1")
    Metrics("phantom", 10).progress(1)
    with pytest.raises(OSError):
        scrape(port)
