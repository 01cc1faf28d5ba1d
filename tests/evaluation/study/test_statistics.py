"""Intervals, permutation test and power, against scipy, simulation and cases worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from phantom.evaluation.study.statistics import (
    detectable_effect,
    hierarchical_bootstrap,
    sign_flip_test,
    smallest_p,
)


def test_the_sign_flip_test_by_hand():
    # Of the 8 flips of (1, 2, 3), sums: 6 4 2 0 0 -2 -4 -6; two are as far from 0 as 6, one is as large.
    assert sign_flip_test(np.array([1.0, 2.0, 3.0])) == 2 / 8 == smallest_p(3)
    assert sign_flip_test(np.array([1.0, 2.0, 3.0]), "one") == 1 / 8 == smallest_p(3, "one")
    assert sign_flip_test(np.array([-1.0, 2.0, 3.0])) == 4 / 8  # +-6 and +-4
    assert sign_flip_test(np.array([-1.0, -2.0, -3.0]), "one") == 1
    assert sign_flip_test(np.zeros(4)) == 1
    assert sign_flip_test(np.full(6, 0.1)) == smallest_p(6) == 1 / 32  # equal terms, whose sums differ in the last bit
    assert sign_flip_test(1e-12 * np.array([1.0, 2.0, 3.0])) == 2 / 8  # whatever the unit


@pytest.mark.parametrize(("sides", "alternative"), [("two", "two-sided"), ("one", "greater")])
def test_the_sign_flip_test_is_scipys(sides, alternative):
    gains = np.random.default_rng(3).normal(0.4, 1, 9)
    found = stats.permutation_test(
        (gains,), np.mean, permutation_type="samples", alternative=alternative, n_resamples=np.inf
    )
    assert sign_flip_test(gains, sides) == pytest.approx(found.pvalue, abs=1e-12)


def test_the_bootstrap_of_one_seed_is_scipys_over_clips():
    d = np.random.default_rng(0).normal(1, 2, (1, 40))
    low, high = hierarchical_bootstrap(d)
    theirs = stats.bootstrap((d[0],), np.mean, n_resamples=10_000, method="percentile", rng=1).confidence_interval
    assert (low, high) == pytest.approx((theirs.low, theirs.high), abs=0.05)


def test_the_bootstrap_has_the_variance_of_seeds_and_of_clips():
    rng = np.random.default_rng(1)
    seeds, clips = rng.normal(0, 1, (12, 1)), rng.normal(0, 2, (1, 50))
    d = 5 + seeds + clips  # additive, so that the variances of the two resamplings add up
    low, high = hierarchical_bootstrap(d)
    expected = math.sqrt(seeds.var() / 12 + clips.var() / 50)  # of the plug-in estimates
    assert (high - low) / (2 * 1.96) == pytest.approx(expected, rel=0.05)
    assert low < d.mean() < high
    assert hierarchical_bootstrap(d) == (low, high)  # the same numbers every time
    wider = hierarchical_bootstrap(d, level=0.99)
    assert wider[0] < low and wider[1] > high


def test_the_interval_of_a_constant_is_the_constant():
    assert hierarchical_bootstrap(np.full((3, 4), 0.25)) == (0.25, 0.25)


@pytest.mark.parametrize(("seeds", "level", "sides"), [(3, 0.05, "two"), (5, 0.01, "one"), (12, 0.05, "two")])
def test_power_is_scipys_noncentral_t(seeds, level, sides):
    effect = detectable_effect(2.0, seeds, level, sides)
    shift, df = effect / 2.0 * math.sqrt(seeds), seeds - 1
    critical = stats.t.ppf(1 - level / (2 if sides == "two" else 1), df)
    power = stats.nct.sf(critical, df, shift) + (stats.nct.cdf(-critical, df, shift) if sides == "two" else 0)
    assert power == pytest.approx(0.8, abs=2e-3)


def test_power_as_simulated():
    effect = detectable_effect(1.0, 6, 0.05)
    draws = np.random.default_rng(0).normal(effect, 1, (20_000, 6))
    found = stats.ttest_1samp(draws, 0, axis=1).pvalue < 0.05
    assert found.mean() == pytest.approx(0.8, abs=0.01)


def test_the_detectable_effect_is_in_the_unit_of_the_spread():
    assert detectable_effect(0.02, 5, 0.05) == pytest.approx(0.01 * detectable_effect(2.0, 5, 0.05))
    assert detectable_effect(0.0, 5, 0.05) == 0
    assert detectable_effect(1.0, 1, 0.05) == math.inf
    assert detectable_effect(1.0, 20, 0.05) < detectable_effect(1.0, 5, 0.05) < detectable_effect(1.0, 5, 0.01)
