"""Activation checkpointing and compilation change what is recomputed and compiled, not what is learnt."""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
from diffusers.models.attention_dispatch import attention_backend
from torch.utils._python_dispatch import TorchDispatchMode

from phantom.errors import UserError
from phantom.training.trainer import Trainer, train
from tests.training.runs import weights


@pytest.mark.parametrize("kind", ["full", "selective"])
def test_activation_checkpointing_trains_the_same_weights(run_params, kind):
    shared = ("train.steps=3", "train.recursive_weight.every=2")
    train(run_params(*shared))
    plain = weights()
    shutil.rmtree("checkpoints")
    train(run_params(*shared, f"train.activation_checkpointing={kind}"))
    assert all(torch.allclose(value, plain[name], atol=1e-6) for name, value in weights().items())


def test_selective_checkpointing_recomputes_all_but_attention(run_params):
    class Calls(TorchDispatchMode):
        attention = products = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            name = str(func)
            self.attention += "scaled_dot_product" in name and "backward" not in name
            self.products += func is torch.ops.aten.addmm.default
            return func(*args, **(kwargs or {}))

    found = {}
    for name in ("none", "selective", "full", "half"):
        kind = ("selective", "train.selective_every=2") if name == "half" else (name,)
        checkpointing = (f"train.activation_checkpointing={kind[0]}", *kind[1:])
        settings = run_params("train.recursive_weight.every=100", *checkpointing)
        trainer = Trainer(settings, Path(), "phantom", held=False)
        trainer.tracker.close()
        batches = trainer._batches()
        trainer.train_step([next(batches)])  # measures the norms, with full checkpointing
        with Calls() as calls:
            trainer.train_step([next(batches)])
        found[name] = calls
    assert found["none"].attention == found["selective"].attention == found["full"].attention / 2
    assert found["none"].attention * 1.5 == found["half"].attention
    assert found["none"].products < found["selective"].products == found["full"].products


def test_selective_checkpointing_that_keeps_nothing_is_one_line(run_params):
    selective = "train.activation_checkpointing=selective"
    found = r"train.selective_every: found 3, which keeps nothing of the model's 2 blocks; accepted: 1 to 2"
    with pytest.raises(UserError, match=found):
        train(run_params(selective, "train.selective_every=3"))
    settings = run_params(selective, "train.recursive_weight.every=100", "train.recursive_weight.mode=fixed")
    trainer = Trainer(settings, Path(), "phantom", held=False)
    trainer.tracker.close()
    math = attention_backend("_native_math")  # no operation of its own: products and a softmax
    with math, pytest.raises(UserError, match="found selective, but no operation of attention that it knows"):
        trainer.train_step([next(trainer._batches())])


@pytest.mark.slow
def test_compiled_blocks_need_few_graphs_and_validation_needs_none(run_params, monkeypatch):
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    shared = ("physics.num_layers=1", "evaluate.sampling.steps=2", "train.recursive_weight.every=3")
    compiled = ("train.compile=true", "train.activation_checkpointing=selective")
    train(run_params(*shared, *compiled, "train.validate_every=2", "train.sample_every=2"))
    assert counters["stats"]["unique_graphs"] == 4  # two kinds of block, each with a static and a dynamic shape
    found = weights()
    shutil.rmtree("checkpoints")
    train(run_params(*shared))
    assert all(torch.allclose(found[name], value, atol=1e-5) for name, value in weights().items())
