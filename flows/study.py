"""A study as a Prefect flow: one task per run, at most `workers` at a time, then its results and page.

The runs are the processes of `phantom study run`: what is finished is not repeated, whichever of the two began it.
Run as a script, this serves the deployment `study`; `prefect deploy --all` deploys it to a work pool instead.
"""

# No `from __future__ import annotations`: a served flow could not resolve the types of its parameters.
import os
from pathlib import Path
from typing import Annotated, Any

from prefect import flow, get_run_logger, task, unmapped
from prefect.artifacts import create_markdown_artifact
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import ConcurrencyLimitConfig, ConcurrencyLimitStrategy, State
from prefect.states import Cancelled
from prefect.task_runners import ThreadPoolTaskRunner
from pydantic import Field

from phantom.cluster.study_jobs import make_runner
from phantom.errors import Interrupted, StageFailed, UserError
from phantom.evaluation.study.figures import FIGURES
from phantom.evaluation.study.results import page_path
from phantom.evaluation.study.spec import Study
from phantom.orchestration.privacy import no_telemetry
from phantom.orchestration.run_settings import platform_overrides, run_overrides
from phantom.orchestration.stages import STAGES
from phantom.orchestration.study import collect, open_study, primary_text, write_report
from phantom.orchestration.study_processes import Runner
from phantom.orchestration.study_runs import StudyRun

ROOT = Path(os.environ.get("PHANTOM_CHECKOUT", Path(__file__).resolve().parents[1]))  # in a pod: on the volume
RETRY_DELAY_SECONDS = [10, 60, 300]

no_telemetry()


def _should_retry(task: Any, run: Any, state: Any) -> bool:
    """What failed or was interrupted is retried; wrong input is not."""
    return not isinstance(state.result(raise_on_failure=False), UserError)


@task(
    name="run",
    task_run_name="{run.title}",
    tags=["phantom", "study"],
    cache_policy=NO_CACHE,
    retries=STAGES["train"].retries,
    retry_delay_seconds=RETRY_DELAY_SECONDS,
    retry_condition_fn=_should_retry,
)
def train_and_measure(run: StudyRun, study: Study, runner: Runner) -> bool | State:
    """Runs an arm from a seed unless it is finished, with its output in the log. Returns whether it ran.

    When the flow is stopped the run saves, and its task is `Cancelled`.
    """
    logger = get_run_logger()
    try:
        ran = runner.run(run, logger.info)
    except (Interrupted, StageFailed) as error:
        if runner.stopped:
            return Cancelled(message=str(error))
        raise
    logger.info(f"{run.title}: {primary_text(study, run, ROOT)}" + ("" if ran else ", finished already"))
    return ran


@task(
    name="report",
    tags=["phantom", "study"],
    cache_policy=NO_CACHE,
    retries=3,  # for a server that does not answer
    retry_delay_seconds=RETRY_DELAY_SECONDS,
    retry_condition_fn=_should_retry,
)
def report(name: str, study: Study, runs: list[StudyRun], overrides: tuple[str, ...]) -> str:
    """Writes results and page, and the verdict as the artifact `study-<name>`. Returns the verdict."""
    results = write_report(name, collect(name, study, runs, overrides, ROOT), runs, ROOT)
    create_markdown_artifact(_as_markdown(name, results), key=f"study-{name}", description=f"Verdict of {name}")
    return results["verdict"]


@flow(name="phantom-study", log_prints=True)
def study(name: str, workers: Annotated[int, Field(ge=1)] = 1, params: dict[str, Any] | None = None) -> str:
    """Runs what is not finished of a study and writes its results and page. Returns the verdict.

    name: folder below studies/. workers: runs side by side. params: settings to change in all arms, nested as in
    params.yaml: {"train": {"steps": 50}}, among those that `run_settings.ALLOWED` names; an arm's own settings prevail.
    Where runs take place and are recorded (`run_settings.PLATFORM`) is otherwise the checkout's. A run that fails for
    good fails the flow, once the others have ended.
    """
    overrides = (*platform_overrides(ROOT), *run_overrides(params, ROOT))
    spec, runs = open_study(name, overrides, ROOT, print)
    runner = make_runner(name, workers, runs, ROOT)
    with ThreadPoolTaskRunner(max_workers=workers) as threads:
        try:
            done = threads.map(train_and_measure, {"run": runs, "study": unmapped(spec), "runner": unmapped(runner)})
            done.wait()  # for all of them: one that fails stops no other
        finally:
            runner.stop()
    for run in done:
        run.result()  # raises what the run did, if it failed
    return report(name, spec, runs, overrides, wait_for=done)


def _as_markdown(name: str, results: dict[str, Any]) -> str:
    """The verdict, what was asked, the differences, and where the page is."""
    lines = [f"**{results['verdict']}**", "", results["study"]["question"], ""]
    lines += ["| arm - reference | figure | difference | 95% interval | p |", "| --- | --- | --- | --- | --- |"]
    for found in results["comparisons"]:
        values = [found[key] for key in ("difference", "low", "high", "p")]
        difference, low, high, p = ("" if value is None else f"{value:.3g}" for value in values)
        pair, title = f"{found['arm']} - {found['reference']}", FIGURES[found["figure"]].title
        lines.append(f"| {pair} | {title} | {difference} | {low} to {high} | {p} |")
    return "\n".join([*lines, "", f"Page: `{(ROOT / page_path(name)).resolve()}`"])


if __name__ == "__main__":
    study.serve(
        name="study",
        limit=1,
        global_limit=ConcurrencyLimitConfig(limit=1, collision_strategy=ConcurrencyLimitStrategy.ENQUEUE),
        tags=["phantom"],
    )
