"""`train.init_from`: a new run starts from the weights of an export or a checkpoint, with other settings."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from phantom.data.storage import LocalFolder
from phantom.errors import UserError
from phantom.model import PhantomTransformer3DModel
from phantom.training import checkpoint
from phantom.training.trainer import Trainer, train
from tests.training.runs import same, weights


@pytest.fixture
def earlier(run_params) -> Path:
    """The checkpoints of a finished run of 4 steps, with a moving average."""
    train(run_params("train.steps=4", "train.ema_decay=0.5"))
    (folder,) = Path("checkpoints").glob("phantom-*")
    return folder


def start(params) -> Trainer:
    trainer = Trainer(params, Path(), "phantom", held=False)
    trainer.tracker.close()
    return trainer


def test_a_run_starts_from_an_export_or_a_checkpoint(run_params, earlier, capsys):
    expected = weights()
    capsys.readouterr()
    for where in ("models/phantom", str(earlier), f"{earlier}/step-0000004"):
        trainer = start(run_params(f"train.init_from={where}", "train.optimizer.learning_rate=0.5"))
        assert trainer.step == 0 and trainer.folder != earlier and not trainer.learner.optimizer.state
        assert same(dict(trainer.learner.weights()), expected)
        said = capsys.readouterr().err
        assert f"train.init_from: {where}: {len(expected)} of {len(expected)} weights are taken from it\n" in said
    (before,) = (c for c in checkpoint.find_all(LocalFolder(earlier))[0] if c.step == 2)
    trainer = start(run_params(f"train.init_from={earlier}/step-0000002"))
    assert same(dict(trainer.learner.weights()), dict(before.exported_weights()))
    assert not same(dict(trainer.learner.weights()), expected)


def test_weights_that_do_not_fit_are_named(run_params, earlier, capsys):
    capsys.readouterr()
    trainer = start(run_params("train.init_from=models/phantom", "physics.ffn_dim=24", "coupling.blocks=[0]"))
    said, now = capsys.readouterr().err, dict(trainer.learner.weights())
    fitting = {name: w for name, w in weights().items() if name in now and "physics.ffn" not in name}
    assert fitting and all(torch.equal(now[name], weight) for name, weight in fitting.items())
    assert "blocks.0.physics.ffn.net.0.proj.weight (96, 48) where the model has (24, 48)" in said
    assert "; not used: blocks.1.coupling." in said and "; not in it" not in said


def test_another_unit_of_z_is_named(run_params, capsys):
    train(run_params("physics.standardize=true", "train.steps=1"))
    config = Path("models/phantom/config.json")
    found = json.loads(config.read_text())
    std = PhantomTransformer3DModel.from_export("models/phantom").config.physics["std"]
    changes = {
        "": {"std": std},
        "; z has other statistics there: means of channels up to 0 std apart, std up to 1.50 times": {
            "std": [2 * std[0] / 3, *std[1:]]
        },
        "; z was not standardized there (physics.standardize)": {"mean": None, "std": None},
    }
    for note, change in changes.items():
        config.write_text(json.dumps(found | {"physics": found["physics"] | change}))
        capsys.readouterr()
        start(run_params("physics.standardize=true", "train.init_from=models/phantom"))
        assert f" weights are taken from it{note}\n" in capsys.readouterr().err


def test_adapters_start_from_an_export_of_adapters(run_params, capsys):
    lora = ("train.method=lora", "train.lora.rank=4")
    train(run_params("train.steps=2", *lora))
    expected = dict(PhantomTransformer3DModel.from_export("models/lora").trainable_parameters())
    capsys.readouterr()
    trainer = Trainer(run_params("train.init_from=models/lora", *lora), Path(), "lora", held=False)
    trainer.tracker.close()
    assert same(dict(trainer.learner.weights()), expected)
    said = f"train.init_from: models/lora: {len(expected)} of {len(expected)} weights are taken from it"
    assert said in capsys.readouterr().err.splitlines()


def test_a_resumed_run_does_not_start_again(run_params, earlier, capsys):
    params = run_params("train.init_from=models/phantom", "train.optimizer.decay=constant", "train.steps=2")
    train(params)
    capsys.readouterr()
    trainer = start(params)
    assert trainer.step == 2 and "init_from" not in capsys.readouterr().err


def test_what_cannot_be_started_from_is_one_line(run_params, earlier):
    Path("empty").mkdir()
    with pytest.raises(UserError, match=r"^train.init_from: empty: neither an export nor a checkpoint; accepted: "):
        start(run_params("train.init_from=empty"))
    config = Path("models/phantom/config.json")
    other = json.loads(config.read_text()) | {"base_fingerprint": "another", "base_id": "models/other"}
    config.write_text(json.dumps(other))
    with pytest.raises(UserError, match=r"trained on the base models/other, and models.base is .*accepted: "):
        start(run_params("train.init_from=models/phantom"))
    with pytest.raises(UserError, match=r"^train.init_from: \./models/phantom: replaced before the control starts"):
        train(run_params("train.init_from=./models/phantom", "train.control=true"))
