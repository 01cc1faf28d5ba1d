"""Line charts as inline SVG, without scripts; colours and fonts come from the page's style sheet."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 560.0, 260.0
LEFT, RIGHT, TOP, BOTTOM = 52.0, 14.0, 14.0, 34.0

Points = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Chart:
    """A chart of the page: title, drawing, names of the lines, and a note."""

    title: str
    svg: str
    names: list[str]
    note: str


def chart(
    title: str,
    lines: Mapping[str, Points],
    note: str = "",
    log: bool = False,
    marks: Sequence[float] = (),
    level: tuple[str, float] | None = None,
) -> Chart | None:
    """`lines` over training steps; None if no line has two points.

    log: logarithmic axis; values that are not positive are dropped. marks: steps marked with a tick. level: name and
    value of a horizontal line.
    """
    drawn = {name: [(x, y) for x, y in points if y > 0 or not log] for name, points in lines.items()}
    drawn = {name: points for name, points in drawn.items() if len(points) > 1}
    if not drawn:
        return None
    xs = [x for points in drawn.values() for x, _ in points]
    ys = [y for points in drawn.values() for _, y in points] + ([level[1]] if level else [])
    across = Axis(min(xs), max(xs), LEFT, WIDTH - RIGHT, False)
    up = Axis(min(ys) if log else min(0.0, *ys), max(ys), HEIGHT - BOTTOM, TOP, log)

    parts = [f'<svg viewBox="0 0 {WIDTH:g} {HEIGHT:g}" role="img" aria-label="{escape(_summary(title, drawn))}">']
    for value in up.ticks():
        y = up.at(value)
        parts.append(f'<line class="grid" x1="{LEFT:g}" x2="{WIDTH - RIGHT:g}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="tick" x="{LEFT - 8:g}" y="{y + 4:.1f}" text-anchor="end">{short(value)}</text>')
    for value in across.ticks():
        x = across.at(value)
        parts.append(f'<text class="tick" x="{x:.1f}" y="{HEIGHT - 14:g}" text-anchor="middle">{short(value)}</text>')
    parts.append(f'<text class="tick" x="{LEFT - 8:g}" y="{HEIGHT - 14:g}" text-anchor="end">step</text>')
    foot = HEIGHT - BOTTOM
    parts += [
        f'<line class="mark" x1="{across.at(x):.1f}" x2="{across.at(x):.1f}" y1="{foot:g}" y2="{foot + 7:g}"/>'
        for x in marks
    ]
    if level:
        y = up.at(level[1])
        parts.append(f'<line class="level" x1="{LEFT:g}" x2="{WIDTH - RIGHT:g}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(
            f'<text class="tick" x="{WIDTH - RIGHT - 4:g}" y="{y - 5:.1f}" text-anchor="end">{escape(level[0])}</text>'
        )
    for number, points in enumerate(drawn.values()):
        path = " ".join(f"{across.at(x):.1f},{up.at(y):.1f}" for x, y in points)
        parts.append(f'<polyline class="line line{number}" points="{path}"/>')
    return Chart(title, "".join([*parts, "</svg>"]), list(drawn), note)


@dataclass(frozen=True)
class Axis:
    """Maps values from `low` to `high` to coordinates from `start` to `end`."""

    low: float
    high: float
    start: float
    end: float
    log: bool

    def at(self, value: float) -> float:
        """The coordinate of a value."""
        low, high, value = (
            (math.log10(v) for v in (self.low, self.high, value)) if self.log else (self.low, self.high, value)
        )
        return self.start + (value - low) / ((high - low) or 1.0) * (self.end - self.start)

    def ticks(self) -> list[float]:
        """Three to six round values within the axis. On a logarithmic axis powers of ten, or finer if few fit."""
        if self.log:
            powers = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            for steps in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 4, 5, 6, 8)):
                found = [s * 10.0**p for p in powers for s in steps if self.low <= s * 10.0**p <= self.high]
                if len(found) > 2:
                    break
            if len(found) > 1:
                return found[:: math.ceil(len(found) / 6)]
        rough = ((self.high - self.low) or abs(self.high) or 1.0) / 4
        size = 10 ** math.floor(math.log10(rough))
        step = size * next(s for s in (1, 2, 2.5, 5, 10) if s * size >= rough)
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        return [i * step for i in range(first, last + 1)]


def short(value: float) -> str:
    """A tick's value in few characters."""
    return (
        f"{value:.6g}"
        if not value or 1e-3 <= abs(value) < 1e5
        else f"{value:.0e}".replace("e-0", "e-").replace("e+0", "e")
    )


def _summary(title: str, lines: Mapping[str, Points]) -> str:
    ends = [f"{name} from {points[0][1]:.3g} to {points[-1][1]:.3g}" for name, points in lines.items()]
    return f"{title}: {'; '.join(ends)}"
