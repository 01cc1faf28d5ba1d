"""Physics-IQ (Motamed et al., 2025), original and Verified, behind the protocol of all benchmarks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from phantom.evaluation.protocol import NOTHING_PUBLISHED, Benchmark, Figure, Published, Scores

FIGURES = (
    Figure("score", "Score", "0 to 100: how close to the other take of the same experiment", 1, 1),
    Figure("spatial_iou", "Spatial IoU", "where something moves", 3, 1),
    Figure("spatiotemporal_iou", "Spatiotemporal IoU", "where and when", 3, 1),
    Figure("weighted_spatial_iou", "Weighted spatial IoU", "where and how much", 3, 1),
    Figure("mse", "Squared error", "of the pixels", 4, -1),
    Figure("verified", "Verified score", "Physics-IQ Verified, 0 to 100", 1, 1),
)
# Of the paper (arXiv 2604.08503), most likely under the original protocol: `docs/evaluation.md`.
PAPER = Published(
    {
        "Wan2.2-TI2V-5B, one frame": {
            "score": 22.10,
            "spatial_iou": 0.164,
            "spatiotemporal_iou": 0.132,
            "weighted_spatial_iou": 0.102,
            "mse": 0.010,
        },
        "Phantom, one frame": {
            "score": 29.59,
            "spatial_iou": 0.245,
            "spatiotemporal_iou": 0.146,
            "weighted_spatial_iou": 0.140,
            "mse": 0.009,
        },
        "Phantom, several frames": {"score": 27.53},
    },
    198,
    "recordings",
)


class PhysicsIQ(Benchmark):
    """Videos that continue a recording, compared with both takes of it."""

    name = "physics-iq"
    title = "Physics-IQ"
    score = FIGURES[0]

    def figures(self, scores: Sequence[Scores]) -> Sequence[Figure]:
        return FIGURES

    def published(self, protocol: str) -> Published:
        return PAPER if protocol == "original" else NOTHING_PUBLISHED

    def gain(self, base: Scores, other: Scores) -> dict[str, Any] | None:
        """Over the scenarios that both files have."""
        from phantom.evaluation.gains import gain

        if not all("per_scenario" in scores for scores in (base, other)):
            return None
        return gain(base["per_scenario"], other["per_scenario"], base.get("protocol", ""))

    def figure_gain(self, figure: Figure, base: Scores, other: Scores) -> dict[str, Any] | None:
        from phantom.evaluation.gains import row_gain

        ours, theirs = (scores.get("per_scenario", []) for scores in (base, other))
        if not all(figure.key in row for row in [*ours, *theirs]):
            return None
        return row_gain(ours, theirs, figure.key)

    def items(self, scores: Scores) -> tuple[str, Mapping[str, float]]:
        rows = scores.get("per_scenario", [])
        return "Verified score by scenario", {row["scenario"]: row["verified"] for row in rows}


PHYSICS_IQ = PhysicsIQ()
