"""The table of LikePhys in the report of the evaluate stage."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from phantom.errors import listed
from phantom.evaluation.cells import NAMES, delta_cell, difference_cell
from phantom.evaluation.likephys.figures import MARGIN, PPE
from phantom.evaluation.page import Cell, Table, TableRow
from phantom.evaluation.protocol import Figure

BY = ("By scenario", "By violation")
GAINS = {"gain_over_control": "Against the control", "gain": "Against the base"}
LOSSES = {"video": "by the video's loss", "physics": "by the physics loss", "joint": "by the sum of both"}


def table(models: Mapping[str, Mapping[str, Any]]) -> Table:
    """Base, control and Phantom: the error by each loss, by scenario and violation, and of losses without a model."""
    base = models["base"]

    def row(
        name: str,
        note: str,
        of: Mapping[str, Any],
        reference: Mapping[str, Any] | None,
        figure: Figure = PPE,
        gains: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> TableRow:
        known = reference[figure.key] if reference else None
        cells = []
        for model in models:
            found, gained = of.get(model), gains[model].get("gain") if gains else None
            base = None if model == "base" else known
            cells.append(delta_cell(figure, found[figure.key], base, gained) if found else Cell("–"))
        if "control" in models:
            over = gains["phantom"].get("gain_over_control") if gains else None
            cells.append(difference_cell(figure, over) if gains else Cell(""))
        return TableRow(name, note, cells)

    def rows(kind: str, key: str) -> list[TableRow]:
        found = {m: {r[key]: r for r in models[m]["losses"]["video"][kind]} for m in models}
        return [
            row(name.replace("_", " "), "", {m: found[m][name] for m in models}, reference)
            for name, reference in found["base"].items()
        ]

    def by_loss(figure: Figure, pick: Callable[[Mapping[str, Any]], Mapping[str, Any]]) -> list[TableRow]:
        return [
            row(
                figure.title if kind == "video" else "…",
                f"{note}; {figure.note}" if kind == "video" else note,
                {m: pick(models[m]["losses"][kind]) for m in models if kind in models[m]["losses"]},
                pick(base["losses"]["video"]) if kind == "video" else None,
                figure,
                {m: pick(models[m]) for m in models} if kind == "video" else None,
            )
            for kind, note in LOSSES.items()
        ]

    losses = by_loss(PPE, lambda of: of) + by_loss(MARGIN, lambda of: of["margin"])
    trivial = {m: {r["name"]: r for r in models[m]["trivial"]} for m in models}
    trivial_rows = [row(name, "", {m: trivial[m][name] for m in models}, None) for name in trivial["base"]]
    groups = [
        ("LikePhys", losses),
        (BY[0], rows("scenarios", "scenario")),
        (BY[1], rows("violations", "violation")),
        ("Variations that break no law, and losses without a model", trivial_rows),
    ]
    note = f"Over {base['groups']} groups, paired. " + " ".join(
        f"{said}: {listed(shown)}."
        for key, said in GAINS.items()
        if (shown := [f"{NAMES[m]} {_gained(of, key)}" for m, of in models.items() if of.get(key)])
    )
    more = ["Phantom − control"] * ("control" in models)
    columns = [NAMES[name] for name in models] + more
    return Table("LikePhys", columns, [*models, *[""] * len(more)], groups, note.replace("-", "−"), BY)


def _gained(of: Mapping[str, Any], key: str) -> str:
    error, margin = of[key], of["margin"][key]
    return (
        f"error {error['gain']:+.1f} [{error['low']:+.1f}, {error['high']:+.1f}], "
        f"margin {margin['gain']:+.2f} [{margin['low']:+.2f}, {margin['high']:+.2f}]"
    )
