"""`phantom study run`, `report`, `list`, `params`: arms x seeds of studies/<name>/study.yaml, and what they show."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from phantom.cli.shared import AsJson, Set, app, arguments, show
from phantom.errors import Interrupted, UserError

study = typer.Typer(help="Studies: arms x seeds of studies/NAME/study.yaml, and what they show.", no_args_is_help=True)
app.add_typer(study, name="study")

Name = Annotated[str, typer.Argument(metavar="NAME", help="The study's folder below studies/.")]


@study.command("run")
def run_study(
    context: typer.Context,
    name: Name,
    workers: Annotated[int, typer.Option(help="Runs side by side, here or as jobs.", min=1)] = 1,
    set_: Set = None,
    as_json: AsJson = False,
) -> None:
    """Run the arms of a study from every seed, each once, and write its results and page."""
    from phantom.cluster.study_jobs import make_runner
    from phantom.orchestration import study as studies

    overrides = _overrides(context, set_)
    try:
        results = studies.run_study(name, workers, overrides, make_runner=make_runner)
    except KeyboardInterrupt:
        raise Interrupted(f"study {name}: interrupted; what was finished is kept, run again to go on") from None
    _show_results(name, results, as_json)


@study.command("report")
def report(context: typer.Context, name: Name, set_: Set = None, as_json: AsJson = False) -> None:
    """Write results.json and the page of a study from the runs that are finished."""
    from phantom.orchestration import study as studies

    _show_results(name, studies.report_study(name, _overrides(context, set_)), as_json)


@study.command("card")
def card(
    name: Name,
    model: Annotated[Path, typer.Option(help="The export whose card it is.")] = Path("models/phantom"),
    as_json: AsJson = False,
) -> None:
    """Print the model card of an export with the numbers of a study, for the Hugging Face hub."""
    from phantom.evaluation.study.card import study_card

    text = study_card(name, model)
    show({"card": text}, as_json, text.rstrip())


@study.command("list")
def list_(as_json: AsJson = False) -> None:
    """List the studies with their questions and how far they are."""
    from phantom.orchestration.study import list_studies

    found = list_studies()
    lines = []
    for row in found:
        lines += [f"{row['name']}: {row['question']}", f"    {row['state']}", f"    {row['verdict'] or ''}"]
    text = "\n".join(line for line in lines if line.strip())
    show(found, as_json, text or "studies: there is none; docs/studies.md says how to write one")


@study.command("params")
def params(
    context: typer.Context,
    name: Name,
    arm: Annotated[str, typer.Option(metavar="LABEL", help="The arm.")],
    seed: Annotated[int | None, typer.Option(help="By default the first of the study.", min=0)] = None,
    set_: Set = None,
    as_json: AsJson = False,
) -> None:
    """Print what `dvc exp run` has to set for an arm: -S KEY=VALUE for each setting that params.yaml has otherwise."""
    from phantom.orchestration.study_experiment import as_arguments, check_outputs, experiment_settings

    found = experiment_settings(name, arm, seed, _overrides(context, set_))
    check_outputs()
    show(found, as_json, as_arguments(found))


@study.command("one", hidden=True)
def run_one(
    place: Annotated[Path, typer.Argument(help="The folder with its run.json.")], as_json: AsJson = False
) -> None:
    """Train and measure one run, in the process that `phantom study run` starts for it."""
    from phantom.orchestration.study_child import run_one

    try:
        result = run_one(place)
    except KeyboardInterrupt:
        raise Interrupted("interrupted; what was finished is kept, run again to go on") from None
    show(result, as_json)


def _overrides(context: typer.Context, set_: list[str] | None) -> list[str]:
    file, overrides = arguments(context, None, set_)
    if file:
        raise UserError(f"--params {file}: found with a study, which names its preset; accepted: --set")
    return overrides


def _show_results(name: str, results: dict, as_json: bool) -> None:
    from phantom.evaluation.study.results import page_path

    show(results, as_json, f"{results['verdict']}\n{page_path(name)}")
