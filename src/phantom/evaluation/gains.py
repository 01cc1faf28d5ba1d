"""Confidence intervals of gains: paired bootstrap over scenarios or prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from phantom.tracking.champion import LEAST_PAIRS, count_pairs, entry_of
from phantom.training.paired import gap, tail

RESAMPLES = 10_000
IOUS = ("spatial_iou", "spatiotemporal_iou", "weighted_spatial_iou")

Rows = Sequence[Mapping[str, Any]]  # `per_scenario` of a score


def gain(
    base: Rows, other: Rows, protocol: str, seed: int = 0, runs: tuple[Sequence[Rows], Sequence[Rows]] = ((), ())
) -> dict[str, Any] | None:
    """The gain of `other` over `base` in Physics-IQ points over their common scenarios, with a 95% interval.

    runs: of each, the rows of several runs of which it is the mean; these are drawn again, too, each model's by itself.
    low, high: percentile interval over bootstrap resamples of the scenarios, the same resamples for both models,
        widened for few scenarios (`tail`).
    positive: share of resampled gains above 0. None with fewer than two scenarios in common.
    """
    ours, theirs = ({row["scenario"]: row for row in rows} for rows in (base, other))
    shared = [name for name in ours if name in theirs]
    if len(shared) < 2:
        return None
    count = len(shared)
    rng = np.random.default_rng(seed)
    picks = _draw(count, rng)
    with np.errstate(divide="ignore", invalid="ignore"):
        scores = [
            _scores([rows[name] for name in shared], _values_of(of, rows, shared), picks, protocol, rng)
            for rows, of in zip((ours, theirs), runs, strict=True)
        ]
        difference = scores[1] - scores[0]
    if not np.isfinite(difference).all():
        return None
    several = {"runs": [len(of) or 1 for of in runs]} if any(runs) else {}
    return _interval(difference, count) | {"scenarios": count, **several}


def prompt_gain(base: Rows, other: Rows, weights: Mapping[str, float], seed: int = 0) -> dict[str, Any] | None:
    """The gain of `other` over `base` for scores that are means over prompts, with an interval as in `gain`.

    base, other: `per_prompt` of a score. If both have videos of a prompt with the same seeds, only these are compared,
    seed by seed. weights: weight of each stratum (first of a row's `groups`) in the score; the key "" stands for all
    prompts. paired: share of prompts with common seeds. None if a stratum has fewer than two prompts in common.
    """

    def by_prompt(rows: Rows) -> dict[tuple[str, str], Mapping[str, Any]]:
        return {(row["groups"][0] if "" not in weights else "", row["prompt"]): row for row in rows}

    ours, theirs = by_prompt(base), by_prompt(other)
    strata: dict[str, list[tuple[float, bool]]] = {stratum: [] for stratum in weights}
    for key in ours:
        if key in theirs and key[0] in strata:
            strata[key[0]].append(_difference(ours[key], theirs[key]))
    if any(len(found) < 2 for found in strata.values()):
        return None
    rng = np.random.default_rng(seed)
    total = np.zeros(RESAMPLES + 1)
    for stratum, found in strata.items():
        differences = np.array([difference for difference, _ in found])
        total += weights[stratum] * differences[_draw(len(found), rng)].mean(1)
    together = [same for found in strata.values() for _, same in found]
    return _interval(total, len(together)) | {"prompts": len(together), "paired": sum(together) / len(together)}


def mean_gain(base: Sequence[float | None], other: Sequence[float | None]) -> dict[str, Any] | None:
    """The mean of `other` - `base`, pair by pair, as `gain`, with `low` and `high`; None with fewer than two pairs."""
    found = gap(other, base)
    pairs = sum(a is not None and b is not None for a, b in zip(base, other, strict=True))
    return {"gain": found.mean, "low": found.low, "high": found.high, "pairs": pairs} if found else None


def row_gain(base: Rows, other: Rows, key: str) -> dict[str, Any] | None:
    """`mean_gain` of a number in the rows of the scenarios that both have.

    A key that ends in `_trained` or `_unseen` is the number without that, of the worlds within or beyond those ranges.
    """
    ours, theirs = ({row["scenario"]: row for row in rows} for rows in (base, other))
    shared = [name for name in ours if name in theirs]
    return mean_gain(*([_value(rows[name], key) for name in shared] for rows in (ours, theirs)))


def metric_gain(base: Mapping[str, Any], other: Mapping[str, Any], metric: str) -> dict[str, Any] | None:
    """The paired gain of one evaluation.json over another in `metric`, a dotted name; None where it has no pairs."""
    ours, theirs = (entry_of(evaluation, metric) for evaluation in (base, other))
    key = metric.rpartition(".")[2]
    if "per_scenario" in ours and "per_scenario" in theirs:
        rows = ours["per_scenario"], theirs["per_scenario"]
        if metric.startswith("physics_iq.") and key == "score":
            return gain(*rows, other["benchmark"]["protocol"])
        return row_gain(*rows, key) if all(key in row for of in rows for row in of) else None
    if key == "score" and "per_prompt" in ours and "per_prompt" in theirs:
        return prompt_gain(ours["per_prompt"], theirs["per_prompt"], {"": 1.0})
    return None


def is_clear(gained: Mapping[str, Any] | None) -> bool:
    """Whether an interval excludes 0, and is over enough pairs to mean it.

    With fewer than `LEAST_PAIRS` differences all can have one sign by chance in more than 5% of cases.
    """
    if not gained or gained["low"] * gained["high"] <= 0:
        return False
    return count_pairs(gained) >= LEAST_PAIRS


def _value(row: Mapping[str, Any], key: str) -> float | None:
    stem, _, part = key.rpartition("_")
    if part in ("trained", "unseen"):
        return row[stem] if row["unseen"] == (part == "unseen") else None
    return row[key]


def _difference(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> tuple[float, bool]:
    """The difference `theirs` - `ours` on one prompt, and whether it is over common seeds."""
    if common := ours["seeds"].keys() & theirs["seeds"].keys():
        return sum(theirs["seeds"][s] - ours["seeds"][s] for s in sorted(common)) / len(common), True
    return theirs["value"] - ours["value"], False


def _draw(count: int, rng: np.random.Generator) -> np.ndarray:
    """Indices (1 + RESAMPLES, count): the first row is the original sample, the others are drawn with replacement."""
    return np.concatenate([np.arange(count)[None], rng.integers(count, size=(RESAMPLES, count))])


def _interval(difference: np.ndarray, count: int) -> dict[str, float]:
    """Gain and interval from gains (1 + RESAMPLES,) over `count` pairs; the first is that of the original sample."""
    outside = 100 * tail(count)
    low, high = np.percentile(difference[1:], [outside, 100 - outside])
    return {
        "gain": float(difference[0]),
        "low": float(low),
        "high": float(high),
        "positive": float((difference[1:] > 0).mean()),
    }


def _values_of(runs: Sequence[Rows], mean: Mapping[str, Mapping[str, Any]], names: Sequence[str]) -> list[Rows]:
    """The rows of each run in the order of `names`; `mean`, by name, where there is one run."""
    by_name: list[Mapping[str, Mapping[str, Any]]] = [{row["scenario"]: row for row in rows} for rows in runs]
    return [[found[name] for name in names] for found in by_name or [mean]]


def _scores(rows: Rows, runs: Sequence[Rows], picks: np.ndarray, protocol: str, rng: np.random.Generator) -> np.ndarray:
    """The scores, float64 (R,), of the resamples `picks` (R, n) of indices into the rows, of as many of the runs."""
    several = len(runs)
    weights = np.ones((len(picks), 1))
    if several > 1:
        drawn = rng.multinomial(several, np.full(several, 1 / several), len(picks) - 1) / several
        weights = np.concatenate([np.full((1, several), 1 / several), drawn])

    def means(key: str) -> np.ndarray:
        values = np.array([[row[key] for row in run] for run in runs], np.float64)
        return np.take_along_axis(weights @ values, picks, 1).mean(1)

    def of_takes(key: str) -> np.ndarray:
        return np.array([row["physical_variance"][key] for row in rows], np.float64)[picks].mean(1)

    if protocol == "verified":
        return means("verified")
    ratios = [means(key) / of_takes(key) for key in IOUS]
    return np.clip(100 * (sum(ratios) / 3 - (means("mse") - of_takes("mse"))), 0, 100)
