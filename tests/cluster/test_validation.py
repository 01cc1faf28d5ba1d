"""Each rule by which a job's manifest is validated, broken once."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest

from phantom.cluster.render import render
from phantom.cluster.spec import make_spec
from phantom.cluster.validation import validate_manifest
from phantom.config import load_params, preset_path


def manifest(stage: str, *overrides: str) -> dict[str, Any]:
    """The manifest of a stage in the paper's preset, which has no problems."""
    return render(make_spec(stage, load_params(preset_path("wan2.2-ti2v-5b"), overrides)))


def at(*path: Any, value: Any) -> Callable[[dict[str, Any]], None]:
    """A change that sets one value of a manifest."""

    def change(made: dict[str, Any]) -> None:
        node: Any = made
        for part in path[:-1]:
            node = node[part]
        node[path[-1]] = value

    return change


WORKER = ("spec", "pytorchReplicaSpecs", "Worker")
POD = (*WORKER, "template", "spec")
CONTAINER = (*POD, "containers", 0)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (at("metadata", "name", value="Phantom"), "metadata.name: found 'Phantom', accepted: at most 50 of a-z"),
        (at("metadata", "name", value="p" * 51), "metadata.name: found 'ppp"),
        (at("metadata", "name", value="1st"), "metadata.name: found '1st'"),
        (at("metadata", "namespace", value="a.b"), "metadata.namespace: found 'a.b'"),
        (at("metadata", "labels", value={"a": "b c"}), "metadata.labels.a: found 'b c'"),
        (at("metadata", "labels", value={"-": "b"}), "metadata.labels: found '-', accepted: [DOMAIN/]NAME"),
        (lambda made: made["spec"].pop("runPolicy"), "runPolicy: missing; kubeflow-training cannot read"),
        (at("spec", "runPolicy", "cleanPodPolicy", value="running"), "accepted: None, Running, All"),
        (at("spec", "runPolicy", "backoffLimit", value=0), "runPolicy.backoffLimit: found 0, accepted: >= 1"),
        (at("spec", "runPolicy", "managedBy", value="me"), "runPolicy.managedBy: found 'me'"),
        (at("spec", "nprocPerNode", value="many"), "nprocPerNode: found 'many', accepted: a string: 'auto'"),
        (at("spec", "nprocPerNode", value=8), "nprocPerNode: found 8, accepted: a string"),
        (at("spec", "elasticPolicy", "rdzvBackend", value="tcp"), "elasticPolicy.rdzvBackend: found 'tcp'"),
        (at("spec", "elasticPolicy", "minReplicas", value=3), "elasticPolicy: found 3 to 1 replicas"),
        (at(*WORKER, "restartPolicy", value="onfailure"), "Worker.restartPolicy: found 'onfailure'"),
        (at(*WORKER, "replicas", value=0), "Worker.replicas: found 0, accepted: >= 1"),
        (at(*CONTAINER, "name", value="main"), "found ['main'], accepted: one named 'pytorch'"),
        (at(*CONTAINER, "image", value="phantom"), "image: found 'phantom', accepted: one with a version"),
        (at(*CONTAINER, "image", value="phantom:latest"), "image: found 'phantom:latest'"),
        (at(*CONTAINER, "image", value="phantom train:1"), "image: found 'phantom train:1', accepted: NAME:VERSION"),
        (at(*CONTAINER, "image", value=""), "image: found ''"),
        (at(*CONTAINER, "resources", "limits", value={"memory": "16 GB"}), "limits.memory: found '16 GB'"),
        (at(*CONTAINER, "resources", "limits", value={"nvidia.com/gpu": "1500m"}), "accepted: a whole number"),
        (at(*CONTAINER, "resources", "limits", value={"nvidia.com/gpu": "1"}), "found another than in limits"),
        (at(*CONTAINER, "volumeMounts", value=[{"name": "x", "mountPath": "/x"}]), "volumeMounts: found 'x'"),
        (at(*CONTAINER, "volumeMounts", 0, "mountPath", value="x"), "mountPath: found 'x', accepted: an absolute path"),
        (at(*CONTAINER, "env", value=[{"name": "1A", "value": ""}]), "env: found '1A'"),
        (at(*CONTAINER, "env", value=[{"name": "A", "value": ""}] * 2), "env: found A twice"),
        (
            at(*POD, "terminationGracePeriodSeconds", value=30),
            "terminationGracePeriodSeconds: found 30, accep",
        ),
        (at(*POD, "serviceAccountName", value="a_b"), "serviceAccountName: found 'a_b'"),
        (at(*POD, "volumes", 0, "persistentVolumeClaim", "claimName", value="A"), "claimName: found 'A'"),
        (at(*POD, "nodeSelector", value={"a": True}), "nodeSelector.a: found True"),
        (at(*POD, "containers", value=[]), "containers: found none"),
        # PodSecurity
        (at(*POD, "hostNetwork", value=True), "hostNetwork: found true, accepted: false"),
        (at(*POD, "volumes", 1, value={"name": "tmp", "hostPath": {"path": "/"}}), "volumes.tmp: found hostPath"),
        (at(*POD, "securityContext", value={}), "securityContext.runAsNonRoot: found no true"),
        (at(*POD, "securityContext", "runAsUser", value=0), "securityContext.runAsUser: found 0"),
        (at(*POD, "securityContext", "seccompProfile", "type", value="Unconfined"), "seccompProfile.type: found Uncon"),
        (at(*POD, "securityContext", "sysctls", value=[{"name": "a", "value": "1"}]), "sysctls: found a"),
        (at(*CONTAINER, "securityContext", value={}), "allowPrivilegeEscalation: found None, accepted: false"),
        (at(*CONTAINER, "securityContext", "privileged", value=True), "privileged: found true"),
        (at(*CONTAINER, "securityContext", "capabilities", "drop", value=[]), "drop: found [], accepted: [ALL]"),
        (at(*CONTAINER, "securityContext", "capabilities", "add", value=["IPC_LOCK"]), "add: found IPC_LOCK"),
        (at(*CONTAINER, "securityContext", "procMount", value="Unmasked"), "procMount: found Unmasked"),
        (at(*CONTAINER, "ports", 0, "hostPort", value=1), "ports: found hostPort 1"),
    ],
)
def test_a_broken_rule_is_reported_in_one_line(change: Callable[[dict[str, Any]], None], said: str):
    made = copy.deepcopy(manifest("train"))
    change(made)
    found = validate_manifest(made)
    assert any(said in line for line in found), found
    assert all(line.startswith(f"PyTorchJob {made['metadata']['name']}: ") and "\n" not in line for line in found)


def test_a_master_is_single_and_has_no_elastic_policy():
    made = manifest("train")
    replicas = made["spec"]["pytorchReplicaSpecs"]
    replicas["Master"] = copy.deepcopy(replicas["Worker"]) | {"replicas": 2}
    found = "\n".join(validate_manifest(made))
    assert "Master.replicas: found 2, accepted: 1" in found and "elasticPolicy: found with a Master" in found
    replicas["Chief"] = replicas.pop("Worker")
    found = "\n".join(validate_manifest(made))
    assert "found 'Chief', accepted: Master, Worker" in found and "found no Worker" in found


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            at("spec", "trainer", "env", value=[{"name": "PET_NNODES", "value": "2"}]),
            "found PET_NNODES, accepted",
        ),
        (at("spec", "trainer", "image", value="x:latest"), "trainer.image: found 'x:latest'"),
        (at("spec", "trainer", "numNodes", value=0), "trainer.numNodes: found 0"),
        (at("spec", "runtimePatches", 0, "manager", value="me"), "manager: found 'me', accepted: DOMAIN/NAME"),
    ],
)
def test_rules_of_a_trainjob(change: Callable[[dict[str, Any]], None], said: str):
    made = copy.deepcopy(manifest("train", "cluster.operator=trainjob"))
    change(made)
    assert any(said in line for line in validate_manifest(made))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (at("spec", "template", "spec", "restartPolicy", value="Always"), "restartPolicy: found Always"),
        (at("spec", "template", "spec", "restartPolicy", value="OnFailure"), "Never, as there is a podFailurePolicy"),
        (at("spec", "completions", value=None), "completions: missing"),
    ],
)
def test_rules_of_a_batch_job(change: Callable[[dict[str, Any]], None], said: str):
    made = copy.deepcopy(manifest("encode"))
    change(made)
    assert any(said in line for line in validate_manifest(made))
