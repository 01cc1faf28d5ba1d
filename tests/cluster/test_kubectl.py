"""The real kubectl applies k8s/ and its overlays to a server that validates fields, and makes the secrets."""

from __future__ import annotations

import base64
import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from tests.cluster.apiserver import ApiServer
from tests.cluster.manifests import (
    K8S,
    OAUTH2,
    OVERLAYS,
    SECRETS,
    applied,
    needs_kubectl,
    overlay,
)
from tests.cluster.schemas import crd_folder, schema_errors


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ApiServer]:
    """An empty cluster that validates fields, in the kubeconfig of kubectl."""
    with ApiServer(schema_errors=schema_errors) as server:
        server.remove("namespaces", "phantom")
        monkeypatch.setenv("KUBECONFIG", str(server.kubeconfig(tmp_path / "kubeconfig")))
        monkeypatch.setenv("HOME", str(tmp_path))
        yield server


def call(*command: str | Path, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*map(str, command)], env={**os.environ, **env}, capture_output=True, text=True)


@needs_kubectl
def test_kubectl_applies_the_folder(server: ApiServer):
    for word in ("created", "configured|unchanged"):
        done = call("kubectl", "apply", "-f", f"{K8S}/")
        assert done.returncode == 0, done.stderr
        lines = done.stdout.splitlines()
        assert len(lines) == len(applied()) and all(re.search(f" ({word})$", line) for line in lines)
    assert {o["kind"] for o in server.objects.values()} == {m["kind"] for m in applied()}


@needs_kubectl
@pytest.mark.parametrize("name", OVERLAYS)
def test_kubectl_applies_every_overlay(server: ApiServer, name: str):
    if name == "kueue":
        crd_folder()
    done = call("kubectl", "apply", "-k", K8S / "overlays" / name)
    assert done.returncode == 0, done.stderr
    assert len(server.objects) == len(overlay(name))


@needs_kubectl
def test_kubectl_rejects_unknown_fields(server: ApiServer, tmp_path: Path):
    server.add("v1", "namespaces", {"kind": "Namespace", "metadata": {"name": "phantom"}})
    service = next(m for m in applied() if m["kind"] == "Service")
    service["spec"]["prots"] = service["spec"].pop("ports")
    (tmp_path / "service.yaml").write_text(yaml.safe_dump(service), encoding="utf-8")
    done = call("kubectl", "apply", "-f", tmp_path / "service.yaml")
    assert done.returncode and "prots" in done.stderr and not server.find("services")


@needs_kubectl
def test_the_script_creates_the_secrets(server: ApiServer):
    refused = call(K8S / "secrets.sh")
    assert refused.returncode and "PHANTOM_ARTIFACTS" in refused.stderr
    assert call("kubectl", "apply", "-f", K8S / "00-namespace.yaml").returncode == 0

    def made(**env: str) -> dict[str, dict[str, str]]:
        done = call(K8S / "secrets.sh", **env)
        assert done.returncode == 0, done.stderr
        secrets = {s["metadata"]["name"]: s["data"] for s in server.find("secrets")}
        return {
            name: {key: base64.b64decode(value).decode() for key, value in data.items()}
            for name, data in secrets.items()
        }

    first = made(PHANTOM_ARTIFACTS="s3://bucket/p", AWS_ACCESS_KEY_ID="a b='$c'", AWS_SECRET_ACCESS_KEY="old")
    assert set(first) == SECRETS
    assert first["phantom-s3"] == {
        "MLFLOW_ARTIFACTS_DESTINATION": "s3://bucket/p",
        "PHANTOM_BACKUPS": "s3://bucket/p-backups",
        "AWS_ACCESS_KEY_ID": "a b='$c'",
        "AWS_SECRET_ACCESS_KEY": "old",
    }
    passwords = first["phantom-postgres"]
    assert set(passwords) == {"POSTGRES_PASSWORD", "PREFECT_PASSWORD", "MLFLOW_PASSWORD"}
    assert len(set(passwords.values())) == 3 and all(re.fullmatch("[0-9a-f]{48}", p) for p in passwords.values())
    assert re.fullmatch("phantom:[0-9a-f]{48}", first["phantom-prefect"]["PREFECT_API_AUTH_STRING"])
    assert first["phantom-mlflow"]["MLFLOW_TRACKING_USERNAME"] == "phantom"
    scrape = first["phantom-prefect-scrape"]
    assert f"{scrape['username']}:{scrape['password']}" == first["phantom-prefect"]["PREFECT_API_AUTH_STRING"]
    drawn = [value for name in SECRETS - {"phantom-s3"} for value in first[name].values() if value != "phantom"]
    assert len(set(drawn)) == 7 and all(re.fullmatch("(phantom:)?[0-9a-f]{48}", value) for value in drawn)
    again = made(PHANTOM_ARTIFACTS="s3://bucket/p", AWS_ACCESS_KEY_ID="a", AWS_SECRET_ACCESS_KEY="new")
    assert set(again) == SECRETS
    login = made(PHANTOM_ARTIFACTS="s3://b", OAUTH2_CLIENT_ID="phantom", OAUTH2_CLIENT_SECRET="it's")[OAUTH2]
    assert len(login.pop("OAUTH2_PROXY_COOKIE_SECRET")) == 32
    assert login == {"OAUTH2_PROXY_CLIENT_ID": "phantom", "OAUTH2_PROXY_CLIENT_SECRET": "it's"}
    assert all(again[name] == first[name] for name in SECRETS - {"phantom-s3"})
    assert again["phantom-s3"]["AWS_SECRET_ACCESS_KEY"] == "new"
