"""`phantom doctor --cluster`, with a server of prepared answers in place of the API server."""

from __future__ import annotations

import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from phantom.cluster.diagnostics import check_cluster
from phantom.config import Params
from phantom.orchestration.checks import Check
from tests.cluster.manifests import SECRETS
from tests.orchestration.checks import api_server, named, set_versions


def test_a_client_that_kubeflow_training_cannot_use(make_params, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    set_versions(monkeypatch, {"kubernetes": "36.1.0"})
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "none"))
    found = named(check_cluster(make_params()))["kubernetes client"]
    assert not found.ok and found.fix == "pip install 'kubernetes<36'"


def test_no_kubeconfig(make_params, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "none"))
    found = named(check_cluster(make_params()))
    assert not found["cluster"].ok and "KUBECONFIG" in found["cluster"].fix
    assert "operator" not in found


def test_no_kubernetes_client(make_params, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "kubernetes", None)
    found = named(check_cluster(make_params()))
    assert not found["cluster"].ok and "kubernetes" in found["cluster"].finding


def test_an_unreachable_cluster(make_params, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and nobody listens
        use_kubeconfig(tmp_path, f"http://127.0.0.1:{taken.getsockname()[1]}", monkeypatch)
        found = named(check_cluster(make_params()))
    assert not found["cluster"].ok and "refused" in found["cluster"].finding
    assert "operator" not in found


def test_a_cluster_where_all_is_well(cluster: FakeCluster):
    found = cluster.look()
    assert all(check.ok for check in found.values()), found
    assert "v1.35.2" in found["cluster"].finding and found["cluster"].finding.endswith("namespace lab")
    assert found["job kinds"].finding == "pytorchjobs.kubeflow.org/v1"
    assert found["operator"].finding == "kubeflow/training-operator: 1 ready"
    assert found["queue"].finding.startswith("none is set")
    assert {("kubeflow.org", "pytorchjobs", "create"), ("", "pods/log", "get"), ("", "pods", "list")} <= cluster.asked


def test_a_cluster_without_the_namespace(cluster: FakeCluster):
    cluster.answers["GET /api/v1/namespaces/lab"] = 403
    assert cluster.look()["cluster"].ok  # who may only work in it may not look at it
    del cluster.answers["GET /api/v1/namespaces/lab"]
    checks = named(check_cluster(cluster.params()))
    assert not checks["cluster"].ok and checks["cluster"].finding.endswith("has no namespace lab")
    assert "operator" not in checks


def test_a_cluster_without_the_operator(cluster: FakeCluster):
    found = cluster.look("cluster.operator=trainjob")
    assert not found["job kinds"].ok and "trainer" in found["job kinds"].fix
    assert not found["operator"].ok and "trainer" in found["operator"].fix
    assert ("trainer.kubeflow.org", "trainjobs", "create") in cluster.asked
    cluster.answers["GET /apis/trainer.kubeflow.org/v1alpha1"] = {"resources": [{"name": "trainjobs"}]}
    found = cluster.look("cluster.operator=trainjob")
    assert found["job kinds"].finding == "no TrainingRuntime phantom in lab"
    assert found["job kinds"].fix == "kubectl apply -f k8s/jobs/trainer-v2/runtime.yaml"
    runtime = "GET /apis/trainer.kubeflow.org/v1alpha1/namespaces/lab/trainingruntimes/phantom"
    cluster.answers[runtime] = {"kind": "TrainingRuntime"}
    assert cluster.look("cluster.operator=trainjob")["job kinds"].ok
    del cluster.answers["GET /apis/kubeflow.org/v1"]
    assert "training-operator" in cluster.look()["job kinds"].fix


def test_an_operator_that_is_installed_and_does_not_run(cluster: FakeCluster):
    where = "GET /apis/apps/v1/namespaces/kubeflow/deployments/training-operator"
    cluster.answers[where] = {"status": {"replicas": 1}}
    stopped = cluster.look()["operator"]
    assert not stopped.ok and stopped.finding == "kubeflow/training-operator: 0 ready"
    assert stopped.fix.startswith("kubectl -n kubeflow describe deployment training-operator")
    cluster.answers[where] = 403  # the worker's account may not look there
    assert cluster.look()["operator"].ok


def test_a_cluster_that_does_not_let_us(cluster: FakeCluster):
    cluster.refused = {("kubeflow.org", "pytorchjobs", "create"), ("", "pods/log", "get")}
    assert cluster.look()["rights"].finding == "not allowed: create pytorchjobs, get pods/log"


def test_a_queue_that_takes_our_jobs_and_all_that_can_be_wrong_with_it(cluster: FakeCluster):
    def look() -> Check:
        return cluster.look("cluster.queue=gpus")["queue"]

    assert look().ok
    queue = cluster.answers.pop("GET /apis/kueue.x-k8s.io/v1beta2/namespaces/lab/localqueues/gpus")
    assert look().finding == "no LocalQueue gpus in lab"
    cluster.answers["GET /apis/kueue.x-k8s.io/v1beta2/namespaces/lab/localqueues/gpus"] = queue
    config = cluster.answers["GET /api/v1/namespaces/kueue-system/configmaps/kueue-manager-config"]
    config["data"]["controller_manager_config.yaml"] = '- "batch/job"\n#  - "kubeflow.org/pytorchjob"\n'
    # Ours are not submitted suspended: the danger is not that they hang.
    assert not look().ok and look().finding.endswith("jobs would start at once, past the queue and its quota")
    assert "kubeflow.org/pytorchjob" in look().fix
    cluster.answers["GET /api/v1/namespaces/kueue-system/configmaps/kueue-manager-config"] = 403
    assert look().ok and "may not see whether Kueue has kubeflow.org/pytorchjob enabled" in look().finding
    del cluster.answers["GET /apis/kueue.x-k8s.io"]
    assert look().finding == "Kueue is not installed"


def test_a_cluster_that_breaks_down_in_between(cluster: FakeCluster):
    cluster.answers["GET /apis/kubeflow.org/v1"] = 500
    found = cluster.look()["job kinds"]
    assert not found.ok and "500" in found.finding


def test_a_workspace_that_is_not_bound(cluster: FakeCluster):
    claim = "GET /api/v1/namespaces/lab/persistentvolumeclaims/phantom-workspace"
    cluster.answers[claim] = {"spec": {}, "status": {"phase": "Pending"}}
    assert "none is the default" in cluster.look()["workspace"].finding
    cluster.answers[claim] = {"spec": {"storageClassName": "efs"}, "status": {"phase": "Pending"}}
    found = cluster.look()["workspace"]
    assert not found.ok and found.finding == "phantom-workspace wants the storage class efs; there are: nfs"
    cluster.answers[claim]["spec"]["storageClassName"] = "nfs"
    assert cluster.look()["workspace"].finding == "phantom-workspace is Pending (storage class nfs)"
    del cluster.answers[claim]
    assert cluster.look()["workspace"].finding == "no claim phantom-workspace"


def test_too_few_gpus(cluster: FakeCluster):
    def look(*overrides: str) -> Check:
        wanted = ["cluster.gpu=nvidia.com/gpu", "train.batch_size=16", "train.processes=16", *overrides]
        return cluster.look(*wanted)["gpu nodes"]

    assert look("cluster.nodes=2").ok  # of the three nodes one is not ready
    assert not look("cluster.nodes=1").ok and "needed: 1 x 16" in look("cluster.nodes=1").finding
    assert not look("cluster.nodes=2", "cluster.node_selector=[pool=other]").ok
    cluster.answers["GET /api/v1/nodes"] = 403
    assert look("cluster.nodes=2").ok


def test_a_quota_that_is_used_up(cluster: FakeCluster):
    wanted = ["cluster.gpu=nvidia.com/gpu", "train.batch_size=16", "train.processes=16"]
    found = cluster.look(*wanted)["quota"]
    assert not found.ok and found.finding == "small: 8 of 16 nvidia.com/gpu are free, training takes 16"
    assert "02-limits.yaml" in found.fix
    assert cluster.look("cluster.gpu=nvidia.com/gpu")["quota"].ok


def test_secrets_that_are_not_there(cluster: FakeCluster):
    del cluster.answers["GET /api/v1/namespaces/lab/secrets/phantom-s3"]
    found = cluster.look()["secrets"]
    assert (found.ok, found.finding) == (False, "missing: phantom-s3") and "k8s/secrets.sh" in found.fix
    cluster.answers["GET /api/v1/namespaces/lab/secrets/phantom-s3"] = 403
    assert cluster.look()["secrets"].ok


def test_the_names_that_mlflow_answers_to(cluster: FakeCluster):
    assert cluster.look("tracking.uri=http://mlflow.lab.svc:5000")["mlflow's hosts"].ok
    refused = cluster.look("tracking.uri=http://curves:5000")["mlflow's hosts"]
    assert not refused.ok and refused.fix.startswith("add curves:5000 to MLFLOW_SERVER_ALLOWED_HOSTS")
    assert not cluster.look("compute.train=kubernetes")["mlflow's hosts"].ok  # a pod has no such file
    cluster.answers["GET /apis/apps/v1/namespaces/lab/deployments/mlflow"] = 403
    unseen = cluster.look("tracking.uri=http://mlflow:5000")["mlflow's hosts"]
    assert unseen.ok and unseen.finding == "not looked at: this account may not read deployments"


def test_what_starts_the_pods_of_flow_runs(cluster: FakeCluster):
    assert cluster.look()["flow runs"].finding == "PodTemplate phantom-flow-run; worker: 1 ready"
    worker = "GET /apis/apps/v1/namespaces/lab/deployments/worker"
    cluster.answers[worker] = {"status": {}}
    assert not cluster.look()["flow runs"].ok and "kubectl -n lab describe" in cluster.look()["flow runs"].fix
    cluster.answers[worker] = 403
    assert cluster.look()["flow runs"].ok
    del cluster.answers["GET /api/v1/namespaces/lab/podtemplates/phantom-flow-run"]
    missing = cluster.look()["flow runs"]
    assert not missing.ok and missing.finding == "no PodTemplate phantom-flow-run: no run of a flow starts"


def test_monitoring_where_it_is_applied(cluster: FakeCluster):
    assert cluster.look()["monitoring"].ok
    cluster.answers["GET /apis/monitoring.coreos.com"] = {"kind": "APIGroup"}
    assert cluster.look()["monitoring"].finding.startswith("not applied")
    cluster.answers["GET /apis/monitoring.coreos.com/v1/namespaces/lab/prometheusrules/phantom"] = {}
    found = cluster.look()["monitoring"]
    assert not found.ok and found.finding == "missing: namespace monitoring"
    cluster.answers["GET /api/v1/namespaces/monitoring"] = 403
    assert cluster.look()["monitoring"].finding == "k8s/overlays/monitoring is applied"
    del cluster.answers["GET /api/v1/namespaces/lab/secrets/phantom-prefect-scrape"]
    assert cluster.look()["monitoring"].finding == "missing: secret phantom-prefect-scrape"


MLFLOW = {"containers": [{"env": [{"name": "MLFLOW_SERVER_ALLOWED_HOSTS", "value": "mlflow:*,*.svc:*"}]}]}
QUOTA = {
    "metadata": {"name": "small"},
    "spec": {"hard": {"requests.nvidia.com/gpu": "16", "pods": "9"}},
    "status": {"used": {"requests.nvidia.com/gpu": "8"}},
}


def node(ready: str) -> dict[str, Any]:
    status = {"allocatable": {"nvidia.com/gpu": "8"}, "conditions": [{"type": "Ready", "status": ready}]}
    return {"metadata": {"labels": {"pool": "gpus"}}, "status": status}


class FakeCluster:
    """An API server that answers what it is told to, and reviews access by `refused`."""

    def __init__(self, make_params: Any) -> None:
        self._make = make_params
        self.refused: set[tuple[str, str, str]] = set()
        self.asked: set[tuple[str, str, str]] = set()
        frameworks = 'integrations:\n  frameworks:\n    - "batch/job"\n    - "kubeflow.org/pytorchjob"\n'
        self.answers: dict[str, Any] = {
            "GET /version": {"gitVersion": "v1.35.2"},
            "GET /api/v1/namespaces/lab": {"metadata": {"name": "lab"}},
            "GET /apis/kubeflow.org/v1": {"resources": [{"name": "pytorchjobs"}, {"name": "pytorchjobs/status"}]},
            "GET /apis/kueue.x-k8s.io": {"preferredVersion": {"groupVersion": "kueue.x-k8s.io/v1beta2"}},
            "GET /api/v1/namespaces/kueue-system/configmaps/kueue-manager-config": {
                "data": {"controller_manager_config.yaml": frameworks}
            },
            "GET /apis/kueue.x-k8s.io/v1beta2/namespaces/lab/localqueues/gpus": {"metadata": {"name": "gpus"}},
            "GET /apis/apps/v1/namespaces/kubeflow/deployments/training-operator": {"status": {"readyReplicas": 1}},
            "GET /apis/apps/v1/namespaces/lab/deployments/mlflow": {"spec": {"template": {"spec": MLFLOW}}},
            "GET /api/v1/namespaces/lab/podtemplates/phantom-flow-run": {"kind": "PodTemplate"},
            "GET /apis/apps/v1/namespaces/lab/deployments/worker": {"status": {"readyReplicas": 1}},
            "GET /api/v1/namespaces/lab/persistentvolumeclaims/phantom-workspace": {
                "spec": {"accessModes": ["ReadWriteMany"]},
                "status": {"phase": "Bound"},
            },
            "GET /apis/storage.k8s.io/v1/storageclasses": {"items": [{"metadata": {"name": "nfs"}}]},
            "GET /api/v1/nodes": {"items": [node("True"), node("True"), node("Unknown")]},
            "GET /api/v1/namespaces/lab/resourcequotas": {"items": [QUOTA]},
            **{f"GET /api/v1/namespaces/lab/secrets/{name}": {"metadata": {"name": name}} for name in SECRETS},
            "POST /apis/authorization.k8s.io/v1/selfsubjectaccessreviews": self._review,
        }

    def params(self, *overrides: str) -> Params:
        return self._make("cluster.namespace=lab", *overrides)

    def look(self, *overrides: str) -> dict[str, Check]:
        checks = named(check_cluster(self.params(*overrides)))
        here = list(checks)
        return {name: checks[name] for name in here[here.index("cluster") :]}

    def _review(self, body: dict[str, Any]) -> dict[str, Any]:
        asked = body["spec"]["resourceAttributes"]
        assert asked["namespace"] == "lab"
        resource = "/".join(filter(None, (asked["resource"], asked.get("subresource"))))
        right = (asked.get("group", ""), resource, asked["verb"])
        self.asked.add(right)
        return {**body, "status": {"allowed": right not in self.refused}}


@pytest.fixture
def cluster(tmp_path: Path, make_params, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeCluster]:
    made = FakeCluster(make_params)
    with api_server(made.answers) as address:
        use_kubeconfig(tmp_path, address, monkeypatch)
        yield made


def use_kubeconfig(folder: Path, address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    file = folder / "kubeconfig"
    tree = {
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{"name": "here", "cluster": {"server": address}}],
        "users": [{"name": "me", "user": {"token": "none"}}],
        "contexts": [{"name": "lab", "context": {"cluster": "here", "user": "me", "namespace": "lab"}}],
        "current-context": "lab",
    }
    file.write_text(yaml.safe_dump(tree), encoding="utf-8")
    monkeypatch.setenv("KUBECONFIG", str(file))
