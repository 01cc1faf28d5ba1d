"""What the API server serves: its resources, in the discovery and OpenAPI documents that clients ask for."""

from __future__ import annotations

from typing import Any

Object = dict[str, Any]

# group/version -> (plural, kind, namespaced)
RESOURCES: dict[str, list[tuple[str, str, bool]]] = {
    "v1": [
        ("namespaces", "Namespace", False),
        ("nodes", "Node", False),
        ("pods", "Pod", True),
        ("events", "Event", True),
        ("services", "Service", True),
        ("secrets", "Secret", True),
        ("configmaps", "ConfigMap", True),
        ("serviceaccounts", "ServiceAccount", True),
        ("persistentvolumes", "PersistentVolume", False),
        ("persistentvolumeclaims", "PersistentVolumeClaim", True),
        ("resourcequotas", "ResourceQuota", True),
        ("limitranges", "LimitRange", True),
        ("podtemplates", "PodTemplate", True),
    ],
    "apps/v1": [("deployments", "Deployment", True), ("statefulsets", "StatefulSet", True)],
    "batch/v1": [("jobs", "Job", True), ("cronjobs", "CronJob", True)],
    "policy/v1": [("poddisruptionbudgets", "PodDisruptionBudget", True)],
    "networking.k8s.io/v1": [("networkpolicies", "NetworkPolicy", True), ("ingresses", "Ingress", True)],
    "rbac.authorization.k8s.io/v1": [("roles", "Role", True), ("rolebindings", "RoleBinding", True)],
    "scheduling.k8s.io/v1": [("priorityclasses", "PriorityClass", False)],
    "storage.k8s.io/v1": [("storageclasses", "StorageClass", False)],
    "authorization.k8s.io/v1": [("selfsubjectaccessreviews", "SelfSubjectAccessReview", False)],
    "apiextensions.k8s.io/v1": [("customresourcedefinitions", "CustomResourceDefinition", False)],
    "kubeflow.org/v1": [("pytorchjobs", "PyTorchJob", True)],
    "trainer.kubeflow.org/v1alpha1": [("trainjobs", "TrainJob", True), ("trainingruntimes", "TrainingRuntime", True)],
    "kueue.x-k8s.io/v1beta2": [
        ("localqueues", "LocalQueue", True),
        ("clusterqueues", "ClusterQueue", False),
        ("resourceflavors", "ResourceFlavor", False),
    ],
}


def api_groups() -> Object:
    """The response to GET /apis."""
    versions_of: dict[str, list[str]] = {}
    for name in RESOURCES:
        if "/" in name:
            versions_of.setdefault(name.split("/")[0], []).append(name)
    listed = []
    for group, names in versions_of.items():
        versions = [{"groupVersion": n, "version": n.split("/")[1]} for n in names]
        listed.append({"name": group, "versions": versions, "preferredVersion": versions[0]})
    return {"kind": "APIGroupList", "apiVersion": "v1", "groups": listed}


def openapi_index() -> Object:
    """The response to GET /openapi/v3."""
    names = [f"apis/{group}" if "/" in group else f"api/{group}" for group in RESOURCES]
    return {"paths": {name: {"serverRelativeURL": f"/openapi/v3/{name}"} for name in names}}


def openapi(group_version: str) -> Object:
    """The OpenAPI document of a group: only that fields are validated, which is all that kubectl reads."""
    group, _, version = group_version.rpartition("/")
    base = f"/apis/{group_version}" if group else "/api/v1"
    parameters = [{"name": "fieldValidation", "in": "query", "schema": {"type": "string"}}]
    paths = {}
    for plural, kind, namespaced in RESOURCES[group_version]:
        patch = {
            "parameters": parameters,
            "responses": {},
            "x-kubernetes-group-version-kind": {"group": group, "version": version, "kind": kind},
        }
        paths[f"{base}{'/namespaces/{namespace}' if namespaced else ''}/{plural}/{{name}}"] = {"patch": patch}
    return {"openapi": "3.0.0", "info": {"title": "Kubernetes", "version": "v1.32.0"}, "paths": paths}


def api_resources(group: str, known: list[tuple[str, str, bool]]) -> Object:
    """The response to GET /apis/GROUP/VERSION."""
    verbs = ["create", "delete", "get", "list", "patch", "update", "watch"]
    listed = [
        {"name": plural, "singularName": kind.lower(), "namespaced": namespaced, "kind": kind, "verbs": verbs}
        for plural, kind, namespaced in known
    ]
    return {"kind": "APIResourceList", "apiVersion": "v1", "groupVersion": group, "resources": listed}
