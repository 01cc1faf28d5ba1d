"""`phantom run`, `up`, `approve`, `pretrain`: all stages together, the servers, the miniature's parts."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from phantom.cli.shared import (
    AsJson,
    ParamsFile,
    Set,
    app,
    arguments,
    replace_settings,
    settings,
    show,
)
from phantom.config import load_params
from phantom.errors import Interrupted
from phantom.progress import say


@app.command()
def run(context: typer.Context, params: ParamsFile = None, set_: Set = None, as_json: AsJson = False) -> None:
    """Run the whole pipeline here; stages that are up to date are left as they are.

    --set and --params change params.yaml, which the pipeline reads.
    """
    from phantom.orchestration import run as pipeline

    file, overrides = arguments(context, params, set_)
    target = Path("params.yaml")
    load_params(file or target, overrides)
    if file and file.resolve() != target.resolve():
        replace_settings(target, file)
    for change in pipeline.write_params(target, overrides):
        say(change)
    done = pipeline.run()
    result = pipeline.summary(load_params(target), done)
    show(result, as_json, pipeline.as_text(result))


@app.command()
def up(
    context: typer.Context,
    prefect_port: Annotated[int | None, typer.Option(help="Port of Prefect's server.")] = None,
    mlflow_port: Annotated[int | None, typer.Option(help="Port of MLflow.")] = None,
    params: ParamsFile = None,
    set_: Set = None,
) -> None:
    """Start Prefect, MLflow and the served deployment here, until Ctrl-C."""
    from phantom.orchestration.up import up as start

    start(settings(context, params, set_), prefect_port, mlflow_port)


@app.command()
def pretrain(
    out: Annotated[Path, typer.Option(help="Where the parts go.")] = Path("models/mini"),
    seed: Annotated[int, typer.Option(help="Of clips, weights and batches.", min=0)] = 0,
    as_json: AsJson = False,
) -> None:
    """Make the frozen parts of the mini preset again: models/mini. An hour or two on two cores."""
    from phantom.pretraining.stage import pretrain

    try:
        made = pretrain(out, seed)
    except KeyboardInterrupt:
        raise Interrupted("pretrain: interrupted; finished parts are kept, run again to go on") from None
    show(made, as_json, "\n".join(f"{name}: {figures}" for name, figures in made["heldout"].items()))


@app.command()
def approve(
    run: Annotated[str | None, typer.Argument(help="The run's name or id; by default the one that waits.")] = None,
    reject: Annotated[bool, typer.Option("--reject", help="Do not register.")] = False,
    as_json: AsJson = False,
) -> None:
    """Answer a pipeline run that waits before registering."""
    from phantom.orchestration.approve import approve as answer

    name = answer(run, reject)
    show({"run": name, "approved": not reject}, as_json, f"{name}: {'rejected' if reject else 'approved'}")
