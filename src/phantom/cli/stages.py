"""`phantom prepare`, `encode`, `train`, `evaluate`, `register`: the stages, here or as a job of the cluster."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from phantom.cli.shared import (
    AsJson,
    Launcher,
    ParamsFile,
    Set,
    app,
    on_cluster,
    show,
    stage,
)
from phantom.errors import UserError


@app.command()
def prepare(context: typer.Context, params: ParamsFile = None, set_: Set = None, as_json: AsJson = False) -> None:
    """Make the clips: data/clips, and data/benchmark for the simulated worlds."""
    with stage("prepare", context, params, set_) as tree:
        from phantom.data.prepare import prepare
        from phantom.orchestration.run import stand_in
        from phantom.tracking.records import record

        result = prepare(tree)
        if tree.evaluate.physics_iq.benchmark != "worlds":
            stand_in(Path("data/benchmark"), f"The benchmark of this run is {tree.evaluate.physics_iq.benchmark}.")
        record("prepare", tree, result)
    show(result, as_json)


@app.command()
def encode(
    context: typer.Context,
    worker: Annotated[int | None, typer.Option(help="Encode a share of the clips: the number of it.", min=0)] = None,
    of: Annotated[int | None, typer.Option(help="How many shares there are.", min=1)] = None,
    merge: Annotated[
        bool, typer.Option("--merge", help="Make data/latents of the shares; with --worker, if it is the last to end.")
    ] = False,
    shard: Annotated[
        str | None, typer.Option(metavar="FILE", help="Make this shard of data/latents again: it is damaged.")
    ] = None,
    launcher: Launcher = None,
    params: ParamsFile = None,
    set_: Set = None,
    as_json: AsJson = False,
) -> None:
    """Encode the clips into latents: data/latents. Any number of workers may do it side by side."""
    if (worker is None) != (of is None):
        raise UserError("--worker and --of: found one of them; accepted: both, or neither")
    if shard is not None and (worker is not None or merge):
        raise UserError("--shard: found with --worker or --merge; accepted: alone")
    with stage("encode", context, params, set_, launcher) as tree:
        if tree.compute.encode == "kubernetes" and worker is None and not merge and shard is None:
            result: Any = on_cluster("encode", tree)
        else:
            from phantom.cluster.outputs import keep
            from phantom.data.encode import encode
            from phantom.data.shards import LATENTS
            from phantom.data.shares import Share
            from phantom.tracking.records import record

            share = None if worker is None or of is None else Share(worker, of)
            result = encode(tree, share=share, merge=merge, shard=shard)
            if Path(result.folder) == LATENTS:  # not a worker that others are still beside
                keep("encode")
                record("encode", tree, result)
    show(result, as_json)


@app.command()
def train(
    context: typer.Context,
    launcher: Launcher = None,
    params: ParamsFile = None,
    set_: Set = None,
    as_json: AsJson = False,
) -> None:
    """Train the physics branch and the coupling: models/phantom."""
    with stage("train", context, params, set_, launcher) as tree:
        if tree.compute.train == "kubernetes":
            result: Any = on_cluster("train", tree)
        else:
            from phantom.cluster.outputs import keep
            from phantom.orchestration.run import stand_in
            from phantom.training.trainer import train

            result = train(tree)
            if os.environ.get("RANK", "0") == "0":
                if not tree.train.control:
                    stand_in(Path("models/control"), "Trained with train.control: false, so there is no control.")
                keep("train")
    show(result, as_json)


@app.command()
def evaluate(
    context: typer.Context,
    launcher: Launcher = None,
    params: ParamsFile = None,
    set_: Set = None,
    as_json: AsJson = False,
) -> None:
    """Score base, control and Phantom: reports/evaluation.json and reports/index.html."""
    with stage("evaluate", context, params, set_, launcher) as tree:
        if tree.compute.evaluate == "kubernetes":
            result: Any = on_cluster("evaluate", tree)
        else:
            from phantom.cluster.outputs import keep
            from phantom.evaluation.stage import evaluate
            from phantom.tracking.records import record

            result = evaluate(tree)
            keep("evaluate")
            record("evaluate", tree, result)
    show(result, as_json)


@app.command()
def register(
    context: typer.Context,
    promote: Annotated[bool, typer.Option("--promote", help="Champion whatever the score.")] = False,
    params: ParamsFile = None,
    set_: Set = None,
    as_json: AsJson = False,
) -> None:
    """Register the evaluated model in MLflow; the best is champion."""
    with stage("register", context, params, set_) as tree:
        from phantom.tracking.registry import register

        result = register(tree, promote=promote)
    alias = "champion" if result.champion else "challenger"
    against = "" if result.champion_score is None else f", the champion's was {result.champion_score:.3f}"
    show(result, as_json, f"{result.name} version {result.version}: {alias}, score {result.score:.3f}{against}")
