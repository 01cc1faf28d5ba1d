"""An API server that fails, rejects requests, or is not there: what is retried, and what is reported."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from phantom.cluster.submit import run_job
from phantom.errors import StageFailed, UserError
from tests.cluster.conftest import Cluster
from tests.cluster.jobs import DONE, WAITS, meanwhile, until


def test_transient_errors_of_the_api_are_retried(cluster: Cluster, capfd: Any):
    cluster.image(torchrun=f"sleep 1; {DONE}")
    cluster.api.fail("POST .*pytorchjobs", 500)
    cluster.api.fail("POST .*pytorchjobs", None)
    cluster.api.fail("GET .*pytorchjobs/", 503, count=3)
    cluster.api.fail("GET .*/pods$", None, count=3)
    cluster.api.fail("GET .*/log", 500, count=2)
    cluster.api.fail("GET .*/events", 429, count=2)
    assert run_job("train", cluster.params(), cluster.root).here
    said = capfd.readouterr().err
    assert "the cluster could not create PyTorchJob" in said and "the server is having a bad day; trying again" in said
    assert "the cluster answers again" in said
    assert not any(fault.count for fault in cluster.api.faults)


def test_a_creation_whose_response_was_lost_is_not_repeated(cluster: Cluster):
    cluster.image(torchrun=f"echo x >> runs; {DONE}")
    cluster.api.fail("POST .*pytorchjobs", None, after=True)
    result = run_job("train", cluster.params(), cluster.root)
    assert result.here and (cluster.root / "runs").read_text(encoding="utf-8") == "x\n"


@pytest.mark.parametrize(
    ("status", "said"),
    [(403, "refuses to create PyTorchJob .*: the server is having a bad day"), (401, "does not accept these cred")],
)
def test_a_rejected_request_is_not_retried(cluster: Cluster, status: int, said: str):
    cluster.api.fail("POST", status, count=9)
    with pytest.raises(StageFailed, match=said):
        run_job("train", cluster.params(), cluster.root)
    assert sum(request.startswith("POST") for request in cluster.api.requests) <= 2


def test_a_missing_operator_or_namespace_is_reported(cluster: Cluster):
    cluster.api.absent = {"pytorchjobs"}
    with pytest.raises(StageFailed, match=r"does not know this kind .*; is the operator installed?"):
        run_job("train", cluster.params(), cluster.root)
    with pytest.raises(StageFailed, match='namespaces "other" not found; `kubectl apply -f k8s/`'):
        run_job("encode", cluster.params("cluster.namespace=other"), cluster.root)


def test_an_api_that_stays_down_ends_the_watch_and_not_the_job(cluster: Cluster, monkeypatch: pytest.MonkeyPatch):
    cluster.image(torchrun=WAITS)
    monkeypatch.setattr("phantom.cluster.submit.WATCH_TIMEOUT_SECONDS", 0.3)
    meanwhile(
        lambda: until((cluster.root / "started").exists), lambda: cluster.api.fail("GET .*pytorchjobs/", 500, count=99)
    )
    with pytest.raises(StageFailed, match=r"the cluster could not read PyTorchJob .* for 0 s"):
        run_job("train", cluster.params(), cluster.root)
    assert cluster.controllers.running()
    cluster.api.faults.clear()
    (cluster.root / "go").touch()
    assert run_job("train", cluster.params(), cluster.root).here


def test_an_unreachable_cluster_is_reported_soon(cluster: Cluster, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("phantom.cluster.submit.SUBMIT_TIMEOUT_SECONDS", 0.3)
    config = Path(os.environ["KUBECONFIG"])
    text = config.read_text(encoding="utf-8").replace(cluster.api.url, "http://127.0.0.1:9")
    config.write_text(text, encoding="utf-8")
    with pytest.raises(StageFailed, match=r"could not create PyTorchJob .* Connection refused"):
        run_job("train", cluster.params(), cluster.root)
    config.write_text("{}", encoding="utf-8")
    with pytest.raises(UserError, match=r"^kubeconfig: .*; set KUBECONFIG, or cluster\.context$"):
        run_job("train", cluster.params(), cluster.root)
