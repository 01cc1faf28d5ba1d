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

from phantom import doctor as checking
from phantom.config import Params, load_params, preset_path
from phantom.doctor import Check, as_text, doctor

ROOT = Path(__file__).resolve().parents[1]


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
    assert not large.ok and large.finding == "300 GiB free, about 440 GiB needed"  # four checkpoints of 16 bytes each


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
    assert found["operator"].finding == "pytorchjobs.kubeflow.org/v1"
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
    assert not found["operator"].ok and "trainer" in found["operator"].mend
    assert ("trainer.kubeflow.org", "trainjobs", "create") in cluster.asked
    del cluster.answers["GET /apis/kubeflow.org/v1"]
    assert "training-operator" in cluster.look()["operator"].mend


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
    assert not look().ok and "never start" in look().finding and "kubeflow.org/pytorchjob" in look().mend
    cluster.answers["GET /api/v1/namespaces/kueue-system/configmaps/kueue-manager-config"] = 403
    assert "403" in look().finding
    del cluster.answers["GET /apis/kueue.x-k8s.io"]
    assert look().finding == "Kueue is not installed"


def test_a_cluster_that_breaks_down_in_between(cluster: FakeCluster):
    cluster.answers["GET /apis/kubeflow.org/v1"] = 500
    found = cluster.look()["operator"]
    assert not found.ok and "500" in found.finding


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
            "POST /apis/authorization.k8s.io/v1/selfsubjectaccessreviews": self._review,
        }

    def params(self, *overrides: str) -> Params:
        return self._make("cluster.namespace=lab", *overrides)

    def look(self, *overrides: str) -> dict[str, Check]:
        checks = named(doctor(self.params(*overrides), cluster=True, root=self.checkout))
        return {name: checks[name] for name in ("cluster", "operator", "rights", "queue")}

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
