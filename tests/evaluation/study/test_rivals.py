"""studies/rivals: what is trained costs the same, and shares its runs with other studies where it is the same."""

from __future__ import annotations

import pytest

from phantom.config import Params, Role, select
from phantom.evaluation.study.spec import Study, arm_params, load_study
from phantom.orchestration.study_runs import SETTINGS
from phantom.planning.plan import plan
from tests.conftest import ROOT


@pytest.fixture(scope="module")
def study() -> Study:
    return load_study("rivals", ROOT)


def params(study: Study, label: str) -> Params:
    return arm_params(study, next(arm for arm in study.arms if arm.label == label), 0)


def test_all_arms_that_are_trained_cost_the_same(study: Study):
    plans = {
        arm.label: plan(params(study, arm.label), "H200", 1, root=ROOT) for arm in study.arms if arm.weights is None
    }
    flops = {label: planned["flops"]["model_per_run"] for label, planned in plans.items()}
    assert all(cost == pytest.approx(flops["control"], rel=0.001) for cost in flops.values()), flops
    adapters = {label: planned["parameters"].get("lora") for label, planned in plans.items()}
    assert adapters["alignment"] == adapters["LoRA"] and list(plans) == ["control", "phantom", "LoRA", "alignment"]


@pytest.mark.parametrize(
    ("other", "label", "theirs"),
    [
        ("twin-first", "control", "control"),
        ("twin-first", "phantom", "phantom"),
        ("more-worlds", "phantom", "phantom"),
        ("arms", "LoRA", "lora"),
    ],
)
def test_runs_of_other_studies_are_not_repeated(study: Study, other: str, label: str, theirs: str):
    found = [params(study, label), params(load_study(other, ROOT), theirs)]
    a, b = (select(one, SETTINGS, without=(Role.NOT_IN_RESULT,)) for one in found)
    assert a == b


def test_self_refinement_is_compared_with_as_many_passes(study: Study):
    passes = {arm.label: params(study, arm.label).evaluate.sampling.passes for arm in study.arms}
    assert passes["self-refine"] == passes["more steps"] == 2 * 44 and passes["phantom"] == 2 * 20
    assert passes["VideoJAM guidance"] == 3 * 20


def test_best_of_4_is_compared_with_as_many_passes(study: Study):
    passes = {arm.label: params(study, arm.label).evaluate.sampling.passes for arm in study.arms}
    assert passes["best of 4"] == passes["4 times the steps"] == 8 * 20 and passes["best of 8"] == 16 * 20
