"""A run of a study as an experiment of the real DVC, on stubs of the stages."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from phantom.config import Role, load_params, select
from phantom.errors import UserError
from phantom.evaluation.study.spec import arm_params, load_study
from phantom.orchestration.privacy import NO_TELEMETRY
from phantom.orchestration.study_experiment import as_arguments, check_outputs, experiment_settings
from phantom.orchestration.study_runs import SETTINGS
from tests.orchestration.pipeline import calls, make_checkout
from tests.orchestration.studies import toy_study, write_study

ODD = {  # values that a shell, Hydra or YAML could take for something else
    "models.base_revision": "it's a b",
    "models.physics_encoder_revision": "1e3",
    "coupling.blocks": [0, 2],
    "train.optimizer.learning_rate": 1e-05,
    "train.ema_decay": 0.5,
}


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A checkout with the toy study, whose arm `phantom` has odd settings."""
    root = make_checkout(tmp_path / "checkout")
    study = toy_study(Path("models/mini"))
    study["arms"][1]["settings"] = ODD
    write_study(root, study)
    return root


def run(root: Path, command: str) -> None:
    env = {**NO_TELEMETRY, **os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    done = subprocess.run(["sh", "-ec", command], cwd=root, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_an_experiment_of_dvc_trains_with_the_settings_of_the_arm(checkout: Path):
    run(checkout, "dvc repro encode && git add . && git -c user.name=a -c user.email=a@b commit -qm start")
    check_outputs(checkout)
    calls(checkout)
    run(
        checkout,
        f"dvc exp run --single-item train {as_arguments(experiment_settings('toy', 'phantom', 7, (), checkout))}",
    )
    assert calls(checkout) == ["train"] and (checkout / "data/latents/index.json").is_file()
    study = load_study("toy", checkout)
    wanted = arm_params(study, study.arms[1], 7)
    of_training = (SETTINGS, (Role.NOT_IN_RESULT,))
    assert select(load_params(checkout / "params.yaml"), *of_training) == select(wanted, *of_training)
    assert experiment_settings("toy", "phantom", 7, (), checkout) == {}


def test_outputs_that_dvc_would_delete_are_refused(checkout: Path):
    for name in ("data/clips", "data/benchmark", "data/latents"):
        (checkout / name).mkdir(parents=True)
        (checkout / name / "index.json").write_text("made without DVC")
    with pytest.raises(UserError) as refused:
        check_outputs(checkout)
    said = "data/clips, data/benchmark, data/latents: not as in dvc.lock, so `dvc exp run` would delete it; "
    assert str(refused.value) == said + "`dvc commit --force prepare encode` keeps it"
    run(checkout, "dvc commit --force prepare encode")
    check_outputs(checkout)
    with pytest.raises(UserError, match=r"^dvc status: you are not inside of a DVC repository"):
        check_outputs(checkout.parent)


def test_a_held_arm_is_the_control_and_an_unknown_one_is_an_error(checkout: Path, capsys):
    params = checkout / "params.yaml"
    params.write_text(params.read_text().replace("  control: true", "  control: false"))
    found = experiment_settings("toy", "control", overrides=["train.steps=9"], root=checkout)
    assert found["train.control"] is True and found["train.steps"] == 9 and "train.seed" not in found
    assert "arm 'control' is held at alpha_z = 0: `phantom train` makes it as models/control" in capsys.readouterr().err
    assert json.loads(json.dumps(found)) == found
    with pytest.raises(UserError, match=r"^--arm 'fantom': study 'toy' has control, phantom; nearest: phantom$"):
        experiment_settings("toy", "fantom", root=checkout)
