"""`phantom prepare`, `encode`, `train`, `evaluate`, `register`: the stages, on this machine or as a Kubernetes job."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from phantom.cli.shared import (
    AsJson,
    Index,
    Launcher,
    Of,
    ParamsFile,
    Set,
    app,
    find_part,
    run_on_cluster,
    show,
    stage,
)
from phantom.errors import UserError
from phantom.progress import is_first_process


@app.command()
def prepare(
    context: typer.Context,
    index: Annotated[
        int | None, typer.Option(help="Look at one part of the source's videos only: its number, from 0.", min=0)
    ] = None,
    of: Annotated[int | None, typer.Option(help="Number of parts, with --index.", min=1)] = None,
    launcher: Launcher = None,
    params: ParamsFile = None,
    set_: Set = None,
    as_json: AsJson = False,
) -> None:
    """Prepare the clips in data/clips, and data/benchmark for the simulated worlds.

    Parts of the videos may be looked at before, at the same time, anywhere.
    """
    part = find_part(index, of)
    with stage("prepare", context, params, set_, launcher) as tree:
        if tree.compute.prepare == "kubernetes" and part is None:
            result: Any = run_on_cluster("prepare", tree)
        else:
            from phantom.cluster.outputs import keep
            from phantom.data.part import Part
            from phantom.data.prepare import prepare, prepare_part
            from phantom.orchestration.run import write_placeholder
            from phantom.orchestration.stages import BENCHMARK
            from phantom.tracking.records import log_stage

            if part is not None:
                result = prepare_part(tree, Part(*part))
            else:
                result = prepare(tree)
                if (benchmark := tree.evaluate.physics_iq.benchmark) != "worlds":
                    write_placeholder(BENCHMARK.path, f"The benchmark of this run is {benchmark}.")
                keep("prepare")
                log_stage("prepare", tree, result)
    show(result, as_json)


@app.command()
def encode(
    context: typer.Context,
    index: Annotated[int | None, typer.Option(help="Encode one part of the clips: its number, from 0.", min=0)] = None,
    of: Annotated[int | None, typer.Option(help="Number of parts, with --index.", min=1)] = None,
    processes: Annotated[
        int | None,
        typer.Option(help="Processes of this machine that encode at once; default: encode.processes.", min=1),
    ] = None,
    merge: Annotated[bool, typer.Option("--merge", help="Make data/latents of the parts.")] = False,
    shard: Annotated[
        str | None, typer.Option(metavar="FILE", help="Encode this shard of data/latents again, as it is damaged.")
    ] = None,
    launcher: Launcher = None,
    params: ParamsFile = None,
    set_: Set = None,
    as_json: AsJson = False,
) -> None:
    """Encode the clips into latents in data/latents. Parts of them may be encoded at the same time, anywhere."""
    part = find_part(index, of)
    if sum([part is not None, merge, shard is not None]) > 1:
        raise UserError("--index, --merge, --shard: found more than one of them; accepted: one, or none")
    if processes is not None and (part is not None or merge or shard is not None):
        raise UserError("--processes: found with --index, --merge or --shard; accepted: without them")
    at_once = [] if processes is None else [f"encode.processes={processes}"]
    with stage("encode", context, params, [*(set_ or []), *at_once], launcher) as tree:
        if tree.compute.encode == "kubernetes" and part is None and not merge and shard is None:
            result: Any = run_on_cluster("encode", tree)
        else:
            from phantom.cluster.outputs import keep
            from phantom.data.encode import encode, encode_part, merge_parts
            from phantom.data.part import Part
            from phantom.tracking.records import log_stage

            if part is not None:
                result = encode_part(tree, Part(*part))
            else:
                result = merge_parts(tree) if merge else encode(tree, shard=shard)
                keep("encode")
                log_stage("encode", tree, result)
    show(result, as_json)


@app.command()
def train(
    context: typer.Context,
    launcher: Launcher = None,
    params: ParamsFile = None,
    set_: Set = None,
    as_json: AsJson = False,
) -> None:
    """Train the physics branch and the coupling, or adapters (train.method), and export them to models/<method>."""
    with stage("train", context, params, set_, launcher) as tree:
        if tree.compute.train == "kubernetes":
            result: Any = run_on_cluster("train", tree)
        else:
            from phantom.cluster.outputs import keep
            from phantom.orchestration.run import write_placeholder
            from phantom.orchestration.stages import CONTROL
            from phantom.training.trainer import train

            result = train(tree)
            if is_first_process():
                if tree.train.method == "phantom" and not tree.train.control:
                    write_placeholder(CONTROL.path, "Trained with train.control: false, so there is no control.")
                keep("train")
    show(result, as_json)


@app.command()
def evaluate(
    context: typer.Context,
    index: Index = None,
    of: Of = None,
    launcher: Launcher = None,
    params: ParamsFile = None,
    set_: Set = None,
    as_json: AsJson = False,
) -> None:
    """Score the base model, the control, LoRA and Phantom, in reports/evaluation.json and reports/index.html.

    Parts of the videos may be generated before, at the same time, anywhere.
    """
    part = find_part(index, of)
    with stage("evaluate", context, params, set_, launcher) as tree:
        if tree.compute.evaluate == "kubernetes" and part is None:
            result: Any = run_on_cluster("evaluate", tree)
        else:
            from phantom.cluster.outputs import keep
            from phantom.data.part import Part
            from phantom.evaluation.stage import evaluate, evaluate_part
            from phantom.tracking.records import log_stage

            if part is not None:
                result = evaluate_part(tree, Part(*part))
            elif (result := evaluate(tree)) is not None:
                keep("evaluate")
                log_stage("evaluate", tree, result)
    if is_first_process():
        show(result, as_json)


@app.command()
def register(
    context: typer.Context,
    promote: Annotated[bool, typer.Option("--promote", help="Make it the champion whatever its score.")] = False,
    params: ParamsFile = None,
    set_: Set = None,
    as_json: AsJson = False,
) -> None:
    """Register the evaluated model in MLflow; one that is clearly better than the champion takes its alias."""
    with stage("register", context, params, set_) as tree:
        from phantom.evaluation.gains import metric_gain
        from phantom.tracking.registry import register

        result = register(tree, metric_gain, promote=promote)
    alias = "champion" if result.champion else "challenger"
    against = "" if result.champion_score is None else f", the champion's was {result.champion_score:.3f}"
    why = f"; {result.reason}" if result.reason else ""
    show(result, as_json, f"{result.name} version {result.version}: {alias}, score {result.score:.3f}{against}{why}")
