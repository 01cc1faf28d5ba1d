"""The model card of an export with the numbers of a study, for the Hugging Face hub."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from phantom.errors import UserError
from phantom.evaluation.study.figures import FIGURES
from phantom.evaluation.study.results import read_results
from phantom.evaluation.study.spec import load_study

CARD = "README.md"


def study_card(name: str, model: Path, root: Path = Path()) -> str:
    """The card that training wrote into the export `model`, with a section on the study `name`.

    The export's own README.md is left as it is: it is part of what DVC and the registry know the export by. Raises
    UserError where there is no such study, none of its results, or no card.
    """
    load_study(name, root)
    results = read_results(name, root)
    if results is None:
        raise UserError(f"study {name}: no results yet; `phantom study run {name}` writes them")
    card = model / CARD
    if not card.is_file():
        raise UserError(f"model: {card}: no such file; accepted: an export that `phantom train` wrote")
    return f"{card.read_text(encoding='utf-8').rstrip()}\n\n{study_section(results)}\n"


def study_section(results: Mapping[str, Any]) -> str:
    """The question of a study, its verdict and its paired differences, in Markdown."""
    study, commits = results["study"], ", ".join(made["commit"][:12] for made in results["made_with"])
    rows = [
        f"| {one['arm']} - {one['reference']} | {_title(one['figure'])} ({one['better']} is better) "
        f"| {one['difference']:+.4g} [{one['low']:+.4g}, {one['high']:+.4g}] | {_p(one['p'])} | {len(one['seeds'])} |"
        for one in results["comparisons"]
    ]
    return "\n".join(
        [
            f"## Results of the study {results['name']}",
            "",
            f"{study['question']}",
            "",
            f"{results['verdict']}",
            "",
            "| difference | figure | mean, and 95% interval | permutation p | seeds |",
            "| --- | --- | --- | --- | --- |",
            *rows,
            "",
            f"Of the study's own runs (preset `{study['preset']}`, {results['finished']} of {results['expected']}, "
            f"commit {commits}), not of these weights.",
        ]
    )


def _title(figure: str) -> str:
    return FIGURES[figure].title if figure in FIGURES else figure


def _p(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"
