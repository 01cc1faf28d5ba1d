"""Aggregates the metrics of all views into the two Physics-IQ scores, with the rounding of the official scorer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from phantom.evaluation.physics_iq.metrics import Metrics

Table = Mapping[str, Mapping[str, Metrics]]  # scenario -> view -> metrics, as in the official csv

ROUNDED = ("spatiotemporal_iou_v1", "v1_mse", "variance_spatiotemporal_iou", "variance_mse")
EPSILON = 1e-8  # the official guard of the ratios in the Verified score


def as_parsed(values: Iterable[float]) -> list[float]:
    """A per-frame list as the official scorer reads it from its csv: rounded to 4 decimals."""
    return [round(float(value), 4) for value in values]


def original(table: Table) -> dict[str, float]:
    """The original score in [0, 100] (`score`, 2 decimals) with its means and physical variances.

    100 ((ST/V_ST + SP/V_SP + WS/V_WS) / 3 - (MSE - V_MSE)), clipped: ratios of means over the whole table, with the
    variances V rounded (4 decimals, SP 5). As in the official code, a variance of 0 is not guarded against: the score
    is then 100, or nan if the mean is 0 as well.
    """
    raw = means(table)
    variance = {key: np.round(value, 5 if key == "spatial_iou" else 4) for key, value in variances(table).items()}
    with np.errstate(divide="ignore", invalid="ignore"):
        score = 100 * (
            (
                raw["spatiotemporal_iou"] / variance["spatiotemporal_iou"]
                + raw["spatial_iou"] / variance["spatial_iou"]
                + raw["weighted_spatial_iou"] / variance["weighted_spatial_iou"]
            )
            / 3
            - (raw["mse"] - variance["mse"])
        )
    ious = variance["spatiotemporal_iou"] + variance["spatial_iou"] + variance["weighted_spatial_iou"]
    return {
        "score": float(np.round(np.clip(score, 0.0, 100.0), 2)),
        **{key: float(value) for key, value in raw.items()},
        **{f"variance_{key}": float(value) for key, value in variance.items()},
        "physical_variance_all_metrics": float(np.round(ious - variance["mse"], 4)),
    }


def means(table: Table) -> dict[str, np.floating[Any]]:
    """Raw means over the table, as in published results: three IoUs (higher is better) and the MSE."""
    return {
        "spatial_iou": _by_view(table, "spatial_iou_v1"),
        "spatiotemporal_iou": _by_scenario(table, "spatiotemporal_iou_v1"),
        "weighted_spatial_iou": _by_view(table, "weighted_spatial_iou_v1"),
        "mse": _by_scenario(table, "v1_mse"),
    }


def variances(table: Table) -> dict[str, np.floating[Any]]:
    """Means of the same four metrics between the two takes, which a perfect model would reach."""
    return {
        "spatial_iou": _by_view(table, "variance_spatial"),
        "spatiotemporal_iou": _by_view(table, "variance_spatiotemporal_iou"),
        "weighted_spatial_iou": _by_view(table, "variance_weighted_spatial"),
        "mse": _by_view(table, "variance_mse"),
    }


def unrounded(table: Table) -> dict[str, float]:
    """The official table of scores in [0, 1] without intermediate rounding (`IQTable`), under its official keys."""
    pairs = {
        "spatiotemporal": ("spatiotemporal_iou_v1", "variance_spatiotemporal_iou", _by_scenario),
        "spatial": ("spatial_iou_v1", "variance_spatial", _scalars_by_scenario),
        "weighted_spatial": ("weighted_spatial_iou_v1", "variance_weighted_spatial", _scalars_by_scenario),
        "mse": ("v1_mse", "variance_mse", _by_scenario),
    }
    score: dict[str, Any] = {}
    variance: dict[str, Any] = {}
    with np.errstate(divide="ignore", invalid="ignore"):
        for key, (metric, truth, mean) in pairs.items():
            value, variance[key] = mean(table, metric), mean(table, truth)
            score[key] = value - variance[key] if key == "mse" else value / variance[key]
    ious = ("spatiotemporal", "spatial", "weighted_spatial")
    raw = (score["spatiotemporal"] + score["spatial"] + score["weighted_spatial"]) / 3 - score["mse"]
    clipped = {key: np.clip(value, 0.0, 1.0) for key, value in score.items()}
    stable = sum(clipped[key] for key in ious) / 3 - clipped["mse"]
    by_view = verified(table)
    out = {f"score_{key}": value for key, value in score.items()}
    out |= {"final_score_raw": raw, "final_score_stable": np.clip(stable, 0, 1), "final_score_orig": np.clip(raw, 0, 1)}
    out |= {
        "variance_mse": variance["mse"],
        "variance_spatiotemporal_iou": variance["spatiotemporal"],
        "variance_spatial": variance["spatial"],
        "variance_weighted_spatial": variance["weighted_spatial"],
        "final_score_view": by_view["score"] / 100,
    }
    out |= {f"score_{key}_view": by_view[key] / 100 for key in pairs}
    return {key: float(value) for key, value in out.items()}


def verified(table: Table) -> dict[str, float]:
    """The Physics-IQ Verified score in [0, 100]: means of `view_scores` over all views, total and by component."""
    views = [view_scores(metrics) for row in table.values() for metrics in row.values()]
    parts = {key: 100 * float(np.mean([view[key] for view in views])) for key in views[0]}
    return {"score": parts.pop("score"), **parts}


def view_scores(metrics: Metrics) -> dict[str, float]:
    """The Verified score of one view in [0, 1]: `score`, the mean of its four components, each clipped to [0, 1].

    IoU / (variance + 1e-8), and the inverse of MSE / (variance + 1e-8); an MSE of 0 scores 1.
    """
    ratio = {
        "spatial": metrics["spatial_iou_v1"] / (metrics["variance_spatial"] + EPSILON),
        "spatiotemporal": _mean(metrics, "spatiotemporal_iou_v1")
        / (_mean(metrics, "variance_spatiotemporal_iou") + EPSILON),
        "weighted_spatial": metrics["weighted_spatial_iou_v1"] / (metrics["variance_weighted_spatial"] + EPSILON),
    }
    mse = _mean(metrics, "v1_mse") / (_mean(metrics, "variance_mse") + EPSILON)
    with np.errstate(divide="ignore"):
        ratio["mse"] = np.float64(mse) ** -1
    clipped = {key: float(np.clip(value, 0.0, 1.0)) for key, value in ratio.items()}
    return {"score": float(np.mean(list(clipped.values()))), **clipped}


def spread(scores: list[float]) -> dict[str, float | int | None]:
    """Mean and sample standard deviation over runs of a model; the deviation of a single run is None."""
    std = float(np.std(scores, ddof=1)) if len(scores) > 1 else None
    return {"mean": float(np.mean(scores)), "std": std, "runs": len(scores)}


def _mean(metrics: Metrics, key: str) -> np.floating[Any]:
    return np.mean(as_parsed(metrics[key]))


def _by_view(table: Table, key: str) -> np.floating[Any]:
    """Mean over views of the mean over all values of the view (scenarios, and frames of per-frame lists)."""
    views: dict[str, list[float]] = {}
    for row in table.values():
        for view, metrics in row.items():
            values = as_parsed(metrics[key]) if key in ROUNDED else [metrics[key]]
            views.setdefault(view, []).extend(values)
    return np.mean([np.mean(values) for values in views.values()])


def _by_scenario(table: Table, key: str) -> np.floating[Any]:
    """Mean over scenarios of the mean over the frames of all their views."""
    return np.mean([np.mean([v for m in row.values() for v in as_parsed(m[key])]) for row in table.values()])


def _scalars_by_scenario(table: Table, key: str) -> np.floating[Any]:
    return np.mean([np.mean([metrics[key] for metrics in row.values()]) for row in table.values()])


def by_group(table: Table, groups: Mapping[str, str], score: Callable[[Table], Any]) -> dict[str, Any]:
    """`score` of the part of the table in each group; `groups` maps scenarios to groups."""
    names = sorted({groups[scenario] for scenario in table if groups.get(scenario)})
    return {name: score({s: row for s, row in table.items() if groups.get(s) == name}) for name in names}
