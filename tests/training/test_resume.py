"""When a run is stopped it saves, and later runs resume it or start anew, depending on settings and data."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from phantom.data.storage import LocalFolder
from phantom.errors import Interrupted
from phantom.training import checkpoint
from phantom.training.trainer import Trainer, train
from tests.training.runs import history, same, stop_and_go_on, weights


def test_a_stopped_run_saves_and_resumes_bit_for_bit(run_params, monkeypatch):
    params = run_params("train.steps=10", "train.checkpoint_every=100")
    train(params)
    expected, curve = weights(), history()
    stop_and_go_on(params, monkeypatch)
    assert same(weights(), expected) and history() == curve


def test_a_run_on_filtered_clips_is_another_one_and_resumes_bit_for_bit(run_params, monkeypatch, capsys):
    params = run_params("data.filter=cuts == 0", "train.steps=10", "train.checkpoint_every=100")
    train(params)
    assert "train phantom: data.filter leaves 6 of 12 training clips\n" in capsys.readouterr().err
    expected, curve = weights(), history()
    stop_and_go_on(params, monkeypatch)
    assert same(weights(), expected) and history() == curve
    folders = {Trainer(run_params(*more), Path(), "phantom", False).folder for more in ((), ("data.filter=cuts == 0",))}
    assert len(folders) == 2


def test_a_stop_waits_for_the_checkpoint_that_is_being_written(run_params, monkeypatch):
    create, step, steps = LocalFolder.create, Trainer.train_step, []

    def slow(self, name):
        time.sleep(0.5)
        return create(self, name)

    def signalled(self, micro_batches):
        steps.append(self.step)
        if self.step == 2:  # the checkpoint of step 2 is being written
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, micro_batches)

    monkeypatch.setattr(LocalFolder, "create", slow)
    monkeypatch.setattr(Trainer, "train_step", signalled)
    with pytest.raises(Interrupted, match="after step 3, which is saved"):
        train(run_params("train.checkpoint_every=2"))
    (folder,) = Path("checkpoints").glob("phantom-*")
    committed, others = checkpoint.find_all(LocalFolder(folder))
    assert steps == [0, 1, 2] and [c.step for c in committed] == [2, 3] and not others


def test_changed_settings_start_a_new_run(run_params):
    first = Trainer(run_params(), Path(), "phantom", False)
    other = Trainer(run_params("train.optimizer.learning_rate=0.5"), Path(), "phantom", False)
    saving = Trainer(run_params("train.checkpoint_every=1", "train.keep_checkpoints=9"), Path(), "phantom", False)
    control = Trainer(run_params(), Path(), "phantom", held=True)
    assert first.folder == saving.folder
    assert len({first.folder, other.folder, control.folder}) == 3
