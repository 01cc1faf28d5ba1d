"""The pod templates of a manifest, and what the Pod Security Standard `restricted` rejects in them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

WORKLOADS = ("Deployment", "StatefulSet", "DaemonSet", "ReplicaSet", "Job")
VOLUME_TYPES = {  # accepted by `restricted`
    "configMap",
    "csi",
    "downwardAPI",
    "emptyDir",
    "ephemeral",
    "persistentVolumeClaim",
    "projected",
    "secret",
}
SECCOMP_PROFILES = ("RuntimeDefault", "Localhost")


def pod_templates(manifest: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """(path, pod template) for each pod template of a manifest, whatever its kind."""
    kind, spec = manifest["kind"], manifest.get("spec", {})
    if kind == "Pod":
        yield "", manifest
    elif kind == "PodTemplate":
        yield "template.", manifest["template"]
    elif kind in WORKLOADS:
        yield "spec.template.", spec["template"]
    elif kind == "CronJob":
        yield "spec.jobTemplate.spec.template.", spec["jobTemplate"]["spec"]["template"]
    elif kind == "PyTorchJob":
        for role, replica in (spec.get("pytorchReplicaSpecs") or {}).items():
            yield f"spec.pytorchReplicaSpecs.{role}.template.", replica.get("template", {})


def containers(pod: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """(path in the pod spec, container) for each container and init container."""
    for group in ("initContainers", "containers"):
        for number, container in enumerate(pod.get(group) or []):
            yield f"{group}[{number}]", container


def pod_security_violations(pod: dict[str, Any], allow_ipc_lock: bool = False) -> Iterator[str]:
    """Violations of the level `restricted` in a pod spec: "field: found ..., accepted: ...".

    allow_ipc_lock: accept the capability IPC_LOCK, for a namespace that enforces another level.
    """
    security = pod.get("securityContext") or {}
    for field in ("hostNetwork", "hostPID", "hostIPC"):
        if pod.get(field):
            yield f"{field}: found true, accepted: false"
    for volume in pod.get("volumes") or []:
        for source in set(volume) - {"name"} - VOLUME_TYPES:
            yield f"volumes.{volume['name']}: found {source}, accepted: {', '.join(sorted(VOLUME_TYPES))}"
    for sysctl in security.get("sysctls") or []:
        yield f"securityContext.sysctls: found {sysctl['name']}, accepted: none"
    if security.get("runAsUser") == 0:
        yield "securityContext.runAsUser: found 0, accepted: another user than root"
    for place, container in containers(pod):
        yield from (f"{place}.{line}" for line in _container_violations(container, security, allow_ipc_lock))


def _container_violations(container: dict[str, Any], pod: dict[str, Any], allow_ipc_lock: bool) -> Iterator[str]:
    own = container.get("securityContext") or {}
    if own.get("privileged"):
        yield "securityContext.privileged: found true, accepted: false"
    if own.get("allowPrivilegeEscalation") is not False:
        yield f"securityContext.allowPrivilegeEscalation: found {own.get('allowPrivilegeEscalation')}, accepted: false"
    if own.get("runAsNonRoot", pod.get("runAsNonRoot")) is not True:
        yield "securityContext.runAsNonRoot: found no true, accepted: true here or for the pod"
    if own.get("runAsUser") == 0:
        yield "securityContext.runAsUser: found 0, accepted: another user than root"
    seccomp = (own.get("seccompProfile") or pod.get("seccompProfile") or {}).get("type")
    if seccomp not in SECCOMP_PROFILES:
        yield f"securityContext.seccompProfile.type: found {seccomp}, accepted: {', '.join(SECCOMP_PROFILES)}"
    if own.get("procMount", "Default") != "Default":
        yield f"securityContext.procMount: found {own['procMount']}, accepted: Default"
    capabilities = own.get("capabilities") or {}
    if "ALL" not in (capabilities.get("drop") or []):
        yield f"securityContext.capabilities.drop: found {capabilities.get('drop') or []}, accepted: [ALL]"
    accepted = {"NET_BIND_SERVICE"} | ({"IPC_LOCK"} if allow_ipc_lock else set())
    for name in sorted(set(capabilities.get("add") or []) - accepted):
        yield f"securityContext.capabilities.add: found {name}, accepted: {', '.join(sorted(accepted))}"
    for port in container.get("ports") or []:
        if port.get("hostPort"):
            yield f"ports: found hostPort {port['hostPort']}, accepted: none"
