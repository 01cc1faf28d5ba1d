"""The manifests of k8s/, as kubectl applies them."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from phantom.config import apply_overrides, preset_path, validate

ROOT = Path(__file__).resolve().parents[2]
K8S = ROOT / "k8s"
OVERLAYS = ("dev", "eks", "gke", "ingress", "kueue", "rdma")
# Made by k8s/secrets.sh.
SECRETS = {
    "phantom-postgres",
    "phantom-prefect",
    "phantom-prefect-scrape",
    "phantom-mlflow",
    "phantom-mlflow-server",
    "phantom-s3",
}
OAUTH2 = "phantom-oauth2"  # made by it for the overlay ingress
OURS = ("phantom-orchestrator", "phantom-train")

Manifest = dict[str, Any]

needs_kubectl = pytest.mark.skipif(not shutil.which("kubectl"), reason="no kubectl")


def load(text: str) -> list[Manifest]:
    return [document for document in yaml.safe_load_all(text) if document]


def applied() -> list[Manifest]:
    """What `kubectl apply -f k8s/` takes."""
    return [m for file in sorted(K8S.glob("*.yaml")) for m in load(file.read_text(encoding="utf-8"))]


def overlay(name: str) -> list[Manifest]:
    """What `kubectl apply -k k8s/overlays/<name>` takes."""
    done = subprocess.run(["kubectl", "kustomize", K8S / "overlays" / name], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return load(done.stdout)


def one(manifests: list[Manifest], kind: str, name: str) -> Manifest:
    (found,) = [m for m in manifests if m["kind"] == kind and m["metadata"]["name"] == name]
    return found


def rights(role: str) -> set[tuple[str, str, str]]:
    """(group, resource, verb) of what a Role allows."""
    rules = one(applied(), "Role", role)["rules"]
    return {(g, r, v) for rule in rules for g in rule["apiGroups"] for r in rule["resources"] for v in rule["verbs"]}


def right_of(request: str) -> tuple[str, str, str]:
    """(group, resource, verb) that a request asks for."""
    method, path = request.split()
    found = re.fullmatch(r"/(?:api|apis/([^/]+))/[^/]+/namespaces/phantom/([a-z]+)(?:/([^/]+))?(/log)?", path)
    assert found, request
    group, plural, name, log = found.groups()
    verb = {"POST": "create", "DELETE": "delete", "GET": "get" if name else "list"}[method]
    return group or "", plural + (log or ""), verb


def settings_of(manifests: list[Manifest]) -> Any:
    """The settings from which runs start: the ConfigMap `phantom-settings` and its preset."""
    data = one(manifests, "ConfigMap", "phantom-settings")["data"]
    tree = yaml.safe_load(preset_path(data["preset"]).read_text(encoding="utf-8"))
    lines = [line for line in data["settings"].splitlines() if line and not line.startswith("#")]
    return validate(apply_overrides(tree, lines))
