"""The runs of a study as jobs beside each other, where `compute.train` is kubernetes.

A run's process, `phantom study one`, is the same as on one machine. The checkout has to lie on the volume that the pods
mount: they read there what they are told, and write their figures.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from phantom.cluster.api import Connection
from phantom.cluster.render import render
from phantom.cluster.spec import study_spec
from phantom.cluster.submit import FILES_VISIBLE_SECONDS, SUBMIT_TIMEOUT_SECONDS, raise_first, run_manifest
from phantom.cluster.validation import validate_manifest
from phantom.cluster.watch import JobWatcher
from phantom.errors import Interrupted, StageFailed
from phantom.orchestration.run import LineCallback
from phantom.orchestration.study_processes import Processes, Runner, pipeline_name, prepare_folder
from phantom.orchestration.study_runs import StudyRun
from phantom.progress import say


def make_runner(name: str, workers: int, runs: Sequence[StudyRun], root: Path = Path()) -> Runner:
    """What runs the study `name`: jobs on the cluster, or processes here, as `compute.train` says."""
    on_cluster = runs[0].params.compute.train == "kubernetes"
    return Jobs(name, root) if on_cluster else Processes(name, workers, root)


class Jobs:
    """Runs each as a job, for callers in several threads. A job that exists already is adopted."""

    def __init__(self, study: str, root: Path = Path()) -> None:
        self.study, self.root, self.stopped = study, root, False

    def run(self, run: StudyRun, on_line: LineCallback) -> bool:
        """Runs it unless it is finished, with each line of its log to `on_line`. Returns whether it ran.

        Raises what the run did if it failed, and Interrupted after `stop`, when the job is deleted and its pod saves.
        """
        if run.read(self.root) is not None:
            return False
        if self.stopped:
            raise Interrupted(f"{run.title}: stopped before it began")
        place = prepare_folder(run, self.study, self.root)
        key = f"{run.folder.name.removeprefix('base-')[:10]}-{place.name}"
        cluster = run.params.cluster
        spec = study_spec(key, place.relative_to(self.root), pipeline_name(self.study), cluster)
        manifest = render(spec)
        raise_first(validate_manifest(manifest, cluster.lock_memory))
        say(f"study {self.study}: {run.title}: {manifest['kind']} {spec.name}")
        connection = Connection(cluster, SUBMIT_TIMEOUT_SECONDS)
        watcher = JobWatcher(connection, spec.stage, manifest["kind"], spec.name, self.root, on_line)
        run_manifest(spec, manifest, watcher, lambda: run.read(self.root) is not None, lambda: self.stopped)
        self._wait_for_figures(run, spec.name)
        return True

    def stop(self) -> None:
        """Lets the threads delete their jobs, and no other begin."""
        self.stopped = True

    def _wait_for_figures(self, run: StudyRun, job: str) -> None:
        deadline = time.monotonic() + FILES_VISIBLE_SECONDS
        while run.read(self.root) is None:
            if time.monotonic() > deadline:
                raise StageFailed(
                    f"{run.title}: {job} has succeeded, but its figures are on the volume "
                    f"{run.params.cluster.volume}, on which this checkout does not lie; see docs/cluster.md"
                )
            time.sleep(1)
