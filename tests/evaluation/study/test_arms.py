"""studies/arms: each arm differs from Phantom by what it is named after, and by nothing else."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from phantom.config import Params, Role, select
from phantom.evaluation.study.spec import Study, arm_params, load_study
from phantom.orchestration.study import differing_settings
from phantom.orchestration.study_runs import SETTINGS, StudyRun
from phantom.planning.plan import plan
from phantom.tracking.runs import flatten_settings
from tests.conftest import ROOT
from tests.evaluation.study.made_up import make_study

# Steps and intervals are those that make the compute the same, and no difference of the method.
SCHEDULE = ("train.steps", "train.twin_steps", "train.validate_every")
DIFFERENCES = {
    "control": {},
    "twin alone": {},
    "fixed alpha_z": {"train.recursive_weight.mode": "fixed"},
    "physics to video only": {"coupling.direction": "to_video"},
    "video to physics only": {"coupling.direction": "to_physics"},
    "no coupling": {"coupling.direction": "none"},
    "random features": {"models.physics_encoder_random_seed": "0"},
}


@pytest.fixture(scope="module")
def study() -> Study:
    return load_study("arms", ROOT)


def params(study: Study, label: str) -> Params:
    return arm_params(study, next(arm for arm in study.arms if arm.label == label), 0)


def differences(study: Study, label: str) -> dict[str, str]:
    """The settings of an arm that are not Phantom's, as text."""
    ours, theirs = (
        flatten_settings(select(params(study, name), SETTINGS, without=(Role.NOT_IN_RESULT,)))
        for name in ("phantom", label)
    )
    return {key: value for key, value in theirs.items() if ours[key] != value and key not in SCHEDULE}


@pytest.mark.parametrize("label", DIFFERENCES)
def test_an_arm_differs_by_what_it_is_named_after(study: Study, label: str):
    assert differences(study, label) == DIFFERENCES[label]
    assert [arm.label for arm in study.arms if arm.held] == ["control", "twin alone"]


def test_as_it_was_is_what_the_documentation_lists(study: Study):
    text = (ROOT / "docs/method.md").read_text(encoding="utf-8").partition("The paper's way is a list of settings")[2]
    listed = dict(re.findall(r"--set (\S+)=(\S+)", text.partition("## 4.")[0]))
    listed |= dict(re.findall(r"`([a-z_.]+)=([^`\s]+)`", text.partition("bit for bit")[0]))
    assert differences(study, "as it was") == {key: str(yaml.safe_load(value)) for key, value in listed.items()}


def test_phantom_and_its_control_are_those_of_twin_first(study: Study):
    other = load_study("twin-first", ROOT)
    arms = {arm.label: arm for arm in study.arms}
    ours, theirs = (select(params(one, "control"), SETTINGS, without=(Role.NOT_IN_RESULT,)) for one in (study, other))
    assert ours == theirs  # so that its runs are the same
    assert arms["phantom"].start == "twin"
    twin, phantom, whole = params(study, "twin"), params(study, "phantom"), params(other, "phantom")
    assert twin.train.steps == twin.train.twin_steps == whole.train.twin_steps
    assert twin.train.steps + phantom.train.steps == whole.train.steps


def test_all_arms_but_the_twin_cost_the_same(study: Study):
    flops = {
        label: plan(params(study, label), "H200", 1, root=ROOT)["flops"]["model_per_run"] for label in study.labels
    }
    whole = {
        arm.label: flops[arm.label] + (flops["twin"] if arm.start else 0) for arm in study.arms if arm.label != "twin"
    }
    assert all(cost == pytest.approx(whole["control"], rel=0.01) for cost in whole.values()), whole


def test_arms_of_the_same_weights_may_be_sampled_in_other_ways():
    """As docs/baselines.md has it: settings that differ by name, and what a video costs."""
    scales = {"guidance_scale": 6, "physics_guidance_scale": 6, "modality_guidance_scale": 4}
    arms = [
        {"label": "phantom"},
        {"label": "self-refine", "settings": {"refine": {"rounds": 3, "until": 0.2, "threshold": 0.25}}},
        {"label": "videojam", "settings": scales},
    ]
    for arm in arms[1:]:
        arm["weights"] = "phantom"
        arm["settings"] = {f"evaluate.sampling.{key}": value for key, value in arm["settings"].items()}
    measured = {"primary": {"figure": "position_error", "better": "lower"}, "measures": {"positions": {"scenarios": 6}}}
    references = [{"arm": "self-refine", "reference": one} for one in ("phantom", "simulator_pixels")]
    tree = make_study().model_dump() | measured | {"arms": arms, "compare": references, "equal": []}
    study = Study.model_validate(tree)
    found = {arm.label: arm_params(study, arm, 0) for arm in study.arms}
    assert [one.evaluate.sampling.passes for one in found.values()] == [2 * 20, 2 * 44, 3 * 20]
    runs = [StudyRun(label, 0, False, one, {"heldout": {}}, Path()) for label, one in found.items()]
    told = differing_settings(runs)
    assert (
        told["phantom"]["evaluate.sampling.refine"] == "None" and told["self-refine"]["evaluate.sampling.refine"] == ""
    )
    assert [told[label]["evaluate.sampling.refine.rounds"] for label in found] == ["", "3", ""]
    assert told["videojam"]["evaluate.sampling.modality_guidance_scale"] == "4.0"
