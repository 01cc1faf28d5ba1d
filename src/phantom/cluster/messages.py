"""Kubernetes objects as text: a job's state from its conditions, why a pod is not running, why a container ended."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal

from phantom.cluster.render import QUEUE_LABEL
from phantom.errors import read_outcome

Phase = Literal["created", "suspended", "running", "restarting", "succeeded", "failed"]
IMAGE_ERRORS = ("ErrImagePull", "ImagePullBackOff", "InvalidImageName", "ErrImageNeverPull")
EVICTIONS = ("Evicted", "Preempting", "NodeLost", "NodeShutdown", "Shutdown", "Terminated")  # reasons of a failed pod
# Reasons of a waiting container that are not reported: normal, or its termination is reported instead.
NOT_REPORTED = ("ContainerCreating", "PodInitializing", "CrashLoopBackOff")


@dataclass(frozen=True)
class JobState:
    """The phase of a job, and a clause that describes it: "PyTorchJob x {text}"."""

    phase: Phase
    text: str


@dataclass(frozen=True)
class Termination:
    """How a container terminated: its exit code and the reason, and what the stage wrote as its termination message."""

    pod: str
    uid: str  # of the pod
    attempt: int  # the container's restart count when it ran; -1 for a pod that failed as a whole
    exit_code: int
    reason: str
    by_cluster: bool  # out of memory, evicted, or lost with its node: not by the stage's own doing
    stage_exit_code: int | None
    stage_error: str  # one line
    log_tail: str  # the termination message, where the stage wrote none itself
    seconds: float = 0.0  # for which it ran


def job_state(job: dict[str, Any]) -> JobState:
    """The state of a PyTorchJob, TrainJob or batch Job, from its conditions."""
    spec, status = job["spec"], job.get("status") or {}
    holds = {c["type"]: c for c in status.get("conditions") or [] if c["status"] == "True"}
    for kind in ("Succeeded", "Complete"):
        if kind in holds:
            return JobState("succeeded", "has succeeded")
    if "Failed" in holds:
        failed = holds["Failed"]
        return JobState("failed", f"has failed: {one_line(failed.get('message') or failed.get('reason'))}")
    if spec.get("suspend") or (spec.get("runPolicy") or {}).get("suspend"):
        queue = (job["metadata"].get("labels") or {}).get(QUEUE_LABEL)
        waits = f"waits in the queue {queue}" if queue else "is suspended, and goes on when it is resumed"
        return JobState("suspended", waits)
    if "Restarting" in holds:
        return JobState("restarting", "is restarting")
    if "Running" in holds or _has_pods(status) or any(_has_pods(part) for part in status.get("jobsStatus") or []):
        return JobState("running", "is running")
    return JobState("created", "is created")


def _has_pods(status: dict[str, Any]) -> bool:
    """Whether a batch Job, or a part of a TrainJob, has pods or had some: after its last one it is not yet complete."""
    counted = ("active", "succeeded", "failed", "terminating")
    return any(status.get(count) for count in counted) or any((status.get("uncountedTerminatedPods") or {}).values())


def is_reconciled(job: dict[str, Any]) -> bool:
    """Whether a controller has reconciled the job: only a controller writes its status."""
    return bool(job.get("status"))


def pod_warnings(pod: dict[str, Any]) -> Iterator[str]:
    """Why a pod is not running, or will soon be evicted: a clause for each reason."""
    status = pod.get("status") or {}
    if status.get("phase") == "Failed":
        return
    for condition in status.get("conditions") or []:
        if condition["type"] == "PodScheduled" and condition["status"] == "False":
            yield f"cannot be scheduled: {one_line(condition.get('message') or condition.get('reason'))}"
        if condition["type"] == "DisruptionTarget" and condition["status"] == "True":
            yield f"is being evicted: {one_line(condition.get('message') or condition.get('reason'))}"
    for container in [*(status.get("initContainerStatuses") or []), *(status.get("containerStatuses") or [])]:
        waiting = (container.get("state") or {}).get("waiting") or {}
        reason = waiting.get("reason")
        if reason in IMAGE_ERRORS:
            yield f"cannot get its image {container.get('image')}: {one_line(waiting.get('message') or reason)}"
        elif reason and reason not in NOT_REPORTED:
            yield f"cannot start: {reason}: {one_line(waiting.get('message') or 'no reason given')}"


def terminations(pod: dict[str, Any]) -> Iterator[Termination]:
    """Every termination that the pod's status still holds; one for the pod as a whole where it failed without any."""
    status, meta = pod.get("status") or {}, pod["metadata"]
    container_failed = False
    for container in status.get("containerStatuses") or []:
        count = container.get("restartCount", 0)
        for attempt, state in ((count - 1, "lastState"), (count, "state")):
            terminated = (container.get(state) or {}).get("terminated")
            if terminated and attempt >= 0:
                container_failed = container_failed or bool(terminated["exitCode"])
                yield _termination(meta, attempt, terminated, status)
    if status.get("phase") == "Failed" and not container_failed:
        evicted = _eviction(status)
        reason = evicted or one_line(status.get("message") or "failed")
        yield Termination(meta["name"], meta["uid"], -1, 1, reason, evicted is not None, None, "", "")


def _termination(meta: dict[str, Any], attempt: int, terminated: dict[str, Any], status: dict[str, Any]) -> Termination:
    code, message = terminated["exitCode"], (terminated.get("message") or "").strip()
    stage_code, stage_error, log_tail = None, "", message
    if outcome := read_outcome(message):  # None if the kubelet has truncated it
        stage_code, stage_error, log_tail = outcome.code, outcome.error, ""
    out_of_memory = terminated.get("reason") == "OOMKilled"
    by_cluster = "ran out of memory; raise cluster.memory_gib" if out_of_memory else _eviction(status)
    reason = by_cluster or stage_error or f"ended with exit code {code}"
    return Termination(
        meta["name"],
        meta["uid"],
        attempt,
        code,
        reason,
        by_cluster is not None,
        stage_code,
        stage_error,
        log_tail,
        _seconds(terminated),
    )


def _seconds(terminated: dict[str, Any]) -> float:
    """For how long a container ran. The cluster's times are whole seconds, and null where it does not know them."""
    times = [terminated.get(key) for key in ("startedAt", "finishedAt")]
    began, ended = (datetime.fromisoformat(time) if time else None for time in times)
    return (ended - began).total_seconds() if began and ended else 0.0


def _eviction(status: dict[str, Any]) -> str | None:
    """Why the cluster evicted the pod, if it did."""
    if status.get("reason") in EVICTIONS:
        return f"was evicted ({status['reason']}): {one_line(status.get('message') or 'no reason given')}"
    for condition in status.get("conditions") or []:
        if condition["type"] == "DisruptionTarget" and condition["status"] == "True":
            return f"was evicted ({condition.get('reason')}): {one_line(condition.get('message'))}"
    return None


def gpu_count(pod: dict[str, Any]) -> int:
    """The GPUs of a pod: what its first container has of a resource like nvidia.com/gpu."""
    (container, *_) = pod["spec"].get("containers") or [{}]
    limits = (container.get("resources") or {}).get("limits") or {}
    return sum(int(count) for name, count in limits.items() if name.partition("/")[2].startswith("gpu"))


def one_line(text: Any) -> str:
    """A message of the cluster with its line breaks and runs of spaces collapsed."""
    return " ".join(str(text).split())
