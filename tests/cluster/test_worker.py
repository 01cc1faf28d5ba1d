"""The deployment on a work pool of type process: `prefect deploy --all`, a real server, a real worker.

Jobs go to the fake cluster. The flow's process is killed, cancelled, and started again.
"""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from phantom.orchestration.run import STAGES
from tests.cluster.conftest import Cluster
from tests.cluster.jobs import WAITS
from tests.cluster.test_training import check_model, first_checkpoint, two_pods
from tests.orchestration.pipeline import ROOT, calls, make_checkout
from tests.orchestration.prefect_server import Prefect, alive, descendants, prefect_server_in, wait

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3000)]


@pytest.fixture
def pool(cluster: Cluster) -> Iterator[Prefect]:
    """A Prefect server for the checkout; `deploy` adds the deployment and a worker."""
    with prefect_server_in(cluster.root) as made:
        yield made


def deploy(pool: Prefect) -> None:
    """Deploys the flows and starts a worker, as prefect.yaml says."""
    shutil.copytree(ROOT / "flows", pool.checkout / "flows", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("prefect.yaml", "prefect.toml"):
        shutil.copy(ROOT / name, pool.checkout)
    pool.command("prefect", "work-pool", "create", "phantom", "--type", "process")
    pool.command("prefect", "--no-prompt", "deploy", "--all")
    arguments = ("worker", "start", "--pool", "phantom", "--type", "process", "--limit", "1")
    pool.worker = pool.start("worker.log", "prefect", *arguments)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_flow_that_is_killed_and_started_again_adopts_the_running_job(
    pool: Prefect, cluster: Cluster, make_params, number: signal.Signals
):
    root = two_pods(cluster, make_params, "train.steps=40")
    deploy(pool)
    found = {deployment["name"]: deployment for deployment in pool.ask("/deployments/filter", {})}
    assert found.keys() == {"full-pipeline", "study"}
    deployed = found["full-pipeline"]
    assert deployed["work_pool_name"] == "phantom"
    assert deployed["schedules"] == []

    first = pool.run()
    first_checkpoint(cluster)
    (job,) = cluster.api.find("pytorchjobs")
    assert pool.worker
    of_the_flow = descendants(pool.worker.pid)
    assert len(of_the_flow) >= 3  # the flow, DVC, the stage
    for pid in of_the_flow if number == signal.SIGKILL else children(pool.worker.pid):
        os.kill(pid, number)
    assert pool.finished(first) in ("Crashed", "Failed")
    if number == signal.SIGTERM:
        assert f"train: stopped; PyTorchJob {job['metadata']['name']} goes on, run again to adopt it" in pool.log(first)
        wait(lambda: not any(alive(pid) for pid in of_the_flow))
    assert cluster.api.find("pytorchjobs")  # the job is not affected
    assert calls(root) == ["prepare", "encode"]

    second = pool.run("-p", 'params={"evaluate": {"seed": 7}}')
    assert pool.finished(second) == "Completed", pool.log(second)
    assert "already exists: adopting it" in pool.log(second) or "adopting its outputs" in pool.log(second)
    (same,) = cluster.api.find("pytorchjobs")
    assert same["metadata"]["uid"] == job["metadata"]["uid"]
    check_model(cluster)
    assert calls(root) == ["evaluate", "register"]
    made = {artifact["key"] for artifact in pool.ask("/artifacts/filter", {}) if artifact["key"]}
    assert {f"{stage}-progress" for stage in STAGES} | {"evaluation"} <= made


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def test_cancelling_a_run_stops_its_processes_and_its_job(pool: Prefect, cluster: Cluster, make_params):
    root = make_checkout(cluster.root)
    cluster.image(torchrun=WAITS)
    tree = yaml.safe_load((root / "dvc.yaml").read_text(encoding="utf-8"))
    tree["stages"]["train"]["cmd"] = "phantom train"
    (root / "dvc.yaml").write_text(yaml.safe_dump(tree), encoding="utf-8")
    params = make_params("compute.train=kubernetes").model_dump(mode="json", by_alias=True)
    (root / "params.yaml").write_text(yaml.safe_dump(params), encoding="utf-8")
    deploy(pool)
    name = pool.run()
    wait((root / "started").exists)
    assert pool.worker
    of_the_flow = descendants(pool.worker.pid)
    pool.command("prefect", "flow-run", "cancel", pool.runs()[name]["id"])
    assert pool.finished(name) == "Cancelled"
    wait(lambda: not cluster.api.find("pytorchjobs") and not cluster.controllers.running())
    assert (root / "saved").read_text(encoding="utf-8") == "saved\n"
    wait(lambda: not any(alive(pid) for pid in of_the_flow), lambda: f"{[p for p in of_the_flow if alive(p)]}")
    assert pool.worker.poll() is None
