"""The manifests of jobs: against the schemas, against the rules beside them, and against what each rule is for."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from typing import Any

import pytest
import yaml

from phantom.cluster.render import DIGEST_ANNOTATION, render
from phantom.cluster.spec import make_spec
from phantom.cluster.validation import validate_manifest
from phantom.config import Params, load_params, preset_names, preset_path
from phantom.errors import UserError
from tests.cluster.schemas import schema_errors

STAGES = ("encode", "train", "evaluate")
EVERYTHING = [
    "cluster.nodes=2",
    "cluster.queue=gpus",
    "cluster.pull_secret=registry",
    "cluster.node_selector=[nvidia.com/gpu.product=NVIDIA-H100]",
    "cluster.resources=[rdma/ib=1]",
    "cluster.lock_memory=true",
    "cluster.env=[NCCL_DEBUG=INFO, NCCL_IB_HCA==mlx5]",
]


def params(*overrides: str, preset: str = "wan2.2-ti2v-5b") -> Params:
    return load_params(preset_path(preset), overrides)


def manifest(stage: str, *overrides: str, preset: str = "wan2.2-ti2v-5b") -> dict[str, Any]:
    return render(make_spec(stage, params(*overrides, preset=preset)))


def pod(job: dict[str, Any]) -> dict[str, Any]:
    spec = job["spec"]
    return (spec["template"] if job["kind"] == "Job" else spec["pytorchReplicaSpecs"]["Worker"]["template"])["spec"]


@pytest.mark.parametrize("operator", ["pytorchjob", "trainjob"])
@pytest.mark.parametrize("more", [[], EVERYTHING], ids=["preset", "everything"])
@pytest.mark.parametrize("preset", preset_names())
@pytest.mark.parametrize("stage", STAGES)
def test_every_job_keeps_to_schema_and_rules(stage: str, preset: str, more: list[str], operator: str):
    if preset == "mini" and more:
        more = [*more, "train.processes=2"]
    made = manifest(stage, *more, f"cluster.operator={operator}", preset=preset)
    assert schema_errors(made) == []
    assert validate_manifest(made, allow_ipc_lock=bool(more)) == []


def test_the_schema_is_strict():
    made = manifest("train")
    made["spec"]["nprocPerNode"] = 8
    made["spec"]["runPolicy"]["cleanPodPolcy"] = "None"
    assert len(schema_errors(made)) == 2


def test_processes_are_divided_among_pods_with_a_gpu_each():
    made = manifest("train", "cluster.nodes=2", "train.processes=16")
    worker = made["spec"]["pytorchReplicaSpecs"]["Worker"]
    assert worker["replicas"] == 2 and made["spec"]["nprocPerNode"] == "8"
    assert pod(made)["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == "8"
    assert made["spec"]["elasticPolicy"]["minReplicas"] == made["spec"]["elasticPolicy"]["maxReplicas"] == 2
    with pytest.raises(UserError, match=r"cluster\.nodes: found 3, accepted: divisors of train\.processes 8; .*: 2$"):
        manifest("train", "cluster.nodes=3")


def test_without_gpus_nothing_asks_for_one():
    assert "gpu" not in json.dumps(pod(manifest("train", preset="mini"))["containers"][0]["resources"])


def test_a_pod_may_save_for_longer_than_torchrun_waits():
    made = pod(manifest("train", "cluster.grace_seconds=100"))
    env = {entry["name"]: entry["value"] for entry in made["containers"][0]["env"]}
    assert int(env["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"]) < made["terminationGracePeriodSeconds"] == 100


def test_the_name_and_the_digest_say_what_they_are_to_say():
    first, same = manifest("train"), manifest("train", "evaluate.seed=3", "register.name=other")
    assert first["metadata"] == same["metadata"]
    other = manifest("train", "train.seed=1")
    assert other["metadata"]["name"] != first["metadata"]["name"]
    assert manifest("train", "train.checkpoint_every=7")["metadata"] == first["metadata"]
    stored, online = (manifest("encode", f"train.physics_latents={kind}") for kind in ("stored", "online"))
    assert stored["metadata"]["name"] != online["metadata"]["name"]
    bigger = manifest("train", "cluster.cpu=13")
    assert bigger["metadata"]["name"] == first["metadata"]["name"]
    assert bigger["metadata"]["annotations"][DIGEST_ANNOTATION] != first["metadata"]["annotations"][DIGEST_ANNOTATION]


def test_the_run_above_it_in_mlflow_makes_no_other_job_of_it(monkeypatch: pytest.MonkeyPatch):
    alone = manifest("train")
    monkeypatch.setenv("PHANTOM_PIPELINE", "pipeline of today")
    of_a_pipeline = manifest("train")
    assert of_a_pipeline["metadata"] == alone["metadata"] and of_a_pipeline != alone
    text = json.dumps(of_a_pipeline)
    assert '{"name": "PHANTOM_PIPELINE", "value": "pipeline of today"}' in text


def test_settings_survive_the_way_into_the_pod():
    hard = "costs $(HOME) $$ \"quoted\" 'too' ä\n"
    made = params().model_copy(update={"preset": hard})
    text = make_spec("evaluate", made).env["PHANTOM_PARAMS"]
    assert "$" not in text and json.loads(text)["preset"] == hard


# --- rules ------------------------------------------------------------------------------------------------------------


def at(*path: Any, value: Any) -> Callable[[dict[str, Any]], None]:
    """Sets a value deep in a manifest."""

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
def test_a_rule_that_is_broken_is_a_line(change: Callable[[dict[str, Any]], None], said: str):
    made = copy.deepcopy(manifest("train"))
    change(made)
    found = validate_manifest(made)
    assert any(said in line for line in found), found
    assert all(line.startswith(f"PyTorchJob {made['metadata']['name']}: ") and "\n" not in line for line in found)


def test_a_master_is_one_and_stands_alone():
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
def test_the_same_for_a_trainjob(change: Callable[[dict[str, Any]], None], said: str):
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
def test_the_same_for_a_job(change: Callable[[dict[str, Any]], None], said: str):
    made = copy.deepcopy(manifest("encode"))
    change(made)
    assert any(said in line for line in validate_manifest(made))


def test_a_manifest_is_plain_yaml():
    made = manifest("train", *EVERYTHING)
    assert yaml.safe_load(yaml.safe_dump(made)) == made
