"""`phantom doctor --cluster`: whether the cluster can be reached, can run the jobs, and has what their manifests name.

Checks are read-only. An object that this account may not read is skipped, not failed: the worker's service account can
read little beyond its jobs.
"""

from __future__ import annotations

import re
import urllib.parse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from phantom.cluster.render import TRAINING_RUNTIME
from phantom.cluster.work_pool import POD_TEMPLATE
from phantom.config import Cluster, Params
from phantom.orchestration.checks import INSTALL, Check, attempt, check_packages, first_line, numbers, version

PACKAGES = ("kubernetes", "kubeflow-training")
TIMEOUT_SECONDS = 5.0  # per request
CLUSTER_INFO = "look at `kubectl cluster-info`"
APPLY = "kubectl apply -f k8s/"
APPLY_RUNTIME = "kubectl apply -f k8s/jobs/trainer-v2/runtime.yaml"
OPERATORS = {  # the kustomization that installs each operator, and its Deployment (namespace, name)
    "pytorchjob": (
        "github.com/kubeflow/training-operator.git/manifests/overlays/standalone?ref=v1.9.4",
        ("kubeflow", "training-operator"),
    ),
    "trainjob": (
        "github.com/kubeflow/trainer.git/manifests/overlays/manager?ref=v2.2.1",
        ("kubeflow-system", "kubeflow-trainer-controller-manager"),
    ),
}
KUEUE = ("kueue-system", "kueue-manager-config", "controller_manager_config.yaml")  # namespace, ConfigMap, its key
FRAMEWORKS = {"pytorchjob": "kubeflow.org/pytorchjob", "trainjob": "trainer.kubeflow.org/trainjob"}
# Created by k8s/secrets.sh.
SERVICE_SECRETS = ("phantom-postgres", "phantom-prefect", "phantom-mlflow", "phantom-mlflow-server", "phantom-s3")
# k8s/overlays/monitoring: the group of its kinds, the namespace of Prometheus that its network policies name, and the
# secret with which that logs in at Prefect's server.
MONITORING, PROMETHEUS_NAMESPACE, SCRAPE_SECRET = "monitoring.coreos.com", "monitoring", "phantom-prefect-scrape"


def check_cluster(params: Params, root: Path = Path()) -> list[Check]:
    """Runs every check, the client's packages first. An unreachable cluster is one failure and ends the list.

    root: the checkout, whose `constraints.txt` has the tested versions.
    """
    packages = attempt("cluster packages", lambda name: check_packages(name, PACKAGES, root))
    return [packages, attempt("kubernetes client", _client), *_check_api(params)]


def _check_api(params: Params) -> list[Check]:
    settings = params.cluster
    try:
        from kubernetes import client

        from phantom.cluster.api import load_configuration

        api = client.ApiClient(load_configuration(settings.context))
    except Exception as error:
        return [Check("cluster", False, first_line(error), "set KUBECONFIG to the cluster's file, as for kubectl")]
    reachable = attempt("cluster", lambda name: _reachable(name, api, settings), CLUSTER_INFO)
    if not reachable.ok:
        return [reachable]
    checks: dict[str, Callable[[str], Check]] = {
        "job kinds": lambda name: _job_kinds(name, api, settings),
        "operator": lambda name: _operator(name, api, settings),
        "rights": lambda name: _permissions(name, api, settings),
        "queue": lambda name: _queue(name, api, settings),
        "workspace": lambda name: _workspace(name, api, settings),
        "gpu nodes": lambda name: _gpu_nodes(name, api, params),
        "quota": lambda name: _quota(name, api, params),
        "secrets": lambda name: _secrets(name, api, settings),
        "mlflow's hosts": lambda name: _allowed_hosts(name, api, params),
        "flow runs": lambda name: _flow_runs(name, api, settings),
        "monitoring": lambda name: _monitoring(name, api, settings),
    }
    return [reachable, *(attempt(name, check, CLUSTER_INFO) for name, check in checks.items())]


def _client(name: str) -> Check:
    found = version("kubernetes")
    if found is None:
        return Check(name, False, "kubernetes is missing", INSTALL)
    works = numbers(found)[0] < 36
    finding = f"kubernetes {found}" + ("" if works else ": kubeflow-training 1.9 cannot read its answers")
    return Check(name, works, finding, "pip install 'kubernetes<36'")


def _get(api: Any, path: str) -> Any:
    """The object at `path` of the API server; None on 404. Raises ApiException for any other error."""
    from kubernetes.client import ApiException

    options = {"response_type": "object", "auth_settings": ["BearerToken"], "_request_timeout": TIMEOUT_SECONDS}
    try:
        return api.call_api(path, "GET", **options)[0]
    except ApiException as error:
        if error.status == 404:
            return None
        raise


def _get_if_allowed(api: Any, path: str) -> Any:
    """As `_get`, but False on 403: this account may not read the object."""
    from kubernetes.client import ApiException

    try:
        return _get(api, path)
    except ApiException as error:
        if error.status == 403:
            return False
        raise


def _skipped(name: str, what: str) -> Check:
    return Check(name, True, f"not looked at: this account may not read {what}")


def _reachable(name: str, api: Any, settings: Cluster) -> Check:
    found = _get(api, "/version")
    where = f"Kubernetes {found['gitVersion']} at {api.configuration.host}"
    if _get_if_allowed(api, f"/api/v1/namespaces/{settings.namespace}") is None:
        return Check(name, False, f"{where} has no namespace {settings.namespace}", APPLY)
    return Check(name, True, f"{where}, namespace {settings.namespace}")


def _job_kinds(name: str, api: Any, settings: Cluster) -> Check:
    """The custom resource of training jobs is served, and for a TrainJob its TrainingRuntime exists."""
    from phantom.cluster.api import JOB_RESOURCES

    kind = next(kind for known, kind in JOB_RESOURCES.items() if known.lower() == settings.operator)
    served = (_get(api, f"/apis/{kind.group}/{kind.version}") or {}).get("resources", [])
    if any(resource["name"] == kind.plural for resource in served):
        namespace = f"/apis/{kind.group}/{kind.version}/namespaces/{settings.namespace}"
        runtime = f"{namespace}/trainingruntimes/{TRAINING_RUNTIME}"
        if settings.operator == "trainjob" and _get_if_allowed(api, runtime) is None:
            return Check(name, False, f"no TrainingRuntime {TRAINING_RUNTIME} in {settings.namespace}", APPLY_RUNTIME)
        return Check(name, True, f"{kind.plural}.{kind.group}/{kind.version}")
    fix = f"kubectl apply --server-side -k '{OPERATORS[settings.operator][0]}'"
    return Check(name, False, f"the cluster does not know {kind.plural}.{kind.group}", fix)


def _operator(name: str, api: Any, settings: Cluster) -> Check:
    """The operator is running: without it no pods are created for a job, and nothing reports an error."""
    source, (namespace, deployment) = OPERATORS[settings.operator]
    found = _get_if_allowed(api, f"/apis/apps/v1/namespaces/{namespace}/deployments/{deployment}")
    if found is False:
        return _skipped(name, f"deployments in {namespace}")
    if found is None:
        return Check(
            name, False, f"no Deployment {namespace}/{deployment}", f"kubectl apply --server-side -k '{source}'"
        )
    ready = (found.get("status") or {}).get("readyReplicas") or 0
    fix = f"kubectl -n {namespace} describe deployment {deployment}, and its pods' logs, say why"
    return Check(name, ready > 0, f"{namespace}/{deployment}: {ready} ready", fix)


def _permissions(name: str, api: Any, settings: Cluster) -> Check:
    """RBAC allows what submitting, watching and deleting a job requires."""
    from kubernetes.client import AuthorizationV1Api

    from phantom.cluster.api import JOB_RESOURCES

    used = [kind for known, kind in JOB_RESOURCES.items() if known.lower() in (settings.operator, "job")]
    rights = [(kind.group, kind.plural, "", verb) for kind in used for verb in ("create", "get", "delete")]
    rights += [("", "pods", "", "list"), ("", "pods", "", "watch"), ("", "pods", "log", "get")]
    rights += [("", "events", "", "list")]
    refused = []
    for group, resource, subresource, verb in rights:
        asked = {"group": group, "resource": resource, "subresource": subresource, "verb": verb}
        review = {"spec": {"resourceAttributes": {"namespace": settings.namespace, **asked}}}
        answer = AuthorizationV1Api(api).create_self_subject_access_review(review, _request_timeout=TIMEOUT_SECONDS)
        if not answer.status.allowed:
            refused.append(f"{verb} {'/'.join(filter(None, (resource, subresource)))}")
    finding = f"not allowed: {', '.join(refused)}" if refused else f"may run jobs in {settings.namespace}"
    return Check(name, not refused, finding, f"{APPLY}, and use a service account that it makes")


def _queue(name: str, api: Any, settings: Cluster) -> Check:
    """The LocalQueue exists and Kueue manages this kind of job; otherwise the queue label has no effect.

    Jobs are submitted unsuspended, so without Kueue they bypass the queue rather than hang.
    """
    if settings.queue is None:
        return Check(name, True, "none is set (cluster.queue): jobs start at once")
    kueue = _get(api, "/apis/kueue.x-k8s.io")
    if kueue is None:
        return Check(name, False, "Kueue is not installed", "install it, or set cluster.queue to null")
    where, config_map, key = KUEUE
    framework = FRAMEWORKS[settings.operator]
    found = _get_if_allowed(api, f"/api/v1/namespaces/{where}/configmaps/{config_map}")
    version = kueue["preferredVersion"]["groupVersion"]
    if _get_if_allowed(api, f"/apis/{version}/namespaces/{settings.namespace}/localqueues/{settings.queue}") is None:
        fix = "kubectl apply -f k8s/kueue/, or set cluster.queue to one that is there"
        return Check(name, False, f"no LocalQueue {settings.queue} in {settings.namespace}", fix)
    if found is False:
        finding = f"{settings.queue}; this account may not see whether Kueue has {framework} enabled"
        return Check(name, True, f"{finding}: without it jobs start past the queue")
    listed = rf"^\s*-\s*[\"']?{re.escape(framework)}[\"']?\s*$"
    if not re.search(listed, ((found or {}).get("data") or {}).get(key, ""), re.M):
        finding = f"Kueue has not enabled {framework}: jobs would start at once, past the queue and its quota"
        fix = f"add {framework} to integrations.frameworks in {where}/{config_map}, then restart Kueue's manager"
        return Check(name, False, finding, fix)
    return Check(name, True, f"{settings.queue}, and {framework} is enabled")


def _workspace(name: str, api: Any, settings: Cluster) -> Check:
    """The volume claim of the checkout is bound. If it is not: whether its storage class exists."""
    found = _get_if_allowed(api, f"/api/v1/namespaces/{settings.namespace}/persistentvolumeclaims/{settings.volume}")
    if found is False:
        return _skipped(name, "volume claims")
    if found is None:
        return Check(name, False, f"no claim {settings.volume}", f"{APPLY}, or set cluster.volume to one that is there")
    phase, spec = (found.get("status") or {}).get("phase"), found["spec"]
    if phase == "Bound":
        return Check(name, True, f"{settings.volume} is bound ({', '.join(spec.get('accessModes', []))})")
    wanted = spec.get("storageClassName")
    classes = _get_if_allowed(api, "/apis/storage.k8s.io/v1/storageclasses")
    fix = f"`kubectl -n {settings.namespace} describe pvc {settings.volume}` says why; see k8s/overlays/ for classes"
    if classes:
        known = {c["metadata"]["name"]: c["metadata"].get("annotations") or {} for c in classes["items"]}
        default = [n for n, a in known.items() if a.get("storageclass.kubernetes.io/is-default-class") == "true"]
        if wanted and wanted not in known:
            finding = f"{settings.volume} wants the storage class {wanted}; there are: {', '.join(known) or 'none'}"
            return Check(name, False, finding, fix)
        if wanted is None and not default:
            return Check(name, False, f"{settings.volume} names no storage class, and none is the default", fix)
        wanted = wanted or default[0]
    return Check(name, False, f"{settings.volume} is {phase or 'Pending'} (storage class {wanted})", fix)


def _gpu_nodes(name: str, api: Any, params: Params) -> Check:
    """Enough ready nodes match the node selector and have the GPUs that a training pod requests."""
    settings = params.cluster
    if settings.gpu is None:
        return Check(name, True, "none are asked for (cluster.gpu)")
    nodes = _get_if_allowed(api, "/api/v1/nodes")
    if nodes is False:
        return _skipped(name, "nodes")
    wanted = dict(pair.split("=", 1) for pair in settings.node_selector)
    fitting = [n for n in nodes["items"] if wanted.items() <= (n["metadata"].get("labels") or {}).items()]
    each = sorted(
        (int(n["status"].get("allocatable", {}).get(settings.gpu, 0)) for n in fitting if _ready(n)), reverse=True
    )
    each = [count for count in each if count]
    per_pod = -(-params.train.processes // settings.nodes)
    finding = f"{len(each)} ready nodes with {settings.gpu}, {sum(each)} in all; needed: {settings.nodes} x {per_pod}"
    fix = "add nodes, install NVIDIA's device plugin, or change cluster.nodes, cluster.node_selector, train.processes"
    autoscaled = " (a node group that grows from zero is not seen)" if not each else ""
    return Check(name, sum(c // per_pod for c in each) >= settings.nodes, finding + autoscaled, fix)


def _ready(node: dict[str, Any]) -> bool:
    conditions = {c["type"]: c["status"] for c in node["status"].get("conditions") or []}
    return conditions.get("Ready") == "True" and not (node.get("spec") or {}).get("unschedulable")


def _quota(name: str, api: Any, params: Params) -> Check:
    """The namespace's ResourceQuotas leave enough GPUs for a training job."""
    settings = params.cluster
    found = _get_if_allowed(api, f"/api/v1/namespaces/{settings.namespace}/resourcequotas")
    if found is False:
        return _skipped(name, "quotas")
    resource = f"requests.{settings.gpu}"
    rooms = []
    for quota in found["items"]:
        hard = (quota["spec"].get("hard") or {}).get(resource)
        if hard is not None:
            used = ((quota.get("status") or {}).get("used") or {}).get(resource, 0)
            rooms.append((int(hard) - int(used), int(hard), quota["metadata"]["name"]))
    if settings.gpu is None or not rooms:
        return Check(name, True, f"none on {settings.gpu or 'GPUs'}")
    left, hard, which = min(rooms)
    finding = f"{which}: {left} of {hard} {settings.gpu} are free, training takes {params.train.processes}"
    fix = f"raise {resource} in k8s/base/02-limits.yaml, wait for other jobs, or lower train.processes"
    return Check(name, left >= params.train.processes, finding, fix)


def _secrets(name: str, api: Any, settings: Cluster) -> Check:
    """The secrets that k8s/ and the jobs refer to exist. Their contents are not checked."""
    wanted = dict.fromkeys((*SERVICE_SECRETS, *settings.secrets))
    found = {s: _get_if_allowed(api, f"/api/v1/namespaces/{settings.namespace}/secrets/{s}") for s in wanted}
    if False in found.values():
        return _skipped(name, "secrets")
    missing = [secret for secret, there in found.items() if there is None]
    finding = f"missing: {', '.join(missing)}" if missing else ", ".join(wanted)
    return Check(name, not missing, finding, "k8s/secrets.sh makes them (PHANTOM_ARTIFACTS=s3://BUCKET/PREFIX)")


def _allowed_hosts(name: str, api: Any, params: Params) -> Check:
    """MLflow accepts the host name that jobs use for it; requests for any other get a 403."""
    host = urllib.parse.urlsplit(params.tracking.uri).netloc
    if not host:
        fix = "tracking.uri=http://mlflow:5000, with which pods find MLflow's server"
        runs_there = "kubernetes" in params.compute.model_dump().values()
        return Check(name, not runs_there, f"tracking.uri {params.tracking.uri} is a file, not the cluster's", fix)
    found = _get_if_allowed(api, f"/apis/apps/v1/namespaces/{params.cluster.namespace}/deployments/mlflow")
    if found is False:
        return _skipped(name, "deployments")
    if not found:
        return Check(name, True, f"{host}: no MLflow in {params.cluster.namespace} to look at")
    (container,) = found["spec"]["template"]["spec"]["containers"]
    env = {entry["name"]: entry.get("value", "") for entry in container.get("env") or []}
    allowed = env.get("MLFLOW_SERVER_ALLOWED_HOSTS", "").split(",")
    fits = any(re.fullmatch(re.escape(pattern).replace(r"\*", ".*"), host) for pattern in allowed)
    return Check(
        name,
        fits,
        f"{host} is {'' if fits else 'not '}among MLFLOW_SERVER_ALLOWED_HOSTS",
        f"add {host} to MLFLOW_SERVER_ALLOWED_HOSTS in k8s/base/20-mlflow.yaml and apply it",
    )


def _flow_runs(name: str, api: Any, settings: Cluster) -> Check:
    """The PodTemplate of flow runs exists, and a ready worker, which starts them."""
    here = f"namespaces/{settings.namespace}"
    template = _get_if_allowed(api, f"/api/v1/{here}/podtemplates/{POD_TEMPLATE}")
    worker = _get_if_allowed(api, f"/apis/apps/v1/{here}/deployments/worker")
    if template is None:
        return Check(name, False, f"no PodTemplate {POD_TEMPLATE}: no run of a flow starts", APPLY)
    if worker is None:
        return Check(name, False, "no Deployment worker: no run of a flow starts", APPLY)
    if False in (template, worker):
        return _skipped(name, "pod templates and deployments")
    ready = (worker.get("status") or {}).get("readyReplicas") or 0
    fix = f"`kubectl -n {settings.namespace} describe deployment worker`, and its pod's log, say why"
    return Check(name, ready > 0, f"PodTemplate {POD_TEMPLATE}; worker: {ready} ready", fix)


def _monitoring(name: str, api: Any, settings: Cluster) -> Check:
    """Where the overlay is applied: what it refers to exists. It need not be."""
    if _get(api, f"/apis/{MONITORING}") is None:
        return Check(name, True, "no Prometheus operator is installed: nothing is scraped, and no alert is raised")
    rules = f"/apis/{MONITORING}/v1/namespaces/{settings.namespace}/prometheusrules/phantom"
    needed = {
        f"namespace {PROMETHEUS_NAMESPACE}": f"/api/v1/namespaces/{PROMETHEUS_NAMESPACE}",
        f"secret {SCRAPE_SECRET}": f"/api/v1/namespaces/{settings.namespace}/secrets/{SCRAPE_SECRET}",
    }
    found = {what: _get_if_allowed(api, path) for what, path in {"rules": rules, **needed}.items()}
    if found.pop("rules") is None:
        return Check(name, True, "not applied; `kubectl apply -k k8s/overlays/monitoring` adds alerts and a dashboard")
    missing = [what for what, there in found.items() if there is None]
    finding = f"missing: {', '.join(missing)}" if missing else "k8s/overlays/monitoring is applied"
    fix = "k8s/secrets.sh makes the secret; k8s/overlays/monitoring/network.yaml names the namespace of Prometheus"
    return Check(name, not missing, finding, fix)
