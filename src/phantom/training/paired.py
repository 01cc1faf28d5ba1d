"""Paired differences of held-out losses, clip by clip, with a bootstrap interval over clips."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy.stats import bootstrap, norm, t

RESAMPLES, LEVEL = 9999, 0.95


class Gap(NamedTuple):
    """The mean of `of` - `than` over clips, and its interval: above 0 where `than` has the lower loss."""

    mean: float
    low: float
    high: float


def tail(count: int) -> float:
    """The share of resampled means to leave out on each side, so that an interval over `count` values covers `LEVEL`.

    A percentile interval of few values is too narrow: the mean over resamples varies by a share (n - 1) / n of what
    the sample's mean does, and like a normal rather than a t variable. Hesterberg (2015), What Teachers Should Know
    About the Bootstrap, section 4.3: expanded percentiles.
    """
    return float(norm.cdf(-t.ppf((1 + LEVEL) / 2, count - 1) * (count / (count - 1)) ** 0.5))


def gap(of: Sequence[float | None], than: Sequence[float | None]) -> Gap | None:
    """The gap over the clips that both have, at `LEVEL`; None with fewer than two of them.

    The interval is over clips alone: it says nothing of another seed.
    """
    pairs = [(a, b) for a, b in zip(of, than, strict=True) if a is not None and b is not None]
    if len(pairs) < 2:
        return None
    difference = np.array([a - b for a, b in pairs])
    level = 1 - 2 * tail(len(difference))
    found = bootstrap(
        (difference,), np.mean, n_resamples=RESAMPLES, confidence_level=level, method="percentile", rng=0
    ).confidence_interval
    return Gap(float(difference.mean()), float(found.low), float(found.high))
