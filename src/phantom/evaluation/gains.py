"""How sure a gain is: paired bootstrap over scenarios, on the per-scenario figures that scoring leaves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

RESAMPLES = 10_000
LEVEL = 0.95
IOUS = ("spatial_iou", "spatiotemporal_iou", "weighted_spatial_iou")

Rows = Sequence[Mapping[str, Any]]  # `per_scenario` of a score


def gain(base: Rows, other: Rows, protocol: str, seed: int = 0) -> dict[str, Any] | None:
    """The gain of `other` over `base` in Physics-IQ points, over the scenarios that both have, with its interval.

    low, high: between them lie 95% of the gains when the scenarios are drawn again, with replacement, the same for both
    models. positive: the share of these gains above 0. None with fewer than two scenarios in common.
    """
    ours, theirs = ({row["scenario"]: row for row in rows} for rows in (base, other))
    shared = [name for name in ours if name in theirs]
    if len(shared) < 2:
        return None
    count = len(shared)
    drawn = np.random.default_rng(seed).integers(count, size=(RESAMPLES, count))
    picks = np.concatenate([np.arange(count)[None], drawn])  # the first is the table as it is
    with np.errstate(divide="ignore", invalid="ignore"):
        scores = [_scores([rows[name] for name in shared], picks, protocol) for rows in (ours, theirs)]
        difference = scores[1] - scores[0]
    if not np.isfinite(difference).all():
        return None
    tail = 50 * (1 - LEVEL)
    low, high = np.percentile(difference[1:], [tail, 100 - tail])
    return {
        "gain": float(difference[0]),
        "low": float(low),
        "high": float(high),
        "positive": float((difference[1:] > 0).mean()),
        "scenarios": count,
    }


def _scores(rows: Rows, picks: np.ndarray, protocol: str) -> np.ndarray:
    """The score of each row of `picks` (R, n), indices of `rows`: float64 (R,)."""
    if protocol == "verified":
        return np.array([row["verified"] for row in rows])[picks].mean(1)

    def means(where: Rows, key: str) -> np.ndarray:
        return np.array([row[key] for row in where], np.float64)[picks].mean(1)

    takes = [row["physical_variance"] for row in rows]
    ratios = [means(rows, key) / means(takes, key) for key in IOUS]
    return np.clip(100 * (sum(ratios) / 3 - (means(rows, "mse") - means(takes, "mse"))), 0, 100)
