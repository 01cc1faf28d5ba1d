"""What the cluster's objects say, in words: the state of a job, what keeps a pod from running, why one has ended."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from phantom.cluster.render import QUEUE

Phase = Literal["created", "suspended", "running", "restarting", "succeeded", "failed"]
STARTING = ("ContainerCreating", "PodInitializing", "CrashLoopBackOff")  # no trouble, or told of already


@dataclass(frozen=True)
class State:
    """Where a job is, and a clause that says so."""

    phase: Phase
    text: str


@dataclass(frozen=True)
class End:
    """How a container ended: its exit code, why, and the exit code and error line that the stage itself left."""

    pod: str
    uid: str
    attempt: int  # of this container in its pod, from 0
    code: int
    text: str
    outcome: int | None
    error: str
    last: str  # of the log, where the stage left nothing


def job_state(job: dict[str, Any]) -> State:
    """The state of a PyTorchJob, TrainJob or batch Job."""
    spec, status = job["spec"], job.get("status") or {}
    holds = {c["type"]: c for c in status.get("conditions") or [] if c["status"] == "True"}
    for kind in ("Succeeded", "Complete"):
        if kind in holds:
            return State("succeeded", "has succeeded")
    if "Failed" in holds:
        failed = holds["Failed"]
        return State("failed", f"has failed: {one_line(failed.get('message') or failed.get('reason'))}")
    if spec.get("suspend") or (spec.get("runPolicy") or {}).get("suspend"):
        queue = (job["metadata"].get("labels") or {}).get(QUEUE)
        waits = f"waits in the queue {queue}" if queue else "is suspended, and goes on when it is resumed"
        return State("suspended", waits)
    if "Restarting" in holds:
        return State("restarting", "is restarting")
    active = status.get("active") or any(part.get("active") for part in status.get("jobsStatus") or [])
    if "Running" in holds or active:
        return State("running", "is running")
    return State("created", "is created")


def taken(job: dict[str, Any]) -> bool:
    """Whether a controller has looked at the job."""
    return bool(job.get("status"))


def trouble(pod: dict[str, Any]) -> Iterator[str]:
    """What keeps a pod from running."""
    status = pod.get("status") or {}
    if status.get("phase") == "Failed":
        return
    for condition in status.get("conditions") or []:
        if condition["type"] == "PodScheduled" and condition["status"] == "False":
            yield f"cannot be scheduled: {one_line(condition.get('message') or condition.get('reason'))}"
        if condition["type"] == "DisruptionTarget" and condition["status"] == "True":
            yield f"has to go: {one_line(condition.get('message') or condition.get('reason'))}"
    for container in [*(status.get("initContainerStatuses") or []), *(status.get("containerStatuses") or [])]:
        waiting = (container.get("state") or {}).get("waiting") or {}
        reason = waiting.get("reason")
        if reason in ("ErrImagePull", "ImagePullBackOff", "InvalidImageName", "ErrImageNeverPull"):
            yield f"cannot get its image {container.get('image')}: {one_line(waiting.get('message') or reason)}"
        elif reason and reason not in STARTING:
            yield f"cannot start: {reason}: {one_line(waiting.get('message') or 'no reason given')}"


def ends(pod: dict[str, Any]) -> Iterator[End]:
    """Every end of the pod's containers that its status still knows, and that of a pod that was put out whole."""
    status, meta = pod.get("status") or {}, pod["metadata"]
    told = False
    for container in status.get("containerStatuses") or []:
        count = container.get("restartCount", 0)
        for attempt, state in ((count - 1, "lastState"), (count, "state")):
            ended = (container.get(state) or {}).get("terminated")
            if ended and attempt >= 0:
                told = told or bool(ended["exitCode"])
                yield _end(meta, attempt, ended, status)
    if status.get("phase") == "Failed" and not told:
        text = _put_out(status) or one_line(status.get("message") or "failed")
        yield End(meta["name"], meta["uid"], -1, 1, text, None, "", "")


def _end(meta: dict[str, Any], attempt: int, ended: dict[str, Any], status: dict[str, Any]) -> End:
    code, message = ended["exitCode"], (ended.get("message") or "").strip()
    outcome, error, last = None, "", message
    if message.startswith('{"code"'):
        try:
            left = json.loads(message)
            outcome, error, last = left["code"], left["error"], ""
        except ValueError:  # cut off
            pass
    if ended.get("reason") == "OOMKilled":
        text = "ran out of memory; raise cluster.memory_gib"
    elif error:
        text = error
    else:
        text = _put_out(status) or f"ended with exit code {code}"
    return End(meta["name"], meta["uid"], attempt, code, text, outcome, error, last)


def _put_out(status: dict[str, Any]) -> str | None:
    """Why the cluster itself ended the pod, if it did."""
    if status.get("reason") in ("Evicted", "Preempting", "NodeLost", "NodeShutdown", "Shutdown", "Terminated"):
        return f"was put out ({status['reason']}): {one_line(status.get('message') or 'no reason given')}"
    for condition in status.get("conditions") or []:
        if condition["type"] == "DisruptionTarget" and condition["status"] == "True":
            return f"was put out ({condition.get('reason')}): {one_line(condition.get('message'))}"
    return None


def one_line(text: Any) -> str:
    """Words of the cluster in one line, however they were broken."""
    return " ".join(str(text).split())
