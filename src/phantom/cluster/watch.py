"""Watches a job until it has ended, and says what happens to it and its pods as it happens.

Nothing is remembered between polls but what was said already: a watcher that dies is replaced by another one, which
begins with the job as it finds it.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path

from phantom.cluster.api import Connection
from phantom.cluster.messages import End, State, ends, job_state, one_line, taken, trouble
from phantom.cluster.render import Manifest
from phantom.errors import Interrupted, StageFailed, UserError
from phantom.progress import say

POLL = 3.0  # s, or as soon as a pod changes
PATIENCE = 60.0  # s without a sign of the operator before this is said
LAST_LINES = 40  # of a log, kept of every pod
FIRST_LINES = 200  # of a log, shown of a pod that runs already
TOLD = ("FailedScheduling", "BackOff", "Failed")  # by the pods' own states
LOGS = Path("checkpoints/jobs")


class Watch:
    """One job of a stage. `pods` and `restarts` count what was seen of it."""

    def __init__(self, connection: Connection, stage: str, kind: str, name: str, root: Path) -> None:
        self.connection, self.stage, self.kind, self.name = connection, stage, kind, name
        self.logs = root / LOGS / name
        self.pods: set[str] = set()  # uids
        self.restarts = 0
        self._uid = ""  # of the job
        self._created = ""  # the job
        self._over, self._wake = threading.Event(), threading.Event()
        self._state: State | None = None
        self._began = time.monotonic()
        self._changes: deque[Manifest] = deque()  # pods as they were for a while
        self._said: set[tuple[str, str]] = set()
        self._known: dict[str, str] = {}  # pods that are there: uid -> name
        self._tails: dict[str, deque[str]] = {}
        self._read: dict[tuple[str, int], tuple[str, float]] = {}  # (pod, attempt) -> time of its last line, and when
        self._read_whole: set[tuple[str, int]] = set()
        self._ends: dict[tuple[str, int], End] = {}

    def __enter__(self) -> Watch:
        """From now on no change of a pod is missed, such as one that ends and is deleted between two polls."""
        follow = (self.name, self._hear, self._over)
        threading.Thread(target=self.connection.changes, args=follow, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()

    def run(self) -> None:
        """Returns when the job has succeeded. Raises UserError, Interrupted or StageFailed, as the stage did."""
        while not self.poll():
            self._wake.wait(POLL)
            self._wake.clear()

    def poll(self) -> bool:
        """One look at the job. True if it has succeeded."""
        job = self.connection.get(self.kind, self.name)
        if job is None or (self._uid and job["metadata"]["uid"] != self._uid):
            raise StageFailed(f"{self.stage}: {self._job()} was deleted by someone else; run again to start it anew")
        self._uid, self._created = job["metadata"]["uid"], job["metadata"]["creationTimestamp"]
        state = job_state(job)
        self._look_at(self.connection.pods(self.name), state)
        self._hear_warnings()
        if state != self._state:
            self._state = state
            say(f"{self.stage}: {self._job()} {state.text}")
        if state.phase == "created" and not taken(job) and time.monotonic() - self._began > PATIENCE:
            self._once(
                "operator", "nobody has taken the job up yet; is the operator running? `phantom doctor --cluster`"
            )
        if state.phase == "failed":
            raise self._failure(state)
        return state.phase == "succeeded"

    # --- pods ---------------------------------------------------------------------------------------------------------

    def _hear(self, pod: Manifest) -> None:
        """A pod has changed: it is looked at before it is gone, and its log with it."""
        self._changes.append(pod)
        self._wake.set()

    def _look_at(self, pods: list[Manifest], state: State) -> None:
        there = {pod["metadata"]["uid"]: pod["metadata"]["name"] for pod in pods}
        while self._changes:
            self._look_at_pod(self._changes.popleft())
        for uid, name in self._known.items():
            finished = any(pod == uid for pod, _ in self._ends)
            if uid not in there and not finished and state.phase not in ("suspended", "succeeded", "failed"):
                self._once(uid, f"pod {name} is gone")
                self._keep_log(name, uid, 0)
        self._known = there
        for pod in pods:
            self._follow_log(pod)
            self._look_at_pod(pod)

    def _look_at_pod(self, pod: Manifest) -> None:
        name, uid = pod["metadata"]["name"], pod["metadata"]["uid"]
        if pod["metadata"]["creationTimestamp"] < self._created:
            return  # of a former job of this name
        self.pods.add(uid)
        for text in trouble(pod):
            self._once(uid, f"pod {name} {text}")
        for end in ends(pod):
            if (uid, end.attempt) not in self._ends:
                self._ends[uid, end.attempt] = end
                if end.code:
                    self._tell_end(end, pod)

    def _tell_end(self, end: End, pod: Manifest) -> None:
        """Says why a container ended and keeps its last lines. Wrong input ends the watching: it stays wrong."""
        self.restarts += 1
        say(f"{self.stage}: pod {end.pod} {end.text}")
        container = (pod["status"].get("containerStatuses") or [{}])[0]
        previous = end.attempt < container.get("restartCount", 0)
        text = self.connection.log(end.pod, container.get("name", ""), tail_lines=LAST_LINES, previous=previous)
        lines = self._keep_log(end.pod, end.uid, end.attempt, [line for _, line in _stamped(text or "")], end.last)
        if not end.error:
            for line in lines[-10:]:
                say(f"    {line}")
        if end.outcome == UserError.exit_code:
            raise UserError(end.error)

    def _follow_log(self, pod: Manifest) -> None:
        """Hands on the new lines of a pod's log."""
        name, uid = pod["metadata"]["name"], pod["metadata"]["uid"]
        for container in (pod.get("status") or {}).get("containerStatuses") or []:
            attempt, state = container.get("restartCount", 0), container.get("state") or {}
            if not ("running" in state or "terminated" in state) or (uid, attempt) in self._read_whole:
                continue
            last, when = self._read.get((uid, attempt), ("", 0.0))
            now = time.monotonic()
            since = {"since_seconds": int(now - when) + 5} if last else {"tail_lines": FIRST_LINES}
            text = self.connection.log(name, container["name"], **since)
            if text is None:
                continue
            if "terminated" in state:
                self._read_whole.add((uid, attempt))
            self._read[uid, attempt] = (last, now)
            for stamp, line in _stamped(text):
                if stamp > last:
                    self._read[uid, attempt] = (stamp, now)
                    self._tails.setdefault(uid, deque(maxlen=LAST_LINES)).append(line)
                    say(f"{name}: {line}" if self.stage == "encode" and len(self._known) > 1 else line)

    def _keep_log(self, name: str, uid: str, attempt: int, lines: Sequence[str] = (), last: str = "") -> Sequence[str]:
        """Writes a container's last lines into a file: those given or, if there are none, those read so far."""
        lines = lines or list(self._tails.get(uid, ())) or last.splitlines()
        if lines:
            self.logs.mkdir(parents=True, exist_ok=True)
            (self.logs / f"{name}-{uid[:8]}-{attempt}.log").write_text("\n".join(lines) + "\n", encoding="utf-8")
        return lines

    # --- words --------------------------------------------------------------------------------------------------------

    def _hear_warnings(self) -> None:
        """Events about the job and its pods, each once: what the pods' own states do not tell, as a refused pod."""
        for event in self.connection.warnings():
            about = event.get("involvedObject") or {}
            name = about.get("name", "")
            ours = about.get("uid") in (self._uid, *self._known) or (
                about.get("kind") == "Workload" and self.name in name
            )
            if ours and event.get("reason") not in TOLD:
                self._once(name, f"{about.get('kind')} {name}: {event.get('reason')}: {one_line(event.get('message'))}")

    def _once(self, about: str, text: str) -> None:
        if (about, text) not in self._said:
            self._said.add((about, text))
            say(f"{self.stage}: {text}")

    def _job(self) -> str:
        return f"{self.kind} {self.name}"

    def _failure(self, state: State) -> Exception:
        """As the stage failed, if it left a word; else as the newest container did."""
        failed = [end for end in self._ends.values() if end.code]
        for end in reversed(failed):
            if end.error:
                kind: Callable[[str], Exception] = {2: UserError, 75: Interrupted}.get(end.outcome or 1, StageFailed)
                return kind(end.error)
        why = f"pod {failed[-1].pod} {failed[-1].text}" if failed else f"it {state.text}"
        kept = f"; last lines of its log in {self.logs}" if self.logs.is_dir() else ""
        return StageFailed(f"{self.stage}: {self._job()} has failed: {why}{kept}")


def _stamped(text: str) -> list[tuple[str, str]]:
    """(time, line) of a log. Times get nine digits, so that they can be compared as text."""
    found = []
    for raw in text.splitlines():
        stamp, _, line = raw.partition(" ")
        second, _, fraction = stamp.removesuffix("Z").partition(".")
        found.append((f"{second}.{fraction:0<9}", line))
    return found
