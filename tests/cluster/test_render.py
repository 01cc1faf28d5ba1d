"""The manifests of jobs: valid for every preset, and what in them depends on the settings."""

from __future__ import annotations

import json
from typing import Any

import pytest
import yaml

from phantom.cluster.render import DIGEST_ANNOTATION, render
from phantom.cluster.spec import last_spec, make_spec
from phantom.cluster.validation import validate_manifest
from phantom.config import Params, load_params, preset_names, preset_path
from phantom.errors import UserError
from phantom.training.metrics import METRICS_PORT_ENV
from tests.cluster.schemas import schema_errors

STAGES = ("prepare", "encode", "train", "evaluate")
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
def test_every_manifest_is_valid(stage: str, preset: str, more: list[str], operator: str):
    if preset != "wan2.2-ti2v-5b" and more:
        more = [*more, "train.processes=2", "train.accumulation=1"]
    made = manifest(stage, *more, f"cluster.operator={operator}", preset=preset)
    assert schema_errors(made) == []
    assert validate_manifest(made, allow_ipc_lock=bool(more)) == []


def test_the_schema_is_strict():
    made = manifest("train")
    made["spec"]["nprocPerNode"] = 8
    made["spec"]["runPolicy"]["cleanPodPolcy"] = "None"
    assert len(schema_errors(made)) == 2


def test_processes_are_divided_among_pods_with_a_gpu_each():
    made = manifest("train", "cluster.nodes=2", "train.processes=16", "train.accumulation=4")
    worker = made["spec"]["pytorchReplicaSpecs"]["Worker"]
    assert worker["replicas"] == 2 and made["spec"]["nprocPerNode"] == "8"
    assert pod(made)["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == "8"
    assert made["spec"]["elasticPolicy"]["minReplicas"] == made["spec"]["elasticPolicy"]["maxReplicas"] == 2
    with pytest.raises(UserError, match=r"cluster\.nodes: found 3, accepted: divisors of train\.processes 8; .*: 2$"):
        manifest("train", "cluster.nodes=3")


def test_the_merge_has_no_gpu_and_may_run_where_they_are():
    merge = pod(render(last_spec(make_spec("encode", params(*EVERYTHING)))))
    assert "gpu" not in json.dumps(merge["containers"][0]["resources"])
    assert merge["nodeSelector"] == {"nvidia.com/gpu.product": "NVIDIA-H100"}
    assert [found["key"] for found in merge["tolerations"]] == ["nvidia.com/gpu"]


def test_videos_and_scores_of_an_evaluation_have_a_gpu_each():
    parts = make_spec("evaluate", params("cluster.evaluate_pods=4"))
    for spec in (parts, last_spec(parts)):
        assert pod(render(spec))["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == "1"
    assert render(parts)["spec"]["completions"] == render(parts)["spec"]["parallelism"] == 4
    assert make_spec("evaluate", params("cluster.evaluate_pods=1")).indexes is None


def test_prepare_has_no_gpu_and_is_known_by_its_source(tmp_path):
    parts = make_spec("prepare", params("data.source=folder", "data.path=videos", "cluster.prepare_pods=4"), tmp_path)
    for spec in (parts, last_spec(parts)):
        assert "gpu" not in json.dumps(pod(render(spec))["containers"][0]["resources"])
    assert render(parts)["spec"]["completions"] == render(parts)["spec"]["parallelism"] == 4
    assert make_spec("prepare", params("data.source=worlds", "cluster.prepare_pods=4"), tmp_path).indexes is None
    (tmp_path / "videos").mkdir()
    names = []
    for name in ("a.mp4", "b.mp4"):
        (tmp_path / "videos" / name).touch()
        names.append(make_spec("prepare", params("data.source=folder", "data.path=videos"), tmp_path).name)
    assert len({*names, parts.name}) == 3


def test_no_gpu_is_requested_without_cluster_gpu():
    assert "gpu" not in json.dumps(pod(manifest("train", preset="mini"))["containers"][0]["resources"])


def test_the_grace_period_is_longer_than_torchruns_shutdown_timeout():
    made = pod(manifest("train", "cluster.grace_seconds=100"))
    env = {entry["name"]: entry["value"] for entry in made["containers"][0]["env"]}
    assert int(env["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"]) < made["terminationGracePeriodSeconds"] == 100


def test_what_changes_a_jobs_name_and_its_digest():
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


def test_the_log_of_a_job_is_json_unless_the_settings_say_otherwise():
    for stage in ("encode", "train", "evaluate"):
        assert make_spec(stage, params()).env["PHANTOM_LOG"] == "json"
        assert make_spec(stage, params("cluster.env=[PHANTOM_LOG=text]")).env["PHANTOM_LOG"] == "text"


def test_prometheus_finds_the_metrics_of_training_alone():
    (container,) = pod(manifest("train"))["containers"]
    (port,) = [each["containerPort"] for each in container["ports"] if each["name"] == "metrics"]
    assert {"name": METRICS_PORT_ENV, "value": str(port)} in container["env"]
    assert METRICS_PORT_ENV not in make_spec("encode", params()).env


def test_the_parent_run_in_mlflow_changes_neither_name_nor_digest(monkeypatch: pytest.MonkeyPatch):
    alone = manifest("train")
    monkeypatch.setenv("PHANTOM_PIPELINE", "pipeline of today")
    of_a_pipeline = manifest("train")
    assert of_a_pipeline["metadata"] == alone["metadata"] and of_a_pipeline != alone
    text = json.dumps(of_a_pipeline)
    assert '{"name": "PHANTOM_PIPELINE", "value": "pipeline of today"}' in text


def test_settings_reach_the_pod_unchanged():
    hard = "costs $(HOME) $$ \"quoted\" 'too' ä\n"
    made = params().model_copy(update={"preset": hard})
    text = make_spec("evaluate", made).env["PHANTOM_PARAMS"]
    assert "$" not in text and json.loads(text)["preset"] == hard


def test_a_manifest_is_plain_yaml():
    made = manifest("train", *EVERYTHING)
    assert yaml.safe_load(yaml.safe_dump(made)) == made
