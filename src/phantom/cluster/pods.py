"""The pods that a manifest makes, and PodSecurity's level `restricted`, which a namespace may hold them to."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

WORKLOADS = ("Deployment", "StatefulSet", "DaemonSet", "ReplicaSet", "Job")
VOLUMES = {
    "configMap",
    "csi",
    "downwardAPI",
    "emptyDir",
    "ephemeral",
    "persistentVolumeClaim",
    "projected",
    "secret",
}
SECCOMP = ("RuntimeDefault", "Localhost")


def pods_of(manifest: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """(path, pod template) for every kind of manifest that makes pods."""
    kind, spec = manifest["kind"], manifest.get("spec", {})
    if kind == "Pod":
        yield "", manifest
    elif kind in WORKLOADS:
        yield "spec.template.", spec["template"]
    elif kind == "CronJob":
        yield "spec.jobTemplate.spec.template.", spec["jobTemplate"]["spec"]["template"]
    elif kind == "PyTorchJob":
        for role, replica in (spec.get("pytorchReplicaSpecs") or {}).items():
            yield f"spec.pytorchReplicaSpecs.{role}.template.", replica.get("template", {})


def containers(pod: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """(path within the pod, container) of the containers and init containers."""
    for group in ("initContainers", "containers"):
        for number, container in enumerate(pod.get(group) or []):
            yield f"{group}[{number}]", container


def restricted(pod: dict[str, Any], memory_locking: bool = False) -> Iterator[str]:
    """What PodSecurity `restricted` refuses in a pod spec: "field: found ..., accepted: ...".

    memory_locking: IPC_LOCK is let through, for a namespace of another level.
    """
    security = pod.get("securityContext") or {}
    for field in ("hostNetwork", "hostPID", "hostIPC"):
        if pod.get(field):
            yield f"{field}: found true, accepted: false"
    for volume in pod.get("volumes") or []:
        for source in set(volume) - {"name"} - VOLUMES:
            yield f"volumes.{volume['name']}: found {source}, accepted: {', '.join(sorted(VOLUMES))}"
    for sysctl in security.get("sysctls") or []:
        yield f"securityContext.sysctls: found {sysctl['name']}, accepted: none"
    if security.get("runAsUser") == 0:
        yield "securityContext.runAsUser: found 0, accepted: another user than root"
    for place, container in containers(pod):
        yield from (f"{place}.{problem}" for problem in _container(container, security, memory_locking))


def _container(container: dict[str, Any], pod: dict[str, Any], memory_locking: bool) -> Iterator[str]:
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
    if seccomp not in SECCOMP:
        yield f"securityContext.seccompProfile.type: found {seccomp}, accepted: {', '.join(SECCOMP)}"
    if own.get("procMount", "Default") != "Default":
        yield f"securityContext.procMount: found {own['procMount']}, accepted: Default"
    capabilities = own.get("capabilities") or {}
    if "ALL" not in (capabilities.get("drop") or []):
        yield f"securityContext.capabilities.drop: found {capabilities.get('drop') or []}, accepted: [ALL]"
    accepted = {"NET_BIND_SERVICE"} | ({"IPC_LOCK"} if memory_locking else set())
    for name in sorted(set(capabilities.get("add") or []) - accepted):
        yield f"securityContext.capabilities.add: found {name}, accepted: {', '.join(sorted(accepted))}"
    for port in container.get("ports") or []:
        if port.get("hostPort"):
            yield f"ports: found hostPort {port['hostPort']}, accepted: none"
