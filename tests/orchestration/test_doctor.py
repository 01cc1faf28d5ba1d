"""`phantom doctor` where all is well, where each thing is amiss, and with a small API server in a cluster's place."""

from __future__ import annotations

import json
import shutil
import socket
import sqlite3
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml

from phantom.config import Params, load_params, preset_path
from phantom.orchestration import doctor as checking
from phantom.orchestration.checks import Check
from phantom.orchestration.doctor import as_text, doctor

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    for name in ("dvc.yaml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path / name)
    return tmp_path


def named(checks: list[Check]) -> dict[str, Check]:
    """The checks by name; each of them in one line, and with a mend where it failed."""
    for check in checks:
        assert check.finding and "\n" not in check.finding + check.mend
        assert check.ok or check.mend
    return {check.name: check for check in checks}


def test_where_all_is_well_every_check_says_what_it_found(make_params, checkout: Path):
    found = named(doctor(make_params(), root=checkout))
    assert [name for name, check in found.items() if not check.ok] == []
    assert "torch 2." in found["packages"].finding and "libx264" in found["video encoder"].finding
    assert found["settings"].finding == "preset mini, fits the frozen parts"
    assert as_text(list(found.values())).endswith("all is well")
    assert not (checkout / "mlflow.db").exists()  # looking makes nothing


def test_other_versions_than_the_tested_ones_are_named(make_params, checkout: Path):
    lines = (checkout / "constraints.txt").read_text(encoding="utf-8").replace("diffusers==0.42.1", "diffusers==9.0")
    (checkout / "constraints.txt").write_text(lines, encoding="utf-8")
    found = named(doctor(make_params(), root=checkout))["packages"]
    assert not found.ok and found.mend == "make install"
    assert found.finding == "diffusers 0.42.1, tested is 9.0"


@pytest.mark.parametrize(
    ("package", "version", "check", "mend"),
    [
        ("fastapi", "0.155.0", "prefect and fastapi", "pip install 'fastapi>=0.139,<=0.150'"),
        ("prefect", None, "prefect and fastapi", "make install"),
        ("dvc", None, "git and dvc", "make install"),
        ("mlflow", None, "packages", "make install"),
        ("kubernetes", "36.1.0", "kubernetes client", "pip install 'kubernetes<36'"),
    ],
)
def test_versions_that_do_not_work_together(
    make_params,
    checkout: Path,
    monkeypatch: pytest.MonkeyPatch,
    package: str,
    version: str | None,
    check: str,
    mend: str,
):
    installed = checking.version
    monkeypatch.setattr(checking, "version", lambda name: version if name == package else installed(name))
    monkeypatch.setenv("KUBECONFIG", str(checkout / "none"))
    found = named(doctor(make_params(), cluster=True, root=checkout))[check]
    assert not found.ok and found.mend == mend


def test_an_orchestrator_needs_no_torch(make_params, checkout: Path, monkeypatch: pytest.MonkeyPatch):
    installed = checking.version
    gone = ("torch", "diffusers", "transformers", "accelerate", "safetensors")
    monkeypatch.setattr(checking, "version", lambda name: None if name in gone else installed(name))
    for name in (*gone, "phantom.planning.plan"):
        monkeypatch.setitem(sys.modules, name, None)
    jobs = [f"compute.{stage}=kubernetes" for stage in ("encode", "train", "evaluate")]
    found = named(doctor(make_params(*jobs), root=checkout))
    assert [name for name, check in found.items() if not check.ok] == []
    assert found["device"].finding.startswith("not looked at: no torch is installed")
    here = named(doctor(make_params(*jobs[:2]), root=checkout))  # evaluation is not a job
    assert not here["packages"].ok and "torch is missing" in here["packages"].finding


def test_settings_that_the_frozen_parts_cannot_take(make_params, checkout: Path):
    found = named(doctor(make_params("data.height=70"), root=checkout))
    assert not found["settings"].ok and "data.height: found 70" in found["settings"].finding
    assert found["frozen parts"].ok


def test_frozen_parts_that_are_not_there(make_params, checkout: Path, tiny_base: Path):
    absent = named(doctor(make_params("models.base=models/mini"), root=checkout))
    assert absent["settings"].ok  # one cause, one failure
    assert "models/mini/transformer/config.json" in absent["frozen parts"].finding
    assert "`phantom pretrain`" in absent["frozen parts"].mend

    shutil.copytree(tiny_base, checkout / "base")
    weights = next((checkout / "base/vae").glob("*.safetensors"))
    weights.unlink()
    partial = named(doctor(make_params("models.base=base"), root=checkout))["frozen parts"]
    assert partial.finding == "missing: base/vae/*.safetensors"

    hub = named(doctor(load_params(preset_path("wan2.2-ti2v-5b")), root=checkout))
    assert hub["settings"].ok and not hub["frozen parts"].ok
    assert hub["frozen parts"].mend == (
        "hf download Wan-AI/Wan2.2-TI2V-5B-Diffusers; hf download facebook/vjepa2-vitl-fpc64-256"
    )


def test_too_small_a_disk(make_params, checkout: Path, monkeypatch: pytest.MonkeyPatch):
    free = shutil.disk_usage(checkout)._replace(free=300 * 2**30)
    monkeypatch.setattr(checking.shutil, "disk_usage", lambda path: free)
    assert named(doctor(make_params(), root=checkout))["disk"].ok
    large = named(doctor(load_params(preset_path("wan2.2-ti2v-5b")), root=checkout))["disk"]
    assert not large.ok and large.finding == "300 GiB free, about 548 GiB needed"  # five checkpoints of 16 bytes each


# --- MLflow's store --------------------------------------------------------------------------------------------------


def test_a_store_that_is_a_file(make_params, checkout: Path):
    with sqlite3.connect(checkout / "good.db") as store:
        store.execute("create table alembic_version (version_num text)")
        store.execute("insert into alembic_version values ('abc')")
    (checkout / "bad.db").write_text("this is no database, whatever its name says", encoding="utf-8")

    def store_check(uri: str) -> Check:
        return named(doctor(make_params(f"tracking.uri={uri}"), root=checkout))["mlflow store"]

    assert store_check("sqlite:///good.db").ok
    bad = store_check("sqlite:///bad.db")
    assert not bad.ok and "file is not a database" in bad.finding
    assert not store_check("sqlite:///no/such/folder/mlflow.db").ok
    assert not store_check("file:./mlruns").ok


def test_a_store_that_is_a_server(make_params, checkout: Path):
    def store_check(uri: str) -> Check:
        return named(doctor(make_params(f"tracking.uri={uri}"), root=checkout))["mlflow store"]

    answers: dict[str, Any] = {}
    with api_server(answers) as address:
        answers["GET /api/2.0/mlflow/experiments/get-by-name"] = {}
        assert store_check(address).ok
        answers["GET /api/2.0/mlflow/experiments/get-by-name"] = 403
        refused = store_check(address)
        assert not refused.ok and "--allowed-hosts" in refused.mend
    gone = store_check(address)
    assert not gone.ok and "refused" in gone.finding


# --- servers, ports, DVC's remote ------------------------------------------------------------------------------------


def test_a_prefect_server_that_is_named_must_answer(make_params, checkout: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    assert named(doctor(make_params(), root=checkout))["prefect server"].finding.startswith("none is named")
    answers: dict[str, Any] = {"GET /api/health": {}}
    with api_server(answers) as address:
        (checkout / "prefect.toml").write_text(f'[api]\nurl = "{address}/api"\n', encoding="utf-8")
        assert named(doctor(make_params(), root=checkout))["prefect server"].finding == f"{address}/api answers"
        monkeypatch.setenv("PREFECT_API_URL", f"{address}/api")
        assert named(doctor(make_params(), root=checkout))["prefect server"].ok
    monkeypatch.delenv("PREFECT_API_URL")
    ours = named(doctor(make_params(), root=checkout))["prefect server"]
    assert ours.ok and ours.finding.startswith(f"none at {address}/api: `phantom up` starts one")
    monkeypatch.setenv("PREFECT_API_URL", f"{address}/api")
    gone = named(doctor(make_params(), root=checkout))["prefect server"]
    assert not gone.ok and "refused" in gone.finding and "`phantom up`" in gone.mend


def test_a_remote_of_dvc(make_params, checkout: Path):
    def look() -> Check:
        return named(doctor(make_params(), root=checkout))["dvc remote"]

    assert look().ok  # no checkout of DVC's at all
    (checkout / ".dvc").mkdir()
    config = checkout / ".dvc/config"
    config.write_text("[core]\n    no_scm = true\n", encoding="utf-8")
    assert look().ok and look().finding.startswith("none is set")
    config.write_text(
        f"[core]\n    no_scm = true\n    remote = here\n['remote \"here\"']\n    url = {checkout}/store\n",
        encoding="utf-8",
    )
    assert look().ok and look().finding == f"here ({checkout}/store) answers"
    config.write_text(
        "[core]\n    no_scm = true\n    remote = s\n['remote \"s\"']\n    url = s3://b/p\n"
        "    endpointurl = http://127.0.0.1:9\n    access_key_id = a\n    secret_access_key = b\n",
        encoding="utf-8",
    )
    found = look()
    assert not found.ok and found.finding.startswith("s (s3://b/p): ") and "`dvc remote modify s url" in found.mend


# --- the cluster -----------------------------------------------------------------------------------------------------


def test_no_kubeconfig(make_params, checkout: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("KUBECONFIG", str(checkout / "none"))
    found = named(doctor(make_params(), cluster=True, root=checkout))
    assert not found["cluster"].ok and "KUBECONFIG" in found["cluster"].mend
    assert "operator" not in found


def test_no_kubernetes_client(make_params, checkout: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "kubernetes", None)
    found = named(doctor(make_params(), cluster=True, root=checkout))
    assert not found["cluster"].ok and "kubernetes" in found["cluster"].finding


def test_an_unreachable_cluster(make_params, checkout: Path, monkeypatch: pytest.MonkeyPatch):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and nobody listens
        use_kubeconfig(checkout, f"http://127.0.0.1:{taken.getsockname()[1]}", monkeypatch)
        found = named(doctor(make_params(), cluster=True, root=checkout))
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
    checks = named(doctor(cluster.params(), cluster=True, root=cluster.checkout))
    assert not checks["cluster"].ok and checks["cluster"].finding.endswith("has no namespace lab")
    assert "operator" not in checks


def test_a_cluster_without_the_operator(cluster: FakeCluster):
    found = cluster.look("cluster.operator=trainjob")
    assert not found["job kinds"].ok and "trainer" in found["job kinds"].mend
    assert not found["operator"].ok and "trainer" in found["operator"].mend
    assert ("trainer.kubeflow.org", "trainjobs", "create") in cluster.asked
    cluster.answers["GET /apis/trainer.kubeflow.org/v1alpha1"] = {"resources": [{"name": "trainjobs"}]}
    found = cluster.look("cluster.operator=trainjob")
    assert found["job kinds"].finding == "no TrainingRuntime phantom in lab"
    assert found["job kinds"].mend == "kubectl apply -f k8s/jobs/trainer-v2/runtime.yaml"
    runtime = "GET /apis/trainer.kubeflow.org/v1alpha1/namespaces/lab/trainingruntimes/phantom"
    cluster.answers[runtime] = {"kind": "TrainingRuntime"}
    assert cluster.look("cluster.operator=trainjob")["job kinds"].ok
    del cluster.answers["GET /apis/kubeflow.org/v1"]
    assert "training-operator" in cluster.look()["job kinds"].mend


def test_an_operator_that_is_installed_and_does_not_run(cluster: FakeCluster):
    where = "GET /apis/apps/v1/namespaces/kubeflow/deployments/training-operator"
    cluster.answers[where] = {"status": {"replicas": 1}}
    stopped = cluster.look()["operator"]
    assert not stopped.ok and stopped.finding == "kubeflow/training-operator: 0 ready"
    assert stopped.mend.startswith("kubectl -n kubeflow describe deployment training-operator")
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
    assert "kubeflow.org/pytorchjob" in look().mend
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
    assert "02-limits.yaml" in found.mend
    assert cluster.look("cluster.gpu=nvidia.com/gpu")["quota"].ok


def test_secrets_that_are_not_there(cluster: FakeCluster):
    del cluster.answers["GET /api/v1/namespaces/lab/secrets/phantom-s3"]
    found = cluster.look()["secrets"]
    assert (found.ok, found.finding) == (False, "missing: phantom-s3") and "k8s/secrets.sh" in found.mend
    cluster.answers["GET /api/v1/namespaces/lab/secrets/phantom-s3"] = 403
    assert cluster.look()["secrets"].ok


def test_the_names_that_mlflow_answers_to(cluster: FakeCluster):
    assert cluster.look("tracking.uri=http://mlflow.lab.svc:5000")["mlflow's hosts"].ok
    refused = cluster.look("tracking.uri=http://curves:5000")["mlflow's hosts"]
    assert not refused.ok and refused.mend.startswith("add curves:5000 to MLFLOW_SERVER_ALLOWED_HOSTS")
    assert not cluster.look("compute.train=kubernetes")["mlflow's hosts"].ok  # a pod has no such file


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

    def __init__(self, checkout: Path, make_params: Any) -> None:
        self.checkout, self._make = checkout, make_params
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
            "GET /api/v1/namespaces/lab/persistentvolumeclaims/phantom-workspace": {
                "spec": {"accessModes": ["ReadWriteMany"]},
                "status": {"phase": "Bound"},
            },
            "GET /apis/storage.k8s.io/v1/storageclasses": {"items": [{"metadata": {"name": "nfs"}}]},
            "GET /api/v1/nodes": {"items": [node("True"), node("True"), node("Unknown")]},
            "GET /api/v1/namespaces/lab/resourcequotas": {"items": [QUOTA]},
            "GET /api/v1/namespaces/lab/secrets/phantom-s3": {"metadata": {"name": "phantom-s3"}},
            "GET /api/v1/namespaces/lab/secrets/phantom-postgres": {"metadata": {"name": "phantom-postgres"}},
            "POST /apis/authorization.k8s.io/v1/selfsubjectaccessreviews": self._review,
        }

    def params(self, *overrides: str) -> Params:
        return self._make("cluster.namespace=lab", *overrides)

    def look(self, *overrides: str) -> dict[str, Check]:
        checks = named(doctor(self.params(*overrides), cluster=True, root=self.checkout))
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
def cluster(checkout: Path, make_params, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeCluster]:
    made = FakeCluster(checkout, make_params)
    with api_server(made.answers) as address:
        use_kubeconfig(checkout, address, monkeypatch)
        yield made


class api_server:
    """Serves `answers` ("GET /path" -> JSON, a status, or a function of the body) on a free port; else 404."""

    def __init__(self, answers: dict[str, Any]) -> None:
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                length = int(self.headers.get("Content-Length") or 0)
                body = json.loads(self.rfile.read(length) or "null")
                answer = answers.get(f"{self.command} {self.path.partition('?')[0]}", 404)
                answer = answer(body) if callable(answer) else answer
                data = json.dumps({} if isinstance(answer, int) else answer).encode()
                self.send_response(answer if isinstance(answer, int) else 200)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            do_POST = do_GET

            def log_message(self, *_: Any) -> None:
                pass

        self.server = HTTPServer(("127.0.0.1", 0), Handler)

    def __enter__(self) -> str:
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return f"http://127.0.0.1:{self.server.server_port}"

    def __exit__(self, *_: Any) -> None:
        self.server.shutdown()
        self.server.server_close()


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
