"""The measured gradient norms equal those of plain autograd over the global batch, and drive alpha_z."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from phantom.data.latent_set import LatentSet
from phantom.training.build import build_model
from phantom.training.conditioning import Batch, TrainingSet
from phantom.training.objective import losses
from phantom.training.sampler import DistributedBatchSampler
from phantom.training.trainer import Trainer, train
from tests.training.runs import history, same, weights


def start(params, folder: Path, name: str = "params.yaml") -> subprocess.Popen:
    """Starts `phantom train` in its own process tree."""
    (folder / name).write_text(yaml.safe_dump(params.model_dump(mode="json", by_alias=True)))
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).resolve().parents[2] / "src")}
    command = [sys.executable, "-m", "phantom.cli", "train", "--params", name]
    return subprocess.Popen(command, cwd=folder, env=env, stderr=subprocess.PIPE, text=True, start_new_session=True)


def reference_gradients(params, alpha=0.0):
    """Norms of both losses' gradients over the first global batch, and their weighted sum, by plain autograd."""
    latents = LatentSet(Path("data/latents"), "train")
    model = build_model(params, latents[0].physics.shape[0])
    (keys,) = list(DistributedBatchSampler(latents.shapes, params.train.batch_size, params.train.seed, range(1)))
    each = losses(model, Batch.collate([TrainingSet(latents, params)[key] for key in keys]))
    named = dict(model.trainable_parameters())
    apart = [
        torch.autograd.grad(loss.mean(), list(named.values()), retain_graph=True, allow_unused=True)
        for loss in (each.video, each.physics)
    ]
    norms = [float(torch.cat([g.flatten() for g in gs if g is not None]).norm()) for gs in apart]
    total = {
        name: sum(w * g for w, g in ((1, v), (alpha, z)) if g is not None)
        for name, v, z in zip(named, *apart, strict=True)
    }
    return norms, total


@pytest.mark.parametrize("checkpointing", ["none", "full", "selective"])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_norms_and_gradient_are_those_of_the_global_batch(run_params, accumulation, checkpointing):
    params = run_params(f"train.accumulation={accumulation}", f"train.activation_checkpointing={checkpointing}")
    trainer = Trainer(params, Path(), "phantom", held=False)
    trainer.weight.since_reset = 3  # alpha 0.75
    seen = {}
    learner = trainer.learner
    learner.optimizer.step = lambda: seen.update(
        {n: p.grad.clone() for n, p in zip(learner.named, learner.parameters, strict=True)}
    )
    learner.clip_norm = 1e9
    batches = trainer._batches()
    figures = trainer.train_step([next(batches) for _ in range(accumulation)])
    trainer.tracker.close()
    (norm_v, norm_z), gradient = reference_gradients(params, alpha=0.75)
    assert figures["grad_norm_video"] == pytest.approx(norm_v, rel=1e-5)
    assert figures["grad_norm_physics"] == pytest.approx(norm_z, rel=1e-5)
    assert figures["alpha"] == 0.75
    for name, expected in gradient.items():
        assert torch.allclose(seen[name], expected, atol=1e-6), name


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2", pytest.param("zero2", marks=pytest.mark.slow)])
def test_two_processes_measure_and_train_like_one(run_params, tmp_path, strategy):
    shared = ("train.steps=3", "train.seed=4", "train.recursive_weight.every=2", "train.ema_decay=0.5")
    params = run_params(*shared)
    train(params)
    one, expected = history(), weights()
    two = run_params(*shared, "train.processes=2", f"train.strategy={strategy}")
    shutil.copytree(tmp_path / "data", tmp_path / "two/data")
    process = start(two, tmp_path / "two")
    _, stderr = process.communicate(timeout=300)
    assert process.returncode == 0, stderr
    for a, b in zip(one, history(root=tmp_path / "two"), strict=True):
        for key in {"grad_norm_physics", "grad_norm_video", "grad_norm", "loss", "loss_video"} & b.keys():
            assert b[key] == pytest.approx(a[key], rel=1e-5), key
    together = weights(root=tmp_path / "two")
    assert all(torch.allclose(together[k], expected[k], atol=1e-6) for k in expected)
    # The norms equal those of plain autograd over the whole batch.
    norms, _ = reference_gradients(params)
    assert [one[0]["grad_norm_video"], one[0]["grad_norm_physics"]] == pytest.approx(norms, rel=1e-5)
    # One process resumes the checkpoint of two.
    resumed = Trainer(params, tmp_path / "two", "phantom", held=False)
    assert resumed.step == 3
    assert same(dict(resumed.learner.weights()), together)
    resumed.tracker.close()


def test_a_norm_above_the_threshold_resets_alpha(run_params):
    params = run_params("train.steps=5")
    (_, norm_z), _ = reference_gradients(params)
    train(run_params("train.steps=5", f"train.recursive_weight.threshold={norm_z * 0.5}"))
    assert history()[0]["alpha"] == 0 and history()[-1]["resets"] > 0


def test_the_head_gradient_triggers_measurements_and_changes_nothing_else(run_params):
    shared = ("train.recursive_weight.every=3", "train.steps=5", "train.accumulation=2")
    train(run_params(*shared))
    exact, expected = history(), weights()
    train(run_params(*shared, "train.recursive_weight.mode=head"))
    assert same(weights(), expected) and history() == exact
    # With a threshold just above the first norm, any higher estimate from the head triggers a measurement.
    norm = exact[0]["grad_norm_physics"]
    train(run_params(*shared, "train.recursive_weight.mode=head", f"train.recursive_weight.threshold={norm * 1.0001}"))
    measured = [r["grad_norm_physics"] for r in history()]
    assert len(set(measured)) > len({r["grad_norm_physics"] for r in exact})
