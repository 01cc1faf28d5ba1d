"""Intervals of differences: how wide they are, and when they tell something."""

import numpy as np
import pytest
from scipy.stats import t

from phantom.evaluation.gains import IOUS, gain, is_clear, mean_gain, row_gain
from phantom.evaluation.physics_iq.benchmark import PHYSICS_IQ
from phantom.evaluation.physics_iq.runs import mean_of_runs


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


def run(seed, by, count=30):
    """The score of one run whose IoUs are `by` above those of seed 0, by as much in every scenario."""
    rng = np.random.default_rng(7)
    rows = []
    for number in range(count):
        value = 0.3 + 0.1 * float(rng.random()) + by
        takes = {**dict.fromkeys(IOUS, 0.5), "mse": 0.001}
        row = {"scenario": f"s{number}", "views": {}, "verified": value, "physical_variance": takes, "mse": 0.01}
        rows.append(row | dict.fromkeys(IOUS, value))
    return {"score": 100 * by, "per_scenario": rows, "seeds": [seed], "videos": count, "protocol": "original"}


def test_runs_are_drawn_again_where_there_are_several():
    base, first, second = run(0, 0.0), run(1, 0.02), run(2, 0.06)
    several = mean_of_runs({"a": first, "b": second})
    alone = PHYSICS_IQ.gain(base, run(1, 0.04))
    both = PHYSICS_IQ.gain(base, several)
    assert both["gain"] == pytest.approx(alone["gain"]) and both["runs"] == [1, 2] and "runs" not in alone
    assert alone["high"] - alone["low"] < 1e-6  # as much in every scenario: the scenarios alone tell of no doubt
    ends = [PHYSICS_IQ.gain(base, one)["gain"] for one in (first, second)]
    assert (both["low"], both["high"]) == pytest.approx((ends[0], ends[1]))
    assert PHYSICS_IQ.gain(several, base)["low"] == pytest.approx(-ends[1])
    rows = (base["per_scenario"], first["per_scenario"])
    assert gain(*rows, "verified", runs=((), [first["per_scenario"]])).items() >= gain(*rows, "verified").items()
