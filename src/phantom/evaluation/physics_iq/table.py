"""The official csv of metrics: a row per scenario, a column per metric and view, per-frame lists as `[a, b]`."""

from __future__ import annotations

import csv
import re
from pathlib import Path

from phantom.errors import UserError
from phantom.evaluation.physics_iq.metrics import LISTS, SCALARS, Metrics
from phantom.evaluation.physics_iq.score import Table

VIEWS = ("perspective-left", "perspective-center", "perspective-right")  # in the order of the official csv
SCORED = (
    "spatiotemporal_iou_v1",
    "v1_mse",
    "variance_spatiotemporal_iou",
    "variance_mse",
    "spatial_iou_v1",
    "weighted_spatial_iou_v1",
    "variance_spatial",
    "variance_weighted_spatial",
)
ORDER = (
    "spatiotemporal_iou_v1",
    "spatiotemporal_iou_v2",
    "spatial_iou_v1",
    "spatial_iou_v2",
    "weighted_spatial_iou_v1",
    "weighted_spatial_iou_v2",
    "v1_mse",
    "v2_mse",
    "variance_spatial",
    "variance_weighted_spatial",
    "variance_spatiotemporal_iou",
    "variance_mse",
)
_FLOAT = re.compile(r"(?<![\w.])[-+]?[0-9]*\.?[0-9]+(?:[eE][-+]?[0-9]+)?")  # also within np.float64(...)


def write(path: Path, table: Table) -> None:
    """Writes `table` in the format of the official scorer. The cells of missing views are empty."""
    present = {view for row in table.values() for view in row}
    views = [v for v in VIEWS if v in present] + sorted(present - set(VIEWS))
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["scenario", *(f"{key}_{view}" for view in views for key in ORDER)])
        for scenario, row in table.items():
            cells = [row[view][key] if view in row else "" for view in views for key in ORDER]
            writer.writerow([f"{scenario}.mp4", *cells])


def read(path: Path) -> Table:
    """Reads an official csv with any views and column order; only the scored columns are required. Raises UserError."""
    if not path.is_file():
        raise UserError(f"{path}: no such file; a csv of the official scorer is needed")
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file)
        columns = list(reader.fieldnames or ())
        views = [c.removeprefix("v1_mse_") for c in columns if c.startswith("v1_mse_")]
        missing = [f"{key}_{view}" for view in views for key in SCORED if f"{key}_{view}" not in columns]
        if "scenario" not in columns or not views or missing:
            wanted = missing[0] if missing else "scenario and v1_mse_perspective-left"
            raise UserError(f"{path}: column {wanted} is missing; expected the csv of the official scorer")
        table = {}
        for line in reader:
            where = f"{path} line {reader.line_num}"
            scenario = line["scenario"].removesuffix(".mp4")
            if scenario in table:
                raise UserError(f"{where}: scenario {scenario} appears twice")
            table[scenario] = {view: _metrics(line, view, where) for view in views if line[f"v1_mse_{view}"]}
            if not table[scenario]:
                raise UserError(f"{where}: scenario {scenario} has no value in any view")
    if not table:
        raise UserError(f"{path}: no scenario in it")
    return table


def _metrics(line: dict[str, str], view: str, where: str) -> Metrics:
    metrics: Metrics = {}
    for key in ORDER:
        cell = line.get(f"{key}_{view}")
        if cell is None and key not in SCORED:
            continue
        try:
            metrics[key] = _floats(cell or "") if key in LISTS else float(cell or "")
        except ValueError:
            form = "[a, b, ...] of numbers" if key in LISTS else "a number"
            raise UserError(f"{where}: {key}_{view} is {str(cell)[:40]!r}, expected {form}") from None
    return metrics


def _floats(text: str) -> list[float]:
    values = [float(number) for number in _FLOAT.findall(text)]
    if not (text.startswith("[") and text.endswith("]")) or not values:
        raise ValueError(text)
    return values


assert set(ORDER) == {*LISTS, *SCALARS}
