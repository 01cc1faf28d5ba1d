"""The figures of a Physics-IQ score."""

from __future__ import annotations

from phantom.evaluation.protocol import Figure

FIGURES = (
    Figure("score", "Score", "0 to 100: how close to the other take of the same experiment", 1, 1),
    Figure("spatial_iou", "Spatial IoU", "where something moves", 3, 1),
    Figure("spatiotemporal_iou", "Spatiotemporal IoU", "where and when", 3, 1),
    Figure("weighted_spatial_iou", "Weighted spatial IoU", "where and how much", 3, 1),
    Figure("mse", "Squared error", "of the pixels", 4, -1),
    Figure("verified", "Verified score", "Physics-IQ Verified, 0 to 100", 1, 1),
)
