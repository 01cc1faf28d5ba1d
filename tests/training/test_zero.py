"""DeepSpeed's ZeRO-1, 2 and 3 on the CPU: the same norms, losses and weights as one process without it."""

from __future__ import annotations

import shutil

import pytest
import torch

from phantom.training import checkpoint
from phantom.training.trainer import Trainer, train
from tests.training.processes import Run
from tests.training.runs import history, same, weights

pytest.importorskip("deepspeed", reason="needs the deepspeed extra")

SHARED = ("train.steps=4", "train.seed=4", "train.ema_decay=0.5", "train.recursive_weight.every=2")
STAGES = ("zero1", "zero2", "zero3")


@pytest.fixture(scope="module")
def alone(tmp_path_factory, make_place):
    """The run of one process without DeepSpeed, which measures no norm after the first: folder."""
    place = make_place(tmp_path_factory.mktemp("alone"))
    train(place.params(*SHARED), place.folder)
    return place


@pytest.mark.parametrize("strategy", STAGES)
@pytest.mark.parametrize(
    ("ranks", "accumulation", "checkpointing"),
    [
        (1, 1, "none"),
        (2, 2, "full"),
        pytest.param(1, 2, "none", marks=pytest.mark.slow),
        pytest.param(2, 1, "selective", marks=pytest.mark.slow),
    ],
)
def test_it_measures_and_trains_as_one_process_without_it(
    alone, tmp_path, strategy, ranks, accumulation, checkpointing
):
    shutil.copytree(alone.folder / "data", tmp_path / "data")
    params = alone.params(
        *SHARED,
        f"train.strategy={strategy}",
        f"train.processes={ranks}",
        f"train.accumulation={accumulation}",
        f"train.activation_checkpointing={checkpointing}",
    )
    run = Run(params, tmp_path)
    assert run.wait() == [0] * ranks, run.said.read_text()
    for a, b in zip(history(alone.folder), history(tmp_path), strict=True):
        for key in ("grad_norm_physics", "grad_norm", "loss", "loss_video", "loss_physics"):
            assert b[key] == pytest.approx(a[key], rel=1e-5), key
    expected, found = weights(alone.folder), weights(tmp_path)
    assert all(torch.allclose(found[name], value, atol=1e-5) for name, value in expected.items())

    # Any strategy takes up what another has saved: weights, moments and the moving average are the same in the file.
    ours, theirs = (checkpoint.newest(next((f / "checkpoints").iterdir())) for f in (alone.folder, tmp_path))
    for group in ("model", "optimizer", "average"):
        a, b = ours.tensors(group), theirs.tensors(group)
        assert a.keys() == b.keys()
        assert all(torch.allclose(a[k], b[k], atol=1e-5) for k in a), group
    resumed = Trainer(alone.params(*SHARED), tmp_path, "phantom", held=False)
    resumed.tracker.close()
    assert resumed.step == 4 and same(resumed.learner.weights(keep=True), found)


@pytest.mark.parametrize("strategy", STAGES)
def test_a_run_that_was_stopped_goes_on_to_the_same_bits(alone, tmp_path, strategy):
    runs = {}
    for kind in ("whole", "stopped"):
        folder = tmp_path / kind
        shutil.copytree(alone.folder / "data", folder / "data")
        params = alone.params(*SHARED, "train.steps=6", "train.processes=2", f"train.strategy={strategy}")
        if kind == "stopped":
            first = Run(params, folder)
            first.wait_until(lambda folder=folder: bool(list(folder.glob("checkpoints/*/step-*"))))
            first.stop(rank=1)
            assert first.wait() == [75, 75], first.said.read_text()
        run = Run(params, folder)
        assert run.wait() == [0, 0], run.said.read_text()
        runs[kind] = weights(folder), history(folder)
    assert same(runs["whole"][0], runs["stopped"][0]) and runs["whole"][1] == runs["stopped"][1]


@pytest.mark.parametrize("strategy", STAGES)
def test_a_gradient_that_is_not_finite_is_skipped(alone, tmp_path, strategy):
    shutil.copytree(alone.folder / "data", tmp_path / "data")
    params = alone.params(
        *SHARED, f"train.strategy={strategy}", "train.optimizer.learning_rate=1e30", "train.max_bad_steps=2"
    )
    run = Run(params, tmp_path)
    assert run.wait() == [1]
    assert "2 steps in a row without a finite gradient" in run.said.read_text()
    found = checkpoint.newest(next((tmp_path / "checkpoints").iterdir()))
    assert all(torch.isfinite(w).all() for w in found.tensors("model").values())
