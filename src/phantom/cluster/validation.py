"""Validates a job's manifest before it is submitted, beyond its schema: one line per problem.

The CRD schemas check neither names nor enumerations. The operator's webhook, Pod Security admission and the kubelet do,
but each at a later time and in a place of its own.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from phantom.cluster.pods import containers, pod_security_violations, pod_templates
from phantom.cluster.render import TRAINING_RUNTIME
from phantom.config import Cluster

MAX_NAME_LENGTH = 50  # the operator appends `-worker-NN`, and a Service of that name is limited to 63
DNS_LABEL = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")
DNS_SUBDOMAIN = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*")
QUALIFIED_NAME = re.compile(r"([a-z0-9]([-a-z0-9.]*[a-z0-9])?/)?[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?")
LABEL_VALUE = re.compile(r"([A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?)?")
QUANTITY = re.compile(r"[0-9]+(\.[0-9]+)?(m|k|M|G|T|P|E|Ki|Mi|Gi|Ti|Pi|Ei)?")
IMAGE = re.compile(r"[^\s@:]+(:\d+/[^\s@:]+)?(:[\w][\w.-]{0,127})?(@sha256:[0-9a-f]{64})?")
ENV_NAME = re.compile(r"[-._a-zA-Z][-._a-zA-Z0-9]*")
OPERATOR_ENV = {"PET_NNODES", "PET_NPROC_PER_NODE", "PET_NODE_RANK", "PET_MASTER_ADDR", "PET_MASTER_PORT"}
SHUTDOWN_TIMEOUT = "TORCH_ELASTIC_SHUTDOWN_TIMEOUT"  # s from torchrun's SIGTERM to SIGKILL
ENUMS = {
    "restartPolicy": ("Always", "OnFailure", "Never", "ExitCode"),
    "cleanPodPolicy": ("None", "Running", "All"),
    "rdzvBackend": ("c10d", "etcd", "etcd-v2"),
    "managedBy": ("kubeflow.org/training-operator", "kueue.x-k8s.io/multikueue"),
}


def validate_manifest(manifest: dict[str, Any], allow_ipc_lock: bool = False) -> list[str]:
    """Every problem of a PyTorchJob, TrainJob or Job, one line each: "Kind name: field: found ..., accepted: ...".

    allow_ipc_lock: accept the capability IPC_LOCK, for a namespace that does not enforce `restricted`.
    """
    kinds = {"PyTorchJob": _pytorchjob, "TrainJob": _trainjob, "Job": _job}
    metadata = manifest["metadata"]
    found = [*_metadata(metadata), *kinds[manifest["kind"]](manifest["spec"])]
    for path, template in pod_templates(manifest):
        found += [f"{path}metadata.{line}" for line in _labels(template.get("metadata") or {})]
        pod = template.get("spec") or {}
        found += [f"{path}spec.{line}" for line in (*validate_pod(pod), *pod_security_violations(pod, allow_ipc_lock))]
    return [f"{manifest['kind']} {metadata.get('name')}: {line}" for line in found]


def runtime_conflicts(runtime: dict[str, Any] | None, settings: Cluster) -> list[str]:
    """What a TrainJob cannot set for its pods and its TrainingRuntime sets otherwise than `cluster`, one line each."""
    if runtime is None:
        name, namespace = TRAINING_RUNTIME, settings.namespace
        return [f"no TrainingRuntime {name} in {namespace}; `kubectl apply -f k8s/jobs/trainer-v2/runtime.yaml`"]
    jobset = runtime["spec"]["template"]["spec"]
    pod = jobset["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    seconds = jobset.get("ttlSecondsAfterFinished")
    secrets = [source["secretRef"]["name"] for source in pod["containers"][0].get("envFrom") or []]
    accepted = {
        "restarts": (jobset.get("failurePolicy") or {}).get("maxRestarts", 0),
        "grace_seconds": pod.get("terminationGracePeriodSeconds", 30),
        "keep_hours": seconds // 3600 if seconds else None,
        "secrets": tuple(secrets),
        "priority_class": pod.get("priorityClassName"),
    }
    return [
        f"cluster.{name}: found {_text(getattr(settings, name))}, accepted with cluster.operator trainjob: "
        f"{_text(value)}, as in the TrainingRuntime {TRAINING_RUNTIME} (k8s/jobs/trainer-v2/runtime.yaml)"
        for name, value in accepted.items()
        if getattr(settings, name) != value
    ]


def _text(value: Any) -> str:
    return f"[{', '.join(value)}]" if isinstance(value, tuple) else "null" if value is None else str(value)


def validate_pod(pod: dict[str, Any]) -> Iterator[str]:
    """Problems of a pod spec besides Pod Security: names, images, resources, volume mounts, environment variables."""
    if not pod.get("containers"):
        yield "containers: found none, accepted: at least one"
    volumes = [volume["name"] for volume in pod.get("volumes") or []]
    for name in sorted({name for name in volumes if volumes.count(name) > 1}):
        yield f"volumes: found {name!r} twice"
    for volume in pod.get("volumes") or []:
        claim = (volume.get("persistentVolumeClaim") or {}).get("claimName")
        yield from _name(f"volumes.{volume['name']}.persistentVolumeClaim.claimName", claim)
    yield from _name("serviceAccountName", pod.get("serviceAccountName"))
    yield from _name("priorityClassName", pod.get("priorityClassName"))
    for key, value in (pod.get("nodeSelector") or {}).items():
        yield from _label("nodeSelector", key, value)
    grace = pod.get("terminationGracePeriodSeconds", 30)
    for place, container in containers(pod):
        yield from (f"{place}.{line}" for line in _container(container, volumes))
        for entry in container.get("env") or []:
            name, value = entry["name"], entry.get("value")
            if name == SHUTDOWN_TIMEOUT and int(value) >= grace:
                yield f"terminationGracePeriodSeconds: found {grace}, accepted: more than {name} {value}"


def _container(container: dict[str, Any], volumes: list[str]) -> Iterator[str]:
    yield from _image(container.get("image"))
    for mount in container.get("volumeMounts") or []:
        if mount["name"] not in volumes:
            yield f"volumeMounts: found {mount['name']!r}, accepted: {', '.join(volumes) or 'none'}"
        if not mount["mountPath"].startswith("/"):
            yield f"volumeMounts.{mount['name']}.mountPath: found {mount['mountPath']!r}, accepted: an absolute path"
    yield from _variables("env", container.get("env"))
    yield from _resources("resources", container.get("resources") or {})


def _pytorchjob(spec: dict[str, Any]) -> Iterator[str]:
    replicas = spec.get("pytorchReplicaSpecs") or {}
    elastic, policy = spec.get("elasticPolicy"), spec.get("runPolicy") or {}
    if "runPolicy" not in spec:
        yield "runPolicy: missing; kubeflow-training cannot read a job without it"
    for role in sorted(set(replicas) - {"Master", "Worker"}):
        yield f"pytorchReplicaSpecs: found {role!r}, accepted: Master, Worker"
    for role, replica in replicas.items():
        count = replica.get("replicas", 1)
        if role == "Master" and replica.get("replicas") != 1:
            yield f"pytorchReplicaSpecs.Master.replicas: found {replica.get('replicas')}, accepted: 1"
        elif count < 1:
            yield f"pytorchReplicaSpecs.{role}.replicas: found {count}, accepted: >= 1"
        names = [c.get("name") for c in ((replica.get("template") or {}).get("spec") or {}).get("containers") or []]
        if "pytorch" not in names:
            yield f"pytorchReplicaSpecs.{role}.template.spec.containers: found {names}, accepted: one named 'pytorch'"
        yield from _one_of(f"pytorchReplicaSpecs.{role}.restartPolicy", replica.get("restartPolicy"))
    per_node = spec.get("nprocPerNode", "auto")
    if not (per_node in ("auto", "cpu", "gpu") or (isinstance(per_node, str) and per_node.isdigit() and int(per_node))):
        yield f"nprocPerNode: found {per_node!r}, accepted: a string: 'auto', 'cpu', 'gpu' or a number >= 1"
    if elastic is not None:
        if "Worker" not in replicas:
            yield "pytorchReplicaSpecs: found no Worker, accepted: one, as there is an elasticPolicy"
        elif (
            not elastic.get("minReplicas", 1) <= replicas["Worker"].get("replicas", 1) <= elastic.get("maxReplicas", 1)
        ):
            yield (
                f"elasticPolicy: found {elastic.get('minReplicas')} to {elastic.get('maxReplicas')} replicas, "
                f"accepted: around Worker.replicas {replicas['Worker'].get('replicas')}"
            )
        if "Master" in replicas:
            yield "elasticPolicy: found with a Master, accepted: Workers alone"
        yield from _one_of("elasticPolicy.rdzvBackend", elastic.get("rdzvBackend"))
    yield from _one_of("runPolicy.cleanPodPolicy", policy.get("cleanPodPolicy"))
    yield from _one_of("runPolicy.managedBy", policy.get("managedBy"))
    if policy.get("backoffLimit", 1) < 1:
        yield f"runPolicy.backoffLimit: found {policy['backoffLimit']}, accepted: >= 1 (the first failure counts)"


def _trainjob(spec: dict[str, Any]) -> Iterator[str]:
    trainer = spec.get("trainer") or {}
    yield from (f"trainer.{line}" for line in _image(trainer.get("image")))
    yield from (f"trainer.{line}" for line in _variables("env", trainer.get("env")))
    yield from (f"trainer.{line}" for line in _resources("resourcesPerNode", trainer.get("resourcesPerNode") or {}))
    for name in sorted(OPERATOR_ENV & {entry["name"] for entry in trainer.get("env") or []}):
        yield f"trainer.env: found {name}, accepted: none that the operator sets"
    for key in ("numNodes", "numProcPerNode"):
        if trainer.get(key, 1) < 1:
            yield f"trainer.{key}: found {trainer[key]}, accepted: >= 1"
    for patch in spec.get("runtimePatches") or []:
        if "/" not in patch["manager"] or not DNS_SUBDOMAIN.fullmatch(patch["manager"].split("/")[0]):
            yield f"runtimePatches.manager: found {patch['manager']!r}, accepted: DOMAIN/NAME"
        for job in (patch["trainingRuntimeSpec"].get("template") or {}).get("spec", {}).get("replicatedJobs", []):
            template = job["template"]["spec"]["template"]
            yield from (f"runtimePatches.{job['name']}.metadata.{line}" for line in _labels(template["metadata"]))
            pod = template["spec"]
            names = [volume["name"] for volume in pod.get("volumes") or []]
            for container in pod.get("containers") or []:
                if container.get("env"):
                    yield f"runtimePatches.{job['name']}.{container['name']}.env: found some, accepted: trainer.env"
                for mount in container.get("volumeMounts") or []:
                    if mount["name"] not in names:
                        yield f"runtimePatches.{job['name']}: volumeMounts: found {mount['name']!r}, accepted: {names}"


def _job(spec: dict[str, Any]) -> Iterator[str]:
    restart = spec["template"]["spec"].get("restartPolicy")
    if restart not in ("OnFailure", "Never"):
        yield f"template.spec.restartPolicy: found {restart}, accepted: OnFailure, Never"
    if spec.get("podFailurePolicy") and restart != "Never":
        yield f"template.spec.restartPolicy: found {restart}, accepted: Never, as there is a podFailurePolicy"
    is_indexed = spec.get("completionMode") == "Indexed"
    if is_indexed and not spec.get("completions"):
        yield "completions: missing; an Indexed job states them"
    if not is_indexed and spec.get("backoffLimitPerIndex") is not None:
        yield "backoffLimitPerIndex: found with completionMode NonIndexed, accepted: Indexed"


def _metadata(metadata: dict[str, Any]) -> Iterator[str]:
    name, namespace = metadata.get("name") or "", metadata.get("namespace") or ""
    if not DNS_LABEL.fullmatch(name) or len(name) > MAX_NAME_LENGTH:
        accepted = f"at most {MAX_NAME_LENGTH} of a-z, 0-9 and -, from a letter to no -"
        yield f"metadata.name: found {name!r}, accepted: {accepted}"
    if not DNS_SUBDOMAIN.fullmatch(namespace) or "." in namespace or len(namespace) > 63:
        yield f"metadata.namespace: found {namespace!r}, accepted: at most 63 of a-z, 0-9 and -, from and to no -"
    yield from (f"metadata.{line}" for line in _labels(metadata))


def _labels(metadata: dict[str, Any]) -> Iterator[str]:
    for key, value in (metadata.get("labels") or {}).items():
        yield from _label("labels", key, value)
    for key in metadata.get("annotations") or {}:
        if not QUALIFIED_NAME.fullmatch(key):
            yield f"annotations: found {key!r}, accepted: [DOMAIN/]NAME"


def _label(where: str, key: str, value: Any) -> Iterator[str]:
    if not QUALIFIED_NAME.fullmatch(key):
        yield f"{where}: found {key!r}, accepted: [DOMAIN/]NAME"
    if not isinstance(value, str) or not LABEL_VALUE.fullmatch(value):
        yield f"{where}.{key}: found {value!r}, accepted: at most 63 letters, digits, -, _ and ."


def _name(field: str, name: str | None) -> Iterator[str]:
    if name is not None and (not DNS_SUBDOMAIN.fullmatch(name) or len(name) > 253):
        yield f"{field}: found {name!r}, accepted: a name of a-z, 0-9, - and ."


def _image(image: str | None) -> Iterator[str]:
    if not image or not IMAGE.fullmatch(image):
        yield f"image: found {image!r}, accepted: NAME:VERSION or NAME@sha256:DIGEST"
    elif image.endswith(":latest") or (":" not in image.rsplit("/", 1)[-1] and "@" not in image):
        yield f"image: found {image!r}, accepted: one with a version other than latest, or a digest"


def _variables(where: str, entries: list[dict[str, Any]] | None) -> Iterator[str]:
    names = [entry["name"] for entry in entries or []]
    for name in names:
        if not ENV_NAME.fullmatch(name):
            yield f"{where}: found {name!r}, accepted: letters, digits, _, - and ., and no digit first"
    for name in sorted({name for name in names if names.count(name) > 1}):
        yield f"{where}: found {name} twice"


def _resources(where: str, resources: dict[str, Any]) -> Iterator[str]:
    for group in ("requests", "limits"):
        for name, quantity in (resources.get(group) or {}).items():
            if not QUALIFIED_NAME.fullmatch(name):
                yield f"{where}.{group}: found {name!r}, accepted: cpu, memory, or DOMAIN/NAME"
            if not QUANTITY.fullmatch(str(quantity)):
                yield f"{where}.{group}.{name}: found {quantity!r}, accepted: a quantity such as 2, 500m or 16Gi"
            elif "/" in name and not str(quantity).isdigit():
                yield f"{where}.{group}.{name}: found {quantity!r}, accepted: a whole number"
    for name in resources.get("limits") or {}:
        if (
            "/" in name
            and (resources.get("requests") or {}).get(name, resources["limits"][name]) != resources["limits"][name]
        ):
            yield f"{where}.requests.{name}: found another than in limits, accepted: the same"


def _one_of(field: str, value: str | None) -> Iterator[str]:
    accepted = ENUMS[field.rsplit(".", 1)[-1]]
    if value is not None and value not in accepted:
        yield f"{field}: found {value!r}, accepted: {', '.join(accepted)}"
