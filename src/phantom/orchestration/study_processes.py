"""The processes of a study's runs, side by side, with one progress bar; a stop signal lets each of them save."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

from phantom.cores import cores
from phantom.errors import OUTCOME_ENV, Interrupted, StageFailed, UserError
from phantom.orchestration.privacy import NO_TELEMETRY
from phantom.orchestration.run import STOP_TIMEOUT_SECONDS
from phantom.orchestration.study_runs import RUN_FILE, StudyRun
from phantom.progress import Bar, say, track
from phantom.tracking.lineage import PIPELINE_ENV

LOG = "log.txt"
POLL_SECONDS = 0.2
STEP = re.compile(r"^train[^:]*: (\d+)/\d+ steps", re.MULTILINE)  # a line of the child's progress


def pipeline_name(study: str) -> str:
    """The name of a study's parent run in MLflow."""
    return f"study {study}"


def run_all(
    name: str,
    runs: Sequence[StudyRun],
    waiting: Sequence[StudyRun],
    workers: int,
    describe: Callable[[StudyRun], str],
    root: Path = Path(),
) -> None:
    """Runs those `waiting` of `runs`, with a bar over the steps of all and a line, by `describe`, for each that ends.

    Raises Interrupted after a stop signal, once the runs have saved, and what the first run to fail did.
    """
    queue, active = deque(waiting), list[Child]()
    total, ended = sum(run.steps for run in runs), len(runs) - len(waiting)
    done_before = total - sum(run.steps for run in waiting)
    threads = max(1, cores() // workers)
    with track(f"study {name}", max(total, 1), "steps", done_before) as bar:
        try:
            while queue or active:
                while queue and len(active) < workers:
                    active.append(Child(queue.popleft(), name, threads, root))
                time.sleep(POLL_SECONDS)
                for child in list(active):
                    child.show_steps(bar)
                    if child.process.poll() is None:
                        continue
                    active.remove(child)
                    child.raise_failure()
                    ended += 1
                    say(f"study {name}: {child.run.title}: {describe(child.run)} ({ended}/{len(runs)})")
        except KeyboardInterrupt:
            raise Interrupted(
                f"study {name}: stopped with {ended} of {len(runs)} runs finished; the others are saved, run again to "
                "go on"
            ) from None
        finally:
            _stop(active)


class Child:
    """A run in a process of its own, in a session of its own: Ctrl-C comes to it through this process."""

    def __init__(self, run: StudyRun, study: str, threads: int, root: Path) -> None:
        self.run, self.folder, self.steps = run, root / run.folder, 0
        prepare_folder(run, study, root)
        self.outcome = self.folder / "outcome.json"
        self.outcome.unlink(missing_ok=True)
        ours = {
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(threads)),
            "PYTHONUNBUFFERED": "1",
            OUTCOME_ENV: str(self.outcome.resolve()),
            PIPELINE_ENV: pipeline_name(study),
        }
        with (self.folder / LOG).open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "phantom.cli", "study", "one", str(run.folder)],
                cwd=root,
                env={**NO_TELEMETRY, "MLFLOW_LOGGING_LEVEL": "WARNING", **os.environ, **ours},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def show_steps(self, bar: Bar) -> None:
        """Advances `bar` by the steps since the last call, as the child's log tells."""
        ended = self.process.poll() == 0
        found = STEP.findall((self.folder / LOG).read_text(encoding="utf-8", errors="replace"))
        steps = self.run.steps if ended else int(found[-1]) if found else 0
        if steps > self.steps:
            bar.advance(steps - self.steps, note=self.run.title)
            self.steps = steps

    def raise_failure(self) -> None:
        """Raises what the child did, if it failed."""
        if not self.process.returncode:
            return
        left = json.loads(self.outcome.read_text(encoding="utf-8")) if self.outcome.is_file() else None
        log = self.run.folder / LOG
        if left and left["code"]:
            kind = {2: UserError, 75: Interrupted}.get(left["code"], StageFailed)
            raise kind(f"{self.run.title}: {left['error']}" + (f" ({log})" if kind is StageFailed else ""))
        raise StageFailed(f"{self.run.title}: its process was killed (out of memory?), see {log}; run again to go on")


def prepare_folder(run: StudyRun, study: str, root: Path) -> None:
    """Makes the folder of a run, with a link to the shared data and what the child has to know."""
    folder = root / run.folder
    folder.mkdir(parents=True, exist_ok=True)
    link = folder / "data"
    if not link.is_symlink():
        link.symlink_to(os.path.relpath((root / "data").resolve(), folder.resolve()))
    told = {key: value for key, value in asdict(run).items() if key not in ("params", "folder")}
    told |= {"study": study, "name": run.name, "params": run.params.model_dump(mode="json", by_alias=True)}
    new = folder / f".{RUN_FILE}.new"
    new.write_text(json.dumps(told, indent=1), encoding="utf-8")
    new.replace(folder / RUN_FILE)


def _stop(active: Sequence[Child]) -> None:
    """Stops children: on the first two signals they save."""
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
