"""The processes of a study's runs, side by side: for `phantom study run` with one progress bar, and for the flow.

A stop signal, or a cancelled flow, lets each of them save.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from pathlib import Path
from threading import Lock
from typing import Any, Protocol

from phantom.cores import cores
from phantom.errors import OUTCOME_ENV, Interrupted, StageFailed, read_outcome
from phantom.orchestration.privacy import NO_TELEMETRY
from phantom.orchestration.run import STOP_TIMEOUT_SECONDS, LineCallback, tail
from phantom.orchestration.study_runs import PROCESSES, RUN_FILE, StudyRun
from phantom.progress import Bar, say, track
from phantom.tracking.lineage import PIPELINE_ENV

LOG = "log.txt"
STEP = re.compile(r"^train[^:]*: (\d+)/\d+ steps")  # a line of the child's progress


def pipeline_name(study: str) -> str:
    """The name of a study's parent run in MLflow."""
    return f"study {study}"


def run_all(
    name: str,
    runs: Sequence[StudyRun],
    waiting: Sequence[StudyRun],
    workers: int,
    describe: Callable[[StudyRun], str],
    runner: Runner,
) -> None:
    """Runs those `waiting` of `runs`, with a bar over the steps of all and a line, by `describe`, for each that ends.

    Raises Interrupted after a stop signal, once the runs have saved, and what the first run to fail did.
    """
    total, ended = _training_steps(runs), len(runs) - len(waiting)
    done_before = total - _training_steps(waiting)
    with track(f"study {name}", max(total, 1), "steps", done_before) as bar, ThreadPoolExecutor(workers) as threads:
        steps = _Steps(bar)
        try:
            futures = {threads.submit(runner.run, run, steps.of(run)): run for run in waiting}
            for future in as_completed(futures):
                future.result()
                run = futures[future]
                steps.show(run, run.steps)
                ended += 1
                say(f"study {name}: {run.title}: {describe(run)} ({ended}/{len(runs)})")
        except KeyboardInterrupt:
            raise Interrupted(
                f"study {name}: stopped with {ended} of {len(runs)} runs finished; the others are saved, run again to "
                "go on"
            ) from None
        finally:
            runner.stop()


class Runner(Protocol):
    """Runs the runs of a study, for callers in several threads: `Processes` here, or jobs on a cluster."""

    stopped: bool

    def run(self, run: StudyRun, on_line: LineCallback) -> bool:
        """Runs it unless it is finished, with each line of its log to `on_line`. Returns whether it ran."""

    def stop(self) -> None:
        """Lets the active runs save and end, and no other begin."""


MakeRunner = Callable[[str, int, Sequence[StudyRun], Path], Runner]  # of the name of a study, workers, runs, root


def processes(name: str, workers: int, runs: Sequence[StudyRun], root: Path) -> Runner:
    """A `MakeRunner`: here, whatever `compute.train` says."""
    return Processes(name, workers, root)


class Processes:
    """Runs each in a process of its own, for callers in several threads; `workers` share the cores."""

    def __init__(self, study: str, workers: int, root: Path = Path()) -> None:
        self.study, self.root, self.threads = study, root, max(1, cores() // workers)
        self.stopped = False
        self._active: list[Child] = []
        self._lock = Lock()

    def run(self, run: StudyRun, on_line: LineCallback) -> bool:
        """Runs it unless it is finished, with each line of its log to `on_line`. Returns whether it ran.

        Raises what the run did if it failed, and Interrupted after `stop`.
        """
        if run.read(self.root) is not None:
            return False
        with self._lock:
            if self.stopped:
                raise Interrupted(f"{run.title}: stopped before it began")
            child = Child(run, self.study, self.threads, self.root)
            self._active.append(child)
        tail(child.process, child.place / LOG, on_line)
        with self._lock:
            self._active.remove(child)
        child.raise_failure()
        return True

    def stop(self) -> None:
        """Lets the active runs save and end, and no other begin. For the main thread, which signals interrupt."""
        self.stopped = True
        with self._lock:
            active = list(self._active)
        for number, seconds in STOP_TIMEOUT_SECONDS.items():
            alive = [child for child in active if child.process.poll() is None]
            for child in alive:
                with suppress(ProcessLookupError):
                    os.killpg(child.process.pid, number)
            end = time.monotonic() + seconds
            for child in alive:
                try:
                    child.process.wait(max(0.0, end - time.monotonic()))
                except (subprocess.TimeoutExpired, KeyboardInterrupt):
                    continue


def _training_steps(runs: Sequence[StudyRun]) -> int:
    """Of all folders: runs that share one are trained once."""
    return sum({run.folder: run.steps for run in runs}.values())


class _Steps:
    """Shows on one bar how far the runs are, as the lines of their logs tell."""

    def __init__(self, bar: Bar) -> None:
        self._bar, self._lock, self._shown = bar, Lock(), dict[Path, int]()  # by folder: several runs may share one

    def of(self, run: StudyRun) -> LineCallback:
        """What to call with each line of the run's log."""

        def read(line: str) -> None:
            if found := STEP.match(line):
                self.show(run, int(found[1]))

        return read

    def show(self, run: StudyRun, steps: int) -> None:
        """Advances the bar to `steps` of the run."""
        with self._lock:
            if (more := steps - self._shown.get(run.folder, 0)) > 0:
                self._bar.advance(more, note=run.title)
                self._shown[run.folder] = steps


class Child:
    """A run in a process of its own, in a session of its own: Ctrl-C comes to it through this process."""

    def __init__(self, run: StudyRun, study: str, threads: int, root: Path) -> None:
        self.run, self.place = run, prepare_folder(run, study, root)
        self.outcome = self.place / "outcome.json"
        self.outcome.unlink(missing_ok=True)
        ours = {
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(threads)),
            "PYTHONUNBUFFERED": "1",
            OUTCOME_ENV: str(self.outcome.resolve()),
            PIPELINE_ENV: pipeline_name(study),
        }
        log = self.place / LOG
        log.write_bytes(b"")
        with log.open("ab") as output:  # to append: a process that outlived an earlier command may still write to it
            self.process = subprocess.Popen(
                [sys.executable, "-m", "phantom.cli", "study", "one", os.path.relpath(self.place, root)],
                cwd=root,
                env={**NO_TELEMETRY, "MLFLOW_LOGGING_LEVEL": "WARNING", **os.environ, **ours},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )

    def raise_failure(self) -> None:
        """Raises what the child did, if it failed."""
        if not self.process.returncode:
            return
        text = self.outcome.read_text(encoding="utf-8", errors="replace") if self.outcome.is_file() else None
        left = read_outcome(text)
        log = self.run.folder / PROCESSES / self.place.name / LOG
        if left and left.code:
            failure = left.exception(f"{self.run.title}: ")
            raise StageFailed(f"{failure} ({log})") if isinstance(failure, StageFailed) else failure
        raise StageFailed(f"{self.run.title}: its process was killed (out of memory?), see {log}; run again to go on")


def prepare_folder(run: StudyRun, study: str, root: Path) -> Path:
    """Makes the folder of a run, with a link to its data; returns that of its process, with what it is told.

    Runs that share a folder are told different things, so each process has a folder of its own in it.
    """
    folder = root / run.folder
    folder.mkdir(parents=True, exist_ok=True)
    if run.trained.start:
        prepare_folder(run.trained.start, study, root)
    link = folder / "data"
    if not link.exists():  # nor is what it leads to, if latents were removed and are elsewhere now
        link.unlink(missing_ok=True)
        with suppress(FileExistsError):  # made by another thread for a run that shares the folder
            link.symlink_to(os.path.relpath((root / run.data).resolve(), folder.resolve()))
    told = {
        **{"study": study, "arm": run.arm, "seed": run.seed, "measures": dict(run.measures)},
        "params": run.params.model_dump(mode="json", by_alias=True),
        **_training(run.trained),
    }
    text = json.dumps(told, indent=1)
    place = folder / PROCESSES / hashlib.sha256(text.encode()).hexdigest()[:8]
    place.mkdir(parents=True, exist_ok=True)
    (place / RUN_FILE).write_text(text, encoding="utf-8")
    return place


def _training(run: StudyRun) -> dict[str, Any]:
    """What a process is told of the training of `run`, and of the run whose weights it begins from."""
    told = {
        **{"name": run.name, "held": run.held, "trained_arm": run.arm},
        "trained_params": run.params.model_dump(mode="json", by_alias=True),
    }
    return told | {"start": {"folder": str(run.start.folder), **_training(run.start)}} if run.start else told
