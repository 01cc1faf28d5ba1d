"""`phantom preset`, `plan`, `doctor`: before anything runs."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from phantom.cli.shared import (
    AsJson,
    ParamsFile,
    Set,
    app,
    arguments,
    params_file,
    replace_settings,
    settings,
    show,
)
from phantom.config import load_params, preset_names, preset_path


@app.command()
def preset(
    context: typer.Context,
    name: Annotated[str | None, typer.Argument(help="Which to write; without it they are listed.")] = None,
    params: ParamsFile = None,
    set_: Set = None,
    as_json: AsJson = False,
) -> None:
    """List the presets, or write params.yaml from one, changed by --set."""
    if name is None:
        first = {n: preset_path(n).read_text(encoding="utf-8").splitlines()[0].lstrip("# ") for n in preset_names()}
        show(first, as_json, "\n".join(f"{n:18} {line}" for n, line in first.items()))
        return
    target, overrides = params_file(context, params), arguments(context, params, set_)[1]
    load_params(preset_path(name), overrides)  # a mistake replaces nothing
    kept = replace_settings(target, preset_path(name))
    if overrides:
        from phantom.orchestration.run import write_params

        write_params(target, overrides)
    show({"preset": name, "file": target, "kept": kept}, as_json, f"{target}: preset {name}")


@app.command()
def plan(
    context: typer.Context,
    preset: Annotated[str | None, typer.Option(help="A preset instead of the settings file.")] = None,
    gpu: Annotated[str, typer.Option(help="Kind of GPU.")] = "H200",
    gpus: Annotated[int, typer.Option(help="How many.", min=1)] = 8,
    clips: Annotated[int | None, typer.Option(help="Size of the data set; by default the manifest's.", min=1)] = None,
    mfu: Annotated[float, typer.Option(help="Share of the GPUs' peak that the model's operations reach.")] = 0.4,
    params: ParamsFile = None,
    set_: Set = None,
    as_json: AsJson = False,
) -> None:
    """Parameters, FLOPs, memory, storage and hours, from the settings alone."""
    from phantom.planning import plan as planning

    file = preset_path(preset) if preset else params
    result = planning.plan(settings(context, file, set_), gpu, gpus, clips, mfu)
    show(result, as_json, planning.as_text(result))


@app.command()
def doctor(
    context: typer.Context,
    cluster: Annotated[bool, typer.Option("--cluster", help="Check the cluster too.")] = False,
    params: ParamsFile = None,
    set_: Set = None,
    as_json: AsJson = False,
) -> None:
    """Check this machine, and the cluster: each line a check, its finding and the mend."""
    from phantom.orchestration import doctor as checking

    checks = checking.doctor(settings(context, params, set_), cluster=cluster)
    show([asdict(c) for c in checks], as_json, checking.as_text(checks))
    raise typer.Exit(0 if all(c.ok for c in checks) else 1)
