"""Steps with a non-finite gradient are skipped, on a GPU without a host sync."""

from __future__ import annotations

import math
import traceback
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from phantom.errors import StageFailed
from phantom.training import checkpoint, process_group
from phantom.training.learner import make_optimizer
from phantom.training.trainer import Trainer
from tests.training.runs import weights


def imitate_gpu(trainer):
    """Uses the fused optimizer, which skips non-finite gradients itself, and avoids host syncs, as on a GPU."""
    learner = trainer.learner
    learner.optimizer = make_optimizer(learner.parameters, trainer.settings.optimizer, fused=True)
    trainer.reads_are_free = False


def test_a_step_without_measurement_has_no_host_sync(run_params):
    """No tensor value is read, which on a GPU would wait for all queued work."""
    trainer = Trainer(run_params("train.recursive_weight.every=100"), Path(), "phantom", held=False)
    trainer.tracker.close()
    batches = trainer._batches()
    trainer.train_step([next(batches)])  # measures the norms

    class Reads(TorchDispatchMode):
        seen: list[str] = []

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default):
                self.seen.append("".join(traceback.format_stack(limit=12)))
            return func(*args, **(kwargs or {}))

    imitate_gpu(trainer)
    batch = next(batches)
    with Reads() as reads:
        figures = trainer.train_step([batch])
    assert not reads.seen, reads.seen[0]
    assert all(math.isfinite(float(value)) for value in figures.values())


def test_the_fused_optimizer_skips_non_finite_gradients(run_params, capsys):
    trainer = Trainer(run_params("train.recursive_weight.every=100", "train.max_bad_steps=2"), Path(), "phantom", False)
    trainer.tracker.close()
    imitate_gpu(trainer)
    batches = trainer._batches()
    for bad in (False, True, True, False):
        batch = next(batches)
        if bad:
            batch.video.fill_(math.nan)
        before = [p.detach().clone() for p in trainer.learner.parameters]
        trainer.train_step([batch])
        changed = [not torch.equal(p, b) for p, b in zip(trainer.learner.parameters, before, strict=True)]
        assert any(changed) != bad
    assert int(trainer.bad) == 0 and trainer.step == 4
    batch.video.fill_(math.nan)
    trainer.train_step([batch])
    trainer.train_step([batch])
    with pytest.raises(StageFailed, match="2 steps in a row"):  # at the next host sync
        trainer._stop_if_bad()


def test_non_finite_gradients_are_skipped_and_too_many_stop_the_run(run_params, monkeypatch, capsys):
    params = run_params("train.max_bad_steps=2", "train.checkpoint_every=1")
    original = process_group.sum_over_processes
    poisoned: set[int] = {2}

    def poison(tensors):
        if trainer.step in poisoned and len(tensors) == len(trainer.learner.parameters):
            next(t for t in tensors if t is not None).fill_(float("nan"))
        original(tensors)

    monkeypatch.setattr("phantom.training.process_group.sum_over_processes", poison)
    trainer = Trainer(params, Path(), "phantom", held=False)
    trainer.run()
    assert "step 3: the gradient is not finite, the step is skipped" in capsys.readouterr().err
    assert all(torch.isfinite(w).all() for w in weights().values())

    poisoned = {2, 3, 4}
    trainer = Trainer(
        run_params("train.max_bad_steps=2", "train.checkpoint_every=1", "train.seed=9"), Path(), "phantom", False
    )
    with pytest.raises(StageFailed, match="2 steps in a row"):
        trainer.run()
    found = checkpoint.find_newest(trainer.checkpoints)
    assert all(torch.isfinite(w).all() for _, w in found.stream(found.keys))
