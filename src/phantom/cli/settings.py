"""`phantom preset`, `plan`, `doctor`: choose settings, estimate costs and check the machine before a run."""

from __future__ import annotations

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
from phantom.evaluation.benchmarks import check_benchmarks


@app.command()
def preset(
    context: typer.Context,
    name: Annotated[str | None, typer.Argument(help="The preset to write; without it, list the presets.")] = None,
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
    check_benchmarks(load_params(preset_path(name), overrides))  # validated before the file is replaced
    kept = replace_settings(target, preset_path(name))
    if overrides:
        from phantom.orchestration.run import write_params

        write_params(target, overrides)
    show({"preset": name, "file": target, "kept": kept}, as_json, f"{target}: preset {name}")


@app.command()
def plan(
    context: typer.Context,
    preset: Annotated[str | None, typer.Option(help="Plan this preset instead of the settings file.")] = None,
    gpu: Annotated[str, typer.Option(help="GPU model.")] = "H200",
    gpus: Annotated[int, typer.Option(help="Number of GPUs.", min=1)] = 8,
    clips: Annotated[int | None, typer.Option(help="Clips in the data set; default: the manifest's.", min=1)] = None,
    mfu: Annotated[float, typer.Option(help="Model FLOPs utilization: the fraction of peak FLOP/s reached.")] = 0.4,
    params: ParamsFile = None,
    set_: Set = None,
    as_json: AsJson = False,
) -> None:
    """Estimate parameters, FLOPs, memory, storage and hours from the settings alone."""
    from phantom.evaluation.benchmarks import BENCHMARKS
    from phantom.evaluation.cost import evaluation_cost
    from phantom.planning.plan import plan as plan_run
    from phantom.planning.table import as_text

    file = preset_path(preset) if preset else params
    tree = settings(context, file, set_)
    result = plan_run(tree, gpu, gpus, clips, mfu)
    result["evaluation"] = evaluation_cost(tree, BENCHMARKS, gpu, mfu)
    show(result, as_json, as_text(result))


@app.command()
def doctor(
    context: typer.Context,
    cluster: Annotated[bool, typer.Option("--cluster", help="Check the Kubernetes cluster too.")] = False,
    params: ParamsFile = None,
    set_: Set = None,
    as_json: AsJson = False,
) -> None:
    """Check this machine and, with --cluster, the cluster: one line per check, and how to fix what fails."""
    from phantom.orchestration.doctor import as_text
    from phantom.orchestration.doctor import doctor as check_machine

    tree = settings(context, params, set_)
    checks = check_machine(tree)
    if cluster:
        from phantom.cluster.diagnostics import check_cluster

        checks += check_cluster(tree)
    show([c.as_json() for c in checks], as_json, as_text(checks))
    raise typer.Exit(0 if all(c.ok for c in checks) else 1)
