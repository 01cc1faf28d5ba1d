"""Histograms as inline SVG, in the style of the page's charts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

import numpy as np

from phantom.evaluation.charts import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, Axis, short

BINS = 24
TAIL_PERCENTILE, TAIL = 99.0, 2.0  # values beyond TAIL times this percentile share the last bar


@dataclass(frozen=True)
class Histogram:
    """A column's distribution: its name, drawing and a note."""

    title: str
    svg: str
    note: str


def histogram(title: str, note: str, kept: Sequence[float], dropped: Sequence[float]) -> Histogram:
    """Counts of the values of a column, those of the clips that are kept below those of the dropped ones.

    At least two different values in all. A long tail is put into the last bar, which the note then says.
    """
    values = np.array([*kept, *dropped], float)
    is_whole = bool((values == values.round()).all())
    edges, has_tail = _edges(values, is_whole)
    last = edges[-1]
    counts = [np.histogram(np.minimum(of, last), edges)[0] for of in (kept, dropped)]
    across = Axis(edges[0], last, LEFT, WIDTH - RIGHT, False)
    up = Axis(0.0, float((counts[0] + counts[1]).max()), HEIGHT - BOTTOM, TOP, False)
    span = f"from {short(values.min())} to {short(values.max())}"
    label = f"{title}: {len(kept)} clips kept, {len(dropped)} dropped, {span}"
    parts = [f'<svg viewBox="0 0 {WIDTH:g} {HEIGHT:g}" role="img" aria-label="{escape(label)}">']
    for value in (tick for tick in up.ticks() if tick == int(tick)):
        y = up.at(value)
        parts.append(f'<line class="grid" x1="{LEFT:g}" x2="{WIDTH - RIGHT:g}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="tick" x="{LEFT - 8:g}" y="{y + 4:.1f}" text-anchor="end">{short(value)}</text>')
    for value in (tick for tick in across.ticks() if tick == int(tick) or not is_whole):
        x = across.at(value)
        parts.append(f'<text class="tick" x="{x:.1f}" y="{HEIGHT - 14:g}" text-anchor="middle">{short(value)}</text>')
    for low, high, below, above in zip(edges, edges[1:], *counts, strict=False):
        for kind, first, count in (("kept", 0, below), ("dropped", below, above)):
            if count:
                x, y = across.at(low), up.at(float(first + count))
                size = f'width="{max(1.0, across.at(high) - x - 1):.1f}" height="{up.at(float(first)) - y:.1f}"'
                parts.append(f'<rect class="{kind}" x="{x:.1f}" y="{y:.1f}" {size}/>')
    tail = f"; the last bar: {short(np.ceil(edges[-2]) if is_whole else edges[-2])} and more" if has_tail else ""
    return Histogram(title, "".join([*parts, "</svg>"]), note + tail)


def _edges(values: np.ndarray, is_whole: bool) -> tuple[list[float], bool]:
    """The edges of the bars, and whether larger values than the last are put into the last one."""
    low, high = float(values.min()), float(values.max())
    percentile = float(np.percentile(values, TAIL_PERCENTILE))
    has_tail = high - low > TAIL * (percentile - low) > 0
    high = percentile if has_tail else high
    if is_whole:  # a bar around every value, or around as many as it takes
        step = -(-int(np.ceil(high) - low + 1) // BINS)
        return [low - 0.5 + i * step for i in range(int((np.ceil(high) - low) // step) + 2)], has_tail
    width = (high - low) / BINS
    return [low + i * width for i in range(BINS + 1)], has_tail
