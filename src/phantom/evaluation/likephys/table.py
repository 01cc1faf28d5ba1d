"""The table of LikePhys in the report of the evaluate stage."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from phantom.evaluation.page import Cell, Table, TableRow
from phantom.evaluation.report import NAMES, Figure, delta_cell

PPE = Figure(
    "score", "Error, %", "how often a possible video is denoised worse than an impossible one; 50: chance", 1, -1
)
LOSSES = {"video": "by the video's loss", "physics": "by the physics loss", "joint": "by the sum of both"}


def table(models: Mapping[str, Mapping[str, Any]]) -> Table:
    """Base, control and Phantom: the error by each loss, by scenario and violation, and of losses without a model."""
    base = models["base"]

    def row(name: str, note: str, of: Mapping[str, Any], reference: Mapping[str, Any] | None) -> TableRow:
        known = reference["score"] if reference else None
        cells = []
        for model in models:
            found = of.get(model)
            cells.append(delta_cell(PPE, found["score"], None if model == "base" else known) if found else Cell("–"))
        return TableRow(name, note, cells)

    def rows(kind: str, key: str) -> list[TableRow]:
        found = {m: {r[key]: r for r in models[m]["losses"]["video"][kind]} for m in models}
        return [
            row(name.replace("_", " "), "", {m: found[m][name] for m in models}, reference)
            for name, reference in found["base"].items()
        ]

    losses = [
        row(
            "Error, %" if kind == "video" else "…",
            f"{note}; {PPE.note}" if kind == "video" else note,
            {m: models[m]["losses"][kind] for m in models if kind in models[m]["losses"]},
            base["losses"]["video"] if kind == "video" else None,
        )
        for kind, note in LOSSES.items()
    ]
    trivial = {m: {r["name"]: r for r in models[m]["trivial"]} for m in models}
    trivial_rows = [row(name, "", {m: trivial[m][name] for m in models}, None) for name in trivial["base"]]
    groups = [
        ("LikePhys", losses),
        ("By scenario", rows("scenarios", "scenario")),
        ("By violation", rows("violations", "violation")),
        ("Variations that break no law, and losses without a model", trivial_rows),
    ]
    gained = [
        f"{NAMES[name]} {found['gain']['gain']:+.1f} (95%: {found['gain']['low']:+.1f} to {found['gain']['high']:+.1f})"
        for name, found in models.items()
        if found["gain"]
    ]
    note = f"Over {base['groups']} groups; lower is better. Against the base, paired: {', '.join(gained)}."
    return Table("LikePhys", [NAMES[name] for name in models], list(models), groups, note.replace("-", "−"))
