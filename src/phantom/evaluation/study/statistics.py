"""Statistics of paired differences between two arms: intervals, an exact permutation test, power.

Legend: S seeds, C clips. Both arms have the same seeds and clips, so that d[s, c] is the difference on one clip after
training from one seed.
"""

from __future__ import annotations

import math
from typing import Literal

import numpy as np

RESAMPLES = 10_000
LEVEL = 0.95
POWER = 0.8

Sides = Literal["one", "two"]


def hierarchical_bootstrap(d_SC: np.ndarray, level: float = LEVEL, seed: int = 0) -> tuple[float, float]:
    """Percentile interval of the mean of `d_SC`, resampling seeds and then clips.

    The clips of a resample are the same for all of its seeds, as in the data, so that what a clip adds to the
    difference does not average out over the seeds. With few seeds the interval is narrower than its level: the
    variance between S seeds comes out (S - 1) / S of what it is.
    """
    seeds, clips = d_SC.shape
    rng = np.random.default_rng(seed)
    weight_of_seed = rng.multinomial(seeds, np.full(seeds, 1 / seeds), RESAMPLES) / seeds  # (R, S)
    weight_of_clip = rng.multinomial(clips, np.full(clips, 1 / clips), RESAMPLES) / clips  # (R, C)
    means = ((weight_of_seed @ d_SC) * weight_of_clip).sum(axis=1)
    tail = 50 * (1 - level)
    low, high = np.percentile(means, [tail, 100 - tail])
    return float(low), float(high)


def sign_flip_test(gain_S: np.ndarray, sides: Sides = "two") -> float:
    """Exact p of the mean of `gain_S` over all 2^S flips of signs: without an effect, either sign was as likely.

    one: only a positive mean counts against chance. two: a mean of either sign does.
    """
    signs = 1 - 2 * ((np.arange(2 ** len(gain_S))[:, None] >> np.arange(len(gain_S))) & 1)  # (2^S, S)
    means = signs @ gain_S
    observed = float(gain_S.sum())
    if sides == "two":
        means, observed = np.abs(means), abs(observed)
    tolerance = 1e-9 * np.abs(gain_S).sum()  # sums of the same terms differ in their last bits
    return float((means >= observed - tolerance).mean())


def smallest_p(seeds: int, sides: Sides = "two") -> float:
    """The smallest p that `sign_flip_test` can give with this number of seeds."""
    return (2 if sides == "two" else 1) / 2**seeds


def detectable_effect(spread: float, seeds: int, level: float, sides: Sides = "two", power: float = POWER) -> float:
    """The smallest true difference that a t test over seeds finds with `power`; `spread`: their standard deviation.

    The noncentral t distribution is integrated over chi, which is exact for any number of seeds. Infinite for one
    seed. The permutation test sees no more than this, and nothing where `smallest_p` exceeds `level`.
    """
    from scipy import integrate, optimize, stats

    if seeds < 2:
        return math.inf
    df = seeds - 1
    critical = float(stats.t.ppf(1 - level / (2 if sides == "two" else 1), df))

    def missing(shift: float) -> float:
        def rejected(scale: float) -> float:  # scale: the estimated over the true spread
            above = stats.norm.sf(critical * scale - shift)
            below = stats.norm.cdf(-critical * scale - shift) if sides == "two" else 0.0
            return float((above + below) * stats.chi.pdf(scale * math.sqrt(df), df) * math.sqrt(df))

        return integrate.quad(rejected, 0, 12, limit=200)[0] - power

    shift = float(optimize.brentq(missing, 0, 200 * critical))
    return shift * spread / math.sqrt(seeds)
