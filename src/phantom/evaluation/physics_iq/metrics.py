"""The four Physics-IQ metrics of one view, accumulated frame by frame."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import chain
from typing import Any

import cv2
import numpy as np

from phantom.data.physics_iq.video import Frames

# Column names of the official csv. Lists have one value per frame.
LISTS = (
    "spatiotemporal_iou_v1",
    "spatiotemporal_iou_v2",
    "v1_mse",
    "v2_mse",
    "variance_spatiotemporal_iou",
    "variance_mse",
)
SCALARS = (
    "spatial_iou_v1",
    "spatial_iou_v2",
    "weighted_spatial_iou_v1",
    "weighted_spatial_iou_v2",
    "variance_spatial",
    "variance_weighted_spatial",
)

Metrics = dict[str, Any]
Row = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]  # one frame: take 1, take 2, mask 1, mask 2


def view_metrics(
    real_1: Frames, real_2: Frames, generated: Frames, mask_1: Frames, mask_2: Frames, mask_generated: Frames
) -> Metrics:
    """The generated video against take 1 (`_v1`) and take 2 (`_v2`), and the takes against each other (`variance_`).

    Frames are uint8 (h, w, 3), masks bool (h, w), all of the same size and count; iterables are consumed in lockstep.
    Raises ValueError if counts or sizes differ.
    """
    truth = zip(real_1, real_2, mask_1, mask_2, strict=True)
    return batch_metrics(truth, [(generated, mask_generated)])[0]


def batch_metrics(truth: Iterable[Row], generated: Sequence[tuple[Frames, Frames]]) -> list[Metrics]:
    """`view_metrics` of several generated videos with their masks, in one pass over the takes."""
    takes: dict[str, Any] = {"variance_mse": [], "variance_spatiotemporal_iou": []}
    found: list[dict[str, Any]] = [{key: [] for key in LISTS if key not in takes} for _ in generated]
    counts: list[np.ndarray] = []  # of take 1, take 2 and each generated video: in how many frames each pixel moves
    for (real1, real2, m1, m2), *others in zip(truth, *chain(*generated), strict=True):
        fakes, masks = others[::2], others[1::2]
        takes["variance_mse"].append(mse(real1, real2))
        takes["variance_spatiotemporal_iou"].append(iou(m1, m2))
        for lists, fake, mask in zip(found, fakes, masks, strict=True):
            lists["v1_mse"].append(mse(real1, fake))
            lists["v2_mse"].append(mse(real2, fake))
            lists["spatiotemporal_iou_v1"].append(iou(m1, mask))
            lists["spatiotemporal_iou_v2"].append(iou(m2, mask))
        if not counts:
            counts = [np.zeros(mask.shape, np.uint16) for mask in (m1, m2, *masks)]
        for count, mask in zip(counts, (m1, m2, *masks), strict=True):
            count += mask
    if not counts:
        raise ValueError("no frames")
    c1, c2, *rest = counts
    takes |= {"variance_spatial": iou(c1 > 0, c2 > 0), "variance_weighted_spatial": weighted_iou(c1, c2)}
    return [
        {
            **lists,
            **takes,
            "spatial_iou_v1": iou(c1 > 0, cg > 0),
            "spatial_iou_v2": iou(c2 > 0, cg > 0),
            "weighted_spatial_iou_v1": weighted_iou(c1, cg),
            "weighted_spatial_iou_v2": weighted_iou(c2, cg),
        }
        for lists, cg in zip(found, rest, strict=True)
    ]


def iou(a: np.ndarray, b: np.ndarray) -> float:
    """|a and b| / |a or b| of bool arrays of the same shape; 1 if both are empty."""
    if a.shape != b.shape:
        raise ValueError(f"masks of {a.shape} and {b.shape}")
    union = np.count_nonzero(a | b)
    return float(np.count_nonzero(a & b) / union) if union else 1.0


def weighted_iou(a: np.ndarray, b: np.ndarray) -> float:
    """sum(min(a, b)) / sum(max(a, b)) of motion counts per pixel (uint16, over equally many frames); 1 if all are 0."""
    union = int(np.maximum(a, b).sum(dtype=np.int64))
    return int(np.minimum(a, b).sum(dtype=np.int64)) / union if union else 1.0


def mse(a: np.ndarray, b: np.ndarray) -> float:
    """Mean squared difference of two uint8 (h, w, 3) frames scaled to [0, 1]. The sum is exact (integers)."""
    if a.shape != b.shape:
        raise ValueError(f"frames of {a.shape} and {b.shape}")
    return cv2.norm(a, b, cv2.NORM_L2SQR) / (a.size * 255.0**2)
