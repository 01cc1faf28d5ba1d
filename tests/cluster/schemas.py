"""Strict validation: built-in kinds by kubernetes-validate, custom resources by their CRDs, where available."""

from __future__ import annotations

import functools
import os
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from jsonschema import Draft202012Validator

ROOT = Path(__file__).resolve().parents[2]
VERSION = "1.32"
CRDS = {
    ("kubeflow.org", "PyTorchJob"): "kubeflow.org_pytorchjobs.yaml",
    ("trainer.kubeflow.org", "TrainJob"): "trainer.kubeflow.org_trainjobs.yaml",
    ("kueue.x-k8s.io", "ResourceFlavor"): "kueue.x-k8s.io_resourceflavors.yaml",
    ("kueue.x-k8s.io", "ClusterQueue"): "kueue.x-k8s.io_clusterqueues.yaml",
    ("kueue.x-k8s.io", "LocalQueue"): "kueue.x-k8s.io_localqueues.yaml",
    ("monitoring.coreos.com", "PodMonitor"): "monitoring.coreos.com_podmonitors.yaml",
    ("monitoring.coreos.com", "ServiceMonitor"): "monitoring.coreos.com_servicemonitors.yaml",
    ("monitoring.coreos.com", "PrometheusRule"): "monitoring.coreos.com_prometheusrules.yaml",
}


def crd_folder() -> Path:
    """The folder of CRDs. Skips the test where there is none."""
    folder = Path(os.environ.get("PHANTOM_CRDS", ROOT.parent / "shared" / "crds"))
    if not (folder / "kubeflow.org_pytorchjobs.yaml").is_file():
        pytest.skip(f"no CRDs at {folder}; set PHANTOM_CRDS")
    return folder


def schema_errors(manifest: dict[str, Any]) -> list[str]:
    """The schema errors of a manifest. Raises for a kind that has no schema."""
    group, _, version = manifest["apiVersion"].rpartition("/")
    file = CRDS.get((group, manifest["kind"]))
    if file is None:
        try:
            kubernetes_validate.validate(manifest, VERSION, strict=True)
        except kubernetes_validate.ValidationError as error:
            return [f"{'.'.join(str(p) for p in error.path)}: {error.message[:200]}"]
        return []
    path = crd_folder() / file
    if not path.is_file():
        pytest.skip(f"no {path}; set PHANTOM_CRDS")
    found = _validator(path, version).iter_errors(manifest)
    return [f"{'.'.join(str(p) for p in error.path)}: {error.message[:200]}" for error in found]


@functools.cache
def _validator(path: Path, version: str) -> Draft202012Validator:
    crd = yaml.load(path.read_text(encoding="utf-8"), yaml.CSafeLoader)
    served = {v["name"]: v["schema"]["openAPIV3Schema"] for v in crd["spec"]["versions"] if v["served"]}
    schema = _strict(served[version])
    schema["properties"]["metadata"] = {"type": "object"}
    return Draft202012Validator(schema)


def _strict(schema: Any) -> Any:
    """A CRD's structural schema as JSON schema, in which unknown fields are errors."""
    if not isinstance(schema, dict):
        return schema
    made = {key: value for key, value in schema.items() if not key.startswith("x-kubernetes-")}
    if schema.get("x-kubernetes-int-or-string"):
        made = {"type": ["integer", "string"]}
    for key in ("properties", "additionalProperties", "items"):
        if key == "properties" and key in made:
            made[key] = {name: _strict(inner) for name, inner in made[key].items()}
        elif key in made:
            made[key] = _strict(made[key])
    if "properties" in made and not schema.get("x-kubernetes-preserve-unknown-fields"):
        made.setdefault("additionalProperties", False)
    if made.pop("nullable", False) and "type" in made:
        made["type"] = [made["type"], "null"]
    return made
