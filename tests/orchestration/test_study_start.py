"""Arms that begin from the weights of another arm's run."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from phantom.errors import UserError
from phantom.evaluation.study.spec import load_study
from phantom.orchestration.study_child import run_one
from phantom.orchestration.study_experiment import experiment_settings
from phantom.orchestration.study_processes import prepare_folder
from phantom.orchestration.study_runs import study_runs
from tests.orchestration.studies import run_here, toy_study, write_study, write_study_latents

STILL = {"train.optimizer.learning_rate": 1e-12, "train.optimizer.weight_decay": 0.0}


def started_study(base):
    """A twin trained alone, an arm that begins from it and hardly moves, the same with more steps, a control."""
    study = toy_study(base, steps=2) | {"seeds": [0]}
    study["arms"] = [
        {"label": "control", "held": True, "settings": {"train.steps": 4}},
        {"label": "phantom", "start": "twin", "settings": STILL},
        {"label": "longer", "start": "twin", "settings": {**STILL, "train.steps": 3}},
        {"label": "twin", "settings": {"train.twin_steps": 2}},
        {"label": "noise", "weights": "phantom", "intervention": "noise"},
    ]
    return study


@pytest.fixture(scope="module")
def started(tmp_path_factory, tiny_base):
    root = tmp_path_factory.mktemp("started")
    write_study_latents(root, tiny_base)
    write_study(root, started_study(tiny_base))
    return root, run_here(root)


def weights(root, label):
    """The exported weights of the arm's run of the first seed."""
    run = next(run for run in study_runs(load_study("toy", root), (), root) if run.arm == label)
    return load_file(root / run.folder / "models" / run.name / "diffusion_pytorch_model.safetensors")


def test_an_arm_begins_from_the_weights_of_the_run_of_its_seed(started):
    root, results = started
    assert results["finished"] == results["expected"] == 5
    twin, phantom, control = (weights(root, label) for label in ("twin", "phantom", "control"))
    assert all(torch.allclose(phantom[name], twin[name], atol=1e-8) for name in twin)
    assert not all(torch.allclose(control[name], twin[name], atol=1e-4) for name in twin)
    clips = {run["arm"]: run["clips"] for run in results["runs"]}
    assert clips["noise"]["heldout_loss_video"] == clips["phantom"]["heldout_loss_video_noise_z"]


def test_runs_that_others_begin_from_come_first_and_count_in_their_costs(started):
    root, results = started
    order = [run.arm for run in study_runs(load_study("toy", root), (), root)]
    assert order == [None, "control", "twin", "phantom", "longer", "noise"]
    costs = results["equality"]
    assert {label: costs[label]["steps"] for label in ("twin", "phantom", "longer", "noise")} == {
        **{"twin": 2, "phantom": 4, "longer": 5, "noise": 4},
    }
    assert costs["phantom"]["flops"] > costs["control"]["flops"] / 2
    assert results["settings"]["phantom"]["begins from"] == "those of twin"
    assert "phantom begins from the weights of twin" in (root / "studies/toy/index.html").read_text()


def test_the_first_run_is_trained_by_whoever_needs_it(started, tmp_path, tiny_base):
    root, _ = started
    write_study_latents(tmp_path, tiny_base)
    study = started_study(tiny_base)
    write_study(tmp_path, study)
    runs = {run.arm: run for run in study_runs(load_study("toy", tmp_path), (), tmp_path)}
    run_one(prepare_folder(runs["phantom"], "toy", tmp_path), tmp_path)
    assert runs["twin"].read(tmp_path) is None  # trained, not measured
    ours, theirs = weights(tmp_path, "phantom"), weights(root, "phantom")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert (tmp_path / runs["twin"].folder / "models/phantom/result.json").is_file()


@pytest.mark.parametrize(
    ("arm", "message"),
    [
        ({"start": "twn"}, "arms.more.start: found 'twn', accepted: .*nearest: twin"),
        ({"start": "phantom"}, "arms.more.start: found 'phantom', accepted: control, twin"),
        ({"start": "twin", "weights": "twin"}, "arms.more.start: found in an arm that is not trained"),
        ({"start": "twin", "settings": {"train.init_from": "x"}}, "arms.more.start: found with train.init_from"),
    ],
)
def test_a_wrong_start_is_one_line(arm, message, tmp_path, tiny_base):
    study = started_study(tiny_base)
    study["arms"].append({"label": "more", **arm})
    write_study(tmp_path, study)
    with pytest.raises(UserError, match=message):
        load_study("toy", tmp_path)


def test_dvc_cannot_begin_from_it(started):
    with pytest.raises(UserError, match="it begins from the weights of 'twin'"):
        experiment_settings("toy", "phantom", root=started[0])
