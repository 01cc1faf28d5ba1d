"""Stages as jobs, from submission to the end, and all that may happen between: the real clients, real processes."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from phantom.cluster import outputs, watch
from phantom.cluster.render import DIGEST_ANNOTATION
from phantom.cluster.submit import run_job
from phantom.errors import StageFailed, UserError
from tests.cluster.conftest import Cluster

ROOT = Path(__file__).resolve().parents[2]
DONE = """
mkdir -p models/phantom "$PHANTOM_KEEP/models/phantom" && echo '{}' > models/phantom/result.json
ln -f models/phantom/result.json "$PHANTOM_KEEP/models/phantom/"
"""
# Ends well as soon as the file `go` is there; asked to stop it says so, as a stage that has saved.
WAITS = f"""
trap 'echo saved >> saved; exit 75' TERM
echo $$ >> started
for i in $(seq 600); do test -e go && break; sleep 0.05; done
{DONE}
"""


def until(holds: Callable[[], Any], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, "it did not come to that"
        time.sleep(0.02)


def looked(cluster: Cluster) -> None:
    """Waits until the watcher has looked at the job a few times from now on, however long that takes."""
    asked = len(cluster.api.requests)
    until(lambda: sum(bool(re.match(r"GET .*/pytorchjobs/", request)) for request in cluster.api.requests[asked:]) > 4)


def meanwhile(*steps: Callable[[], Any]) -> threading.Thread:
    """Runs the steps beside what follows."""
    thread = threading.Thread(target=lambda: [step() for step in steps], daemon=True)
    thread.start()
    return thread


def the_job(cluster: Cluster) -> dict[str, Any]:
    (job,) = cluster.api.find("pytorchjobs")
    return job


def phantom(cluster: Cluster, *arguments: str) -> subprocess.Popen[str]:
    """The command line, in the checkout."""
    code = "import phantom.cluster.watch as w, phantom.cli as c; w.POLL_SECONDS = 0.1; c.main()"
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        cwd=cluster.root,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT / "src")},
    )


# --- well -------------------------------------------------------------------------------------------------------------


def test_a_job_runs_the_stage_with_these_settings_and_its_lines_arrive(cluster: Cluster, capfd: Any):
    cluster.image(torchrun=f'cp "$5" seen.yaml; echo "$@" > seen; echo "train: 1/3 steps"; echo last >&2; {DONE}')
    params = cluster.params("compute.train=kubernetes", "evaluate.sampling.negative_prompt=costs $(HOME) $$ €")
    result = run_job("train", params, cluster.root)
    assert (result.stage, result.pods, result.restarts, result.adopted, result.here) == ("train", 1, 0, False, True)
    assert (cluster.root / "seen").read_text(encoding="utf-8").startswith("-m phantom.cli train --params /")
    seen = yaml.safe_load((cluster.root / "seen.yaml").read_text(encoding="utf-8"))
    assert seen["compute"] == {"encode": "local", "train": "local", "evaluate": "local"}
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
    (job,) = [*cluster.api.find("pytorchjobs"), *cluster.api.find("jobs")]
    assert json.loads(out)["stage"] == stage and json.loads(out)["job"] == job["metadata"]["name"]


def test_encode_is_an_indexed_job_and_evaluate_a_job(cluster: Cluster):
    cluster.image(
        python="""
case "$3" in
encode) echo "$5/$7" >> shares; mkdir -p data/latents; echo '{}' > data/latents/index.json;;
evaluate) mkdir -p reports; echo '{}' > reports/evaluation.json;;
esac"""
    )
    encoded = run_job("encode", cluster.params("cluster.encode_pods=3"), cluster.root)
    assert encoded.here and encoded.pods == 3
    assert sorted((cluster.root / "shares").read_text(encoding="utf-8").split()) == ["0/3", "1/3", "2/3"]
    assert run_job("evaluate", cluster.params(), cluster.root).here


def test_the_other_operator_runs_the_same(cluster: Cluster, capfd: Any):
    cluster.image(torchrun=f"echo step 7 of $PET_NODE_RANK; {DONE}")
    wanted = ["cluster.operator=trainjob", "cluster.nodes=2", "train.processes=2"]
    result = run_job("train", cluster.params(*wanted), cluster.root)
    assert result.here and result.pods == 2
    said = capfd.readouterr().err
    assert "step 7 of 0" in said and "step 7 of 1" in said
    assert said.splitlines()[-1] == f"train: TrainJob {result.job} has succeeded"
    cluster.image(torchrun=leaves(2, "models.base: no such folder"))
    with pytest.raises(UserError, match=r"^models\.base: no such folder$"):
        run_job("train", cluster.params(*wanted, "train.seed=1"), cluster.root)


def test_outputs_that_do_not_arrive_here_are_told(cluster: Cluster, capfd: Any, monkeypatch: pytest.MonkeyPatch):
    cluster.image(torchrun="true")
    assert not run_job("train", cluster.params(), cluster.root).here
    assert "on the volume phantom-workspace, on which this checkout does not lie" in capfd.readouterr().err
    monkeypatch.setenv("PHANTOM_OUTCOME", str(cluster.root / "outcome.json"))
    monkeypatch.setattr("phantom.cluster.submit.FILES_VISIBLE_SECONDS", 0.1)
    with pytest.raises(StageFailed, match="has succeeded, but the outputs are on the volume"):
        run_job("train", cluster.params(), cluster.root)


# --- pods that do not start, or end ---------------------------------------------------------------------------------


def test_a_killed_pod_starts_again_and_the_reason_is_told(cluster: Cluster, capfd: Any):
    cluster.image(torchrun=f"echo step 7; {WAITS}")
    started = cluster.root / "started"
    meanwhile(
        lambda: until(started.exists),
        lambda: looked(cluster),
        lambda: cluster.controllers.kill(cluster.controllers.running()[0]),
        lambda: until(lambda: len(started.read_text().split()) == 2),
        (cluster.root / "go").touch,
    )
    result = run_job("train", cluster.params(), cluster.root)
    assert result.restarts == 1 and result.pods == 1
    said = capfd.readouterr().err
    assert f"train: pod {result.job}-worker-0 ran out of memory; raise cluster.memory_gib" in said
    (kept,) = (cluster.root / "checkpoints/jobs" / result.job).iterdir()
    assert kept.read_text(encoding="utf-8") == "step 7\n"


def test_a_change_of_a_pod_is_looked_at_at_once(cluster: Cluster, capfd: Any, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(watch, "POLL_SECONDS", 600)
    cluster.image(torchrun=f"test -e again || {{ touch again; echo step 7; exit 1; }}\n{DONE}")
    cluster.api.expired = 2  # and such a watch is begun anew
    result = run_job("train", cluster.params(), cluster.root)
    assert result.restarts == 1 and result.seconds < 300
    assert f"pod {result.job}-worker-0 ended with exit code 1\n    step 7\n" in capfd.readouterr().err
    assert cluster.api.expired == 0


def test_an_evicted_pod_is_replaced_and_its_last_lines_are_kept(cluster: Cluster, capfd: Any):
    cluster.image(torchrun=f"echo step 7; {WAITS}")
    started = cluster.root / "started"
    meanwhile(
        lambda: until(started.exists),
        lambda: looked(cluster),
        lambda: cluster.controllers.evict(cluster.controllers.running()[0], "The node was low on resource: memory."),
        lambda: until(lambda: len(started.read_text().split()) == 2),
        (cluster.root / "go").touch,
    )
    result = run_job("train", cluster.params(), cluster.root)
    assert result.pods == 2
    said = capfd.readouterr().err
    evicted = "was evicted (Evicted): The node was low on resource: memory."
    assert f"train: pod {result.job}-worker-0 {evicted}" in said or "is gone" in said
    (kept,) = (cluster.root / "checkpoints/jobs" / result.job).iterdir()
    assert kept.read_text(encoding="utf-8") == "step 7\n"


def test_a_pod_that_waits_for_a_node_or_an_image_is_told_once_and_is_no_failure(cluster: Cluster, capfd: Any):
    cluster.image(torchrun=DONE)
    control = cluster.controllers
    full = "0/3 nodes are available: 3 Insufficient nvidia.com/gpu."
    control.pending, control.no_image = full, "not found"
    meanwhile(
        lambda: looked(cluster),
        lambda: setattr(control, "pending", None),
        lambda: looked(cluster),
        lambda: setattr(control, "no_image", None),
    )
    pod = f"{run_job('train', cluster.params(), cluster.root).job}-worker-0"
    said = capfd.readouterr().err.splitlines()
    assert (
        said.count(f"train: pod {pod} cannot be scheduled: {'0/3 nodes are available: 3 Insufficient nvidia.com/gpu.'}")
        == 1
    )
    assert said.count(f"train: pod {pod} cannot get its image phantom-train:0.2.0: not found") == 1


def test_a_refused_pod_is_told_by_its_event(cluster: Cluster, capfd: Any):
    cluster.image(torchrun=DONE)
    cluster.controllers.idle = True
    refused = 'pods "x" is forbidden: exceeded quota: phantom, requested: requests.nvidia.com/gpu=8'
    meanwhile(
        lambda: until(lambda: cluster.api.find("pytorchjobs")),
        lambda: cluster.api.event(the_job(cluster), "FailedCreatePod", refused),
        lambda: looked(cluster),
        lambda: setattr(cluster.controllers, "idle", False),
    )
    run_job("train", cluster.params(), cluster.root)
    assert f"FailedCreatePod: {refused}" in capfd.readouterr().err


def test_a_job_that_nobody_takes_up_is_told(cluster: Cluster, capfd: Any, monkeypatch: pytest.MonkeyPatch):
    cluster.image(torchrun=DONE)
    cluster.controllers.idle = True
    monkeypatch.setattr(watch, "OPERATOR_TIMEOUT_SECONDS", 0.2)
    meanwhile(lambda: looked(cluster), lambda: setattr(cluster.controllers, "idle", False))
    run_job("train", cluster.params(), cluster.root)
    assert capfd.readouterr().err.count("no controller has reconciled the job yet") == 1


# --- failures ---------------------------------------------------------------------------------------------------------


def test_a_job_that_fails_fails_with_the_last_lines_of_its_log(cluster: Cluster, capfd: Any):
    cluster.image(torchrun="echo step 7; echo 'CUDA error: unspecified launch failure'; exit 1")
    with pytest.raises(StageFailed, match=r"pod .*-worker-0 ended with exit code 1; last lines of its log in"):
        run_job("train", cluster.params("cluster.restarts=2"), cluster.root)
    said = capfd.readouterr().err
    assert "    CUDA error: unspecified launch failure" in said
    kept = list((cluster.root / "checkpoints/jobs").rglob("*.log"))
    assert kept and all("launch failure" in file.read_text(encoding="utf-8") for file in kept)


def test_a_failed_job_is_replaced_by_the_next_call(cluster: Cluster):
    cluster.image(torchrun="exit 1")
    with pytest.raises(StageFailed):
        run_job("train", cluster.params("cluster.restarts=1"), cluster.root)
    cluster.image(torchrun=DONE)
    assert run_job("train", cluster.params("cluster.restarts=1"), cluster.root).here


def leaves(code: int, error: str) -> str:
    """A stage that ends as phantom's command line does in a pod."""
    outcome = json.dumps({"code": code, "error": error})
    return f"""printf '%s' '{outcome}' > "$PHANTOM_OUTCOME"; exit {code}"""


def test_wrong_input_in_a_pod_is_wrong_input_here_and_is_not_tried_again(cluster: Cluster):
    cluster.image(torchrun=leaves(2, "data/latents: made with data.fps 4") + " || exit 1")
    with pytest.raises(UserError, match=r"^data/latents: made with data\.fps 4$"):
        run_job("train", cluster.params("cluster.restarts=1000"), cluster.root)
    until(lambda: not cluster.api.find("pytorchjobs"))
    cluster.image(python=leaves(2, "data/clips: empty"))
    with pytest.raises(UserError, match=r"^data/clips: empty$"):
        run_job("encode", cluster.params(), cluster.root)


def test_the_stages_own_word_is_what_failed(cluster: Cluster):
    cluster.image(torchrun=leaves(1, "train: 10 steps in a row without a finite gradient"))
    with pytest.raises(StageFailed, match=r"^train: 10 steps in a row without a finite gradient$"):
        run_job("train", cluster.params("cluster.restarts=1"), cluster.root)


def test_a_job_deleted_by_someone_else_is_told(cluster: Cluster):
    cluster.image(torchrun=WAITS)
    meanwhile(
        lambda: until((cluster.root / "started").exists),
        lambda: looked(cluster),
        lambda: cluster.api.remove("pytorchjobs", the_job(cluster)["metadata"]["name"]),
    )
    with pytest.raises(StageFailed, match="was deleted by someone else"):
        run_job("train", cluster.params(), cluster.root)


# --- the API server ---------------------------------------------------------------------------------------------------


def test_errors_of_the_api_are_outlived(cluster: Cluster, capfd: Any):
    cluster.image(torchrun=f"sleep 1; {DONE}")
    cluster.api.fail("POST .*pytorchjobs", 500)
    cluster.api.fail("POST .*pytorchjobs", None)
    cluster.api.fail("GET .*pytorchjobs/", 503, count=3)
    cluster.api.fail("GET .*/pods$", None, count=3)
    cluster.api.fail("GET .*/log", 500, count=2)
    cluster.api.fail("GET .*/events", 429, count=2)
    assert run_job("train", cluster.params(), cluster.root).here
    said = capfd.readouterr().err
    assert "the cluster could not create PyTorchJob" in said and "the server is having a bad day; trying again" in said
    assert "the cluster answers again" in said
    assert not any(fault.count for fault in cluster.api.faults)


def test_a_creation_whose_answer_was_lost_is_not_repeated(cluster: Cluster):
    cluster.image(torchrun=f"echo x >> runs; {DONE}")
    cluster.api.fail("POST .*pytorchjobs", None, after=True)
    result = run_job("train", cluster.params(), cluster.root)
    assert result.here and (cluster.root / "runs").read_text(encoding="utf-8") == "x\n"


@pytest.mark.parametrize(
    ("status", "said"),
    [(403, "refuses to create PyTorchJob .*: the server is having a bad day"), (401, "does not accept these cred")],
)
def test_what_the_api_refuses_is_not_tried_again(cluster: Cluster, status: int, said: str):
    cluster.api.fail("POST", status, count=9)
    with pytest.raises(StageFailed, match=said):
        run_job("train", cluster.params(), cluster.root)
    assert sum(request.startswith("POST") for request in cluster.api.requests) <= 2


def test_a_missing_operator_or_namespace_is_told(cluster: Cluster):
    cluster.api.absent = {"pytorchjobs"}
    with pytest.raises(StageFailed, match=r"does not know this kind .*; is the operator installed?"):
        run_job("train", cluster.params(), cluster.root)
    with pytest.raises(StageFailed, match='namespaces "other" not found; `kubectl apply -f k8s/`'):
        run_job("encode", cluster.params("cluster.namespace=other"), cluster.root)


def test_an_api_that_stays_away_ends_the_watching_and_not_the_job(cluster: Cluster, monkeypatch: pytest.MonkeyPatch):
    cluster.image(torchrun=WAITS)
    monkeypatch.setattr("phantom.cluster.submit.WATCH_TIMEOUT_SECONDS", 0.3)
    meanwhile(
        lambda: until((cluster.root / "started").exists), lambda: cluster.api.fail("GET .*pytorchjobs/", 500, count=99)
    )
    with pytest.raises(StageFailed, match=r"the cluster could not read PyTorchJob .* for 0 s"):
        run_job("train", cluster.params(), cluster.root)
    assert cluster.controllers.running()
    cluster.api.faults.clear()
    (cluster.root / "go").touch()
    assert run_job("train", cluster.params(), cluster.root).here


def test_no_cluster_at_all_is_told_soon(cluster: Cluster, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("phantom.cluster.submit.SUBMIT_TIMEOUT_SECONDS", 0.3)
    config = Path(os.environ["KUBECONFIG"])
    text = config.read_text(encoding="utf-8").replace(cluster.api.url, "http://127.0.0.1:9")
    config.write_text(text, encoding="utf-8")
    with pytest.raises(StageFailed, match=r"could not create PyTorchJob .* Connection refused"):
        run_job("train", cluster.params(), cluster.root)
    config.write_text("{}", encoding="utf-8")
    with pytest.raises(UserError, match=r"^kubeconfig: .*; set KUBECONFIG, or cluster\.context$"):
        run_job("train", cluster.params(), cluster.root)


# --- the same job again -----------------------------------------------------------------------------------------------


def test_a_watcher_that_is_killed_is_followed_by_one_that_takes_the_job_up(cluster: Cluster):
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


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_watcher_deletes_the_job_and_its_pods_save(cluster: Cluster, number: int):
    cluster.image(torchrun=WAITS)
    cluster.write_params()
    process = phantom(cluster, "train", "--launcher", "kubernetes")
    until((cluster.root / "started").exists)
    time.sleep(0.5)
    process.send_signal(number)
    _, said = process.communicate(timeout=180)
    assert process.returncode == 75
    assert said.splitlines()[-1].startswith("train: interrupted; PyTorchJob phantom-train-")
    until(lambda: not cluster.api.find("pytorchjobs") and not cluster.api.find("pods"))
    assert (cluster.root / "saved").read_text(encoding="utf-8") == "saved\n"


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


def test_other_work_has_another_name(cluster: Cluster):
    cluster.image(torchrun=DONE)
    names = {run_job("train", cluster.params(), cluster.root).job}
    names.add(run_job("train", cluster.params("train.seed=1"), cluster.root).job)
    (cluster.root / "data/latents").mkdir(parents=True)
    (cluster.root / "data/latents/index.json").write_text("{}", encoding="utf-8")
    names.add(run_job("train", cluster.params(), cluster.root).job)
    assert len(names) == 3


def test_a_finished_job_counts_while_its_outputs_are_there(cluster: Cluster):
    cluster.image(torchrun=f"echo x >> runs; {DONE}")
    run_job("train", cluster.params(), cluster.root)
    assert run_job("train", cluster.params(), cluster.root).adopted
    (cluster.root / "models/phantom/result.json").unlink()
    assert not run_job("train", cluster.params(), cluster.root).adopted
    assert (cluster.root / "runs").read_text(encoding="utf-8") == "x\nx\n"


KEEPS = """
mkdir -p data/latents "$PHANTOM_KEEP/data/latents"
echo x >> runs
echo '{"by": "job"}' > data/latents/index.json
echo latents > data/latents/shard-00000.safetensors
ln data/latents/* "$PHANTOM_KEEP/data/latents/"
"""


def test_outputs_of_a_job_that_ended_unwatched_are_taken_up(cluster: Cluster, capfd: Any):
    """The flow dies, its job finishes, and DVC clears the stage's outputs before it runs the stage again."""
    cluster.image(python=f"until test -e go; do sleep 0.05; done; {KEEPS}")
    cluster.write_params("compute.encode=kubernetes")
    first = phantom(cluster, "encode")
    until(lambda: cluster.controllers.running())
    first.kill()
    first.communicate()
    (cluster.root / "go").touch()
    until(lambda: (cluster.api.find("jobs")[0]["status"]["conditions"] or [{}])[-1].get("type") == "Complete")
    shutil.rmtree(cluster.root / "data/latents")
    result = run_job("encode", cluster.params(), cluster.root)
    assert result.here and result.adopted
    assert "finished while nobody watched it: adopting its outputs" in capfd.readouterr().err
    assert (cluster.root / "runs").read_text(encoding="utf-8") == "x\n"
    assert (cluster.root / "data/latents/index.json").read_text(encoding="utf-8") == '{"by": "job"}\n'
    assert (cluster.root / "data/latents/shard-00000.safetensors").is_file()
    assert not list((cluster.root / "checkpoints/kept/encode").glob("phantom-*"))  # what is taken is not kept


def test_outputs_of_another_job_are_not_taken_for_a_finished_ones(cluster: Cluster):
    cluster.image(python=KEEPS)
    assert not run_job("encode", cluster.params(), cluster.root).adopted
    assert not run_job("encode", cluster.params("encode.seed=1"), cluster.root).adopted
    assert not run_job("encode", cluster.params(), cluster.root).adopted  # what lies there is the second one's
    assert run_job("encode", cluster.params(), cluster.root).adopted
    assert not run_job("encode", cluster.params("cluster.image=phantom-train:0.0.1"), cluster.root).adopted
    assert (cluster.root / "runs").read_text(encoding="utf-8").count("x") == 4


def test_what_a_stage_keeps_in_its_pod(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for name in ("models/phantom/result.json", "models/phantom/a/b.safetensors", "models/control/README.md"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name, encoding="utf-8")
    outputs.keep("train", tmp_path)
    assert not (tmp_path / "checkpoints").exists()  # not in a pod
    for key in ("first", "second"):
        monkeypatch.setenv(outputs.KEEP, f"checkpoints/kept/train/{key}")
        outputs.keep("train", tmp_path)
        outputs.keep("train", tmp_path)
    kept = tmp_path / "checkpoints/kept/train"
    assert [path.name for path in kept.iterdir() if path.is_dir()] == ["second"]
    for name in ("models/phantom", "models/control"):
        shutil.rmtree(tmp_path / name)
    (tmp_path / "models/phantom").mkdir()
    (tmp_path / "models/phantom/stale.json").touch()
    assert not outputs.fetch("train", "first", tmp_path) and outputs.fetch("train", "second", tmp_path)
    assert (tmp_path / "models/phantom/a/b.safetensors").read_text(encoding="utf-8").endswith("b.safetensors")
    assert (tmp_path / "models/control/README.md").is_file() and not (tmp_path / "models/phantom/stale.json").exists()


def test_a_suspended_job_waits_in_words_and_goes_on(cluster: Cluster, capfd: Any):
    cluster.image(torchrun=WAITS)
    started = cluster.root / "started"

    def suspend(value: bool) -> None:
        with cluster.api.lock:
            the_job(cluster)["spec"]["runPolicy"]["suspend"] = value

    meanwhile(
        lambda: until(started.exists),
        lambda: looked(cluster),
        lambda: suspend(True),
        lambda: until((cluster.root / "saved").exists),
        lambda: looked(cluster),
        lambda: suspend(False),
        lambda: until(lambda: len(started.read_text().split()) == 2),
        (cluster.root / "go").touch,
    )
    result = run_job("train", cluster.params("cluster.queue=gpus"), cluster.root)
    said = capfd.readouterr().err
    assert f"train: PyTorchJob {result.job} waits in the queue gpus" in said
    assert "is gone" not in said


def test_a_manifest_with_problems_is_not_submitted(cluster: Cluster, capfd: Any):
    params = cluster.params("cluster.image=phantom-train", "cluster.namespace=Phantom", "cluster.volume=a_b")
    with pytest.raises(UserError) as error:
        run_job("train", params, cluster.root)
    assert "\n" not in str(error.value) and str(error.value).endswith(" (the first of 3 problems)")
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 3 and all(line.startswith("PyTorchJob phantom-train-") for line in lines)
    assert not cluster.api.requests


def test_the_annotation_tells_specs_apart(cluster: Cluster):
    cluster.image(torchrun=DONE)
    run_job("train", cluster.params(), cluster.root)
    assert len(the_job(cluster)["metadata"]["annotations"][DIGEST_ANNOTATION]) == 16
