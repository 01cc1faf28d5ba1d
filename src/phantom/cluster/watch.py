"""Watches a job until it finishes, and reports what happens to it and its pods as it happens.

All state is in the cluster; a watcher only remembers what it has already reported. One that dies can be replaced by
another, which starts from the job as it finds it.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path

from phantom.cluster.api import Connection
from phantom.cluster.messages import (
    JobState,
    Termination,
    gpu_count,
    is_reconciled,
    job_state,
    one_line,
    pod_warnings,
    terminations,
)
from phantom.cluster.render import Manifest
from phantom.cost import HOUR, add_gpu_hours
from phantom.errors import Interrupted, StageFailed, UserError
from phantom.logs import text_of
from phantom.progress import say

POLL_SECONDS = 3.0  # between polls; a pod that changes is polled at once
OPERATOR_TIMEOUT_SECONDS = 60.0  # without a status of the job, before the operator is reported missing
KEPT_LINES = 40  # of each container's log, saved under LOGS
BACKLOG_LINES = 200  # of the log of a container that was running before this watcher, shown
REPORTED_BY_STATUS = ("FailedScheduling", "BackOff", "Failed")  # events that repeat what a pod's status reports
ECHO = "Error pod "  # begins the operator's events that do, too
INCIDENT_SECONDS = 900.0  # the loss of a pod can end its peers this much later: NCCL's timeout, and time to save
LOGS = Path("checkpoints/jobs")


class JobWatcher:
    """Watches one job of a stage. `pods` (uids), `restarts` and `gpu_hours` are what it has seen so far."""

    def __init__(
        self,
        connection: Connection,
        stage: str,
        kind: str,
        name: str,
        root: Path,
        on_line: Callable[[str], None] = say,
    ) -> None:
        """on_line: is given each line of the pods' logs."""
        self.connection, self.stage, self.kind, self.name, self.on_line = connection, stage, kind, name, on_line
        self.logs = root / LOGS / name
        self.pods: set[str] = set()
        self.restarts = 0
        self.gpu_hours = 0.0  # of containers that have ended
        self._uid = ""  # of the job
        self._created = ""  # the job's creationTimestamp
        self._stop, self._wake = threading.Event(), threading.Event()
        self._state: JobState | None = None
        self._started = time.monotonic()
        self._changes: deque[Manifest] = deque()  # pods as they were between two polls
        self._reported: set[tuple[str, str]] = set()
        self._live: dict[str, str] = {}  # pods of the last poll: uid -> name
        self._tails: dict[str, deque[str]] = {}  # pod uid -> last lines of its log
        # (pod uid, attempt) -> timestamp of the last line read, and when it was read
        self._read: dict[tuple[str, int], tuple[str, float]] = {}
        self._read_to_end: set[tuple[str, int]] = set()
        self._terminations: dict[tuple[str, int], Termination] = {}
        self._seen: dict[tuple[str, int], float] = {}  # when each of them was first seen
        self._refused = False  # whether an event about the job itself has been reported

    def __enter__(self) -> JobWatcher:
        """Starts watching the pods, so that one that ends and is deleted between two polls is not missed."""
        arguments = (self.name, self._on_pod_change, self._stop)
        threading.Thread(target=self.connection.watch_pods, args=arguments, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()

    def run(self, is_stopped: Callable[[], bool] = lambda: False) -> None:
        """Returns when the job has succeeded. Raises UserError, Interrupted or StageFailed, as the stage did.

        Raises KeyboardInterrupt soon after `is_stopped`.
        """
        while not self.poll():
            if is_stopped():
                raise KeyboardInterrupt
            self._wake.wait(POLL_SECONDS)
            self._wake.clear()

    def poll(self) -> bool:
        """Reads the job and its pods once and reports what is new. True if the job has succeeded."""
        job = self.connection.get(self.kind, self.name)
        if job is None or (self._uid and job["metadata"]["uid"] != self._uid):
            raise StageFailed(f"{self.stage}: {self._job()} was deleted by someone else; run again to start it anew")
        self._uid, self._created = job["metadata"]["uid"], job["metadata"]["creationTimestamp"]
        state = job_state(job)
        self._check_pods(self.connection.pods(self.name), state)
        self._report_events()
        if state != self._state:
            self._state = state
            say(f"{self.stage}: {self._job()} {state.text}")
        waited = time.monotonic() - self._started
        unheard = not is_reconciled(job) and not self._refused
        if state.phase == "created" and unheard and waited > OPERATOR_TIMEOUT_SECONDS:
            idle = "no controller has reconciled the job yet; is the operator running? `phantom doctor --cluster`"
            self._report_once("operator", idle)
        if state.phase == "failed":
            raise self._failure(state)
        return state.phase == "succeeded"

    # --- pods ---------------------------------------------------------------------------------------------------------

    def _on_pod_change(self, pod: Manifest) -> None:
        """Called from the watching thread. Wakes `run` to poll now, as the pod and its log may soon be deleted."""
        self._changes.append(pod)
        self._wake.set()

    def _check_pods(self, pods: list[Manifest], state: JobState) -> None:
        live = {pod["metadata"]["uid"]: pod["metadata"]["name"] for pod in pods}
        while self._changes:
            self._check_pod(self._changes.popleft())
        for uid, name in self._live.items():
            finished = any(pod == uid for pod, _ in self._terminations)
            if uid not in live and not finished and state.phase not in ("suspended", "succeeded", "failed"):
                self._report_once(uid, f"pod {name} is gone")
                self._save_log(name, uid, 0)
        self._live = live
        for pod in pods:
            self._follow_log(pod)
            self._check_pod(pod)

    def _check_pod(self, pod: Manifest) -> None:
        name, uid = pod["metadata"]["name"], pod["metadata"]["uid"]
        if pod["metadata"]["creationTimestamp"] < self._created:
            return  # belongs to an earlier job of the same name
        self.pods.add(uid)
        for text in pod_warnings(pod):
            self._report_once(uid, f"pod {name} {text}")
        for termination in terminations(pod):
            if (uid, termination.attempt) not in self._terminations:
                self._terminations[uid, termination.attempt] = termination
                self._seen[uid, termination.attempt] = time.monotonic()
                hours = gpu_count(pod) * termination.seconds / HOUR
                self.gpu_hours += hours
                add_gpu_hours(hours)
                if termination.exit_code and not self._was_suspended(pod):
                    self._report_failure(termination, pod)

    def _was_suspended(self, pod: Manifest) -> bool:
        """Whether the pod was deleted because its job is suspended, which is no failure."""
        if not pod["metadata"].get("deletionTimestamp"):
            return False
        job = self.connection.get(self.kind, self.name)
        return job is not None and job_state(job).phase == "suspended"

    def _report_failure(self, failed: Termination, pod: Manifest) -> None:
        """Reports why a container failed and saves the end of its log. Raises UserError for wrong input, at once."""
        self.restarts += 1
        say(f"{self.stage}: pod {failed.pod} {failed.reason}", "warning")
        container = (pod["status"].get("containerStatuses") or [{}])[0]
        previous = failed.attempt < container.get("restartCount", 0)
        log = self.connection.log(failed.pod, container.get("name", ""), tail_lines=KEPT_LINES, previous=previous)
        read = [line for _, line in _timestamped(log or "")]
        lines = self._save_log(failed.pod, failed.uid, failed.attempt, read, failed.log_tail)
        if not failed.stage_error:
            for line in lines[-10:]:
                say(f"    {line}")
        if failed.stage_exit_code == UserError.exit_code:
            raise UserError(failed.stage_error)

    def _follow_log(self, pod: Manifest) -> None:
        """Prints the new lines of a pod's log."""
        name, uid = pod["metadata"]["name"], pod["metadata"]["uid"]
        for container in (pod.get("status") or {}).get("containerStatuses") or []:
            attempt, state = container.get("restartCount", 0), container.get("state") or {}
            if not ("running" in state or "terminated" in state) or (uid, attempt) in self._read_to_end:
                continue
            last, when = self._read.get((uid, attempt), ("", 0.0))
            now = time.monotonic()
            since = {"since_seconds": int(now - when) + 5} if last else {"tail_lines": BACKLOG_LINES}
            text = self.connection.log(name, container["name"], **since)
            if text is None:
                continue
            if "terminated" in state:
                self._read_to_end.add((uid, attempt))
            self._read[uid, attempt] = (last, now)
            for stamp, line in _timestamped(text):
                if stamp > last:
                    self._read[uid, attempt] = (stamp, now)
                    self._tails.setdefault(uid, deque(maxlen=KEPT_LINES)).append(line)
                    self.on_line(f"{name}: {line}" if self.stage != "train" and len(self._live) > 1 else line)

    def _save_log(self, name: str, uid: str, attempt: int, lines: Sequence[str] = (), tail: str = "") -> Sequence[str]:
        """Writes and returns a container's last lines: `lines`, else those read so far, else those of `tail`."""
        lines = lines or list(self._tails.get(uid, ())) or [text_of(line) for line in tail.splitlines()]
        if lines:
            self.logs.mkdir(parents=True, exist_ok=True)
            (self.logs / f"{name}-{uid[:8]}-{attempt}.log").write_text("\n".join(lines) + "\n", encoding="utf-8")
        return lines

    # --- reports ------------------------------------------------------------------------------------------------------

    def _report_events(self) -> None:
        """Reports each warning event of the job and its pods once. No status shows, for one, why a pod was rejected."""
        for event in self.connection.warning_events():
            about = event.get("involvedObject") or {}
            name = about.get("name", "")
            ours = about.get("uid") in (self._uid, *self._live) or (
                about.get("kind") == "Workload" and self.name in name
            )
            message = one_line(event.get("message"))
            if ours and event.get("reason") not in REPORTED_BY_STATUS and not message.startswith(ECHO):
                self._refused = self._refused or about.get("uid") == self._uid
                self._report_once(name, f"{about.get('kind')} {name}: {event.get('reason')}: {message}")

    def _report_once(self, about: str, text: str) -> None:
        if (about, text) not in self._reported:
            self._reported.add((about, text))
            say(f"{self.stage}: {text}")

    def _job(self) -> str:
        return f"{self.kind} {self.name}"

    def _failure(self, state: JobState) -> Exception:
        """The error of the container that ended the job: its stage's own if it reported one, else StageFailed."""
        kept = f"; last lines of its log in {self.logs}" if self.logs.is_dir() else ""
        cause = self._cause()
        if cause is None:
            return StageFailed(f"{self.stage}: {self._job()} has failed: it {state.text}{kept}")
        if cause.stage_error and not cause.by_cluster:
            kinds: dict[int, Callable[[str], Exception]] = {2: UserError, 75: Interrupted}
            return kinds.get(cause.stage_exit_code or 1, StageFailed)(cause.stage_error)
        return StageFailed(f"{self.stage}: {self._job()} has failed: pod {cause.pod} {cause.reason}{kept}")

    def _cause(self) -> Termination | None:
        """The termination that the job failed for; None if there was none.

        At the backoff limit the operator stops the remaining pods, which save and say so last of all. And where a pod
        is lost, its peers fail in their communication, maybe before it is reported.
        """
        failed = [(self._seen[key], found) for key, found in self._terminations.items() if found.exit_code]
        failed = [(at, found) for at, found in failed if found.stage_exit_code != Interrupted.exit_code] or failed
        if not failed:
            return None
        newest = max(at for at, _ in failed)
        last = [found for at, found in failed if newest - at < INCIDENT_SECONDS]
        return ([found for found in last if found.by_cluster] or [f for f in last if f.stage_error] or last)[-1]


def _timestamped(log: str) -> list[tuple[str, str]]:
    """(timestamp, text) for each line of a log. Timestamps have nine-digit fractions, so that they sort as text."""
    found = []
    for raw in log.splitlines():
        stamp, _, line = raw.partition(" ")
        second, _, fraction = stamp.removesuffix("Z").partition(".")
        found.append((f"{second}.{fraction:0<9}", text_of(line)))
    return found
