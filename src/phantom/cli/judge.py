"""`phantom judge`: our own implementation of VideoPhy's judges, on the files of theirs."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from phantom.cli.shared import AsJson, app, resumable, show
from phantom.errors import UserError


class Kind(StrEnum):
    """The benchmark whose judge it is."""

    VIDEOPHY = "videophy"
    VIDEOPHY2 = "videophy2"


class Task(StrEnum):
    """Semantic adherence, physical commonsense, or a rule."""

    SA = "sa"
    PC = "pc"
    RULE = "rule"


@app.command()
def judge(
    benchmark: Annotated[Kind, typer.Argument(help="videophy or videophy2.")],
    input: Annotated[Path, typer.Option(help="The judge's input, which `phantom score` writes.")],
    output: Annotated[Path, typer.Option(help="The csv to write.")],
    weights: Annotated[str, typer.Option(help="A folder or hub id, such as videophysics/videophy_2_auto.")],
    task: Annotated[Task, typer.Option(help="sa, pc or rule; of videophy the input says which.")] = Task.SA,
    device: Annotated[str | None, typer.Option(help="Such as cuda:1; by default the first GPU, or the CPU.")] = None,
    as_json: AsJson = False,
) -> None:
    """Rate videos with the judge of VideoPhy or VideoPhy-2: `command: native` in their settings runs this."""
    import torch

    from phantom.evaluation.videocon import judge as videocon

    try:
        place = torch.empty(0, device=device or ("cuda" if torch.cuda.is_available() else "cpu")).device
    except (RuntimeError, AssertionError):  # no such name, or no such device
        raise UserError(f"--device: found {device!r}; accepted: cpu, or a GPU of this machine such as cuda:1") from None
    if not output.parent.is_dir():
        raise UserError(f"--output: {output.parent}: no such folder; accepted: a file in one")
    with resumable("judge"):
        loaded = videocon.Judge(weights, place)
        if benchmark is Kind.VIDEOPHY:
            count = videocon.judge_videophy(loaded, input, output)
        else:
            count = videocon.judge_videophy2(loaded, input, output, task.value)
    show({"rows": count, "output": str(output)}, as_json, f"{output}: {count} rows")
