"""A job spec as manifests: PyTorchJob (training operator v1), TrainJob (Trainer v2), and batch Jobs for the rest."""

from __future__ import annotations

import copy
import hashlib
import json
from typing import Any

from phantom.cluster.spec import MESSAGE, OF_ONE_CALL, WORKSPACE, JobSpec

JOB, STAGE, SPEC = "phantom/job", "phantom/stage", "phantom/spec"  # labels of jobs and pods; annotation of jobs
QUEUE = "kueue.x-k8s.io/queue-name"
PORT = 23456  # of the rendezvous
USER = 1000  # of the image
RUNTIME = "phantom"  # the TrainingRuntime of k8s/jobs/trainer-v2/
JOIN_SECONDS = 3600  # that a pod waits for all others
STORE_SECONDS = 900  # that it waits for an answer of the first one
MANAGER = "phantom.local/submit"

Manifest = dict[str, Any]


def render(spec: JobSpec) -> Manifest:
    """The manifest of a job, with a digest of it as an annotation: a job that is there can be told to be this one."""
    if spec.stage != "train":
        body = _job(spec)
    elif spec.settings.operator == "pytorchjob":
        body = _pytorchjob(spec)
    else:
        body = _trainjob(spec)
    labels = _labels(spec) | ({QUEUE: spec.settings.queue} if spec.settings.queue else {})
    metadata = {"name": spec.name, "namespace": spec.settings.namespace, "labels": labels}
    manifest = {"apiVersion": body["apiVersion"], "kind": body["kind"], "metadata": metadata, "spec": body["spec"]}
    metadata["annotations"] = {SPEC: digest(manifest)}
    return manifest


def digest(manifest: Manifest) -> str:
    """Of all but what a call hands on: the settings that matter are in the job's name, the others may differ."""
    bare = copy.deepcopy(manifest)
    for container in _containers(bare):
        container["env"] = [entry for entry in container.get("env", []) if entry["name"] not in OF_ONE_CALL]
    return hashlib.sha256(json.dumps(bare, sort_keys=True).encode()).hexdigest()[:16]


def _pytorchjob(spec: JobSpec) -> Manifest:
    """Workers alone: a Master would give the workers an init container that PodSecurity `restricted` refuses.

    Elastic in form, for the rendezvous of torchrun that comes with it, but of one size: min = max.
    """
    pod = _pod(spec, "pytorch")
    pod["spec"]["containers"][0]["ports"] = [{"name": "pytorchjob-port", "containerPort": PORT}]
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
                    {"key": "join_timeout", "value": str(JOIN_SECONDS)},
                    {"key": "read_timeout", "value": str(STORE_SECONDS)},
                ],
            },
            "pytorchReplicaSpecs": {"Worker": {"replicas": spec.pods, "restartPolicy": "OnFailure", "template": pod}},
            "runPolicy": {
                "backoffLimit": max(1, spec.settings.restarts * spec.pods),  # it counts over all pods
                "cleanPodPolicy": "Running",
                "suspend": False,
                "ttlSecondsAfterFinished": spec.settings.keep_hours * 3600,
            },
        },
    }


def _trainjob(spec: JobSpec) -> Manifest:
    """What a TrainJob may say of its pods goes into patches; the rest is in the runtime."""
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
            "runtimeRef": {"apiGroup": "trainer.kubeflow.org", "kind": "TrainingRuntime", "name": RUNTIME},
            "trainer": {
                "image": container["image"],
                "command": container["command"],
                # Variables from secrets, the grace period and the working directory are the runtime's to state.
                "env": container["env"],
                "numNodes": spec.pods,
                "numProcPerNode": spec.processes,
                "resourcesPerNode": container["resources"],
            },
            "runtimePatches": [
                {
                    "manager": MANAGER,
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
    """An Indexed Job for encode, each pod a share; one pod for evaluate. Wrong input (exit code 2) fails it at once."""
    pod = _pod(spec, "stage")
    pod["spec"]["restartPolicy"] = "Never"
    body: Manifest = {
        "completions": spec.pods,
        "parallelism": spec.pods,
        "completionMode": "Indexed" if spec.stage == "encode" else "NonIndexed",
        "backoffLimit": spec.settings.restarts * spec.pods,
        "ttlSecondsAfterFinished": spec.settings.keep_hours * 3600,
        "podFailurePolicy": {
            "rules": [
                {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
                {
                    "action": "FailJob",
                    "onExitCodes": {"containerName": "stage", "operator": "In", "values": [2]},
                },
            ]
        },
        "template": pod,
    }
    return {"apiVersion": "batch/v1", "kind": "Job", "spec": body}


def _pod(spec: JobSpec, name: str) -> Manifest:
    """The pod template: not root, nothing writable but /tmp and the workspace, no token of the API."""
    settings = spec.settings
    gpus = {settings.gpu: str(spec.processes)} if settings.gpu else {}
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
        "terminationMessagePath": MESSAGE,
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
            "runAsUser": USER,
            "runAsGroup": USER,
            "fsGroup": USER,
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
        pod["affinity"] = {"podAffinity": {"preferredDuringSchedulingIgnoredDuringExecution": [_near(spec)]}}
    annotations = {"cluster-autoscaler.kubernetes.io/safe-to-evict": "false", "karpenter.sh/do-not-disrupt": "true"}
    return {"metadata": {"labels": _labels(spec), "annotations": annotations}, "spec": pod}


def _near(spec: JobSpec) -> Manifest:
    """Pods of one job rather in one zone, for their traffic."""
    term = {"labelSelector": {"matchLabels": {JOB: spec.name}}, "topologyKey": "topology.kubernetes.io/zone"}
    return {"weight": 100, "podAffinityTerm": term}


def _labels(spec: JobSpec) -> dict[str, str]:
    return {
        "app.kubernetes.io/name": "phantom",
        "app.kubernetes.io/component": "job",
        JOB: spec.name,
        STAGE: spec.stage,
    }


def _containers(manifest: Manifest) -> list[Manifest]:
    """Those with variables, wherever a kind keeps them."""
    spec = manifest["spec"]
    if manifest["kind"] == "TrainJob":
        return [spec["trainer"]]
    template = spec["template"] if manifest["kind"] == "Job" else spec["pytorchReplicaSpecs"]["Worker"]["template"]
    return template["spec"]["containers"]
