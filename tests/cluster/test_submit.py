"""Stages submitted as jobs, adopted, replaced and cancelled: the real clients, and local processes as pods."""

from __future__ import annotations

import json
import signal
import time
from typing import Any

import pytest
import yaml

from phantom.cluster import api, submit, watch
from phantom.cluster.render import DIGEST_ANNOTATION, render
from phantom.cluster.spec import make_spec
from phantom.cluster.submit import run_job
from phantom.errors import InvalidData, StageFailed, UserError
from tests.cluster.conftest import OF_THE_RUNTIME, Cluster
from tests.cluster.jobs import DONE, WAITS, leaves, meanwhile, phantom, the_job, until


def test_a_job_runs_the_stage_with_its_settings_and_its_log_is_shown(cluster: Cluster, capfd: Any):
    cluster.image(torchrun=f'cp "$5" seen.yaml; echo "$@" > seen; echo "train: 1/3 steps"; echo last >&2; {DONE}')
    params = cluster.params("compute.train=kubernetes", "evaluate.sampling.negative_prompt=costs $(HOME) $$ €")
    result = run_job("train", params, cluster.root)
    assert (result.stage, result.pods, result.restarts, result.adopted, result.here) == ("train", 1, 0, False, True)
    assert (cluster.root / "seen").read_text(encoding="utf-8").startswith("-m phantom.cli train --params /")
    seen = yaml.safe_load((cluster.root / "seen.yaml").read_text(encoding="utf-8"))
    assert seen["compute"] == dict.fromkeys(("prepare", "encode", "train", "evaluate"), "local")
    assert seen["train"] == params.model_dump(mode="json")["train"]
    assert seen["evaluate"]["sampling"]["negative_prompt"] == "costs $(HOME) $$ €"
    said = capfd.readouterr().err.splitlines()
    assert "train: 1/3 steps" in said and "last" in said
    assert said[0] == f"train: PyTorchJob {result.job} is submitted to the namespace phantom"
    assert said[-1] == f"train: PyTorchJob {result.job} has succeeded"


@pytest.mark.parametrize("stage", ["encode", "train", "evaluate"])
def test_the_command_line_launches_and_reports(cluster: Cluster, stage: str):
    cluster.image(torchrun="true", python="true")
    arguments = ["--launcher", "kubernetes"] if stage == "train" else []
    cluster.write_params("compute.encode=kubernetes", "compute.evaluate=kubernetes")
    process = phantom(cluster, stage, *arguments, "--json")
    out, said = process.communicate(timeout=180)
    assert process.returncode == 0, said
    job, *merge = [*cluster.api.find("pytorchjobs"), *cluster.api.find("jobs")]
    assert [found["metadata"]["name"] for found in merge] == [f"{job['metadata']['name']}-merge"] * (stage == "encode")
    assert json.loads(out)["stage"] == stage and json.loads(out)["job"] == job["metadata"]["name"]


def test_encode_is_an_indexed_job_and_evaluate_a_job(cluster: Cluster):
    cluster.image(
        python="""
case "$3" in
encode)
    case "$4" in
    --index) echo "$5/$7" >> parts; exit $(test "$5" = 1 -a ! -e again && touch again && echo 1);;
    --merge) cp parts merged; mkdir -p data/latents; echo '{}' > data/latents/index.json;;
    esac;;
evaluate) mkdir -p reports; echo '{}' > reports/evaluation.json;;
esac"""
    )
    params = cluster.params("cluster.encode_pods=2", "cluster.encode_indexes=5")
    encoded = run_job("encode", params, cluster.root)
    assert encoded.here and encoded.pods == 6 and encoded.restarts == 1
    parts = ["0/5", "1/5", "1/5", "2/5", "3/5", "4/5"]
    assert sorted((cluster.root / "merged").read_text(encoding="utf-8").split()) == parts
    assert run_job("encode", params, cluster.root).adopted
    assert sorted((cluster.root / "parts").read_text(encoding="utf-8").split()) == parts
    assert run_job("evaluate", cluster.params(), cluster.root).here


def test_prepare_is_an_indexed_job_and_one_that_writes_the_manifest(cluster: Cluster):
    cluster.image(
        python="""
case "$4" in
--index) echo "$5/$7" >> parts;;
*) mkdir -p data/clips; cp parts data/clips/manifest.parquet;;
esac"""
    )
    videos = cluster.root / "videos"
    videos.mkdir()
    params = cluster.params("cluster.prepare_pods=3", "data.source=folder", "data.path=videos")
    assert run_job("prepare", params, cluster.root).here
    manifest = cluster.root / "data/clips/manifest.parquet"
    assert sorted(manifest.read_text(encoding="utf-8").split()) == ["0/3", "1/3", "2/3"]
    assert [job["metadata"]["name"].endswith("-manifest") for job in cluster.api.find("jobs")] == [False, True]
    assert run_job("prepare", params, cluster.root).adopted
    (videos / "new.mp4").touch()
    assert not run_job("prepare", params, cluster.root).adopted


def test_the_videos_of_an_evaluation_are_an_indexed_job_and_its_scores_another(cluster: Cluster):
    cluster.image(
        python="""
case "$4" in
--index) echo "$5/$7" >> parts;;
*) cp parts scored; mkdir -p reports; echo '{}' > reports/evaluation.json;;
esac"""
    )
    params = cluster.params("cluster.evaluate_pods=3")
    assert run_job("evaluate", params, cluster.root).here
    assert sorted((cluster.root / "scored").read_text(encoding="utf-8").split()) == ["0/3", "1/3", "2/3"]
    assert [job["metadata"]["name"].endswith("-score") for job in cluster.api.find("jobs")] == [False, True]
    assert run_job("evaluate", params, cluster.root).adopted


def test_an_index_with_wrong_input_fails_alone_and_the_next_call_does_it_again(cluster: Cluster, capfd: Any):
    cluster.image(
        python=f"""
case "$4" in
--merge) mkdir -p data/latents; echo '{{}}' > data/latents/index.json;;
*) echo "$5" >> parts; test "$5" != 1 -o -e mended || {{ {leaves(InvalidData.exit_code, "a.mp4: no such file")}; }};;
esac"""
    )
    params = cluster.params("cluster.encode_pods=1", "cluster.encode_indexes=3")
    with pytest.raises(StageFailed, match=r"^a\.mp4: no such file$"):
        run_job("encode", params, cluster.root)
    assert (cluster.root / "parts").read_text(encoding="utf-8").split() == ["0", "1", "2"]
    (cluster.root / "mended").touch()
    assert run_job("encode", params, cluster.root).here


def test_finished_parts_are_taken_as_they_are_until_they_are_merged(cluster: Cluster):
    """The submitter dies between the two jobs; later data/latents lacks a file."""
    script = "mkdir -p data/latents; echo '{}' > data/latents/index.json; echo x > data/latents/shard"
    cluster.image(python=f'case "$4" in --merge) {script};; *) echo "$5" >> parts;; esac')
    params, spec = cluster.params(), make_spec("encode", cluster.params(), cluster.root)
    connection = api.Connection(params.cluster, 60)
    watcher = watch.JobWatcher(connection, "encode", "Job", spec.name, cluster.root)
    submit.run_manifest(spec, render(spec), watcher, lambda: False)
    assert run_job("encode", params, cluster.root).here
    assert (cluster.root / "parts").read_text(encoding="utf-8").split() == ["0"]
    (cluster.root / "data/latents/shard").unlink()
    assert run_job("encode", params, cluster.root).here
    assert (cluster.root / "parts").read_text(encoding="utf-8").split() == ["0", "0"]


def test_the_other_operator_runs_the_same(cluster: Cluster, capfd: Any):
    cluster.image(torchrun=f"echo step 7 of $PET_NODE_RANK; {DONE}")
    cluster.add_runtime()
    wanted = [*OF_THE_RUNTIME, "cluster.nodes=2", "train.processes=2"]
    result = run_job("train", cluster.params(*wanted), cluster.root)
    assert result.here and result.pods == 2
    said = capfd.readouterr().err
    assert "step 7 of 0" in said and "step 7 of 1" in said
    assert said.splitlines()[-1] == f"train: TrainJob {result.job} has succeeded"
    cluster.image(torchrun=leaves(2, "models.base: no such folder"))
    with pytest.raises(UserError, match=r"^models\.base: no such folder$"):
        run_job("train", cluster.params(*wanted, "train.seed=1"), cluster.root)


def test_what_a_trainjob_cannot_set_is_refused_where_its_runtime_differs(cluster: Cluster, capfd: Any):
    with pytest.raises(UserError, match=r"^no TrainingRuntime phantom in phantom; `kubectl apply -f k8s/jobs/"):
        run_job("train", cluster.params("cluster.operator=trainjob"), cluster.root)
    cluster.add_runtime()
    for setting, found, accepted in (
        ("grace_seconds=1200", "1200", "600"),
        ("restarts=3", "3", "50"),
        ("keep_hours=48", "48", "24"),
        ("secrets=[phantom-s3,hub]", r"\[phantom-s3, hub\]", r"\[phantom-s3, phantom-mlflow\]"),
        ("priority_class=null", "null", "phantom-training"),
    ):
        name = setting.partition("=")[0]
        line = (
            f"^cluster\\.{name}: found {found}, accepted with cluster\\.operator trainjob: {accepted}, as in the Train"
        )
        with pytest.raises(UserError, match=line):
            run_job("train", cluster.params(*OF_THE_RUNTIME, f"cluster.{setting}"), cluster.root)
    assert not cluster.api.find("trainjobs")


def test_an_operator_that_is_down_refuses_the_job_in_one_line(cluster: Cluster, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(submit, "SUBMIT_TIMEOUT_SECONDS", 0.3)
    cluster.controllers.down = True
    with pytest.raises(StageFailed, match=r"^the cluster could not create PyTorchJob .*failed calling webhook"):
        run_job("train", cluster.params(), cluster.root)
    cluster.image(torchrun=DONE)
    monkeypatch.setattr(submit, "SUBMIT_TIMEOUT_SECONDS", 120.0)
    meanwhile(lambda: time.sleep(0.5), lambda: setattr(cluster.controllers, "down", False))
    assert run_job("train", cluster.params(), cluster.root).here  # it is tried again


def test_a_manifest_with_problems_is_not_submitted(cluster: Cluster, capfd: Any):
    params = cluster.params("cluster.image=phantom-train", "cluster.namespace=Phantom", "cluster.volume=a_b")
    with pytest.raises(UserError) as error:
        run_job("train", params, cluster.root)
    assert "\n" not in str(error.value) and str(error.value).endswith(" (the first of 3 problems)")
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 3 and all(line.startswith("PyTorchJob phantom-train-") for line in lines)
    assert not cluster.api.requests


def test_a_submitted_job_is_annotated_with_its_digest(cluster: Cluster):
    cluster.image(torchrun=DONE)
    run_job("train", cluster.params(), cluster.root)
    assert len(the_job(cluster)["metadata"]["annotations"][DIGEST_ANNOTATION]) == 16


def test_other_work_has_another_name(cluster: Cluster):
    cluster.image(torchrun=DONE)
    names = {run_job("train", cluster.params(), cluster.root).job}
    names.add(run_job("train", cluster.params("train.seed=1"), cluster.root).job)
    (cluster.root / "data/latents").mkdir(parents=True)
    (cluster.root / "data/latents/index.json").write_text("{}", encoding="utf-8")
    names.add(run_job("train", cluster.params(), cluster.root).job)
    assert len(names) == 3


def test_a_failed_job_is_replaced_by_the_next_call(cluster: Cluster):
    cluster.image(torchrun="exit 1")
    with pytest.raises(StageFailed):
        run_job("train", cluster.params("cluster.restarts=1"), cluster.root)
    cluster.image(torchrun=DONE)
    assert run_job("train", cluster.params("cluster.restarts=1"), cluster.root).here


def test_after_a_watcher_is_killed_the_next_one_adopts_the_job(cluster: Cluster):
    cluster.image(torchrun=f"echo step 7; {WAITS}")
    cluster.write_params()
    first = phantom(cluster, "train", "--launcher", "kubernetes")
    until((cluster.root / "started").exists)
    time.sleep(0.5)
    first.kill()
    first.communicate()
    assert cluster.controllers.running()
    asked = len(cluster.api.requests)
    second = phantom(cluster, "train", "--launcher", "kubernetes", "--json")
    until(lambda: any("POST" in request for request in cluster.api.requests[asked:]), 180)
    (cluster.root / "go").touch()
    out, said = second.communicate(timeout=180)
    assert second.returncode == 0, said
    assert json.loads(out)["adopted"] is True and json.loads(out)["here"] is True
    assert "already exists: adopting it" in said and "step 7" in said
    assert len((cluster.root / "started").read_text(encoding="utf-8").split()) == 1


def test_a_running_job_of_another_spec_is_left_alone(cluster: Cluster):
    cluster.image(torchrun=WAITS)
    run = meanwhile(lambda: run_job("train", cluster.params(), cluster.root))
    until((cluster.root / "started").exists)
    with pytest.raises(StageFailed, match=r"already exists, with other settings of cluster\.\*; `kubectl -n phantom"):
        run_job("train", cluster.params("cluster.memory_gib=9"), cluster.root)
    # Settings that have nothing to do with the stage make no other job of it.
    meanwhile(lambda: time.sleep(0.5), (cluster.root / "go").touch)
    assert run_job("train", cluster.params("evaluate.seed=5"), cluster.root).adopted
    run.join(20)


def test_an_interrupted_watcher_deletes_the_job_and_its_pods_save(cluster: Cluster):
    cluster.image(torchrun=WAITS)
    cluster.write_params()
    process = phantom(cluster, "train", "--launcher", "kubernetes")
    until((cluster.root / "started").exists)
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=180)
    assert process.returncode == 75
    assert said.splitlines()[-1].startswith("train: interrupted; PyTorchJob phantom-train-")
    until(lambda: not cluster.api.find("pytorchjobs") and not cluster.api.find("pods"))
    assert (cluster.root / "saved").read_text(encoding="utf-8") == "saved\n"


def test_a_terminated_watcher_leaves_the_job_which_the_next_one_adopts(cluster: Cluster):
    cluster.image(torchrun=WAITS)
    cluster.write_params()
    process = phantom(cluster, "train", "--launcher", "kubernetes")
    until((cluster.root / "started").exists)
    time.sleep(0.5)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=180)
    assert process.returncode == 75
    assert (
        said.splitlines()[-1]
        == f"train: stopped; PyTorchJob {the_job(cluster)['metadata']['name']} goes on, run again to adopt it"
    )
    assert cluster.controllers.running() and not (cluster.root / "saved").exists()
    (cluster.root / "go").touch()
    assert run_job("train", cluster.params(), cluster.root).adopted


def test_a_new_job_waits_for_the_pods_of_the_deleted_one(cluster: Cluster, capfd: Any):
    slow = "until test -e let; do sleep 0.05; done; echo late > order; exit 1"
    cluster.image(torchrun=f"trap '{slow}' TERM; touch started; while true; do sleep 0.05; done")
    params = cluster.params()
    first = phantom(cluster, "train", "--launcher", "kubernetes", "--params", str(cluster.write_params()))
    until((cluster.root / "started").exists)
    time.sleep(0.5)
    first.send_signal(signal.SIGINT)
    first.communicate(timeout=180)
    cluster.image(torchrun=f"echo new >> order; {DONE}")
    asked = len(cluster.api.requests)
    meanwhile(
        lambda: until(lambda: sum("POST" in request for request in cluster.api.requests[asked:]) > 1),
        (cluster.root / "let").touch,
    )
    assert run_job("train", params, cluster.root).here
    assert (cluster.root / "order").read_text(encoding="utf-8").split() == ["late", "new"]
    assert "waiting for the pods of the deleted PyTorchJob" in capfd.readouterr().err
