"""Intervals of differences: how wide they are, and when they tell something."""

import numpy as np
import pytest
from scipy.stats import t

from phantom.evaluation.gains import is_clear, mean_gain, row_gain


@pytest.mark.parametrize("count", [6, 12, 60])
def test_intervals_of_few_scenarios_are_as_wide_as_those_of_a_t_test(count):
    rng = np.random.default_rng(0)
    shares = []
    for differences in rng.normal(1.0, 3.0, size=(20, count)):
        found = mean_gain([0.0] * count, differences.tolist())
        half = t.ppf(0.975, count - 1) * differences.std(ddof=1) / count**0.5
        shares.append((found["high"] - found["low"]) / 2 / half)
    assert np.mean(shares) == pytest.approx(1, abs=0.06)  # 0.70, 0.85 and 0.98 for plain percentiles


def test_a_difference_is_clear_only_over_enough_pairs():
    ours, theirs = [[{"scenario": f"{i}", "error": i + by, "unseen": i % 2} for i in range(10)] for by in (0.0, 1.0)]
    found = row_gain(ours, theirs, "error")
    assert (found["gain"], found["pairs"]) == (1.0, 10) and is_clear(found)
    unseen = row_gain(ours, theirs, "error_unseen")
    assert (unseen["gain"], unseen["pairs"]) == (1.0, 5) and not is_clear(unseen)
    assert row_gain(ours[:3], theirs[2:], "error") is None  # one scenario in common
