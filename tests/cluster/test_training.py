"""End to end on CPUs: the flow, DVC, `phantom train`, a PyTorchJob of two pods, and in them torchrun with gloo."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

from phantom.errors import UserError
from phantom.orchestration.run import STAGES
from phantom.training.checkpoint import COMMIT
from tests.cluster.conftest import Cluster
from tests.cluster.jobs import meanwhile, until
from tests.orchestration.pipeline import calls, load_flow, make_checkout
from tests.training.random_latents import write_latents

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3000)]


def two_pods(cluster: Cluster, make_params: Any, *overrides: str) -> Path:
    """The cluster's checkout: training is the real one, in two pods; the other stages only write files."""
    params = make_params(
        "train.steps=40",
        "train.batch_size=4",
        "train.checkpoint_every=1",
        "train.validate_every=0",
        "train.control=false",
        "train.processes=2",
        "cluster.nodes=2",
        "compute.train=kubernetes",
        *overrides,
    )
    root = make_checkout(cluster.root)
    write_latents(root, params)
    shutil.move(root / "data/latents", root / "latents")
    tree = params.model_dump(mode="json", by_alias=True)
    (root / "params.yaml").write_text(yaml.safe_dump(tree), encoding="utf-8")
    stages = yaml.safe_load((root / "dvc.yaml").read_text(encoding="utf-8"))
    stages["stages"]["train"]["cmd"] = "phantom train"
    stages["stages"]["encode"]["cmd"] += " && rm -r data/latents && cp -r latents data/latents"
    (root / "dvc.yaml").write_text(yaml.safe_dump(stages), encoding="utf-8")
    return root


@pytest.fixture
def flow(prefect_server: None, cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The flow's module, with the cluster's checkout as its root."""
    module = load_flow("full_pipeline", monkeypatch)
    monkeypatch.setattr(module, "ROOT", cluster.root)
    return module


def first_checkpoint(cluster: Cluster) -> None:
    """Waits for the first whole checkpoint, which takes a while: two processes import torch before."""
    until(lambda: list(cluster.root.glob(f"checkpoints/phantom-*/step-*/{COMMIT}")), 900)


def check_model(cluster: Cluster) -> None:
    result = json.loads((cluster.root / "models/phantom/result.json").read_text(encoding="utf-8"))
    assert result["steps"] == 40
    (job,) = cluster.api.find("pytorchjobs")
    assert job["status"]["conditions"][-1]["type"] == "Succeeded"


def resumed(cluster: Cluster) -> bool:
    """Whether a pod logged that it resumed. Read on the server: the watcher may miss the last lines of a pod."""
    return any("train phantom: continues after step" in line for log in cluster.api.logs.values() for _, line in log)


def run(flow: ModuleType, caplog: pytest.LogCaptureFixture) -> str:
    """Runs the flow, in which every stage has to run; its log."""
    ran = flow.full_pipeline()
    assert ran == dict.fromkeys(STAGES, True), caplog.text
    return caplog.text


def test_training_resumes_after_a_pod_is_killed(
    cluster: Cluster, flow: ModuleType, make_params: Any, caplog: pytest.LogCaptureFixture
):
    root = two_pods(cluster, make_params)
    meanwhile(lambda: first_checkpoint(cluster), lambda: cluster.controllers.kill(cluster.controllers.running()[1]))
    said = run(flow, caplog)
    assert "-worker-1 ran out of memory" in said and resumed(cluster), said
    check_model(cluster)
    # A second run changes nothing, so DVC skips every stage.
    calls(root)
    assert flow.full_pipeline() == dict.fromkeys(STAGES, False)
    assert calls(root) == []


def test_training_resumes_after_a_pod_is_evicted(
    cluster: Cluster, flow: ModuleType, make_params: Any, caplog: pytest.LogCaptureFixture
):
    two_pods(cluster, make_params)
    low = "The node was low on resource: memory."
    meanwhile(
        lambda: first_checkpoint(cluster), lambda: cluster.controllers.evict(cluster.controllers.running()[0], low)
    )
    said = run(flow, caplog)
    assert f"was evicted (Evicted): {low}" in said or "-worker-0 is gone" in said, said
    assert resumed(cluster), said
    check_model(cluster)


def test_training_survives_pending_pods_and_api_faults(
    cluster: Cluster, flow: ModuleType, make_params: Any, caplog: pytest.LogCaptureFixture
):
    two_pods(cluster, make_params)
    full = "0/3 nodes are available: 3 Insufficient nvidia.com/gpu."
    cluster.controllers.pending = full
    cluster.api.fail("POST .*pytorchjobs", 500)
    cluster.api.fail("POST .*pytorchjobs", None)
    meanwhile(
        lambda: until(lambda: cluster.api.find("pytorchjobs"), 600),
        lambda: time.sleep(8),  # longer than the watcher is away between two looks
        lambda: setattr(cluster.controllers, "pending", None),
        lambda: first_checkpoint(cluster),
        lambda: cluster.api.fail("GET .*pytorchjobs/", 500, count=2),
        lambda: cluster.api.fail("GET .*/pods$", None, count=2),
        lambda: cluster.api.fail("GET .*/log", 503, count=2),
    )
    said = run(flow, caplog)
    assert f"cannot be scheduled: {full}" in said
    assert "could not create PyTorchJob" in said and "the cluster answers again" in said
    check_model(cluster)


def test_wrong_input_in_the_pods_fails_the_flow_with_its_error(
    cluster: Cluster, flow: ModuleType, make_params: Any, caplog: pytest.LogCaptureFixture
):
    root = two_pods(cluster, make_params)
    index = root / "latents/index.json"
    tree = json.loads(index.read_text(encoding="utf-8"))
    tree["recipe"]["data.fps"] = 99
    index.write_text(json.dumps(tree), encoding="utf-8")
    with pytest.raises(UserError, match=r"^data/latents: made with data\.fps 99"):
        flow.full_pipeline()
    assert calls(root) == ["prepare", "encode"]  # and no retry
    assert caplog.text.count("is submitted to the namespace") == 1
    until(lambda: not cluster.api.find("pytorchjobs") and not cluster.controllers.running())
