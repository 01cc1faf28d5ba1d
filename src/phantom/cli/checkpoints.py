"""`phantom checkpoints list`, `verify`, `export`, `prune`: the training states that a run can continue from."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from phantom.cli.shared import AsJson, ParamsFile, Set, app, settings, show
from phantom.errors import StageFailed, UserError

checkpoints = typer.Typer(help="Training states: list, verify, export and prune them.", no_args_is_help=True)
app.add_typer(checkpoints, name="checkpoints")

Run = Annotated[
    str, typer.Argument(metavar="RUN", help="The run's name, as `list` shows it, or the folder of its checkpoints.")
]
Step = Annotated[int | None, typer.Option(help="Only this step.", min=0)]


@checkpoints.command("list")
def list_(
    context: typer.Context,
    run: Annotated[str | None, typer.Argument(metavar="[RUN]", help="Only this run.")] = None,
    params: ParamsFile = None,
    set_: Set = None,
    as_json: AsJson = False,
) -> None:
    """List the checkpoints of all runs, or of one, with their sizes and held-out losses."""
    from dataclasses import asdict

    from phantom.training.checkpoint_commands import list_checkpoints

    rows = list_checkpoints(settings(context, params, set_), Path(), run)
    lines = []
    for row in rows:
        loss = "" if row.heldout_loss is None else f", held-out loss {row.heldout_loss:.4g}"
        size = f" {row.bytes / 2**30:.2f} GiB{loss}" if row.bytes else ""
        lines.append(f"{row.run}/{row.step}:{size}" + (f"{',' if size else ''} {row.note}" if row.note else ""))
    show([asdict(row) for row in rows], as_json, "\n".join(lines) or "checkpoints: there are none")


@checkpoints.command()
def verify(
    context: typer.Context,
    run: Run,
    step: Step = None,
    params: ParamsFile = None,
    set_: Set = None,
    as_json: AsJson = False,
) -> None:
    """Read the files of a run's checkpoints and compare them with their checksums. Fails if one is damaged."""
    from phantom.training.checkpoint_commands import verify_checkpoints

    found = verify_checkpoints(settings(context, params, set_), Path(), run, step)
    show(found, as_json, "\n".join(f"{name}: {why or 'whole'}" for name, why in found.items()))
    if damaged := [name for name, why in found.items() if why]:
        raise StageFailed(f"{run}: {len(damaged)} of {len(found)} checkpoints are not whole: {', '.join(damaged)}")


@checkpoints.command()
def export(
    context: typer.Context,
    run: Run,
    out: Annotated[Path, typer.Option(help="A new folder, for `phantom generate --model`.")],
    step: Annotated[int | None, typer.Option(help="The step; by default the newest.", min=0)] = None,
    dtype: Annotated[
        str | None, typer.Option(metavar="float32|bfloat16", help="By default that of train.export_dtype.")
    ] = None,
    params: ParamsFile = None,
    set_: Set = None,
    as_json: AsJson = False,
) -> None:
    """Write the weights of a checkpoint as an export, tensor by tensor: never the whole model is in memory."""
    from phantom.training.checkpoint_commands import export_checkpoint

    tree = settings(context, params, set_)
    if dtype not in (None, "float32", "bfloat16"):
        raise UserError(f"--dtype: found {dtype!r}, accepted: float32, bfloat16")
    found = export_checkpoint(tree, Path(), run, out, step, dtype or tree.train.export_dtype or tree.models.dtype)
    show({"checkpoint": str(found), "out": str(out)}, as_json, f"{out}: the weights of {found}")


@checkpoints.command()
def prune(
    context: typer.Context,
    run: Run,
    keep: Annotated[
        int | None, typer.Option(help="How many of the newest to keep; by default train.keep_checkpoints.", min=1)
    ] = None,
    params: ParamsFile = None,
    set_: Set = None,
    as_json: AsJson = False,
) -> None:
    """Delete a run's old checkpoints: all but the newest and the best one."""
    from phantom.training.checkpoint_commands import prune_checkpoints

    tree = settings(context, params, set_)
    deleted = prune_checkpoints(tree, Path(), run, keep or tree.train.keep_checkpoints)
    show(deleted, as_json, "\n".join(f"deleted {name}" for name in deleted) or "nothing to delete")
