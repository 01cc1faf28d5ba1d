"""Runs the pipeline on this machine, without a server: `dvc repro` of each stage in turn.

The Prefect flow (`flows/full_pipeline.py`) calls the same `run_stage`. DVC decides whether a stage has to run.
"""

from __future__ import annotations

import configparser
import fcntl
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from textwrap import fill
from typing import Any

from phantom.config import Params, load_params
from phantom.data.files import lock_file
from phantom.data.storage import source_fingerprint
from phantom.errors import OUTCOME_ENV, Interrupted, Outcome, StageFailed, Terminated, UserError, read_outcome
from phantom.evaluation.benchmarks import check_benchmarks
from phantom.logs import relay, text_of
from phantom.orchestration.dvc_remote import push
from phantom.orchestration.privacy import NO_TELEMETRY
from phantom.orchestration.stages import EVALUATION, PHANTOM, REGISTERED, REPORT, STAGES, unlisted_settings
from phantom.progress import say
from phantom.tracking.lineage import PIPELINE_ENV, new_pipeline_name

WORK_DIR = Path(".dvc/tmp/phantom")  # outcome files, logs and the lock; ignored by git and DVC
# Signals that stop a stage, in this order, and how long each has to take effect. On SIGINT and SIGTERM stages save.
STOP_TIMEOUT_SECONDS = {signal.SIGINT: 90.0, signal.SIGTERM: 20.0, signal.SIGKILL: 10.0}
# The same where a job on a cluster is to go on: on SIGINT its stage would delete it.
LEAVE_TIMEOUT_SECONDS = {signal.SIGTERM: 110.0, signal.SIGKILL: 10.0}

LineCallback = Callable[[str], None]


@dataclass(frozen=True)
class StageRun:
    """The result of one stage. `ran` is False if DVC found it up to date or restored its outputs from the cache.

    gpu_hours: for which it held GPUs; not of an attempt that failed or was killed.
    """

    stage: str
    ran: bool
    seconds: float
    gpu_hours: float = 0.0


def run(root: Path = Path(), params: Params | None = None) -> list[StageRun]:
    """Runs every stage that is not up to date, in order. Waits if another run is active in this checkout.

    Raises UserError, Interrupted or StageFailed, as the failed stage did.
    """
    params = params or load_params(root / "params.yaml")
    done: list[StageRun] = []
    pipeline = new_pipeline_name()
    with checkout_lock(root) as lock:
        for number, stage in enumerate(STAGES, 1):
            say(f"[{number}/{len(STAGES)}] {stage}")
            try:
                done.append(run_stage(stage, params, root, lock=lock, pipeline=pipeline))
            except KeyboardInterrupt as stop:
                goes_on = isinstance(stop, Terminated) and getattr(params.compute, stage, "local") == "kubernetes"
                kept = "its job goes on" if goes_on else "what was finished is kept"
                raise Interrupted(f"{stage}: interrupted; {kept}, run again to go on") from None
            say(f"[{number}/{len(STAGES)}] {describe(done[-1])}")
    return done


def describe(run: StageRun) -> str:
    """One line for the log."""
    cost = f", {run.gpu_hours:.2f} GPU-hours" if run.gpu_hours else ""
    return f"{run.stage}: {f'done in {run.seconds:.0f} s{cost}' if run.ran else 'up to date'}"


@contextmanager
def checkout_lock(root: Path) -> Iterator[int]:
    """Locks the checkout for one pipeline run; yields the lock's file descriptor.

    Stage processes inherit the descriptor. If the run dies while a stage is still running, the next run waits for that
    stage and uses its result instead of starting it a second time in parallel.
    """
    if not (root / "dvc.yaml").is_file():
        raise UserError(f"{root.resolve()}: no dvc.yaml there; the pipeline runs in a checkout of this project")
    if not any((folder / ".git").exists() for folder in (root.resolve(), *root.resolve().parents)):
        # In an unpacked archive or an image there is no git repository, which DVC requires unless configured otherwise.
        _set_no_scm(root)
    work = root / WORK_DIR
    work.mkdir(parents=True, exist_ok=True)
    with (work / "lock").open("w") as file:
        try:
            lock_file(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("another run is active in this checkout: waiting for it to finish")
            lock_file(file, fcntl.LOCK_EX)
        _clear_stale_dvc_locks(root / ".dvc/tmp/rwlock")
        yield file.fileno()


def _set_no_scm(root: Path) -> None:
    """Adds `core.no_scm` to DVC's local settings, among which a user's remote and its keys may be."""
    settings = configparser.RawConfigParser(strict=False)
    settings.read(root / ".dvc/config.local", encoding="utf-8")
    if not settings.getboolean("core", "no_scm", fallback=False):
        command = [sys.executable, "-m", "dvc", "config", "--quiet", "--local", "core.no_scm", "true"]
        subprocess.run(command, cwd=root, env={**NO_TELEMETRY, **os.environ}, check=True)


def _clear_stale_dvc_locks(file: Path) -> None:
    """Removes DVC's lock file if a killed run left it: truncated, which DVC cannot parse, or with reused process ids.

    DVC takes a lock for live if any process has its id, which in another pod is often so. The caller holds the
    checkout, so no stage is running. Locks of other DVC commands, such as a user's `dvc pull`, are kept.
    """
    try:
        held = [h for of in json.loads(file.read_text(encoding="utf-8")).values() for h in of.values()]
    except FileNotFoundError:
        return
    except ValueError:
        held = []
    holders = [holder for one in held for holder in (one if isinstance(one, list) else [one])]
    if all("--single-item" in holder["cmd"] for holder in holders):  # started by `run_stage`
        file.unlink()


def run_stage(
    stage: str,
    params: Params,
    root: Path = Path(),
    lock: int | None = None,
    on_line: LineCallback | None = None,
    pipeline: str | None = None,
    leaves_job: Callable[[BaseException], bool] = lambda stop: isinstance(stop, Terminated),
) -> StageRun:
    """Runs `dvc repro --single-item <stage>`. Output goes to the terminal, or to a log and line by line to `on_line`.

    lock: descriptor of `checkout_lock`, for the stage to inherit. pipeline: name of the parent run in MLflow.

    Interrupting this call (Ctrl-C, a cancelled flow) stops the stage, which saves first, and re-raises. Its job on a
    cluster is deleted, unless `leaves_job` says of the interruption that it goes on. If the stage itself fails, raises
    UserError, Interrupted or StageFailed with the error line from its outcome file; StageFailed too where its outputs
    cannot be pushed to `storage.dvc`: run again, only that is done.
    """
    if stage == "train" and params.train.method != "phantom":
        raise UserError(
            f"train.method: found {params.train.method}, accepted in the pipeline: phantom; `phantom train` trains "
            f"models/{params.train.method}, and `phantom evaluate` scores it beside Phantom"
        )
    start, outputs = params.train.init_from, [(root / output.path).resolve() for output in STAGES["train"].writes]
    if stage == "train" and start and (root / start).resolve() in outputs:
        raise UserError(f"train.init_from: {start}: DVC deletes it before the stage runs; accepted: a copy of it")
    started, work = time.monotonic(), root / WORK_DIR
    work.mkdir(parents=True, exist_ok=True)
    outcome_file, log = work / f"{stage}.json", work / f"{stage}.log"
    outcome_file.unlink(missing_ok=True)
    source = source_fingerprint(params, root) if stage == "prepare" else None
    # DVC ignores SIGTERM, as it does SIGINT, and ends once the stage has: stages set a handler of their own.
    command = ["/bin/sh", "-c", "trap '' TERM; exec \"$@\"", "sh", sys.executable]
    command += ["-m", "dvc", "repro", "--quiet", "--single-item", stage]
    if source is not None and source != _read(work / "source"):
        command.append("--force")  # the clips are no DVC dependency: DVC does not notice that they changed
    unlisted, kept = json.dumps(unlisted_settings(stage, params), sort_keys=True), work / f"{stage}.settings"
    if unlisted != (_read(kept) or "{}") and "--force" not in command:
        command.append("--force")  # nor that these did

    with ExitStack() as stack:
        # The stage inherits a terminal, to draw progress bars. Else it writes to a file, not a pipe: it may outlive us.
        attached = on_line is None and sys.stderr.isatty()
        output = sys.stderr if attached else stack.enter_context(log.open("wb"))
        process = subprocess.Popen(
            command,
            cwd=root,
            env=_environment(outcome_file) | ({PIPELINE_ENV: pipeline} if pipeline else {}),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
            pass_fds=[] if lock is None else [lock],
        )
        try:
            code = process.wait() if attached else tail(process, log, on_line)
        except BaseException as stop:
            _stop(process, LEAVE_TIMEOUT_SECONDS if leaves_job(stop) else STOP_TIMEOUT_SECONDS)
            if (said := read_outcome(_read(outcome_file))) and said.error:
                (on_line or say)(said.error)
            raise
    outcome = read_outcome(_read(outcome_file))
    if code:
        raise _failure(stage, outcome, root)
    if source is not None:
        (work / "source").write_text(source, encoding="utf-8")
    kept.write_text(unlisted, encoding="utf-8")
    if params.storage.dvc:
        push(stage, params.storage.dvc, root)
    return StageRun(stage, outcome is not None, time.monotonic() - started, outcome.gpu_hours if outcome else 0.0)


def tail(process: subprocess.Popen[bytes], log: Path, on_line: LineCallback | None = None) -> int:
    """Passes the text of each line of the log to `on_line` until the process exits, or shows the line here.

    Returns its exit code.
    """

    def show(line: str) -> None:
        if on_line:
            on_line(text_of(line))
        else:
            relay(line)

    with log.open(encoding="utf-8", errors="replace") as lines:
        pending = ""
        while True:
            ended = process.poll() is not None
            pending += lines.read()
            *complete, pending = re.split(r"[\r\n]", pending)
            for line in filter(str.strip, complete):
                show(line)
            if ended:
                if pending.strip():
                    show(pending)
                return process.returncode
            time.sleep(0.1)


def write_params(path: Path, overrides: list[str], start: Path | None = None) -> list[str]:
    """Validates `key=value` overrides and writes them to the file, keeping comments. Returns a line for each change.

    start: the file whose settings are changed, by default that at `path` itself.
    """
    from ruamel.yaml import YAML, RoundTripRepresenter

    class Representer(RoundTripRepresenter):
        """Writes null explicitly, not as an empty value."""

    Representer.add_representer(type(None), lambda r, _: r.represent_scalar("tag:yaml.org,2002:null", "null"))

    start = start or path
    check_benchmarks(load_params(start, overrides))  # nothing is written unless the result is valid
    yaml = YAML()
    yaml.Representer = Representer
    yaml.preserve_quotes = True
    yaml.width = 120
    tree = yaml.load(start.read_text(encoding="utf-8"))
    changes = []
    for override in overrides:
        key, _, text = override.partition("=")
        *parents, leaf = key.split(".")
        node = tree
        for parent in parents:
            node = node[parent]
        value = yaml.load(text)
        if node.get(leaf) != value:
            changes.append(f"{path}: {key}: {node.get(leaf)} -> {value}")
            node[leaf] = value
    if changes or start != path:
        new = path.with_suffix(".tmp")
        with new.open("w", encoding="utf-8") as file:
            yaml.dump(tree, file)
        new.replace(path)
    return changes


def write_placeholder(folder: Path, reason: str) -> None:
    """Replaces `folder` by a README with `reason`: DVC expects every output, also one these settings do not make."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    (folder / "README.md").write_text(reason + "\n", encoding="utf-8")


def summary(params: Params, done: list[StageRun], root: Path = Path()) -> dict[str, Any]:
    """The summary of a finished run, JSON-able."""
    evaluation = json.loads((root / EVALUATION.path).read_text(encoding="utf-8"))
    trained = json.loads((root / PHANTOM.path / "result.json").read_text(encoding="utf-8"))
    return {
        "stages": {
            run.stage: {"ran": run.ran, "seconds": round(run.seconds, 1), "gpu_hours": round(run.gpu_hours, 4)}
            for run in done
        },
        "gpu_hours": round(sum(run.gpu_hours for run in done), 4),
        "scores": score_rows(evaluation),
        "verdict": [text for text in (trained.get("verdict"), evaluation.get("verdict")) if text],
        "registered": json.loads((root / REGISTERED.path).read_text(encoding="utf-8")),
        "report": str(REPORT.path),
        "mlflow": mlflow_command(params.tracking.uri),
    }


def as_text(result: dict[str, Any]) -> str:
    """The summary as text: which stages ran, the scores, the model version, and where report and MLflow are."""
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="")
    rows, registered = result["scores"], result["registered"]
    columns = list(dict.fromkeys(column for row in rows for column in row))
    for number, column in enumerate(columns):
        table.add_column(column.replace("_", " "), justify="left" if number < 2 else "right")
    for row in rows:
        cells = (row.get(column, "") for column in columns)
        table.add_row(*(f"{cell:.3f}" if isinstance(cell, float) else str(cell) for cell in cells))
    console = Console(width=120, color_system=None)
    with console.capture() as drawn:
        console.print(table)
    ran = [stage for stage, run in result["stages"].items() if run["ran"]]
    lines = [f"Ran: {', '.join(ran)}" if ran else "Every stage is up to date", "", drawn.get().rstrip(), ""]
    lines += [line for text in result["verdict"] for line in (fill(text, 120), "")]
    alias = "champion" if registered["champion"] else "challenger"
    lines.append(f"Model   {registered['name']} version {registered['version']} ({alias})")
    lines.append(f"Report  {result['report']}")
    lines.append(f"MLflow  {result['mlflow']}")
    if result["gpu_hours"]:
        parts = [f"{stage} {run['gpu_hours']:.2f}" for stage, run in result["stages"].items() if run["gpu_hours"]]
        lines.append(f"Cost    {result['gpu_hours']:.2f} GPU-hours ({', '.join(parts)})")
    return "\n".join(lines)


def score_rows(evaluation: dict[str, Any]) -> list[dict[str, Any]]:
    """One row of metrics for each Physics-IQ mode and model in reports/evaluation.json."""
    rows = []
    for mode, models in evaluation.get("physics_iq", {}).items():
        for model, figures in models.items() if isinstance(models, dict) else ():
            if isinstance(figures, dict) and "score" in figures:
                rows.append({"mode": mode, "model": model, **{k: v for k, v in figures.items() if _is_number(v)}})
    return rows


def mlflow_command(uri: str) -> str:
    """The command that opens the MLflow UI of the store at `uri`, to be run in the checkout."""
    if uri.startswith("http"):
        return f"open {uri}"
    return f"MLFLOW_DISABLE_TELEMETRY=true {shell_command('mlflow')} ui --backend-store-uri {uri}"


def shell_command(command: str) -> str:
    """How to call a command of this environment: by name if that is what the PATH finds, else by path."""
    ours = Path(sys.executable).parent / command
    if shutil.which(command) == str(ours):
        return command
    return str(ours.relative_to(Path.cwd())) if ours.is_relative_to(Path.cwd()) else str(ours)


def _environment(outcome: Path) -> dict[str, str]:
    # DVC runs the stage through $SHELL and finds `phantom` on the PATH, also if the environment is not activated.
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    ours = {"PATH": path, "SHELL": "/bin/sh", "PYTHONUNBUFFERED": "1", OUTCOME_ENV: str(outcome.resolve())}
    return {**NO_TELEMETRY, "MLFLOW_LOGGING_LEVEL": "WARNING", **os.environ, **ours}


def _stop(process: subprocess.Popen[bytes], timeouts: dict[signal.Signals, float]) -> None:
    """Stops the process group of DVC and the stage, with the signals of `timeouts`."""
    for number, seconds in timeouts.items():
        try:
            os.killpg(process.pid, number)
            process.wait(seconds)
            return
        except ProcessLookupError:
            return
        except (subprocess.TimeoutExpired, KeyboardInterrupt):
            continue


def _failure(stage: str, outcome: Outcome | None, root: Path) -> Exception:
    """The exception for a failed `dvc repro`: from the stage's outcome or, if it never ran, from DVC's error."""
    if outcome and outcome.code:
        return outcome.exception()
    hint = f"`{shell_command('dvc')} repro -s {stage}` shows more"
    if outcome:
        return StageFailed(f"{stage}: finished, but DVC could not take its outputs; {hint}")
    command = [sys.executable, "-m", "dvc", "repro", "--dry", "--single-item", stage]
    dry_run = subprocess.run(command, cwd=root, env={**NO_TELEMETRY, **os.environ}, capture_output=True, text=True)
    errors = [line for line in dry_run.stderr.splitlines() if line.startswith("ERROR: ")]
    if dry_run.returncode and errors:
        return StageFailed(f"{stage}: {errors[0].removeprefix('ERROR: ')}")
    return StageFailed(f"{stage}: its process was killed (out of memory?); run again to go on, or {hint}")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _read(path: Path) -> str | None:
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else None
