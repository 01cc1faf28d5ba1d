"""Renders a JobSpec as a manifest: train as a PyTorchJob or (Trainer v2) a TrainJob, other stages as batch Jobs."""

from __future__ import annotations

import copy
import hashlib
import json
from typing import Any

from phantom.cluster.spec import ENV_OF_ONE_RUN, METRICS_PORT, TERMINATION_LOG, WORKSPACE, JobSpec
from phantom.errors import InvalidData, UserError

JOB_LABEL, STAGE_LABEL = "phantom/job", "phantom/stage"  # of jobs and their pods
DIGEST_ANNOTATION = "phantom/spec"  # of jobs
QUEUE_LABEL = "kueue.x-k8s.io/queue-name"
RENDEZVOUS_PORT = 23456
USER_ID = 1000  # of the image
TRAINING_RUNTIME = "phantom"  # of k8s/jobs/trainer-v2/
JOIN_TIMEOUT_SECONDS = 3600  # for all pods to join the rendezvous
READ_TIMEOUT_SECONDS = 900  # for the rendezvous' store, in the first pod, to respond
FIELD_MANAGER = "phantom.local/submit"

Manifest = dict[str, Any]


def render(spec: JobSpec) -> Manifest:
    """The manifest of a job, annotated with its digest: by it an existing job is recognized as the same one."""
    if spec.stage != "train":
        body = _job(spec)
    elif spec.settings.operator == "pytorchjob":
        body = _pytorchjob(spec)
    else:
        body = _trainjob(spec)
    labels = _labels(spec) | ({QUEUE_LABEL: spec.settings.queue} if spec.settings.queue else {})
    metadata = {"name": spec.name, "namespace": spec.settings.namespace, "labels": labels}
    manifest = {"apiVersion": body["apiVersion"], "kind": body["kind"], "metadata": metadata, "spec": body["spec"]}
    metadata["annotations"] = {DIGEST_ANNOTATION: digest(manifest)}
    return manifest


def digest(manifest: Manifest) -> str:
    """Digest of a manifest without the variables that may differ between calls for the same work.

    Settings that decide the result are in the job's name.
    """
    common = copy.deepcopy(manifest)
    for container in _containers(common):
        container["env"] = [entry for entry in container.get("env", []) if entry["name"] not in ENV_OF_ONE_RUN]
    return hashlib.sha256(json.dumps(common, sort_keys=True).encode()).hexdigest()[:16]


def _pytorchjob(spec: JobSpec) -> Manifest:
    """Workers only: with a Master the operator adds an init container that Pod Security `restricted` rejects.

    The elastic policy is there for torchrun's c10d rendezvous; the size is fixed, minReplicas = maxReplicas.
    """
    pod = _pod(spec, "pytorch")
    ports = {"pytorchjob-port": RENDEZVOUS_PORT, "metrics": METRICS_PORT}
    pod["spec"]["containers"][0]["ports"] = [{"name": name, "containerPort": port} for name, port in ports.items()]
    return {
        "apiVersion": "kubeflow.org/v1",
        "kind": "PyTorchJob",
        "spec": {
            "nprocPerNode": str(spec.processes),
            "elasticPolicy": {
                "minReplicas": spec.pods,
                "maxReplicas": spec.pods,
                "maxRestarts": 0,
                "rdzvBackend": "c10d",
                "rdzvConf": [
                    {"key": "join_timeout", "value": str(JOIN_TIMEOUT_SECONDS)},
                    {"key": "read_timeout", "value": str(READ_TIMEOUT_SECONDS)},
                ],
            },
            "pytorchReplicaSpecs": {"Worker": {"replicas": spec.pods, "restartPolicy": "OnFailure", "template": pod}},
            "runPolicy": {
                # Restarts of all pods are counted together, and the job fails when there are this many.
                "backoffLimit": spec.settings.restarts * spec.pods + 1,
                "cleanPodPolicy": "Running",
                "suspend": False,
                "ttlSecondsAfterFinished": spec.settings.keep_hours * 3600,
            },
        },
    }


def _trainjob(spec: JobSpec) -> Manifest:
    """What a TrainJob may set for its pods is in `trainer` and `runtimePatches`; the rest is in the TrainingRuntime."""
    pod = _pod(spec, "node")
    (container,) = pod["spec"]["containers"]
    patched = ("affinity", "imagePullSecrets", "nodeSelector", "securityContext", "serviceAccountName", "tolerations")
    template = {
        "metadata": pod["metadata"],
        "spec": {
            **{key: pod["spec"][key] for key in (*patched, "volumes") if key in pod["spec"]},
            "containers": [{key: container[key] for key in ("name", "securityContext", "volumeMounts")}],
        },
    }
    return {
        "apiVersion": "trainer.kubeflow.org/v1alpha1",
        "kind": "TrainJob",
        "spec": {
            "runtimeRef": {"apiGroup": "trainer.kubeflow.org", "kind": "TrainingRuntime", "name": TRAINING_RUNTIME},
            "trainer": {
                "image": container["image"],
                "command": container["command"],
                # envFrom, the grace period and the working directory can only be set in the runtime.
                "env": container["env"],
                "numNodes": spec.pods,
                "numProcPerNode": spec.processes,
                "resourcesPerNode": container["resources"],
            },
            "runtimePatches": [
                {
                    "manager": FIELD_MANAGER,
                    "trainingRuntimeSpec": {
                        "template": {
                            "spec": {"replicatedJobs": [{"name": "node", "template": {"spec": {"template": template}}}]}
                        }
                    },
                }
            ],
        },
    }


def _job(spec: JobSpec) -> Manifest:
    """An Indexed Job for the parts of encode or evaluate, else a pod. Wrong settings (exit code 2) are not retried, and
    an index whose input is wrong (`InvalidData`) is not either: the others go on."""
    pod = _pod(spec, "stage")
    pod["spec"]["restartPolicy"] = "Never"
    rules: list[Manifest] = [
        {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
        _on_exit("FailJob", UserError.exit_code),
    ]
    restarts = {"backoffLimit": spec.settings.restarts * spec.pods}
    if spec.indexes is not None:
        rules.append(_on_exit("FailIndex", InvalidData.exit_code))
        restarts = {"backoffLimitPerIndex": spec.settings.restarts}
    body: Manifest = {
        "completions": spec.indexes or spec.pods,
        "parallelism": spec.pods,
        "completionMode": "NonIndexed" if spec.indexes is None else "Indexed",
        **restarts,
        "ttlSecondsAfterFinished": spec.settings.keep_hours * 3600,
        "podFailurePolicy": {"rules": rules},
        "template": pod,
    }
    return {"apiVersion": "batch/v1", "kind": "Job", "spec": body}


def _on_exit(action: str, code: int) -> Manifest:
    return {"action": action, "onExitCodes": {"containerName": "stage", "operator": "In", "values": [code]}}


def _pod(spec: JobSpec, name: str) -> Manifest:
    """The pod template: not root, only /tmp and the workspace writable, no service account token."""
    settings = spec.settings
    gpus = {settings.gpu: str(spec.processes)} if settings.gpu and spec.has_gpus else {}
    resources = {
        "cpu": str(settings.cpu * spec.processes),
        "memory": f"{settings.memory_gib * spec.processes}Gi",
        **gpus,
        **dict(pair.split("=", 1) for pair in settings.resources),
    }
    volumes = {
        "workspace": (WORKSPACE, {"persistentVolumeClaim": {"claimName": settings.volume}}),
        "tmp": ("/tmp", {"emptyDir": {"sizeLimit": "20Gi"}}),
        "shm": (
            "/dev/shm",
            {"emptyDir": {"medium": "Memory", "sizeLimit": f"{settings.shared_memory_gib * spec.processes}Gi"}},
        ),
    }
    container: Manifest = {
        "name": name,
        "image": settings.image,
        "imagePullPolicy": "IfNotPresent",
        "command": list(spec.command),
        "workingDir": WORKSPACE,
        "env": [{"name": key, "value": value} for key, value in spec.env.items()],
        "envFrom": [{"secretRef": {"name": secret, "optional": True}} for secret in settings.secrets],
        "resources": {"requests": resources, "limits": resources},
        "volumeMounts": [{"name": key, "mountPath": path} for key, (path, _) in volumes.items()],
        "terminationMessagePath": TERMINATION_LOG,
        "terminationMessagePolicy": "FallbackToLogsOnError",
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]} | ({"add": ["IPC_LOCK"]} if settings.lock_memory else {}),
        },
    }
    pod: Manifest = {
        "serviceAccountName": settings.service_account,
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "terminationGracePeriodSeconds": settings.grace_seconds,
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": USER_ID,
            "runAsGroup": USER_ID,
            "fsGroup": USER_ID,
            "fsGroupChangePolicy": "OnRootMismatch",
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "containers": [container],
        "volumes": [{"name": key, **source} for key, (_, source) in volumes.items()],
    }
    if settings.gpu:
        pod["tolerations"] = [{"key": settings.gpu, "operator": "Exists", "effect": "NoSchedule"}]
    if settings.node_selector:
        pod["nodeSelector"] = dict(pair.split("=", 1) for pair in settings.node_selector)
    if settings.priority_class:
        pod["priorityClassName"] = settings.priority_class
    if settings.pull_secret:
        pod["imagePullSecrets"] = [{"name": settings.pull_secret}]
    if spec.stage == "train" and spec.pods > 1:
        pod["affinity"] = {"podAffinity": {"preferredDuringSchedulingIgnoredDuringExecution": [_same_zone(spec)]}}
    annotations = {"cluster-autoscaler.kubernetes.io/safe-to-evict": "false", "karpenter.sh/do-not-disrupt": "true"}
    return {"metadata": {"labels": _labels(spec), "annotations": annotations}, "spec": pod}


def _same_zone(spec: JobSpec) -> Manifest:
    """Prefers one zone for all pods of a job, which exchange gradients."""
    term = {"labelSelector": {"matchLabels": {JOB_LABEL: spec.name}}, "topologyKey": "topology.kubernetes.io/zone"}
    return {"weight": 100, "podAffinityTerm": term}


def _labels(spec: JobSpec) -> dict[str, str]:
    return {
        "app.kubernetes.io/name": "phantom",
        "app.kubernetes.io/component": "job",
        JOB_LABEL: spec.name,
        STAGE_LABEL: spec.stage,
    }


def _containers(manifest: Manifest) -> list[Manifest]:
    """The containers (for a TrainJob its trainer) that have `env`."""
    spec = manifest["spec"]
    if manifest["kind"] == "TrainJob":
        return [spec["trainer"]]
    template = spec["template"] if manifest["kind"] == "Job" else spec["pytorchReplicaSpecs"]["Worker"]["template"]
    return template["spec"]["containers"]
