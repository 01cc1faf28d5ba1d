"""`phantom run`, `up`, `pull`, `approve`, `pretrain`: the pipeline, its servers, its results, the mini's parts."""

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
from phantom.evaluation.benchmarks import check_benchmarks
from phantom.progress import say


@app.command()
def run(context: typer.Context, params: ParamsFile = None, set_: Set = None, as_json: AsJson = False) -> None:
    """Run the whole pipeline on this machine, skipping stages that are up to date.

    --set and --params are written to params.yaml, which the pipeline reads.
    """
    from phantom.orchestration import run as pipeline

    file, overrides = arguments(context, params, set_)
    target = Path("params.yaml")
    check_benchmarks(load_params(file or target, overrides))
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
    prefect_port: Annotated[int | None, typer.Option(help="Port of the Prefect server.")] = None,
    mlflow_port: Annotated[int | None, typer.Option(help="Port of the MLflow server.")] = None,
    studio_port: Annotated[int | None, typer.Option(help="Port of the studio.")] = None,
    studio: Annotated[bool, typer.Option("--studio/--no-studio", help="--no-studio: do not load a model.")] = True,
    params: ParamsFile = None,
    set_: Set = None,
) -> None:
    """Start Prefect, MLflow, the served deployment and the studio on this machine, until Ctrl-C."""
    from phantom.orchestration.up import up as start

    start(settings(context, params, set_), prefect_port, mlflow_port, studio_port, studio)


@app.command()
def pull(
    context: typer.Context,
    run: Annotated[
        str,
        typer.Argument(
            metavar="RUN", help="Number or alias of a version, models:/NAME/NUMBER, or the id of the run in MLflow."
        ),
    ],
    out: Annotated[Path | None, typer.Option(help="Folder; by default pulled/NAME-NUMBER.", show_default=False)] = None,
    model_only: Annotated[bool, typer.Option("--model-only", help="Leave out clips and latents.")] = False,
    registry: Annotated[
        bool, typer.Option("--registry", help="The model alone, from the registry instead of the remote.")
    ] = False,
    params: ParamsFile = None,
    set_: Set = None,
    as_json: AsJson = False,
) -> None:
    """Fetch the data, models and reports of a registered version, from the remote to which its run pushed them."""
    from dataclasses import asdict

    from phantom.orchestration.pull import as_text
    from phantom.orchestration.pull import pull as fetch

    result = fetch(run, settings(context, params, set_), out, model_only, registry)
    show(asdict(result), as_json, as_text(result))


@app.command()
def pretrain(
    out: Annotated[Path, typer.Option(help="Output folder.")] = Path("models/mini"),
    seed: Annotated[int, typer.Option(help="Seed of clips, weights and batches.", min=0)] = 0,
    keep: Annotated[
        list[str] | None,
        typer.Option(metavar="PART", help="Keep vae, physics_encoder or video_model of --out as it is; repeatable."),
    ] = None,
    work: Annotated[Path, typer.Option(help="Checkpoints and finished parts of a run, which a later run uses.")] = Path(
        "checkpoints/pretrain"
    ),
    as_json: AsJson = False,
) -> None:
    """Pretrain the frozen parts of the mini preset again, in models/mini: hours on two cores; resumes after Ctrl-C."""
    from phantom.pretraining.stage import pretrain

    try:
        made = pretrain(out, seed, work, keep or ())
    except KeyboardInterrupt:
        raise Interrupted("pretrain: interrupted; what was saved is kept, run again to go on") from None
    show(made, as_json, "\n".join(f"{name}: {figures}" for name, figures in made["heldout"].items()))


@app.command()
def approve(
    run: Annotated[str | None, typer.Argument(help="Name or id of the run; by default the one waiting.")] = None,
    reject: Annotated[bool, typer.Option("--reject", help="Reject: do not register the model.")] = False,
    as_json: AsJson = False,
) -> None:
    """Approve or reject a pipeline run that is waiting before it registers its model."""
    from phantom.orchestration.approve import approve as answer

    name = answer(run, reject)
    show({"run": name, "approved": not reject}, as_json, f"{name}: {'rejected' if reject else 'approved'}")
