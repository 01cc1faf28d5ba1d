"""study.yaml: strict, and wrong in one line that names the nearest valid key."""

from __future__ import annotations

import pytest
import yaml

from phantom.errors import UserError
from phantom.evaluation.study.spec import Study, arm_params, load_study, study_digest
from tests.conftest import ROOT
from tests.evaluation.study.made_up import make_study


def write(root, **changes):
    tree = make_study().model_dump(mode="json")
    for key, value in changes.items():
        *parents, leaf = key.split("__")
        node = tree
        for parent in parents:
            node = node[int(parent) if parent.isdigit() else parent]
        node[leaf] = value
    path = root / "studies/one/study.yaml"
    path.parent.mkdir(parents=True)
    path.write_text(yaml.safe_dump(tree))
    return path


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"seed": [1]}, "seed: unknown key; nearest: seeds (of question, primary,"),
        ({"arms__1__setings": {}}, "arms.1.setings: unknown key; nearest: settings (of label, settings, held, "),
        ({"arms__1__weights": "contrl"}, "arms.phantom.weights: found 'contrl', accepted: control; nearest: control"),
        ({"arms__1__weights": "phantom"}, "arms.phantom.weights: found 'phantom', accepted: control"),
        ({"arms__1__coupling": False}, "arms.phantom.coupling: found in an arm that is trained; accepted with weights"),
        (
            {"arms__1__weights": "control", "arms__1__settings": {"train.steps": 3}},
            "arms.phantom.settings.train.steps: found in an arm that is not trained, for it has the weights of "
            "'control'; accepted: evaluate.*",
        ),
        (
            {"arms__1__weights": "control", "arms__1__intervention": "noise", "measures__likephys": {"groups": 1}},
            "arms.phantom.intervention: found 'noise' with measures.likephys, which has no z to replace",
        ),
        ({"test__levels": 1}, "test.levels: unknown key; nearest: level"),
        ({"test__kind": "t"}, "test.kind: found 't', accepted: 'sign-flip'"),
        ({"test__level": 2}, "test.level: found 2, input should be less than 1"),
        ({"primary__0__figure": "heldout_los"}, "primary.0.figure: found 'heldout_los', accepted: heldout_loss_video,"),
        ({"primary__0__figure": "position_error"}, "found 'position_error', accepted with measures.positions"),
        ({"compare__0__arm": "phantm"}, "compare.0.arm: found 'phantm', accepted: control, phantom; nearest: phantom"),
        ({"compare__0__arm": "base"}, "compare.0.arm: found 'base', accepted: control, phantom"),
        ({"compare__0__reference": "bas"}, "compare.0.reference: found 'bas', accepted: control, phantom, base, last_"),
        ({"compare__0__reference": "simulator"}, "compare: found 'simulator', accepted with measures.positions"),
        ({"arms__1__label": "base"}, "arms: found the label 'base', accepted: another"),
        ({"compare__0__arm": "control"}, "compare.0: found 'control' twice, accepted: two arms"),
        ({"seeds": [1, 1]}, "seeds: found 1 twice, accepted: each once"),
        ({"seeds": [True]}, "seeds.0: found True, input should be a valid integer"),
        ({"equal": ["stepz"]}, "equal.0: found 'stepz', accepted: 'steps',"),
        ({"preset": "mimi"}, "preset 'mimi': no such preset; nearest: mini"),
        ({"settings": {"train.seed": 3}}, "settings.train.seed: found in a study, which states it itself"),
        (
            {"arms__1__settings": {"physics.predictoin": "clean"}},
            "arm 'phantom': physics.predictoin: unknown setting; nearest: physics.prediction",
        ),
        (
            {"arms__1__settings": {"physics.prediction": "cleen"}},
            "arm 'phantom': physics.prediction: found 'cleen', accepted: clean, velocity; nearest: clean",
        ),
    ],
)
def test_a_wrong_file_is_one_line(tmp_path, changes, said):
    write(tmp_path, **changes)
    with pytest.raises(UserError) as wrong:
        load_study("one", tmp_path)
    assert said in str(wrong.value) and "\n" not in str(wrong.value)


def test_a_file_that_is_not_yaml_or_not_there(tmp_path):
    path = write(tmp_path)
    path.write_text("question: [")
    with pytest.raises(UserError, match=r"^studies/one/study\.yaml: line 1, column 12: not valid YAML: "):
        load_study("one", tmp_path)
    path.write_text("- a")
    with pytest.raises(UserError, match="found list, expected a mapping of question, primary"):
        load_study("one", tmp_path)
    with pytest.raises(UserError, match=r"study 'on': no studies/on/study\.yaml; nearest: one"):
        load_study("on", tmp_path)
    with pytest.raises(UserError, match=r"study '\.\./one': no studies"):
        load_study("../one", tmp_path)


def test_an_arms_settings_prevail_over_those_of_the_command_and_these_over_the_studys():
    study = make_study(settings={"train.steps": 7, "train.batch_size": 4, "train.flow_shift": 1.5})
    arm = study.arms[1].model_copy(update={"settings": {"train.flow_shift": 1e-5}})
    params = arm_params(study, arm, 5, ("train.batch_size=2", "train.flow_shift=9"))
    train = params.train
    assert (train.steps, train.batch_size, train.flow_shift, train.seed, train.control) == (7, 2, 1e-5, 5, False)


def test_an_arm_with_the_weights_of_another_has_its_settings_and_its_own_over_them():
    arms = [
        {"label": "control", "settings": {"train.flow_shift": 2, "evaluate.sampling.steps": 3}},
        {"label": "short", "weights": "control", "settings": {"evaluate.sampling.steps": 1}},
    ]
    study = Study.model_validate(make_study(1, ("control", "short")).model_dump() | {"arms": arms})
    params = arm_params(study, study.arms[1], 0)
    assert (params.train.flow_shift, params.evaluate.sampling.steps) == (2, 1)


def test_the_committed_studies_are_valid():
    for name, lead in (("physics-branch", 1.0), ("physics-lead", 0.3)):
        study = load_study(name, ROOT)
        assert study.labels == ["control", "phantom"]
        assert {arm_params(study, arm, 0).physics.noise_shift for arm in study.arms} == {lead}
        assert len(study_digest(name, ROOT)) == 64
