"""The work pool of type kubernetes, made of the PodTemplate in k8s/: on a real server, and what its worker makes of it.

The worker's part needs prefect-kubernetes, and is skipped where that is not installed.
"""

from __future__ import annotations

import asyncio
import copy
import uuid
from types import SimpleNamespace
from typing import Any

import pytest

from phantom.cluster.pods import pod_security_violations
from phantom.cluster.validation import validate_pod
from phantom.cluster.work_pool import POOL, base_job_template, make_work_pool
from tests.cluster.conftest import Cluster
from tests.cluster.manifests import Manifest, applied, one
from tests.cluster.schemas import schema_errors

PODS = one(applied(), "PodTemplate", "phantom-flow-run")


def valid(job: Manifest) -> Manifest:
    """The job as the API server keeps it, checked against its schema and Pod Security."""
    job = copy.deepcopy(job)
    pod = job["spec"]["template"]["spec"]
    assert (pod.pop("parallelism"), pod.pop("completions")) == (1, 1)  # which no pod has
    assert [*schema_errors(job), *validate_pod(pod), *pod_security_violations(pod)] == []
    return job


def test_the_template_makes_a_restricted_job_that_nothing_can_change():
    template = base_job_template(PODS)
    job = valid(template["job_configuration"]["job_manifest"])
    assert job["spec"]["backoffLimit"] == 0 and job["metadata"]["namespace"] == "phantom"
    assert job["spec"]["template"]["spec"]["containers"] == PODS["template"]["spec"]["containers"]
    assert template["variables"]["properties"] == {} and "{{" not in str(template)
    assert "parallelism" not in PODS["template"]["spec"]  # the template given is as it was


def test_the_pool_is_made_once_and_keeps_what_a_user_changed(
    prefect_server: None, cluster: Cluster, monkeypatch: pytest.MonkeyPatch
):
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.actions import WorkPoolCreate, WorkPoolUpdate

    monkeypatch.setenv("PHANTOM_NAMESPACE", "phantom")
    pods = cluster.api.add("v1", "podtemplates", copy.deepcopy(PODS), "phantom")
    with get_client(sync_client=True) as client:
        client.create_work_pool(WorkPoolCreate(name=POOL, type="process"))  # of an earlier version
        make_work_pool()
        pool = client.read_work_pool(POOL)
        assert pool.type == "kubernetes"
        valid(pool.base_job_template["job_configuration"]["job_manifest"])

        client.update_work_pool(POOL, WorkPoolUpdate(is_paused=True, concurrency_limit=3))
        pods["template"]["spec"]["containers"][0]["image"] = "mine/phantom-orchestrator:9"
        make_work_pool()
        again = client.read_work_pool(POOL)
        assert (again.id, again.is_paused, again.concurrency_limit) == (pool.id, True, 3)
        (container,) = again.base_job_template["job_configuration"]["job_manifest"]["spec"]["template"]["spec"][
            "containers"
        ]
        assert container["image"] == "mine/phantom-orchestrator:9"
        client.delete_work_pool(POOL)


def test_prefects_worker_makes_that_job_of_it_whatever_a_run_asks_for(
    prefect_server: None, cluster: Cluster, monkeypatch: pytest.MonkeyPatch
):
    worker = pytest.importorskip("prefect_kubernetes.worker")
    from prefect.settings import PREFECT_API_AUTH_STRING, temporary_settings

    cluster.controllers.idle = True
    given = {"image": "evil:1", "env": {"LD_PRELOAD": "x"}, "command": "sh", "namespace": "kube-system"}
    (declared,) = one(applied(), "Deployment", "worker")["spec"]["template"]["spec"]["containers"]
    for entry in declared["env"]:
        if entry["name"].startswith("PREFECT_INTEGRATIONS_"):
            monkeypatch.setenv(entry["name"], entry["value"])
    run: Any = SimpleNamespace(id=uuid.uuid4(), name="brave-otter", flow_id=uuid.uuid4(), deployment_id=None)
    flow: Any = SimpleNamespace(id=run.flow_id, name="phantom")

    async def start() -> None:
        made = await worker.KubernetesWorkerJobConfiguration.from_template_and_values(base_job_template(PODS), given)
        made.prepare_for_flow_run(run, flow=flow)
        await worker.KubernetesWorker(work_pool_name=POOL).run(run, made)

    with temporary_settings({PREFECT_API_AUTH_STRING: "phantom:secret"}):
        asyncio.run(start())
    (made,) = cluster.api.find("jobs")
    job = valid(made)
    assert (job["metadata"]["namespace"], job["spec"]["backoffLimit"]) == ("phantom", 0)
    pod, ours = job["spec"]["template"], PODS["template"]
    (container,), (stated,) = pod["spec"]["containers"], ours["spec"]["containers"]
    assert container["image"] == stated["image"] and container["args"] == ["prefect", "flow-run", "execute"]
    env = {entry["name"]: entry.get("value") for entry in container["env"]}
    assert env.items() >= {entry["name"]: entry["value"] for entry in stated["env"]}.items() - {
        ("PREFECT_API_URL", "http://prefect-server:4200/api"),  # the worker's comes before, and here it is another
        ("PREFECT_HOME", "/tmp/prefect"),
    }
    assert env["PREFECT__FLOW_RUN_ID"] == str(run.id) and "LD_PRELOAD" not in env
    assert env["PREFECT_FLOW_RUN_EXECUTE_SIGTERM_BEHAVIOR"] == "reschedule"
    (auth,) = [entry for entry in container["env"] if entry["name"] == "PREFECT_API_AUTH_STRING"]
    assert auth["valueFrom"]["secretKeyRef"] == {"name": "phantom-prefect", "key": "PREFECT_API_AUTH_STRING"}
    assert "phantom:secret" not in str(job)
    assert pod["metadata"]["labels"].items() >= ours["metadata"]["labels"].items()  # network policies go by them
    assert pod["metadata"]["labels"]["prefect.io/flow-run-id"] == str(run.id)
    assert pod["metadata"]["labels"]["prefect.io/flow-name"] == "phantom"  # the init container reads it
