"""The verdict of an evaluation in a few sentences: Phantom beside its control, and where it is worst."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from phantom.errors import listed
from phantom.evaluation.cells import MODES, signed
from phantom.evaluation.gains import is_clear
from phantom.evaluation.protocol import Figure

WAYS = ("ahead of", "behind", "not distinguishable from")
COUNTED = ("scenarios", "prompts", "pairs")


def verdict(title: str, figure: Figure, modes: Mapping[str, Mapping[str, Any]], worst: str = "") -> str:
    """From the entries of evaluation.json of a benchmark, by mode, or its name, and model; empty without intervals.

    figure: of which `gain` and `gain_over_control` are. worst: where Phantom is worst, in a sentence; by default the
    category with the worst score.
    """
    models = {mode: found["phantom"] for mode, found in modes.items()}
    key, reference = "gain_over_control", "its control"
    if any(key not in found for found in models.values()):
        key, reference = "gain", "its base"
    gains = {mode: found.get(key) for mode, found in models.items()}
    if not models or None in gains.values():
        return ""
    parts = []
    for way in WAYS:
        shown = [_points(gain, figure, mode) for mode, gain in gains.items() if _way(gain, figure) == way]
        if shown:
            parts.append(f"{way} {reference} in {title} ({listed(shown)})")
    first = next(iter(gains.values()))
    count = next((f" over {first[name]} {name}" for name in COUNTED if name in first), "")
    said = f"95% intervals{count}, of one training: another seed may differ by more"
    return f"Phantom is {' and '.join(parts)}; {said}. {worst or _worst_category(figure, models)}".rstrip()


def _way(gain: Mapping[str, Any], figure: Figure) -> str:
    return WAYS[2] if not is_clear(gain) else WAYS[0] if gain["low"] * figure.better > 0 else WAYS[1]


def _points(gain: Mapping[str, Any], figure: Figure, mode: str) -> str:
    value, low, high = (signed(gain[key] * figure.scale, 1) for key in ("gain", "low", "high"))
    return f"{MODES.get(mode, '')} {value} [{low}, {high}]".lstrip()


def _worst_category(figure: Figure, models: Mapping[str, Mapping[str, Any]]) -> str:
    """In the last mode; empty where there are no categories."""
    mode, found = list(models.items())[-1]
    scored = [row for row in found.get("categories", ()) if row.get("score") is not None]
    if not scored:
        return ""
    worst = min(scored, key=lambda row: row["score"] * figure.better)
    extreme = "lowest" if figure.better > 0 else "highest"
    where = f" {MODES[mode]}" if mode in MODES else ""
    return f"Its {extreme} score{where} is in {worst['category']}, {worst['score'] * figure.scale:.1f}."
