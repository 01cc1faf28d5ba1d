"""k8s/serving: schemas, Pod Security, what it names, its command, the script that makes its database and secret."""

from __future__ import annotations

import base64
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import typer.main
import yaml

from phantom.cli.shared import app
from phantom.cluster.pods import pod_security_violations
from phantom.cluster.validation import validate_pod
from phantom.serving.jobs import JOBS, JobQueue
from tests.cluster.manifests import K8S, SECRETS, Manifest, applied, load, needs_kubectl, one
from tests.cluster.schemas import schema_errors
from tests.serving.test_jobs import postgres  # noqa: F401

SERVING = K8S / "serving"
OURS = "phantom-serving"  # the secret of setup.sh
KUBECTL = """#!/bin/sh
for last; do :; done
case "$*" in
  *" exec "*) while [ "$1" != -- ]; do shift; done; shift; exec "$@" --host 127.0.0.1 --port {port} ;;
  *" get secret "*) key=${{last#*data.}}; sed -n "s/^  ${{key%?}}: //p" secret 2> /dev/null | tr -d '\\n' ;;
  apply*) cat > made && mv made secret ;;
  *) exec {kubectl} "$@" ;;
esac
"""


def manifests() -> list[Manifest]:
    listed = yaml.safe_load((SERVING / "kustomization.yaml").read_text(encoding="utf-8"))["resources"]
    assert sorted(listed) == sorted(file.name for file in SERVING.glob("*.yaml") if file.name != "kustomization.yaml")
    return [manifest for name in listed for manifest in load((SERVING / name).read_text(encoding="utf-8"))]


def pod() -> Manifest:
    return one(manifests(), "Deployment", "serving")["spec"]["template"]["spec"]


def test_the_manifests_are_valid_and_name_what_there_is():
    for made in manifests():
        assert schema_errors(made) == [], made["metadata"]["name"]
        assert made["metadata"]["namespace"] == "phantom"
    assert [*validate_pod(pod()), *pod_security_violations(pod())] == []
    base = applied()
    one(base, "ServiceAccount", pod()["serviceAccountName"])
    one(base, "PriorityClass", pod()["priorityClassName"])
    claims = [v["persistentVolumeClaim"]["claimName"] for v in pod()["volumes"] if "persistentVolumeClaim" in v]
    for claim in claims:
        one(base, "PersistentVolumeClaim", claim)
    (container,) = pod()["containers"]
    assert {source["secretRef"]["name"] for source in container["envFrom"]} <= {*SECRETS, OURS}
    assert container["securityContext"]["readOnlyRootFilesystem"] is True
    mounted = {mount["name"] for mount in container["volumeMounts"]}
    assert mounted == {volume["name"] for volume in pod()["volumes"]}
    (budget,) = [m for m in manifests() if m["kind"] == "PodDisruptionBudget"]
    (scaler,) = [m for m in manifests() if m["kind"] == "HorizontalPodAutoscaler"]
    labels = one(manifests(), "Deployment", "serving")["spec"]["template"]["metadata"]["labels"]
    assert budget["spec"]["selector"]["matchLabels"].items() <= labels.items()
    assert scaler["spec"]["scaleTargetRef"]["name"] == "serving"
    assert one(manifests(), "Service", "serving")["spec"]["ports"][0]["port"] == 8000


def test_the_pod_runs_the_command_and_its_probes_are_routes():
    from phantom.serving.guard import OPEN

    (container,) = pod()["containers"]
    assert container["command"][-2:] == ["phantom.cli", "serve"]
    command: Any = typer.main.get_command(app).commands["serve"]  # type: ignore[attr-defined]
    given = command.make_context("serve", list(container["args"])).params
    assert (given["host"], given["workers"], given["model"]) == ("0.0.0.0", 1, "models:/phantom@champion")
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert container[probe]["httpGet"]["path"] in OPEN  # which the kubelet asks without a token


def test_the_service_reaches_its_database_its_registry_and_https_and_no_more():
    policies = {m["metadata"]["name"]: m["spec"] for m in manifests() if m["kind"] == "NetworkPolicy"}
    ports = [[port["port"] for port in rule["ports"]] for rule in policies["serving"]["egress"]]
    assert ports == [[5432], [5000], [443]]
    assert policies["serving"]["egress"][2]["to"] == [{"ipBlock": {"cidr": "0.0.0.0/0", "except": ["169.254.0.0/16"]}}]
    (rule,) = policies["from-serving"]["ingress"]
    assert rule["from"] == [{"podSelector": policies["serving"]["podSelector"]}]


@needs_kubectl
def test_keda_takes_the_autoscalers_place_and_asks_a_query_that_is_valid(tmp_path: Path):
    done = subprocess.run(["kubectl", "kustomize", K8S / "serving-keda"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    made = load(done.stdout)
    assert "HorizontalPodAutoscaler" not in {m["kind"] for m in made} and one(made, "Deployment", "serving")
    (trigger,) = one(made, "ScaledObject", "serving")["spec"]["triggers"]
    queue = JobQueue(f"sqlite:///{tmp_path / 'queue.db'}", 5, 1)
    queue.submit({"prompt": "a"})
    with queue._engine.connect() as connection:
        assert connection.exec_driver_sql(trigger["metadata"]["query"]).scalar_one() == 1
    assert JOBS.name in trigger["metadata"]["query"]


@needs_kubectl
def test_the_script_makes_a_database_and_a_secret_and_keeps_them(postgres: str, tmp_path: Path):  # noqa: F811
    """kubectl is the real one for what it makes of its input; psql runs here instead of in the pod."""
    (tmp_path / "kubectl").write_text(KUBECTL.format(port=postgres.rpartition(":")[2], kubectl=shutil.which("kubectl")))
    (tmp_path / "kubectl").chmod(0o755)
    env = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "KUBECONFIG": "none"}

    def made(**more: str) -> dict[str, str]:
        done = subprocess.run([SERVING / "setup.sh"], cwd=tmp_path, env=env | more, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        data = yaml.safe_load((tmp_path / "secret").read_text())["data"]
        return {key: base64.b64decode(value).decode() for key, value in data.items()}

    refused = subprocess.run([SERVING / "setup.sh"], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert refused.returncode and "PHANTOM_RESULTS" in refused.stderr
    first = made(PHANTOM_RESULTS="s3://bucket/videos")
    assert first["PHANTOM_SERVE_RESULTS"] == "s3://bucket/videos"
    assert re.fullmatch("[0-9a-f]{48}", first["PHANTOM_SERVE_TOKEN"])
    again = made(PHANTOM_RESULTS="s3://bucket/other")
    assert again == first | {"PHANTOM_SERVE_RESULTS": "s3://bucket/other"}
    place = postgres.rpartition("@")[2]
    queue = JobQueue(first["PHANTOM_SERVE_DATABASE"].replace("postgres:5432", place), 5, 1)
    queue.submit({"prompt": "a"})
    assert queue.claim("a:1", 60) is not None
    queue.close()


@pytest.mark.parametrize("key", ["PHANTOM_SERVE_TOKEN", "PHANTOM_SERVE_DATABASE", "PHANTOM_SERVE_RESULTS"])
def test_what_the_pod_takes_from_the_secret_is_in_the_script(key: str):
    assert f"'{key}=" in (SERVING / "setup.sh").read_text(encoding="utf-8")
