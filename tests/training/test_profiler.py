"""`train.profile`: the trace of a window of steps."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import mlflow
import pytest

from phantom.errors import UserError
from phantom.training.trainer import train


def test_the_steps_of_the_window_are_traced_and_kept_as_an_artifact(run_params):
    params = run_params("train.steps=4", "train.profile=[2,3]", "train.checkpoint_every=100")
    train(params)
    (trace,) = Path("checkpoints").glob("*/profile/trace.json.gz")
    events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    assert {event["name"] for event in events if event["name"].startswith("step ")} == {"step 2", "step 3"}
    assert any("scaled_dot_product" in event["name"] for event in events)
    client = mlflow.MlflowClient(params.tracking.uri)
    # The newest: other tests record theirs in the same place.
    run, *_ = client.search_runs([client.get_experiment_by_name(params.tracking.experiment).experiment_id])
    assert [file.path for file in client.list_artifacts(run.info.run_id, "profile")] == ["profile/trace.json.gz"]


def test_a_window_in_the_wrong_order_is_one_line(run_params):
    with pytest.raises(UserError, match=r"profile: found \[5, 3\]; accepted: \[from, to\]"):
        run_params("train.profile=[5,3]")
