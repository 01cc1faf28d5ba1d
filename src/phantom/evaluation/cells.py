"""Numbers as they are shown on every page: cells and bars, with differences, intervals and colours."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from phantom.evaluation.gains import is_clear
from phantom.evaluation.page import Bar, Cell
from phantom.evaluation.protocol import Benchmark, Figure, Mark

NAMES = {"base": "Base", "control": "Control", "lora": "LoRA", "alignment": "Alignment", "phantom": "Phantom"}
MODES = {"single": "from one frame", "multi": "from several frames"}
INTERVAL = (
    "95% interval",
    "Of a difference: 10,000 times the scenarios, or prompts, are drawn again with replacement, the same ones for both "
    "models; videos of a prompt from the same seed are compared one by one. An interval that holds 0 leaves open which "
    "model is better. Of a model with several runs in its score file, these are drawn again, too; otherwise it is over "
    "scenarios alone, and another training from another seed may differ by more.",
)
COLOURS = "Green and red: the 95% interval of the difference, over at least 6 scenarios, excludes 0."


def delta_cell(
    figure: Figure, value: float | None, base: float | None, gained: Mapping[str, Any] | None = None
) -> Cell:
    """A cell with the difference to the base, if `base` is given; coloured if the interval in `gained` excludes 0."""
    text = text_of(figure, value)
    if value is None or base is None:
        return Cell(text)
    change = round((value - base) * figure.scale, figure.digits)
    return Cell(text, signed(change, figure.digits) if change else "±0", _tone(figure, gained))


def difference_cell(figure: Figure, gained: Mapping[str, Any] | None) -> Cell:
    """A difference with its interval, coloured if that excludes 0; a dash without one."""
    if not gained:
        return Cell("–")
    gain, low, high = (signed(gained[key] * figure.scale, figure.digits) for key in ("gain", "low", "high"))
    return Cell(gain, f"[{low}, {high}]", _tone(figure, gained))


def _tone(figure: Figure, gained: Mapping[str, Any] | None) -> str:
    if not gained or not is_clear(gained):
        return ""
    return "good" if gained["low"] * figure.better > 0 else "bad"


def signed(value: float, digits: int) -> str:
    """The formatted difference, with its sign."""
    return f"{value:+.{digits}f}".replace("-", "−")


def text_of(figure: Figure, value: float | None) -> str:
    """The formatted value; a dash for None."""
    return "–" if value is None else f"{value * figure.scale:.{figure.digits}f}"


def gain_bar(
    name: str,
    kind: str,
    score: float | None,
    base: float | None,
    gained: Mapping[str, Any] | None,
    figure: Figure = Benchmark.score_figure,
    over: str = "",
    marks: Sequence[Mark] = (),
) -> Bar:
    """A score as a bar, with its gain over the model `over` and the interval of the gain; coloured if that excludes 0.

    The interval is drawn around the bar's end: where the model would end if it gained as little, or as much.
    """
    cell = delta_cell(figure, score, base, gained)
    if not gained or base is None:
        return Bar(name, kind, score or 0.0, cell.text, cell.delta, marks=marks)
    interval = f" (95%: {signed(gained['low'], 1)} to {signed(gained['high'], 1)})"
    drawn = (base + gained["low"], base + gained["high"])
    said = signed(gained["gain"], 1) + interval + (f" against {over}" if over else "")
    return Bar(name, kind, score or 0.0, cell.text, said, cell.tone, drawn, marks)
