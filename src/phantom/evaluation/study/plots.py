"""Two drawings as inline SVG: every seed's value by arm, and differences with their intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

from phantom.evaluation.charts import LEFT, RIGHT, WIDTH, Axis, Chart, short

ROW, FOOT = 46.0, 34.0  # height of a row, and of the axis below the rows
EDGE = 16.0  # left of the drawing


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


def _summary(title: str, rows: Sequence[Row]) -> str:
    def interval(row: Row) -> str:
        return f" [{row.interval[0]:.3g}, {row.interval[1]:.3g}]" if row.interval else ""

    return f"{title}: " + "; ".join(f"{row.name} {row.mean:.4g}{interval(row)}" for row in rows)
