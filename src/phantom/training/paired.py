"""Paired differences of held-out losses, clip by clip, with a bootstrap interval over clips."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy.stats import bootstrap

RESAMPLES, LEVEL = 9999, 0.95


class Gap(NamedTuple):
    """The mean of `of` - `than` over clips, and its interval: above 0 where `than` has the lower loss."""

    mean: float
    low: float
    high: float


def gap(of: Sequence[float | None], than: Sequence[float | None]) -> Gap | None:
    """The gap over the clips that both have, at `LEVEL`; None with fewer than two of them.

    The interval is over clips alone: it says nothing of another seed.
    """
    pairs = [(a, b) for a, b in zip(of, than, strict=True) if a is not None and b is not None]
    if len(pairs) < 2:
        return None
    difference = np.array([a - b for a, b in pairs])
    found = bootstrap(
        (difference,), np.mean, n_resamples=RESAMPLES, confidence_level=LEVEL, method="percentile", rng=0
    ).confidence_interval
    return Gap(float(difference.mean()), float(found.low), float(found.high))
