"""The table of the predictions without a model in the report of the evaluate stage."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from phantom.evaluation.cells import MODES, NAMES, delta_cell, difference_cell
from phantom.evaluation.page import Cell, Table, TableRow
from phantom.evaluation.physics_iq.figures import FIGURES as PHYSICS_IQ
from phantom.evaluation.trivial.predictions import TITLES
from phantom.evaluation.worlds_figures import WORLDS

SCORE, AGAINST_SIMULATOR = PHYSICS_IQ[0], WORLDS[:3]


def table(evaluation: Mapping[str, Any]) -> Table:
    """Phantom and each prediction by mode, with Phantom's gain over it."""
    groups = []
    for mode, found in evaluation["trivial"].items():
        phantom = evaluation["physics_iq"][mode]["phantom"] | evaluation["worlds"][mode]["phantom"]
        rows = [
            _row(*TITLES[name], figures | figures["worlds"], difference_cell(SCORE, figures["phantom_gain"]["score"]))
            for name, figures in found.items()
        ]
        groups.append((MODES[mode].capitalize(), [_row(NAMES["phantom"], "", phantom, Cell("")), *rows]))
    columns = [SCORE.name, "Phantom ahead by", *(figure.title for figure in AGAINST_SIMULATOR)]
    note = (
        "What the scale is worth: a model that is no better than the nearest training clip has learnt no more than a "
        "look-up. The other take is what the benchmark's own variation allows. Phantom's lead is in points of the "
        "score, with its 95% interval over scenarios."
    )
    return Table("Without a model", columns, [""] * len(columns), groups, note, [title for title, _ in groups])


def _row(name: str, note: str, figures: Mapping[str, Any], lead: Cell) -> TableRow:
    score, *others = (delta_cell(figure, figures[figure.key], None) for figure in (SCORE, *AGAINST_SIMULATOR))
    return TableRow(name, note, [score, lead, *others])
