"""Runs a stage as a job: renders, checks, submits or adopts, watches, and leaves nothing running when it is stopped."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path

from phantom.cluster import outputs
from phantom.cluster.api import Connection
from phantom.cluster.messages import job_state
from phantom.cluster.render import SPEC, Manifest, render
from phantom.cluster.spec import JobSpec, make_spec
from phantom.cluster.validation import problems
from phantom.cluster.watch import POLL_SECONDS, JobWatcher
from phantom.config import Params
from phantom.errors import OUTCOME, Interrupted, StageFailed, UserError
from phantom.progress import say

# How long a server that does not answer is asked again: before there is a job, while it runs, and to delete it.
SUBMIT_SECONDS, WATCH_SECONDS, CANCEL_SECONDS = 120.0, 1800.0, 20.0
SEEN_SECONDS = 60.0  # that a network file system may take to show what a pod wrote


@dataclass(frozen=True)
class JobResult:
    """A job that has succeeded. here: whether its outputs lie in this checkout, as they do on the job's volume."""

    stage: str
    job: str
    namespace: str
    adopted: bool
    pods: int
    restarts: int
    seconds: float
    here: bool


def run_job(stage: str, params: Params, root: Path = Path()) -> JobResult:
    """Runs a stage on the cluster, to its end. Called again while the job runs, it takes that one up.

    Stopped by a signal it deletes the job, whose pods save what they have. Raises UserError, Interrupted or
    StageFailed, as the stage did.
    """
    began = time.monotonic()
    spec = make_spec(stage, params, root)
    manifest = render(spec)
    _refuse(problems(manifest, params.cluster.lock_memory))
    kind, name, namespace = manifest["kind"], spec.name, params.cluster.namespace
    if outputs.fetch(stage, spec.key, root):
        say(f"{stage}: {kind} {name} has ended while nobody watched it: its outputs are taken up")
        outputs.take(stage, spec.key, root)
        return JobResult(stage, name, namespace, True, 0, 0, round(time.monotonic() - began, 1), True)
    before = outputs.stamp(stage, root)
    connection = Connection(params.cluster, SUBMIT_SECONDS)
    try:
        with JobWatcher(connection, stage, kind, name, root) as watcher:
            adopted = _submit(connection, spec, manifest, root)
            connection.timeout_seconds = WATCH_SECONDS
            watcher.run()
    except KeyboardInterrupt:
        raise Interrupted(_cancel(params, stage, kind, name)) from None
    except UserError:
        _cancel(params, stage, kind, name)
        raise
    here = _arrived(spec, root, before, adopted)
    if here:
        outputs.take(stage, spec.key, root)
    else:
        where = f"the outputs are on the volume {params.cluster.volume}, on which this checkout does not lie"
        if os.environ.get(OUTCOME):  # the next stages read them
            raise StageFailed(f"{stage}: {kind} {name} has succeeded, but {where}; see docs/cluster.md")
        say(f"{stage}: {where}")
    seconds = round(time.monotonic() - began, 1)
    return JobResult(stage, name, namespace, adopted, len(watcher.pods), watcher.restarts, seconds, here)


def _refuse(found: list[str]) -> None:
    """Raises UserError for the first problem of a manifest; where there are several, each is a line before it."""
    if len(found) > 1:
        for line in found:
            say(line)
    if found:
        raise UserError(found[0] + (f" (the first of {len(found)} problems)" if len(found) > 1 else ""))


def _submit(connection: Connection, spec: JobSpec, manifest: Manifest, root: Path) -> bool:
    """Creates the job, or finds it there: then True. A finished one is replaced, unless its outputs can be had."""
    stage, kind, meta = spec.stage, manifest["kind"], manifest["metadata"]
    said = False
    while not connection.create(manifest):
        job = connection.get(kind, meta["name"])
        if job is None:
            continue
        if job["metadata"].get("deletionTimestamp"):
            if not said:
                say(f"{stage}: waiting for the pods of the former {kind} {meta['name']} to end")
            said = True
            time.sleep(POLL_SECONDS)
            continue
        state = job_state(job)
        same = (job["metadata"].get("annotations") or {}).get(SPEC) == meta["annotations"][SPEC]
        if state.phase == "failed" or (state.phase == "succeeded" and not (same and _has_left(spec, root))):
            connection.delete(kind, meta["name"])
            continue
        if not same:
            raise StageFailed(
                f"{stage}: {kind} {meta['name']} is there already, with other settings of cluster.*; "
                f"`kubectl -n {connection.namespace} delete {kind.lower()} {meta['name']}` ends it"
            )
        say(f"{stage}: {kind} {meta['name']} is there already: it is taken up")
        return True
    say(f"{stage}: {kind} {meta['name']} is submitted to the namespace {connection.namespace}")
    return False


def _cancel(params: Params, stage: str, kind: str, name: str) -> str:
    """Deletes the job. Returns a line that says so."""
    try:
        Connection(params.cluster, CANCEL_SECONDS).delete(kind, name)
    except (StageFailed, KeyboardInterrupt) as error:
        command = f"kubectl -n {params.cluster.namespace} delete {kind.lower()} {name}"
        return f"{stage}: interrupted, but {kind} {name} could not be deleted ({error}): `{command}`"
    return f"{stage}: interrupted; {kind} {name} is deleted and its pods save what they have; run again to go on"


def _has_left(spec: JobSpec, root: Path) -> bool:
    """Whether the outputs of a finished job are here, or can be."""
    return outputs.are_there(spec.stage, spec.key, root) or outputs.fetch(spec.stage, spec.key, root)


def _arrived(spec: JobSpec, root: Path, before: int | None, adopted: bool) -> bool:
    """Whether the job's output is here: newer than what was here before, unless the job was there before us."""
    deadline = time.monotonic() + (SEEN_SECONDS if os.environ.get(OUTCOME) else 0)
    while (now := outputs.stamp(spec.stage, root)) is None or (now == before and not adopted):
        if time.monotonic() > deadline:
            return False
        time.sleep(1)
    return True
