"""Flow runs whose pod is lost: `prefect flow-run execute`, as pods run it, on a real server with our automations.

A process stands for a pod, and the test does what Prefect's worker does: it starts one for each run that is scheduled.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from datetime import UTC, datetime

import pytest
import yaml

from tests.cluster.conftest import Cluster
from tests.cluster.jobs import the_job
from tests.orchestration.pipeline import ROOT, calls, make_checkout
from tests.orchestration.prefect_server import Prefect, alive, descendants, prefect_server_in, wait

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3000)]

# What the worker sets in the pods of a Job that is not tried again, and what the manifests set.
ENV = {"PREFECT_FLOW_RUN_EXECUTE_SIGTERM_BEHAVIOR": "reschedule", "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": "30"}
LEASE = {"PREFECT_SERVER_CONCURRENCY_INITIAL_DEPLOYMENT_LEASE_DURATION": "60"}
SLOT_IS_FREE_SECONDS = 120.0
# The job of train: goes on until the file `go` exists.
TRAINS = """
touch started
for i in $(seq 6000); do test -e go && break; sleep 0.1; done
mkdir -p models/phantom models/control
for file in control/config phantom/config phantom/history phantom/result; do echo '{}' > models/$file.json; done
"""


class Worker:
    """Prefect's worker, asked by the test. `pod` is the one that it started last."""

    def __init__(self, prefect: Prefect) -> None:
        self.prefect = prefect
        self.pod: subprocess.Popen[bytes] | None = None

    def submit(self) -> bool:
        """Starts a pod for the run that is scheduled and gets a concurrency slot. Whether there was one."""
        due = {"scheduled_before": datetime.now(UTC).isoformat()}
        for scheduled in self.prefect.ask("/work_pools/phantom/get_scheduled_flow_runs", due):
            run = scheduled["flow_run"]["id"]
            answer = self.prefect.ask(f"/flow_runs/{run}/set_state", {"state": {"type": "PENDING"}})
            if answer["status"] == "ACCEPT":
                command = ("prefect", "flow-run", "execute")
                self.pod = self.prefect.start("pod.log", *command, PREFECT__FLOW_RUN_ID=run, **ENV)
                return True
        return False

    def lose(self, number: signal.Signals) -> None:
        """Stops the pod: its first process gets SIGTERM, or all of its processes are killed."""
        assert self.pod
        processes = descendants(self.pod.pid)
        for pid in [self.pod.pid, *(processes if number == signal.SIGKILL else ())]:
            os.kill(pid, number)
        self.pod.wait(60)
        wait(lambda: not any(map(alive, processes)), seconds=60)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_run_whose_pod_is_lost_at_every_stage_is_started_again_and_ends(cluster: Cluster, number: signal.Signals):
    root = make_checkout(cluster.root)
    cluster.image(torchrun=TRAINS)
    stages = yaml.safe_load((root / "dvc.yaml").read_text(encoding="utf-8"))
    stages["stages"]["train"]["cmd"] = "phantom train"
    (root / "dvc.yaml").write_text(yaml.safe_dump(stages), encoding="utf-8")
    cluster.write_params("compute.train=kubernetes", "train.control=false")
    shutil.copytree(ROOT / "flows", root / "flows", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("prefect.yaml", "prefect.toml"):
        shutil.copy(ROOT / name, root)
    with prefect_server_in(root, **LEASE) as prefect:
        worker = Worker(prefect)
        prefect.command("prefect", "work-pool", "create", "phantom", "--type", "process")
        prefect.command("python", "-m", "phantom.orchestration.deploy")
        run = prefect.run()
        wait(worker.submit)
        for stage in ("prepare", "train", "register"):
            (root / "slow").write_text("register" if stage == "train" else stage, encoding="utf-8")
            wait((root / "started").exists, lambda: prefect.log(run))  # train: the job's pod
            if stage == "register":
                assert "already exists: adopting it" in prefect.log(run)
            lost = time.monotonic()
            worker.lose(number)
            (root / "started").unlink()
            wait(worker.submit, lambda: f"{prefect.states()} {prefect.log(run)}", 2 * SLOT_IS_FREE_SECONDS)
            assert time.monotonic() - lost < SLOT_IS_FREE_SECONDS
            if stage == "train":
                job = the_job(cluster)
                wait(lambda: "already exists: adopting it" in prefect.log(run), lambda: prefect.log(run))
                (root / "go").touch()
        (root / "slow").unlink()
        assert prefect.finished(run) == "Completed", prefect.log(run)
        assert prefect.runs()[run]["run_count"] == 4
        assert the_job(cluster)["metadata"]["uid"] == job["metadata"]["uid"]
        assert calls(root) == ["prepare", "prepare", "encode", "evaluate", "register", "register"]

        after = prefect.run()  # the slot is not taken
        wait(worker.submit)
        assert prefect.finished(after) == "Completed", prefect.log(after)
