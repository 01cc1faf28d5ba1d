"""studies/arms: each arm differs from Phantom by what it is named after, and by nothing else."""

from __future__ import annotations

import re

import pytest
import yaml

from phantom.config import Params, Role, select
from phantom.evaluation.study.spec import Study, arm_params, load_study
from phantom.orchestration.study_runs import SETTINGS
from phantom.tracking.runs import flatten_settings
from tests.conftest import ROOT

DIFFERENCES = {
    "control": {},
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
    return {key: value for key, value in theirs.items() if ours[key] != value}


@pytest.mark.parametrize("label", DIFFERENCES)
def test_an_arm_differs_by_what_it_is_named_after(study: Study, label: str):
    assert differences(study, label) == DIFFERENCES[label]
    assert [arm.label for arm in study.arms if arm.held] == ["control"]


def test_as_it_was_is_what_the_documentation_lists(study: Study):
    text = (ROOT / "docs/method.md").read_text(encoding="utf-8").partition("The paper's way is a list of settings")[2]
    listed = dict(re.findall(r"--set (\S+)=(\S+)", text.partition("## 4.")[0]))
    listed |= dict(re.findall(r"`([a-z_.]+)=([^`\s]+)`", text.partition("bit for bit")[0]))
    assert differences(study, "as it was") == {key: str(yaml.safe_load(value)) for key, value in listed.items()}


def test_phantom_and_its_control_are_those_of_physics_branch(study: Study):
    other = load_study("physics-branch", ROOT)
    for label in ("control", "phantom"):
        ours, theirs = (select(params(one, label), SETTINGS, without=(Role.NOT_IN_RESULT,)) for one in (study, other))
        assert ours == theirs
