"""Comparisons and the verdict that is made of them."""

from __future__ import annotations

import pytest

from phantom.evaluation.study.results import compare, make_results
from tests.evaluation.study.made_up import COSTS, made_up, make_run, make_study


def test_a_difference_is_paired_by_seed_and_clip():
    study = make_study(2)
    runs = [make_run(arm, seed, 0) for seed in (0, 1) for arm in study.labels]
    for run, values in zip(runs, ([1.0, 3.0], [0.5, 2.0], [1.0, None], [0.0, 2.0]), strict=True):
        run["clips"]["heldout_loss_video"] = values
    found = compare(study, study.compare[0], study.primary[0], runs)
    # The second clip is missing in one run, so only the first counts: -0.5 and -1.
    assert (found["difference"], found["by_seed"], found["count"]) == (-0.75, [-0.5, -1.0], 1)
    assert (found["p"], found["smallest_p"], found["share_of_gap"]) == (0.5, 0.5, None)
    base = {"clips": {"heldout_loss_video": [2.5, 3.0]}}  # the control gained (2.75 - mean of 1, 3, 1) over it
    assert compare(study, study.compare[0], study.primary[0], runs, base)["share_of_gap"] == pytest.approx(
        0.75 / (2.75 - 5 / 3), rel=1e-5
    )


def test_a_clear_gain_is_said_with_interval_seeds_clips_and_p():
    results = made_up(make_study(), {"control": 0, "phantom": 0.002})
    (found,) = results["comparisons"]
    assert found["low"] < found["difference"] < found["high"] < 0 and found["p"] == 2 / 64
    assert results["verdict"].startswith("phantom's held-out L_v is below control's by 0.00")
    assert "(6 seeds x 20 clips), permutation p = 0.0312." in results["verdict"]
    assert "The smallest effect that this design could have seen is 0.000" in results["verdict"]
    assert found["share_of_gap"] == pytest.approx(0.002 / 0.012, rel=0.25)


def test_a_loss_is_called_worse():
    results = made_up(make_study(), {"control": 0, "phantom": -0.002})
    assert "is above control's by" in results["verdict"] and "phantom is worse." in results["verdict"]


def test_no_difference_is_a_verdict():
    results = made_up(make_study(), {"control": 0, "phantom": 0})
    assert results["verdict"].startswith("phantom is not distinguishable from control: its held-out L_v differs by ")
    assert "The smallest effect that this design could have seen is" in results["verdict"]


def test_too_few_seeds_for_the_test_is_said():
    results = made_up(make_study(3), {"control": 0, "phantom": 0.01})
    assert results["verdict"].startswith("phantom is not distinguishable from control")
    assert "With 3 seeds this test cannot give a p below 0.25, so no difference" in results["verdict"]
    alone = made_up(make_study(1), {"control": 0, "phantom": 0.01})
    assert "With 1 seed this test cannot give a p below 1" in alone["verdict"]
    assert alone["comparisons"][0]["detectable"] is None


def test_what_is_not_equal_or_not_finished_is_part_of_the_verdict():
    study = make_study()
    results = made_up(study, {"control": 0, "phantom": 0.002}, phantom={"flops": 2, "trainable_parameters": 7})
    assert results["equality"]["phantom"]["unequal"] == ["flops"]  # parameters are not asked to be equal
    nearly = made_up(study, {"control": 0, "phantom": 0.002}, phantom={"flops": int(1.005 * COSTS["flops"])})
    assert nearly["equality"]["phantom"]["unequal"] == []
    assert results["verdict"].endswith("The two arms are not equal in flops.")
    runs = [make_run("control", 0, 0)]
    partial = make_results(study, {}, results["equality"], {}, runs, None)
    assert partial["verdict"].startswith("Nothing can be said") and "1 of 12 runs" in partial["verdict"]


def test_a_figure_of_the_run_has_no_clips():
    figure = {"figure": "val_physics_explained", "better": "higher"}
    results = made_up(make_study(6, primary=figure), {"control": 0, "phantom": 0})
    (found,) = results["comparisons"]
    assert found["count"] == 1 and found["difference"] == 0 and found["p"] == 1
    assert "(6 seeds)" in results["verdict"]


def test_every_primary_figure_has_its_comparisons_and_its_statement():
    both = [{"figure": "heldout_loss_video", "better": "lower"}, {"figure": "val_loss_video", "better": "lower"}]
    study = make_study(6, ("control", "phantom", "third"), primary=both)
    results = made_up(study, {"control": 0, "phantom": 0.004, "third": 0})
    assert [(found["arm"], found["figure"]) for found in results["comparisons"]] == [
        (arm, one["figure"]) for arm in ("phantom", "third") for one in both
    ]
    first, second = results["verdict"].split("phantom's ")[1:]
    assert first.startswith("held-out L_v is below") and second.startswith("L_v at the last validation is below")
    assert "third" not in results["verdict"]
