"""Drawings as inline SVG: every seed's value by arm, differences with their intervals, values over their costs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

from phantom.evaluation.charts import HEIGHT, LEFT, RIGHT, TOP, WIDTH, Axis, Chart, short

ROW, FOOT = 46.0, 34.0  # height of a row, and of the axis below the rows
EDGE = 16.0  # left of the drawing
SAME = 1.05  # ratio of costs below which nothing is bought
NAMES, LINE = 130.0, 16.0  # width left for the names beside the marks, and their least distance
LETTER = 7.0  # width of a letter of a name, about


@dataclass(frozen=True)
class Row:
    """A line of a drawing: its name, colour class, and what is drawn on it."""

    name: str
    colour: str
    points: Mapping[str, float]  # what a point is called -> its value
    mean: float
    interval: tuple[float, float] | None = None


def dots(title: str, rows: Sequence[Row], level: tuple[str, float] | None = None, note: str = "") -> Chart | None:
    """Points, mean and interval of each row over one axis; `level`: name and value of a vertical line."""
    rows = [row for row in rows if row.points]
    if not rows:
        return None
    values = [value for row in rows for value in (*row.points.values(), row.mean, *(row.interval or ()))]
    values += [level[1]] if level else []
    margin = 0.06 * ((max(values) - min(values)) or abs(max(values)) or 1.0)
    axis = Axis(min(values) - margin, max(values) + margin, EDGE, WIDTH - RIGHT, False)
    foot = ROW * len(rows) + (18 if level else 0)
    parts = [f'<svg viewBox="0 0 {WIDTH:g} {foot + FOOT:g}" role="img" aria-label="{escape(_summary(title, rows))}">']
    for value in axis.ticks():
        x = axis.at(value)
        parts.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="0" y2="{foot:g}"/>')
        parts.append(f'<text class="tick" x="{x:.1f}" y="{foot + 20:g}" text-anchor="middle">{short(value)}</text>')
    if level:
        x = axis.at(level[1])
        parts.append(f'<line class="level" x1="{x:.1f}" x2="{x:.1f}" y1="0" y2="{foot:g}"/>')
        anchor = "start" if x < (LEFT + WIDTH) / 2 else "end"
        shift = 5 if anchor == "start" else -5
        parts.append(
            f'<text class="tick" x="{x + shift:.1f}" y="{foot - 4:g}" text-anchor="{anchor}">{escape(level[0])}</text>'
        )
    for number, row in enumerate(rows):
        parts += _draw(row, axis, ROW * number)
    return Chart(title, "".join([*parts, "</svg>"]), [], note)


def _draw(row: Row, axis: Axis, top: float) -> list[str]:
    y, x = top + 31, axis.at(row.mean)
    parts = [f'<g class="{row.colour}"><text class="label" x="{EDGE:g}" y="{top + 15:g}">{escape(row.name)}</text>']
    if row.interval:
        low, high = (axis.at(value) for value in row.interval)
        parts.append(f'<line class="interval" x1="{low:.1f}" x2="{high:.1f}" y1="{y:g}" y2="{y:g}"/>')
    for name, value in row.points.items():
        title = f"<title>{escape(name)}: {value:.5g}</title>"
        parts.append(f'<circle class="point" cx="{axis.at(value):.1f}" cy="{y:g}" r="4.5">{title}</circle>')
    parts.append(f'<line class="mean" x1="{x:.1f}" x2="{x:.1f}" y1="{y - 9:g}" y2="{y + 9:g}"/></g>')
    return parts


def over_cost(
    title: str, rows: Sequence[tuple[float, Row]], unit: str, level: tuple[str, float] | None = None
) -> Chart | None:
    """Mean and range of the seeds of each row over its cost, on a logarithmic axis; None where all cost the same.

    rows: with their costs, in `unit`. level: name and value of a horizontal line.
    """
    rows = [(cost, row) for cost, row in rows if row.points]
    if not rows or max(cost for cost, _ in rows) < SAME * min(cost for cost, _ in rows):
        return None
    values = [value for _, row in rows for value in row.points.values()] + ([level[1]] if level else [])
    margin = 0.06 * ((max(values) - min(values)) or abs(max(values)) or 1.0)
    costs = [cost for cost, _ in rows]
    across = Axis(min(costs), max(costs), LEFT + EDGE, WIDTH - NAMES, True)
    foot = HEIGHT + TOP
    up = Axis(min(values) - margin, max(values) + margin, foot, TOP, False)
    said = f"{title}: " + "; ".join(f"{row.name} {row.mean:.4g} for {cost:.4g} {unit}" for cost, row in rows)
    parts = [f'<svg viewBox="0 0 {WIDTH:g} {foot + FOOT:g}" role="img" aria-label="{escape(said)}">']
    for value in up.ticks():
        y = up.at(value)
        parts.append(f'<line class="grid" x1="{LEFT:g}" x2="{WIDTH - RIGHT:g}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="tick" x="{LEFT - 8:g}" y="{y + 4:.1f}" text-anchor="end">{short(value)}</text>')
    ticks = {round(across.at(cost) / NAMES * 4): cost for cost in sorted(costs)}  # not closer than a quarter of a name
    for cost in ticks.values():
        parts.append(
            f'<text class="tick" x="{across.at(cost):.1f}" y="{foot + 20:g}" text-anchor="middle">{cost:.3g}</text>'
        )
    if level:
        y = up.at(level[1])
        parts.append(f'<line class="level" x1="{LEFT:g}" x2="{WIDTH - RIGHT:g}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(
            f'<text class="tick" x="{WIDTH - RIGHT:g}" y="{y - 5:.1f}" text-anchor="end">{escape(level[0])}</text>'
        )
    written = list[tuple[float, float, float]]()  # left, right and height of the names so far, from the top
    for cost, row in sorted(rows, key=lambda found: -found[1].mean):
        x, y = across.at(cost), up.at(row.mean)
        top, bottom = (up.at(value) for value in (max(row.points.values()), min(row.points.values())))
        end = x + 14 + LETTER * len(row.name)
        beside = max([y, *(above + LINE for left, right, above in written if left < end and x < right)])
        written.append((x, end, beside))
        name, said = escape(row.name), f"{row.mean:.5g}"
        parts += [
            f'<g class="{row.colour}">',
            f'<line class="interval" x1="{x:.1f}" x2="{x:.1f}" y1="{top:.1f}" y2="{bottom:.1f}"/>',
            f'<circle class="point" cx="{x:.1f}" cy="{y:.1f}" r="5"><title>{name}: {said}</title></circle>',
            f'<line class="grid" x1="{x + 7:.1f}" x2="{x + 12:.1f}" y1="{y:.1f}" y2="{beside:.1f}"/>',
            f'<text class="label" x="{x + 14:.1f}" y="{beside + 4:.1f}">{name}</text></g>',
        ]
    return Chart(title, "".join([*parts, "</svg>"]), [], "Means, and the range of the seeds.")


def _summary(title: str, rows: Sequence[Row]) -> str:
    def interval(row: Row) -> str:
        return f" [{row.interval[0]:.3g}, {row.interval[1]:.3g}]" if row.interval else ""

    return f"{title}: " + "; ".join(f"{row.name} {row.mean:.4g}{interval(row)}" for row in rows)
