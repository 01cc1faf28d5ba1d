"""Force prompts from files and from the command line.

| file | is |
| --- | --- |
| JSON | an object as `ForcePrompt.to_dict`, or a list of them, one for each video |
| csv with x, y, angle, magnitude and perhaps time | the points of one prompt |
| csv with force, angle, coordx, coordy, width, height | Force Prompting's, a push at the first frame for each row |
| csv with wind_speed, wind_angle | Force Prompting's, a wind for each row |

Force Prompting counts coordy from the bottom. Its test files state forces from 0 to 1, which are taken as they are;
those of its training files, in units of their own, are divided by the largest of the file.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from phantom.errors import UserError
from phantom.force.prompt import ForcePrompt, PointForce, Wind, parse_point, parse_wind

SUFFIXES = (".json", ".csv")
POINTS = ("x", "y", "angle", "magnitude")
FORCE_PROMPTING_POINT = ("force", "angle", "coordx", "coordy", "width", "height")
FORCE_PROMPTING_WIND = ("wind_speed", "wind_angle")

Row = dict[str, float]
Kind = TypeVar("Kind", PointForce, Wind)


def parse_forces(forces: Sequence[str], wind: str | None = None) -> list[ForcePrompt]:
    """The prompts of `--force`, each a point or one file, and `--wind`: one for all videos, or one for each.

    Raises UserError.
    """
    files = [text for text in forces if Path(text).suffix.lower() in SUFFIXES]
    if not files:
        return [ForcePrompt(tuple(map(parse_point, forces)), None if wind is None else parse_wind(wind))]
    if len(forces) > 1 or wind is not None:
        raise UserError(f"force: found {files[0]} and other forces; accepted: one file, or points and a wind")
    return read_forces(files[0])


def read_forces(path: str | Path) -> list[ForcePrompt]:
    """The force prompts of a JSON or csv file, at least one. Raises UserError."""
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"force: {path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
    try:
        found = _read_json(text) if path.suffix.lower() == ".json" else _read_csv(text)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    if not found:
        raise UserError(f"{path}: force: no force in it; accepted: at least one")
    return found


def _read_json(text: str) -> list[ForcePrompt]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"force: not JSON: {error}") from None
    return [ForcePrompt.from_dict(one) for one in (value if isinstance(value, list) else [value])]


def _read_csv(text: str) -> list[ForcePrompt]:
    try:
        reader = csv.DictReader(io.StringIO(text, newline=""))
        stated, lines = list(reader.fieldnames or ()), list(reader)
    except csv.Error as error:
        raise UserError(f"force: not a csv: {error}") from None
    kinds = (POINTS, FORCE_PROMPTING_POINT, FORCE_PROMPTING_WIND)
    names = next((names for names in kinds if set(stated) >= set(names)), None)
    if names is None:
        accepted = "; ".join(", ".join(names) for names in kinds)
        raise UserError(f"force: found columns {', '.join(stated) or 'none'}; accepted: those of one of {accepted}")
    optional = ("time",) if names is POINTS and "time" in stated else ()
    rows = [_read_row(number, row, (*names, *optional)) for number, row in enumerate(lines, 2)]
    if names is POINTS:
        points = tuple(_at_line(number, PointForce, **row) for number, row in rows)
        return [ForcePrompt(points)] if points else []
    strongest = max([row[names[0]] for _, row in rows], default=0.0)
    unit = max(strongest, 1.0)
    if names is FORCE_PROMPTING_WIND:
        return [
            ForcePrompt(wind=_at_line(number, Wind, angle=row["wind_angle"], magnitude=row["wind_speed"] / unit))
            for number, row in rows
        ]
    return [ForcePrompt((_of_force_prompting(number, row, unit),)) for number, row in rows]


def _of_force_prompting(number: int, row: Row, unit: float) -> PointForce:
    if row["width"] <= 0 or row["height"] <= 0:
        raise UserError(f"line {number}: force: found a picture of {row['width']:g} x {row['height']:g}")
    place = {"x": row["coordx"] / row["width"], "y": 1 - row["coordy"] / row["height"]}
    return _at_line(number, PointForce, **place, angle=row["angle"], magnitude=row["force"] / unit)


def _read_row(number: int, row: dict[str, str | None], names: Sequence[str]) -> tuple[int, Row]:
    """The numbers of a row, and its line."""
    try:
        return number, {name: float(row[name] or "") for name in names if row[name] or name != "time"}
    except ValueError:
        wrong = next(name for name in names if not _is_number(row[name]))
        raise UserError(f"line {number}: force: {wrong}: found {row[wrong]!r}; accepted: a number") from None


def _is_number(text: str | None) -> bool:
    try:
        float(text or "")
    except ValueError:
        return False
    return True


def _at_line(number: int, kind: Callable[..., Kind], **values: float) -> Kind:
    try:
        return kind(**values)
    except UserError as error:
        raise UserError(f"line {number}: {error}") from None
