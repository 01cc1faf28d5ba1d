"""Prefect's work pool in a cluster: a pod for each flow run.

    python -m phantom.cluster.work_pool

The pod is the PodTemplate `phantom-flow-run` (k8s/base/40-worker.yaml), which kustomize changes as it does other pods;
Prefect's base job template, which is JSON, is made of it here. It has no variables: whoever starts a run, or changes a
deployment, chooses neither image nor command, environment, account or namespace.
"""

from __future__ import annotations

import os
from copy import deepcopy
from typing import Any

from phantom.cluster.api import REQUEST_TIMEOUT, load_configuration
from phantom.cluster.render import Manifest

POOL = "phantom"  # as in prefect.yaml
POD_TEMPLATE = "phantom-flow-run"
KEEP_SECONDS = 24 * 3600  # a finished pod with its log
NAMESPACE_ENV = "PHANTOM_NAMESPACE"  # where the PodTemplate is, and the pods of the runs


def make_work_pool() -> None:
    """Makes the pool on the server at PREFECT_API_URL, or gives the one that is there the present template.

    A pool of another type, such as `process` of earlier versions, is replaced: the runs that wait in it are lost.
    """
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.actions import WorkPoolCreate, WorkPoolUpdate
    from prefect.exceptions import ObjectNotFound

    template = base_job_template(read_pod_template(os.environ[NAMESPACE_ENV]))
    with get_client(sync_client=True) as client:
        try:
            pool = client.read_work_pool(POOL)
        except ObjectNotFound:
            pool = None
        if pool and pool.type == "kubernetes":
            client.update_work_pool(POOL, WorkPoolUpdate(base_job_template=template))
            return
        if pool:
            client.delete_work_pool(POOL)
        client.create_work_pool(WorkPoolCreate(name=POOL, type="kubernetes", base_job_template=template))


def read_pod_template(namespace: str) -> Manifest:
    """The PodTemplate in this cluster, or that of the kubeconfig."""
    from kubernetes.client import ApiClient, CoreV1Api

    api = CoreV1Api(ApiClient(load_configuration(None)))
    found = api.read_namespaced_pod_template(POD_TEMPLATE, namespace, _request_timeout=REQUEST_TIMEOUT)
    return api.api_client.sanitize_for_serialization(found)


def base_job_template(pods: Manifest) -> dict[str, Any]:
    """Prefect's base job template of a PodTemplate: a Job of one pod, in the PodTemplate's namespace.

    A pod that fails is not started again by its Job: the run is scheduled again, and gets a new Job. prefect-kubernetes
    goes by `backoffLimit`, and lets a pod that is stopped schedule its run itself.
    """
    namespace, template = pods["metadata"]["namespace"], deepcopy(pods["template"])
    # Prefect asks for them here, where the API server drops them.
    template["spec"] |= {"parallelism": 1, "completions": 1}
    job = {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {"namespace": namespace, "labels": {}, "annotations": {}},
        "spec": {
            "parallelism": 1,
            "completions": 1,
            "backoffLimit": 0,
            "ttlSecondsAfterFinished": KEEP_SECONDS,
            "template": template,
        },
    }
    # Prefect names jobs and pods after flow and deployment, unless told otherwise; network policies go by these labels.
    labels = template["metadata"]["labels"]
    configuration = {"namespace": namespace, "labels": labels, "job_manifest": job, "stream_output": False}
    return {"variables": {"type": "object", "properties": {}}, "job_configuration": configuration}


if __name__ == "__main__":
    make_work_pool()
