"""Job states, pod warnings and terminations, from statuses as a real cluster writes them."""

from __future__ import annotations

from typing import Any

import pytest

from phantom.cluster.messages import job_state, pod_warnings, terminations


def job(*conditions: tuple[str, str], spec: dict[str, Any] | None = None, **status: Any) -> dict[str, Any]:
    held = [{"type": kind, "status": value, "reason": kind, "message": ""} for kind, value in conditions]
    return {"metadata": {"name": "x"}, "spec": spec or {}, "status": {"conditions": held, **status}}


@pytest.mark.parametrize(
    ("found", "phase"),
    [
        (job(), "created"),
        (job(("Created", "True")), "created"),
        (job(("Created", "True"), ("Running", "True")), "running"),
        (job(("Running", "False"), ("Restarting", "True")), "restarting"),
        (job(("Running", "False"), ("Succeeded", "True")), "succeeded"),
        (job(("Running", "False"), ("Failed", "True")), "failed"),
        # spec.suspend decides; the condition may be stale.
        (job(("Suspended", "True"), spec={"runPolicy": {"suspend": True}}), "suspended"),
        (job(("Suspended", "False"), ("Running", "True"), spec={"runPolicy": {"suspend": False}}), "running"),
        (job(spec={"suspend": True}), "suspended"),
        # A resumed TrainJob has no other condition than Suspended=False.
        (job(("Suspended", "False"), jobsStatus=[{"name": "node", "active": 2}]), "running"),
        (job(("Complete", "True")), "succeeded"),
        (job(active=1), "running"),
        # Its last pod has ended, and it is not yet complete.
        (job(active=0, uncountedTerminatedPods={"succeeded": ["u"]}), "running"),
        (job(succeeded=1), "running"),
        (job(jobsStatus=[{"name": "node", "active": 0, "succeeded": 1}]), "running"),
        (job(("FailureTarget", "True"), active=1), "running"),  # its pods are still ending
        (job(("SuccessCriteriaMet", "True"), active=1), "running"),
    ],
)
def test_the_state_of_a_job(found: dict[str, Any], phase: str):
    assert job_state(found).phase == phase


def test_a_suspended_job_names_its_queue():
    waiting = job(spec={"suspend": True})
    assert "is suspended" in job_state(waiting).text
    waiting["metadata"]["labels"] = {"kueue.x-k8s.io/queue-name": "gpus"}
    assert job_state(waiting).text == "waits in the queue gpus"


def pod(**status: Any) -> dict[str, Any]:
    return {"metadata": {"name": "p", "uid": "u"}, "status": status}


def waiting(reason: str, message: str | None = None) -> list[dict[str, Any]]:
    return [{"name": "c", "image": "i:1", "state": {"waiting": {"reason": reason, "message": message}}}]


@pytest.mark.parametrize(
    ("found", "said"),
    [
        (pod(containerStatuses=waiting("ContainerCreating")), []),
        (pod(containerStatuses=waiting("CrashLoopBackOff", "back-off 10s")), []),  # its termination is reported instead
        (
            pod(containerStatuses=waiting("CreateContainerConfigError", 'secret "s" not found')),
            ['cannot start: CreateContainerConfigError: secret "s" not found'],
        ),
        (
            pod(containerStatuses=waiting("InvalidImageName", "couldn't parse")),
            ["cannot get its image i:1: couldn't parse"],
        ),
        (pod(initContainerStatuses=waiting("ErrImagePull", "denied")), ["cannot get its image i:1: denied"]),
        (
            pod(conditions=[{"type": "PodScheduled", "status": "False", "reason": "SchedulingGated", "message": ""}]),
            ["cannot be scheduled: SchedulingGated"],
        ),
        (
            pod(conditions=[{"type": "DisruptionTarget", "status": "True", "message": "preempting for q"}]),
            ["is being evicted: preempting for q"],
        ),
    ],
)
def test_why_a_pod_is_not_running(found: dict[str, Any], said: list[str]):
    assert list(pod_warnings(found)) == said


def ended(code: int, reason: str = "Error", message: str = "") -> dict[str, Any]:
    return {"terminated": {"exitCode": code, "reason": reason, "message": message}}


def container(count: int, state: dict[str, Any], last: dict[str, Any] | None = None) -> list[dict[str, Any]]:
    return [{"name": "c", "restartCount": count, "state": state, "lastState": last or {}}]


@pytest.mark.parametrize(
    ("found", "said"),
    [
        (pod(containerStatuses=container(0, {"running": {}})), []),
        (pod(containerStatuses=container(0, ended(0, "Completed"))), [(0, 0, "ended with exit code 0")]),
        (pod(containerStatuses=container(3, {"running": {}}, ended(1))), [(2, 1, "ended with exit code 1")]),
        (
            pod(containerStatuses=container(1, ended(137, "OOMKilled"), ended(1))),
            [(0, 1, "ended with exit code 1"), (1, 137, "ran out of memory; raise cluster.memory_gib")],
        ),
        (
            pod(containerStatuses=container(0, ended(1, message='{"code": 2, "error": "data: bad"}'))),
            [(0, 1, "data: bad")],
        ),
        (
            pod(containerStatuses=container(0, ended(1, message='{"code": 2, "error": "da'))),
            [(0, 1, "ended with exit code 1")],
        ),
        *(  # forged
            (pod(containerStatuses=container(0, ended(1, message=forged))), [(0, 1, "ended with exit code 1")])
            for forged in ('{"code": [2], "error": "x"}', '{"code": 2}', '{"code": true, "error": "x"}', "[" * 4000)
        ),
        (
            pod(containerStatuses=container(0, ended(1, message='{"code": 0, "error": "fine\\n\\u001b[2Jdone"}'))),
            [(0, 1, "fine [2Jdone")],
        ),
        (
            pod(phase="Failed", reason="Evicted", message="The node was low on resource: memory."),
            [(-1, 1, "was evicted (Evicted): The node was low on resource: memory.")],
        ),
        (
            pod(
                phase="Failed",
                conditions=[
                    {
                        "type": "DisruptionTarget",
                        "status": "True",
                        "reason": "PreemptionByScheduler",
                        "message": "for q",
                    }
                ],
                containerStatuses=container(0, ended(143)),
            ),
            [(0, 143, "was evicted (PreemptionByScheduler): for q")],
        ),
        (pod(phase="Failed", message="Pod was rejected"), [(-1, 1, "Pod was rejected")]),
    ],
)
def test_how_a_container_ended(found: dict[str, Any], said: list[tuple[int, int, str]]):
    assert [(t.attempt, t.exit_code, t.reason) for t in terminations(found)] == said


def test_for_how_long_a_container_ran():
    times = {"startedAt": "2026-01-31T23:00:00Z", "finishedAt": "2026-02-01T00:30:00Z"}
    timed, unknown = ended(1), {"terminated": {**ended(0)["terminated"], "startedAt": None}}
    timed["terminated"] |= times
    found = terminations(pod(containerStatuses=container(1, unknown, timed)))
    assert [each.seconds for each in found] == [5400.0, 0.0]


def test_the_stages_error_is_told_from_the_last_lines_of_its_log():
    (own,) = terminations(pod(containerStatuses=container(0, ended(1, message='{"code": 75, "error": "saved"}'))))
    assert (own.stage_exit_code, own.stage_error, own.log_tail) == (75, "saved", "")
    (log,) = terminations(pod(containerStatuses=container(0, ended(1, message="line 1\nline 2"))))
    assert (log.stage_exit_code, log.stage_error, log.log_tail) == (None, "", "line 1\nline 2")


def test_what_the_cluster_did_is_told_before_what_the_stage_said_of_it():
    said = '{"code": 1, "error": "gloo: connection closed by peer"}'
    (killed,) = terminations(pod(containerStatuses=container(0, ended(137, "OOMKilled", said))))
    assert killed.by_cluster and killed.reason == "ran out of memory; raise cluster.memory_gib"
    (own,) = terminations(pod(containerStatuses=container(0, ended(1, message=said))))
    assert not own.by_cluster and own.reason == "gloo: connection closed by peer"
