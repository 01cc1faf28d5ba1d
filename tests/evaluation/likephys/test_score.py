"""The error against numbers worked out by hand, its intervals, and what counts as a violation."""

import math

import numpy as np
import pytest

from phantom.evaluation.likephys.score import GroupLosses, Rankings, as_text, summarize


def group(scenario, name, **video):
    return GroupLosses(scenario, name, {"video": video})


HAND = [
    # fall: jumps 1 of 2 pairs, then 0 of 1; stops 2 of 2. roll: jumps 1 of 1; a tie is no error.
    group("fall", "subgroup_000", valid=[2.0], jumps=[1.0, 3.0], stops=[1.0, 1.5], benign_other_world=[1.0]),
    group("fall", "subgroup_001", valid=[2.0], jumps=[2.5], benign_other_world=[9.0]),
    group("roll", "subgroup_000", valid=[5.0], jumps=[4.0], stops=[5.0]),
    group("roll", "subgroup_001", valid=[5.0, 3.0], jumps=[4.0]),
]


def test_the_error_is_that_of_the_definition():
    found = summarize(HAND)
    cells = {(row["scenario"], row["violation"]): row["score"] for row in found["losses"]["video"]["cells"]}
    assert cells == {("fall", "jumps"): 25.0, ("fall", "stops"): 100.0, ("roll", "jumps"): 75.0, ("roll", "stops"): 0.0}
    assert found["score"] == 50.0  # every scenario and violation counts alike
    by = found["losses"]["video"]
    assert {row["scenario"]: row["score"] for row in by["scenarios"]} == {"fall": 62.5, "roll": 37.5}
    assert {row["violation"]: row["score"] for row in by["violations"]} == {"jumps": 50.0, "stops": 50.0}
    assert [{key: row[key] for key in row if key != "margin"} for row in by["benign"]] == [
        {"variation": "benign_other_world", "score": 50.0, "low": 0.0, "high": 100.0, "groups": 2}
    ]
    assert found["groups"] == 4 and found["clips"] == 15
    assert "lower is better" in found["unit"] and "50" in found["unit"]
    assert next(iter(found)) == "score"


def test_published_values_are_shown_as_not_comparable():
    found = summarize(HAND)
    assert {row["model"]: row["score"] for row in found["published"]}["CogVideoX-2B"] == 48.2
    assert {row["note"] for row in found["published"]} == {"not comparable: other data"}
    assert "HunyuanVideo" in as_text(found) and "lower is better" in as_text(found)


def groups(rate, count=200, scenarios=("a", "b")):
    rng = np.random.default_rng(1)
    return [
        group(s, f"subgroup_{i:03d}", valid=[0.5], jumps=[float(rng.random() >= rate)])
        for s in scenarios
        for i in range(count)
    ]


def test_intervals_resample_groups():
    found = summarize(groups(0.3))
    assert found["low"] < found["score"] < found["high"]
    deviation = 100 * math.sqrt(0.3 * 0.7 / 400)
    assert found["high"] - found["low"] == pytest.approx(2 * 1.96 * deviation, rel=0.1)
    assert summarize(groups(0.3)) == found  # seeded
    assert summarize(groups(0.3, count=1))["low"] is None


def test_gains_are_paired():
    worse, better = Rankings(groups(0.4), "video"), Rankings(groups(0.3), "video")
    found = better.gain_over(worse)["score"]  # the same random numbers: the better is wrong only where the worse one is
    assert found["low"] < found["gain"] < found["high"] < 0
    assert worse.gain_over(worse)["score"] == {"gain": 0.0, "low": 0.0, "high": 0.0}


def test_the_margin_is_that_of_the_definition():
    found = summarize(HAND)
    cells = {(row["scenario"], row["violation"]): row["margin"]["mean"] for row in found["losses"]["video"]["cells"]}
    # fall, jumps: (-50% + 50%) / 2 in the first group, 25% in the second; roll: -20%, and (-20% + 33.3%) / 2.
    expected = {"fall jumps": 12.5, "fall stops": -37.5, "roll jumps": (-20 + 20 / 3) / 2, "roll stops": 0.0}
    assert {" ".join(cell): value for cell, value in cells.items()} == pytest.approx(expected)
    assert found["margin"]["mean"] == pytest.approx(np.mean(list(expected.values())))
    assert found["margin"]["low"] <= found["margin"]["mean"] <= found["margin"]["high"]
    assert "higher is better" in found["margin_unit"] and f"margin {found['margin']['mean']:+.2f}%" in as_text(found)


def test_a_margin_moves_where_no_pair_changes_its_order():
    def losses(gap):
        return [group("fall", f"{i}", valid=[1.0 + i], jumps=[(1.0 + i) * (1 + gap)]) for i in range(30)]

    base, other = Rankings(losses(0.01), "video"), Rankings(losses(0.03), "video")
    found = other.gain_over(base)
    assert found["score"] == {"gain": 0.0, "low": 0.0, "high": 0.0}
    assert found["margin"] == pytest.approx({"gain": 2.0, "low": 2.0, "high": 2.0})


def test_a_clip_without_any_loss_has_no_margin():
    still = [group("fall", "0", valid=[0.0, 1.0], jumps=[2.0]), group("fall", "1", valid=[0.0], jumps=[2.0])]
    assert summarize(still)["margin"]["mean"] == 100.0
    assert [one.mean_margin("video") for one in still] == [100.0, None]
