"""What Phantom's videos lose or gain where z is replaced while sampling (`interventions`): figures, and their table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from phantom.evaluation.cells import MODES, delta_cell
from phantom.evaluation.gains import gain, mean_gain
from phantom.evaluation.page import Cell, Table, TableRow
from phantom.evaluation.physics_iq.figures import FIGURES as PHYSICS_IQ
from phantom.evaluation.protocol import Figure
from phantom.evaluation.sampling_spec import Model
from phantom.evaluation.worlds_figures import WORLDS

OWN = "phantom"
NAMES = {
    "own": "its own z",
    "oracle": "z of the recording",
    "other": "z of another recording",
    "noise": "noise as z",
}
FIGURES = (PHYSICS_IQ[0], WORLDS[0])
NOTE = (
    "Phantom from the same noise, with z replaced after every step of sampling; in brackets the 95% interval of the "
    "change, over scenarios. If another recording's z or noise changes nothing, the video branch does not read z. The "
    "recording's own z shows what a better z would gain."
)


def take_interventions(evaluation: Mapping[str, Any], models: Sequence[Model], protocol: str) -> dict[str, Any]:
    """Moves the figures of `models` out of `evaluation`. Returns, by mode and source of z, score and position error.

    Each with `gain`, its change from the model's own z: mean and 95% interval over scenarios.
    """
    found: dict[str, Any] = {}
    for mode, scored in evaluation["physics_iq"].items():
        worlds = evaluation.get("worlds", {}).get(mode, {})
        own, own_world = scored[OWN], worlds.get(OWN)
        rows = {"own": _values(own, own_world) | {"gain": {}}}
        for model in models:
            other, other_world = scored.pop(model.name), worlds.pop(model.name, None)
            gains = {"score": gain(own["per_scenario"], other["per_scenario"], protocol)}
            if own_world and other_world:
                gains["position_error"] = mean_gain(_errors(own_world), _errors(other_world))
            rows[str(model.states)] = _values(other, other_world) | {"gain": gains}
        found[mode] = rows
    return found


def _values(scored: Mapping[str, Any], world: Mapping[str, Any] | None) -> dict[str, Any]:
    return {"score": scored["score"], **({"position_error": world["position_error"]} if world else {})}


def _errors(world: Mapping[str, Any]) -> list[float | None]:
    return [row["position_error"] for row in world["per_scenario"]]


def interventions_table(found: Mapping[str, Any]) -> Table:
    """The table of the report, from `take_interventions`."""
    sources = list(next(iter(found.values())))
    groups = []
    for mode, rows in found.items():
        shown = [figure for figure in FIGURES if figure.key in rows["own"]]
        groups.append((MODES[mode].capitalize(), [_row(figure, rows, sources) for figure in shown]))
    kinds = [OWN if source == "own" else "" for source in sources]
    return Table("Interventions on z", [NAMES[source] for source in sources], kinds, groups, NOTE)


def _row(figure: Figure, rows: Mapping[str, Any], sources: Sequence[str]) -> TableRow:
    cells = []
    for source in sources:
        change = rows[source]["gain"].get(figure.key)
        own = None if source == "own" else rows["own"][figure.key]
        cell = delta_cell(figure, rows[source][figure.key], own, change)
        interval = f" [{change['low']:+.{figure.digits}f}, {change['high']:+.{figure.digits}f}]" if change else ""
        cells.append(Cell(cell.text, (cell.delta + interval).replace("-", "\u2212"), cell.tone))
    return TableRow(figure.title, figure.note, cells)
