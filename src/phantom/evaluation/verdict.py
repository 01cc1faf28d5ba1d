"""The verdict of an evaluation in a few sentences: Phantom beside its control, and where it is worst."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

from phantom.errors import listed
from phantom.evaluation.cells import MODES
from phantom.evaluation.gains import is_clear

WAYS = ("ahead of", "behind", "not distinguishable from")


def verdict(evaluation: Mapping[str, Any]) -> str:
    """From the contents of evaluation.json; empty without Physics-IQ, or with a single scenario."""
    modes = {mode: found["phantom"] for mode, found in evaluation.get("physics_iq", {}).items()}
    key, reference = "gain_over_control", "its control"
    if any(key not in found for found in modes.values()):
        key, reference = "gain", "its base"
    gains = {mode: found[key] for mode, found in modes.items()}
    if not modes or None in gains.values():
        return ""
    parts = []
    for way in WAYS:
        shown = [f"{MODES[mode]} {_points(gain)}" for mode, gain in gains.items() if _way(gain) == way]
        if shown:
            parts.append(f"{way} {reference} in Physics-IQ ({listed(shown)})")
    count = next(iter(gains.values()))["scenarios"]
    said = f"95% intervals over {count} scenarios, of one training: another seed may differ by more"
    return f"Phantom is {' and '.join(parts)}; {said}. {_worst(evaluation)}"


def _way(gain: Mapping[str, Any]) -> str:
    return WAYS[2] if not is_clear(gain) else WAYS[0] if gain["low"] > 0 else WAYS[1]


def _points(gain: Mapping[str, Any]) -> str:
    return f"{gain['gain']:+.1f} [{gain['low']:+.1f}, {gain['high']:+.1f}]".replace("-", "−")


def _worst(evaluation: Mapping[str, Any]) -> str:
    """The kind of scenario with the largest position error, or the lowest score, in the last mode."""
    mode, models = list(evaluation["physics_iq"].items())[-1]
    if "worlds" not in evaluation:
        scored = [row for row in models["phantom"]["categories"] if row["score"] is not None]
        lowest = min(scored, key=lambda row: row["score"])
        return f"Its lowest score {MODES[mode]} is in {lowest['category']}, {lowest['score']:.1f}."
    errors: dict[str, list[float]] = defaultdict(list)
    for row in evaluation["worlds"][mode]["phantom"]["per_scenario"]:
        if row["position_error"] is not None:
            errors[row["kind"]].append(row["position_error"])
    means = {kind: sum(of) / len(of) for kind, of in errors.items()}
    kind = max(means, key=lambda kind: means[kind])
    return f"It is worst at the {kind}, where bodies are off by {means[kind]:.1f} of 64 pixels {MODES[mode]}."
