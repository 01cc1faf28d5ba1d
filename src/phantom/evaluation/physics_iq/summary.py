"""Summary of a table of metrics: scores, components, categories and scenarios."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np

from phantom.evaluation.physics_iq import score
from phantom.evaluation.physics_iq.metrics import Metrics
from phantom.progress import say

Protocol = Literal["original", "verified"]
PROTOCOLS: tuple[Protocol, ...] = ("original", "verified")


def summary(results: score.Table, protocol: Protocol, categories: dict[str, str]) -> dict[str, Any]:
    """Summary of a table of metrics, JSON-able. Non-finite values become None; variances of 0 are reported on stderr.

    score: 0-100, of `protocol`. spatial_iou, spatiotemporal_iou, weighted_spatial_iou, mse: raw means.
    physical_variance: the same four between the takes, and `all_metrics` as computed by the official tool.
    original, verified: both scores and their components. unrounded: `IQTable` of the official tool, in [0, 1].
    categories: score and components of each. per_scenario: category, views and means of each scenario.
    """
    both = {"original": score.original(results), "verified": score.verified(results)}
    variance = {k.removeprefix("variance_"): v for k, v in both["original"].items() if k.startswith("variance_")}
    if bad := [key for key, value in variance.items() if value == 0 and key != "mse"]:
        say(
            f"Physics-IQ: the takes never overlap in {', '.join(bad)}; the original score divides by this variance of 0"
        )
    out = {
        "score": both[protocol]["score"],
        "benchmark": "physics-iq",
        "protocol": protocol,
        **{key: float(value) for key, value in score.means(results).items()},
        "physical_variance": variance | {"all_metrics": both["original"]["physical_variance_all_metrics"]},
        **both,
        "unrounded": score.unrounded(results),
        "categories": score.by_group(results, categories, lambda part: _category(part, protocol)),
        "per_scenario": [_scenario(name, row, categories.get(name)) for name, row in results.items()],
        "scenarios": len(results),
        "videos": sum(map(len, results.values())),
        "views": sorted({view for row in results.values() for view in row}),
    }
    return _finite(out)


def _category(part: score.Table, protocol: Protocol) -> dict[str, Any]:
    scores = {"original": score.original(part)["score"], "verified": score.verified(part)["score"]}
    raw = {key: float(value) for key, value in score.means(part).items()}
    return {"score": scores[protocol], **scores, **raw, "videos": sum(map(len, part.values()))}


def _scenario(name: str, row: Mapping[str, Metrics], category: str | None) -> dict[str, Any]:
    raw = {key: float(value) for key, value in score.means({name: row}).items()}
    views = {view: score.view_scores(metrics) for view, metrics in row.items()}
    return {
        "scenario": name,
        "category": category,
        **raw,
        "physical_variance": {key: float(value) for key, value in score.variances({name: row}).items()},
        "verified": 100 * float(np.mean([view["score"] for view in views.values()])),
        "views": {view: {key: 100 * value for key, value in parts.items()} for view, parts in views.items()},
    }


def _finite(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {key: _finite(value) for key, value in tree.items()}
    if isinstance(tree, list):
        return [_finite(value) for value in tree]
    return None if isinstance(tree, float) and not math.isfinite(tree) else tree
