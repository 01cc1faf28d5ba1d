"""`phantom vote` and `phantom score votes`: blind pairwise comparisons by people."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from phantom.cli.shared import AsJson, app, score, show


@app.command()
def vote(
    folders: Annotated[list[str], typer.Argument(metavar="[NAME=]DIR...", help="Folders of mp4 files, one per model.")],
    out: Annotated[Path, typer.Option(help="Output folder of the page and of the key to its pairs.")],
    pairs: Annotated[int, typer.Option(min=1, help="At most so many pairs.")] = 60,
    seed: Annotated[int, typer.Option(help="Draws prompts, sides and order.")] = 0,
    captions: Annotated[
        str | None, typer.Option(help="Captions to show: a CSV file or a Hugging Face data set id.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Make a page on which people compare the models' videos in pairs, without knowing whose they are."""
    from phantom.evaluation.votes.ballot import named_folders, write_ballot

    made = write_ballot(named_folders(folders), out, pairs, seed, captions)
    text = (
        f"{made.page}: {made.pairs} pairs of {len(made.models)} models, {made.repeated} of them twice; keep {made.key}"
    )
    show(made, as_json, text)


@score.command("votes")
def score_votes(
    files: Annotated[list[Path], typer.Argument(metavar="FILE...", help="What the voters saved.")],
    key: Annotated[Path, typer.Option(help="The key.json that `phantom vote` wrote.")],
    as_json: AsJson = False,
) -> None:
    """Score models by people's votes: Bradley-Terry, with intervals over voters and prompts."""
    from phantom.evaluation.votes import scores

    result = scores.score_votes(files, key)
    show(result, as_json, scores.as_text(result))
