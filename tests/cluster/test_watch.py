"""A watched job: pods that cannot start, are killed or evicted; failures, and whose error is raised."""

from __future__ import annotations

from typing import Any

import pytest

from phantom import cost
from phantom.cluster import messages, watch
from phantom.cluster.submit import run_job
from phantom.errors import StageFailed, UserError
from tests.cluster.conftest import Cluster
from tests.cluster.jobs import DONE, WAITS, leaves, meanwhile, on_signal, polled, the_job, until

PROCESSES = ("train.processes=2",)
TWO_PODS = ("cluster.nodes=2", "train.processes=2")


def test_a_killed_pod_is_restarted_and_the_reason_is_reported(cluster: Cluster, capfd: Any):
    cluster.image(torchrun=f"echo step 7; {WAITS}")
    started = cluster.root / "started"
    meanwhile(
        lambda: until(started.exists),
        lambda: polled(cluster),
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


def test_log_lines_that_are_objects_are_shown_and_kept_as_text(cluster: Cluster, capfd: Any):
    line = '{"time": "2026-01-01T00:00:00.000+00:00", "level": "info", "message": "step 7", "rank": 0}'
    cluster.image(torchrun=f"test -e again || {{ touch again; echo '{line}'; exit 1; }}\n{DONE}")
    result = run_job("train", cluster.params(), cluster.root)
    said = capfd.readouterr().err
    assert "step 7" in map(str.strip, said.splitlines()) and "2026-01-01" not in said  # as it comes, or of the failure
    (kept,) = (cluster.root / "checkpoints/jobs" / result.job).iterdir()
    assert kept.read_text(encoding="utf-8") == "step 7\n"


def test_the_gpu_hours_of_every_attempt_are_counted(cluster: Cluster, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(messages, "_seconds", lambda terminated: 1800.0)
    cluster.image(torchrun=f"test -e again || {{ touch again; exit 1; }}\n{DONE}")
    before = cost.gpu_hours()
    result = run_job("train", cluster.params("cluster.gpu=nvidia.com/gpu", *PROCESSES), cluster.root)
    assert result.gpu_hours == pytest.approx(cost.gpu_hours() - before) == 2.0  # twice half an hour of two GPUs
    script = 'test "$4" = --index && exit; mkdir -p reports; echo "{}" > reports/evaluation.json'
    cluster.image(python=script)
    before = cost.gpu_hours()
    result = run_job("evaluate", cluster.params("cluster.gpu=nvidia.com/gpu", "cluster.evaluate_pods=3"), cluster.root)
    assert result.gpu_hours == pytest.approx(cost.gpu_hours() - before) == 2.0


def test_a_pod_that_changes_is_polled_at_once(cluster: Cluster, capfd: Any, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(watch, "POLL_SECONDS", 600)
    cluster.image(torchrun=f"test -e again || {{ touch again; echo step 7; exit 1; }}\n{DONE}")
    cluster.api.expired = 2  # and such a watch is begun anew
    result = run_job("train", cluster.params(), cluster.root)
    assert result.restarts == 1 and result.seconds < 300
    said = capfd.readouterr().err
    assert f"pod {result.job}-worker-0 ended with exit code 1\n    step 7\n" in said
    assert cluster.api.find("events") and "Error pod" not in said  # the operator repeats it
    assert cluster.api.expired == 0


def test_an_evicted_pod_is_replaced_and_its_last_lines_are_kept(cluster: Cluster, capfd: Any):
    cluster.image(torchrun=f"echo step 7; {WAITS}")
    started = cluster.root / "started"
    meanwhile(
        lambda: until(started.exists),
        lambda: polled(cluster),
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


def test_a_pod_that_waits_for_a_node_or_an_image_is_reported_once_and_is_no_failure(cluster: Cluster, capfd: Any):
    cluster.image(torchrun=DONE)
    control = cluster.controllers
    full = "0/3 nodes are available: 3 Insufficient nvidia.com/gpu."
    control.pending, control.no_image = full, "not found"
    meanwhile(
        lambda: polled(cluster),
        lambda: setattr(control, "pending", None),
        lambda: polled(cluster),
        lambda: setattr(control, "no_image", None),
    )
    pod = f"{run_job('train', cluster.params(), cluster.root).job}-worker-0"
    said = capfd.readouterr().err.splitlines()
    assert (
        said.count(f"train: pod {pod} cannot be scheduled: {'0/3 nodes are available: 3 Insufficient nvidia.com/gpu.'}")
        == 1
    )
    assert said.count(f"train: pod {pod} cannot get its image phantom-train:0.2.0: not found") == 1
    assert not [line for line in said if "Error pod" in line]  # the operator's event, which says the same


def test_refused_pods_are_reported_by_their_event_and_the_operator_is_not_suspected(
    cluster: Cluster, capfd: Any, monkeypatch: pytest.MonkeyPatch
):
    cluster.image(torchrun=DONE)
    monkeypatch.setattr(watch, "OPERATOR_TIMEOUT_SECONDS", 0.2)
    cluster.controllers.refused = "is forbidden: exceeded quota: phantom, requested: requests.nvidia.com/gpu=8"
    meanwhile(
        lambda: until(lambda: cluster.api.find("events")),
        lambda: polled(cluster),
        lambda: setattr(cluster.controllers, "refused", None),
    )
    run_job("train", cluster.params(), cluster.root)
    said = capfd.readouterr().err
    assert (
        "FailedCreatePod" in said and said.count("exceeded quota: phantom, requested: requests.nvidia.com/gpu=8") == 1
    )
    assert "no controller" not in said


def test_a_job_that_no_controller_reconciles_is_reported(cluster: Cluster, capfd: Any, monkeypatch: pytest.MonkeyPatch):
    cluster.image(torchrun=DONE)
    cluster.controllers.idle = True
    monkeypatch.setattr(watch, "OPERATOR_TIMEOUT_SECONDS", 0.2)
    meanwhile(lambda: polled(cluster), lambda: setattr(cluster.controllers, "idle", False))
    run_job("train", cluster.params(), cluster.root)
    assert capfd.readouterr().err.count("no controller has reconciled the job yet") == 1


def test_a_suspended_job_is_reported_and_resumes(cluster: Cluster, capfd: Any):
    cluster.image(torchrun=WAITS)
    started = cluster.root / "started"

    def suspend(value: bool) -> None:
        with cluster.api.lock:
            the_job(cluster)["spec"]["runPolicy"]["suspend"] = value

    meanwhile(
        lambda: until(started.exists),
        lambda: polled(cluster),
        lambda: suspend(True),
        lambda: until((cluster.root / "saved").exists),
        lambda: polled(cluster),
        lambda: suspend(False),
        lambda: until(lambda: len(started.read_text().split()) == 2),
        (cluster.root / "go").touch,
    )
    result = run_job("train", cluster.params("cluster.queue=gpus"), cluster.root)
    said = capfd.readouterr().err
    assert f"train: PyTorchJob {result.job} waits in the queue gpus" in said
    assert "is gone" not in said
    assert result.restarts == 0 and "exit code" not in said


@pytest.mark.parametrize(
    ("code", "said"), [(75, "train: interrupted; saved at step 27"), (1, "train: gloo: connection closed by peer")]
)
def test_a_job_fails_for_what_ended_its_pod_and_not_for_what_its_peers_say_then(cluster: Cluster, code: int, said: str):
    cluster.image(torchrun=f"trap '{on_signal(code, said)}' TERM; touch pod-$$; while true; do sleep 0.05; done")
    meanwhile(
        lambda: until(lambda: len(list(cluster.root.glob("pod-*"))) == 2),
        lambda: polled(cluster),
        lambda: cluster.controllers.kill(cluster.controllers.running()[0]),
    )
    with pytest.raises(StageFailed, match=r"pod .*-worker-0 ran out of memory; raise cluster\.memory_gib"):
        run_job("train", cluster.params(*TWO_PODS, "cluster.restarts=0"), cluster.root)


def test_a_stages_own_error_is_raised_and_not_that_its_peers_have_saved(cluster: Cluster):
    saved = on_signal(75, "train: interrupted; saved at step 27")
    cluster.image(
        torchrun=f"""
mkdir first 2> /dev/null || {{ trap '{saved}' TERM; touch peer; while true; do sleep 0.05; done; }}
until test -e peer; do sleep 0.05; done
{leaves(1, "train: 10 steps in a row without a finite gradient")}"""
    )
    with pytest.raises(StageFailed, match=r"^train: 10 steps in a row without a finite gradient$"):
        run_job("train", cluster.params(*TWO_PODS, "cluster.restarts=0"), cluster.root)


@pytest.mark.parametrize("restarts", [0, 2])
def test_a_pod_is_restarted_as_often_as_the_settings_say(cluster: Cluster, restarts: int):
    cluster.image(torchrun="echo x >> tries; exit 1")
    with pytest.raises(StageFailed, match="ended with exit code 1"):
        run_job("train", cluster.params(f"cluster.restarts={restarts}"), cluster.root)
    assert len((cluster.root / "tries").read_text(encoding="utf-8").split()) == restarts + 1


def test_a_job_that_fails_fails_with_the_last_lines_of_its_log(cluster: Cluster, capfd: Any):
    cluster.image(torchrun="echo step 7; echo 'CUDA error: unspecified launch failure'; exit 1")
    with pytest.raises(StageFailed, match=r"pod .*-worker-0 ended with exit code 1; last lines of its log in"):
        run_job("train", cluster.params("cluster.restarts=2"), cluster.root)
    said = capfd.readouterr().err
    assert "    CUDA error: unspecified launch failure" in said
    kept = list((cluster.root / "checkpoints/jobs").rglob("*.log"))
    assert kept and all("launch failure" in file.read_text(encoding="utf-8") for file in kept)


def test_wrong_input_in_a_pod_is_raised_here_and_not_retried(cluster: Cluster):
    cluster.image(torchrun=leaves(2, "data/latents: made with data.fps 4") + " || exit 1")
    with pytest.raises(UserError, match=r"^data/latents: made with data\.fps 4$"):
        run_job("train", cluster.params("cluster.restarts=1000"), cluster.root)
    until(lambda: not cluster.api.find("pytorchjobs"))
    cluster.image(python=leaves(2, "data/clips: empty"))
    with pytest.raises(UserError, match=r"^data/clips: empty$"):
        run_job("encode", cluster.params(), cluster.root)


def test_the_stages_own_error_is_raised(cluster: Cluster):
    cluster.image(torchrun=leaves(1, "train: 10 steps in a row without a finite gradient"))
    with pytest.raises(StageFailed, match=r"^train: 10 steps in a row without a finite gradient$"):
        run_job("train", cluster.params("cluster.restarts=1"), cluster.root)


def test_a_job_deleted_by_someone_else_is_reported(cluster: Cluster):
    cluster.image(torchrun=WAITS)
    meanwhile(
        lambda: until((cluster.root / "started").exists),
        lambda: polled(cluster),
        lambda: cluster.api.remove("pytorchjobs", the_job(cluster)["metadata"]["name"]),
    )
    with pytest.raises(StageFailed, match="was deleted by someone else"):
        run_job("train", cluster.params(), cluster.root)
