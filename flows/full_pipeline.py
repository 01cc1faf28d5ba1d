"""The pipeline as a Prefect flow: one task per stage, each running `dvc repro` of that stage.

DVC decides whether a stage runs; Prefect adds retries, timeouts, progress, approval and run history, without caching.
Run as a script, this serves the deployment `full-pipeline`; `prefect deploy --all` deploys it to a work pool instead.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

from httpx import HTTPError
from prefect import flow, get_run_logger, task
from prefect.artifacts import (
    create_link_artifact,
    create_progress_artifact,
    create_table_artifact,
    update_progress_artifact,
)
from prefect.cache_policies import NO_CACHE
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import ConcurrencyLimitConfig, ConcurrencyLimitStrategy, StateType
from prefect.exceptions import PrefectException, TerminationSignal
from prefect.flow_runs import suspend_flow_run
from prefect.input import RunInput
from prefect.runtime import flow_run

from phantom.config import load_params
from phantom.errors import Interrupted, StageFailed
from phantom.orchestration.privacy import no_telemetry
from phantom.orchestration.run import checkout_lock, describe, run_stage, score_rows, write_params
from phantom.orchestration.run_settings import run_overrides, start_params
from phantom.orchestration.stages import EVALUATION, REGISTERED, STAGES, Stage

ROOT = Path(os.environ.get("PHANTOM_CHECKOUT", Path(__file__).resolve().parents[1]))  # in a pod: on the volume
APPROVAL_TIMEOUT_SECONDS = 7 * 24 * 3600
MAX_STARTS = 50  # of a run whose pod is lost again and again
_PROGRESS = re.compile(r"^\w[\w ]*: (\d+)/(\d+) ")  # a progress line such as "train: 12/240 steps"

no_telemetry()


class Approval(RunInput):
    """The input that a suspended run waits for, sent by `phantom approve`."""

    approved: bool = True


class Progress:
    """Progress of a stage as a Prefect artifact. Server errors are logged once and never stop a stage."""

    def __init__(self, stage: str) -> None:
        self._stage, self._warned = stage, False
        self._artifact: Any = None  # its id, once created

    def show(self, percent: float) -> None:
        """Creates or updates the artifact. percent: 0 to 100."""
        key, description = f"{self._stage}-progress", f"Progress of {self._stage}"
        try:
            if self._artifact is None:
                self._artifact = create_progress_artifact(progress=percent, key=key, description=description)
            else:
                update_progress_artifact(self._artifact, progress=percent)
        except (HTTPError, PrefectException) as error:
            if not self._warned:
                get_run_logger().warning(f"the progress of {self._stage} is not shown: {error}")
            self._warned = True


def _should_retry(task: Any, run: Any, state: Any) -> bool:
    """An interrupted or failed stage is retried; wrong input is not."""
    return isinstance(state.result(raise_on_failure=False), Interrupted | StageFailed)


@task(
    cache_policy=NO_CACHE, retry_delay_seconds=[10, 60, 300], retry_condition_fn=_should_retry, task_run_name="{stage}"
)
def repro(stage: str, lock: int, pipeline: str) -> bool:
    """Runs a stage, with its output in the flow run's log and its progress as an artifact. Returns whether it ran."""
    logger = get_run_logger()
    progress = Progress(stage)
    progress.show(0.0)

    def show(line: str) -> None:
        logger.info(line)
        if found := _PROGRESS.match(line):
            progress.show(100 * int(found[1]) / max(1, int(found[2])))

    params = load_params(ROOT / "params.yaml")
    done = run_stage(stage, params, ROOT, lock, show, pipeline, _leaves_job)
    progress.show(100.0)
    logger.info(describe(done))
    return done.ran


def _leaves_job(stop: BaseException) -> bool:
    """Whether the run is stopped with its pod, and a job goes on. A run that is cancelled gets the same signal."""
    if not isinstance(stop, TerminationSignal):
        return False
    try:
        with get_client(sync_client=True) as client:
            state = client.read_flow_run(flow_run.id).state
    except (HTTPError, PrefectException):
        return True
    return state is None or state.type not in (StateType.CANCELLING, StateType.CANCELLED)


def _task(stage: Stage) -> Any:
    return repro.with_options(
        name=stage.name, tags=["phantom", stage.name], retries=stage.retries, timeout_seconds=stage.timeout_seconds
    )


TASKS = {name: _task(stage) for name, stage in STAGES.items()}


@flow(name="phantom", log_prints=True)
def full_pipeline(params: dict[str, Any] | None = None, approval: bool = False) -> dict[str, bool]:
    """Runs every stage that is not up to date. Returns for each stage whether it ran.

    params: settings to change, nested as in params.yaml: {"train": {"steps": 50}}; validated and written to that file.
    Only those that `run_settings.ALLOWED` names.
    approval: wait for `phantom approve` before register. The run is suspended and holds neither process nor lock.
    """
    if flow_run.run_count > MAX_STARTS:
        raise StageFailed(
            f"the run was started {MAX_STARTS} times and ended without a result; `prefect deployment run`"
        )
    ran: dict[str, bool] = {}
    pipeline = f"{flow_run.name} {str(flow_run.id)[:8]}"  # unchanged when the run resumes after approval
    with checkout_lock(ROOT) as lock:
        for change in write_params(ROOT / "params.yaml", run_overrides(params, ROOT), start_params(ROOT)):
            print(change)
        for stage in STAGES:
            if stage == "register" and approval and not _approved():
                print("not approved: the model is not registered")
                break
            ran[stage] = TASKS[stage](stage, lock, pipeline)
            if stage == "evaluate":
                _show_evaluation()
        else:
            _link_model()
    return ran


def _approved() -> bool:
    """Suspends the run until an answer arrives. When it resumes, earlier stages are found up to date."""
    answer = suspend_flow_run(
        wait_for_input=Approval.with_initial_data(description="Register this model?"), timeout=APPROVAL_TIMEOUT_SECONDS
    )
    return answer.approved


def _show_evaluation() -> None:
    evaluation = json.loads((ROOT / EVALUATION.path).read_text(encoding="utf-8"))
    create_table_artifact(score_rows(evaluation), key="evaluation", description="Scores on the held-out benchmark")


def _link_model() -> None:
    """Links the registered model's MLflow run, if an MLflow UI is served."""
    tracking = load_params(ROOT / "params.yaml").tracking
    pages = os.environ.get("PHANTOM_MLFLOW_PAGES") or (tracking.uri if tracking.uri.startswith("http") else None)
    if pages:
        registered = json.loads((ROOT / REGISTERED.path).read_text(encoding="utf-8"))
        link = f"{pages}/#/experiments/{registered['experiment_id']}/runs/{registered['run_id']}"
        create_link_artifact(link, link_text=f"{registered['name']} version {registered['version']}", key="mlflow-run")


if __name__ == "__main__":
    full_pipeline.serve(
        name="full-pipeline",
        limit=1,
        global_limit=ConcurrencyLimitConfig(limit=1, collision_strategy=ConcurrencyLimitStrategy.ENQUEUE),
        tags=["phantom"],
    )
