"""`phantom data report`: a page of the prepared clips."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from phantom.cli.shared import AsJson, ParamsFile, Set, app, settings, show

data = typer.Typer(help="The prepared clips: a page of them.", no_args_is_help=True)
app.add_typer(data, name="data")


@data.command()
def report(
    context: typer.Context,
    out: Annotated[Path | None, typer.Option(help="The page; default: reports/data.html.")] = None,
    params: ParamsFile = None,
    set_: Set = None,
    as_json: AsJson = False,
) -> None:
    """Write a page of data/clips: counts, histograms, refused files, and what data.filter drops, as pictures."""
    from phantom.evaluation.dataset.report import PAGE, write_report

    show(write_report(settings(context, params, set_), Path(), out or PAGE), as_json)
