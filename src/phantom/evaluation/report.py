"""The page of the evaluate stage: `reports/index.html`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from phantom.config import Params
from phantom.evaluation.cells import INTERVAL
from phantom.evaluation.charts import Chart, chart
from phantom.evaluation.page import Page, Table, as_csv, embed_data, render

PLAIN = Page("Phantom against its base", "Videos of the same prompts, from the same noise.", notes=[INTERVAL])


def evaluation_page(
    evaluation: Mapping[str, Any], params: Params, root: Path, tables: Sequence[Table], page: Page | None = None
) -> str:
    """The page as HTML.

    evaluation: content of evaluation.json. tables: of the benchmarks. page: what one of them shows beside its tables.
    """
    numbers = json.dumps(evaluation, indent=2) + "\n"
    page = page or PLAIN
    shown = [*page.tables, *tables]
    data = _data(numbers, shown)
    verdict = evaluation.get("verdict", "")
    return render(replace(page, verdict=verdict, tables=shown, charts=_charts(root, params), data=data))


def _data(numbers: str, tables: Sequence[Table]) -> list[tuple[str, str]]:
    return embed_data(
        [("evaluation.json", "application/json", numbers), ("evaluation.csv", "text/csv", as_csv(tables))]
    )


def _charts(root: Path, params: Params) -> list[Chart]:
    """Training curves, from the histories beside the exports."""
    history, control = (_history(root / f"models/{name}/history.json") for name in ("phantom", "control"))
    weight = params.train.recursive_weight
    resets = [b["step"] for a, b in pairwise(history) if (b.get("resets") or 0) > (a.get("resets") or 0)]
    losses = {"physics": _line(history, "loss_physics"), "video": _line(history, "loss_video")}
    if control:
        losses["video, control"] = _line(control, "loss_video")
    losses |= {f"{name}, held out": _line(history, f"val_loss_{name}") for name in ("physics", "video")}
    norms = {
        "of the physics loss": _line(history, "grad_norm_physics"),
        "of the video loss": _line(history, "grad_norm_video"),
    }
    drawn = [
        chart("Losses", losses, "Flow-matching losses, means since the record before.", log=True),
        chart(
            "Weight of the physics loss",
            {"alpha_z": _line(history, "alpha")},
            f"{max((r.get('resets') or 0 for r in history), default=0):.0f} resets; ticks mark the records after one.",
            marks=resets,
        ),
        chart(
            "Gradient norms",
            norms,
            "When the physics norm passes the threshold, alpha_z returns to 0.",
            log=True,
            level=("threshold", weight.threshold),
        ),
    ]
    return [found for found in drawn if found]


def _history(path: Path) -> list[dict[str, Any]]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []


def _line(history: Sequence[Mapping[str, Any]], key: str) -> list[tuple[float, float]]:
    return [(r["step"], r[key]) for r in history if r.get(key) is not None]
