"""Runs a stage as a job: renders and validates its manifest, submits or adopts it, watches it, deletes it on Ctrl-C."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from phantom.cluster import outputs
from phantom.cluster.api import Connection
from phantom.cluster.messages import job_state
from phantom.cluster.render import DIGEST_ANNOTATION, TRAINING_RUNTIME, Manifest, render
from phantom.cluster.spec import JobSpec, last_spec, make_spec
from phantom.cluster.validation import runtime_conflicts, validate_manifest
from phantom.cluster.watch import POLL_SECONDS, JobWatcher
from phantom.config import Cluster, Params
from phantom.errors import OUTCOME_ENV, Interrupted, StageFailed, Terminated, UserError
from phantom.progress import say

# How long requests to an API server that does not respond are retried.
SUBMIT_TIMEOUT_SECONDS, WATCH_TIMEOUT_SECONDS, CANCEL_TIMEOUT_SECONDS = 120.0, 1800.0, 20.0
FILES_VISIBLE_SECONDS = 60.0  # until a network file system shows what a pod on another node wrote


@dataclass(frozen=True)
class JobResult:
    """A job that has succeeded. here: whether this checkout is on the job's volume, and so has its outputs.

    Where the stage is two jobs, this is the first. gpu_hours: those of all pods that were watched to their end, from
    start to end, of the attempts that failed too.
    """

    stage: str
    job: str
    namespace: str
    adopted: bool
    pods: int
    restarts: int
    seconds: float
    here: bool
    gpu_hours: float = 0.0


def run_job(stage: str, params: Params, root: Path = Path()) -> JobResult:
    """Runs a stage as a job until it finishes. A job for the same work that already exists is adopted.

    Encode is two: the parts, and data/latents made of them; so is prepare in several pods: what the videos are, and the
    manifest; and evaluate: the videos, and their scores. Finished parts are done again only after the second was.

    On KeyboardInterrupt it deletes the job, whose pods then save a checkpoint; on Terminated it leaves the job. Raises
    UserError, Interrupted or StageFailed, as the stage did.
    """
    if stage == "train" and params.train.method != "phantom":
        raise UserError(f"train.method: found {params.train.method}, accepted with compute.train kubernetes: phantom")
    started = time.monotonic()
    spec = make_spec(stage, params, root)
    manifest = render(spec)
    raise_first(validate_manifest(manifest, params.cluster.lock_memory))
    kind, name, namespace = manifest["kind"], spec.name, params.cluster.namespace
    if outputs.restore(stage, spec.key, root):
        say(f"{stage}: {kind} {name} finished while nobody watched it: adopting its outputs")
        outputs.mark_adopted(stage, spec.key, root)
        return JobResult(stage, name, namespace, True, 0, 0, round(time.monotonic() - started, 1), True)
    before = outputs.written_at(stage, root)
    connection = Connection(params.cluster, SUBMIT_TIMEOUT_SECONDS)
    if kind == "TrainJob":
        raise_first(runtime_conflicts(connection.training_runtime(TRAINING_RUNTIME), params.cluster))
    watcher = JobWatcher(connection, stage, kind, name, root)
    watched = [watcher]
    if spec.indexes is None:
        adopted = run_manifest(spec, manifest, watcher, lambda: _outputs_available(spec, root))
    else:
        last = last_spec(spec)

        def is_used() -> bool:
            return not _is_finished(connection, last.name) or _outputs_available(spec, root)

        run_manifest(spec, manifest, watcher, is_used)
        watched.append(JobWatcher(connection, stage, kind, last.name, root))
        adopted = run_manifest(last, render(last), watched[-1], lambda: _outputs_available(spec, root))
    here = _wait_for_outputs(spec, root, before, adopted)
    if here:
        outputs.mark_adopted(stage, spec.key, root)
    else:
        where = f"the outputs are on the volume {params.cluster.volume}, on which this checkout does not lie"
        if os.environ.get(OUTCOME_ENV):  # part of a pipeline, whose next stages read them
            raise StageFailed(f"{stage}: {kind} {name} has succeeded, but {where}; see docs/cluster.md")
        say(f"{stage}: {where}")
    seconds = round(time.monotonic() - started, 1)
    gpu_hours = round(sum(each.gpu_hours for each in watched), 4)
    return JobResult(stage, name, namespace, adopted, len(watcher.pods), watcher.restarts, seconds, here, gpu_hours)


def run_manifest(
    spec: JobSpec,
    manifest: Manifest,
    watcher: JobWatcher,
    has_outputs: Callable[[], bool],
    is_stopped: Callable[[], bool] = lambda: False,
) -> bool:
    """Submits a rendered job, or adopts the one that exists, and watches it to its end. Returns whether it adopted.

    has_outputs: whether those of a job that has finished before are there. is_stopped: as in `JobWatcher.run`. Deletes
    the job if interrupted or stopped, and for wrong input; leaves it if terminated. Raises UserError, Interrupted or
    StageFailed.
    """
    stage, kind, name = spec.stage, manifest["kind"], spec.name
    try:
        with watcher:
            adopted = _submit(watcher.connection, spec, manifest, has_outputs)
            watcher.connection.timeout_seconds = WATCH_TIMEOUT_SECONDS
            watcher.run(is_stopped)
    except Terminated:
        raise Interrupted(f"{stage}: stopped; {kind} {name} goes on, run again to adopt it") from None
    except KeyboardInterrupt:
        raise Interrupted(_cancel(spec.settings, stage, kind, name)) from None
    except UserError:
        _cancel(spec.settings, stage, kind, name)
        raise
    return adopted


def raise_first(problems: list[str]) -> None:
    """Raises UserError for the first problem, if any. Where there are several, it prints all of them before."""
    if len(problems) > 1:
        for line in problems:
            say(line)
    if problems:
        raise UserError(problems[0] + (f" (the first of {len(problems)} problems)" if len(problems) > 1 else ""))


def _submit(connection: Connection, spec: JobSpec, manifest: Manifest, has_outputs: Callable[[], bool]) -> bool:
    """Creates the job. True if it adopts an existing one instead; of finished ones, only those with outputs."""
    stage, kind, meta = spec.stage, manifest["kind"], manifest["metadata"]
    reported = False
    while not connection.create(manifest):
        job = connection.get(kind, meta["name"])
        if job is None:
            continue
        if job["metadata"].get("deletionTimestamp"):
            if not reported:
                say(f"{stage}: waiting for the pods of the deleted {kind} {meta['name']} to end")
            reported = True
            time.sleep(POLL_SECONDS)
            continue
        state = job_state(job)
        digest = (job["metadata"].get("annotations") or {}).get(DIGEST_ANNOTATION)
        same = digest == meta["annotations"][DIGEST_ANNOTATION]
        if state.phase == "failed" or (state.phase == "succeeded" and not (same and has_outputs())):
            connection.delete(kind, meta["name"])
            continue
        if not same:
            raise StageFailed(
                f"{stage}: {kind} {meta['name']} already exists, with other settings of cluster.*; "
                f"`kubectl -n {connection.namespace} delete {kind.lower()} {meta['name']}` ends it"
            )
        say(f"{stage}: {kind} {meta['name']} already exists: adopting it")
        return True
    say(f"{stage}: {kind} {meta['name']} is submitted to the namespace {connection.namespace}")
    return False


def _cancel(cluster: Cluster, stage: str, kind: str, name: str) -> str:
    """Deletes the job and returns the line to report, also if it could not be deleted."""
    try:
        Connection(cluster, CANCEL_TIMEOUT_SECONDS).delete(kind, name)
    except (StageFailed, KeyboardInterrupt) as error:
        command = f"kubectl -n {cluster.namespace} delete {kind.lower()} {name}"
        return f"{stage}: interrupted, but {kind} {name} could not be deleted ({error}): `{command}`"
    return f"{stage}: interrupted; {kind} {name} is deleted and its pods save what they have; run again to go on"


def _is_finished(connection: Connection, name: str) -> bool:
    job = connection.get("Job", name)
    return job is not None and job_state(job).phase in ("succeeded", "failed")


def _outputs_available(spec: JobSpec, root: Path) -> bool:
    """Whether the outputs of a finished job are in the checkout, or were kept aside and are now restored to it."""
    return outputs.is_adopted(spec.stage, spec.key, root) or outputs.restore(spec.stage, spec.key, root)


def _wait_for_outputs(spec: JobSpec, root: Path, before: int | None, adopted: bool) -> bool:
    """Whether the job's outputs are in the checkout. Unless it was adopted, they must be newer than `before`."""
    deadline = time.monotonic() + (FILES_VISIBLE_SECONDS if os.environ.get(OUTCOME_ENV) else 0)
    while (now := outputs.written_at(spec.stage, root)) is None or (now == before and not adopted):
        if time.monotonic() > deadline:
            return False
        time.sleep(1)
    return True
