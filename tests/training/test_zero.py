"""DeepSpeed's ZeRO-1, 2 and 3 on the CPU: the same norms, losses and weights as one process without DeepSpeed."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from accelerate.utils.deepspeed import DeepSpeedEngineWrapper

from phantom.data.storage import LocalFolder
from phantom.training import checkpoint, process_group
from phantom.training.objective import losses
from phantom.training.trainer import Trainer
from phantom.training.zero import ZeroLearner
from tests.training.processes import CONTEXT, Run, assert_trains_like, free_port
from tests.training.runs import SHARED, history, same, weights
from tests.training.test_wrong_norms import SIZE, batch, model, norm, trainable

pytest.importorskip("deepspeed", reason="needs the deepspeed extra")

pytestmark = pytest.mark.timeout(1800)  # starts many processes in sequence

STAGES = ("zero1", "zero2", "zero3")
ONE_IN_SHORT = ("zero2", *(pytest.param(stage, marks=pytest.mark.slow) for stage in ("zero1", "zero3")))


def newest(folder: Path) -> checkpoint.Checkpoint:
    """The newest checkpoint of the run in `folder`."""
    found = checkpoint.find_newest(LocalFolder(next((folder / "checkpoints").glob("phantom-*"))))
    assert found
    return found


@pytest.mark.parametrize("strategy", STAGES)
@pytest.mark.parametrize(
    ("ranks", "accumulation", "checkpointing"),
    [
        (2, 2, "full"),
        pytest.param(1, 1, "none", marks=pytest.mark.slow),
        pytest.param(1, 2, "none", marks=pytest.mark.slow),
        pytest.param(2, 1, "selective", marks=pytest.mark.slow),
    ],
)
def test_it_measures_and_trains_like_a_single_process_without_deepspeed(
    single_process, tmp_path, strategy, ranks, accumulation, checkpointing
):
    control = f"train.control={str(ranks == 2).lower()}"
    assert_trains_like(single_process, tmp_path, strategy, ranks, accumulation, checkpointing, control)

    if ranks == 2:
        assert all(r["alpha"] == 0 for r in history(tmp_path, "control"))

    # Strategies can resume each other: files hold the same weights, moments and moving average.
    ours, theirs = (dict(found.stream(found.keys)) for found in map(newest, (single_process.folder, tmp_path)))
    assert ours.keys() == theirs.keys()
    assert all(torch.allclose(ours[k], theirs[k], atol=1e-5) for k in ours)
    resumed = Trainer(single_process.params(*SHARED), tmp_path, "phantom", held=False)
    resumed.tracker.close()
    assert resumed.step == 4 and same(dict(resumed.learner.weights()), weights(tmp_path))


@pytest.mark.parametrize("strategy", ONE_IN_SHORT)
def test_a_stopped_run_resumes_bit_for_bit(single_process, tmp_path, strategy):
    runs = {}
    for kind in ("uninterrupted", "stopped"):
        folder = tmp_path / kind
        shutil.copytree(single_process.folder / "data", folder / "data")
        params = single_process.params(*SHARED, "train.steps=6", "train.processes=2", f"train.strategy={strategy}")
        if kind == "stopped":
            first = Run(params, folder)
            first.wait_until(lambda folder=folder: bool(list(folder.glob("checkpoints/*/step-*"))))
            first.stop(rank=1)
            assert first.wait() == [75, 75], first.log.read_text()
        run = Run(params, folder)
        assert run.wait() == [0, 0], run.log.read_text()
        runs[kind] = weights(folder), history(folder)
    assert same(runs["uninterrupted"][0], runs["stopped"][0]) and runs["uninterrupted"][1] == runs["stopped"][1]


@pytest.mark.parametrize("strategy", ONE_IN_SHORT)
def test_non_finite_gradients_are_skipped(single_process, tmp_path, strategy):
    shutil.copytree(single_process.folder / "data", tmp_path / "data")
    params = single_process.params(
        *SHARED, f"train.strategy={strategy}", "train.optimizer.learning_rate=1e30", "train.max_bad_steps=2"
    )
    run = Run(params, tmp_path)
    assert run.wait() == [1]
    assert "2 steps in a row without a finite gradient" in run.log.read_text()
    found = newest(tmp_path)
    assert all(torch.isfinite(w).all() for _, w in found.stream(found.keys))


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["zero2", "zero3"])
def test_bfloat16(single_process, tmp_path, strategy):
    shutil.copytree(single_process.folder / "data", tmp_path / "data")
    run = Run(single_process.params(*SHARED, f"train.strategy={strategy}", "train.precision=bfloat16"), tmp_path)
    assert run.wait() == [0], run.log.read_text()
    for a, b in zip(history(single_process.folder), history(tmp_path), strict=True):
        assert a["loss"] != b["loss"] == pytest.approx(a["loss"], rel=0.05)
        assert b["grad_norm_physics"] == pytest.approx(a["grad_norm_physics"], rel=0.05)


# --- incorrect methods ------------------------------------------------------------------------------------------------


def try_methods(params, folder, methods: tuple[str, ...]) -> None:
    """Runs in its own process. Writes the result of each method to `folder` as JSON."""
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    torch.set_num_threads(1)
    own, whole = model(), batch(range(SIZE))
    learner = ZeroLearner(own, params.train, process_group.join(params.train), None)
    engine, found = learner.model, {}
    for method in methods:
        each = losses(engine, whole)
        physics, video = each.physics.sum() / SIZE, each.video.sum() / SIZE
        try:
            if method == "autograd.grad":
                given = torch.autograd.grad(physics, list(learner.named.values()), allow_unused=True)
                found[method] = norm(given)
            if method == "two backwards":
                engine.set_gradient_accumulation_boundary(True)
                engine.backward(physics, retain_graph=True)
                engine.backward(video)
                found[method] = float(learner._norm())
            if method == "accelerator.backward":
                before = {name: weight.clone() for name, weight in learner.weights()}
                wrapper = DeepSpeedEngineWrapper(engine)  # what `accelerator.backward` calls
                wrapper.backward(physics)
                found[method] = "stepped" if not same(before, dict(learner.weights())) else "no step"
        except Exception as error:
            found[method] = type(error).__name__
            break  # the engine is in an undefined state
    (folder / "found.json").write_text(json.dumps(found))


@pytest.mark.parametrize("strategy", ONE_IN_SHORT)
def test_the_documented_methods_lose_a_gradient_raise_or_step(single_process, tmp_path, strategy):
    found = {}
    for method in ("autograd.grad", "two backwards", "accelerator.backward"):
        params = single_process.params(f"train.strategy={strategy}")
        process = CONTEXT.Process(target=try_methods, args=(params, tmp_path, (method,)))
        process.start()
        process.join(500)
        found |= json.loads((tmp_path / "found.json").read_text())
    own, whole = model(), batch(range(SIZE))
    each = losses(own, whole)
    both = norm(torch.autograd.grad((each.physics.sum() + each.video.sum()) / SIZE, trainable(own)))
    assert isinstance(found["autograd.grad"], str)  # an error
    if strategy == "zero3":
        assert isinstance(found["two backwards"], str)  # an error too
    else:
        assert found["two backwards"] != pytest.approx(both, rel=0.01)  # and no error
    assert found["accelerator.backward"] == "stepped"  # it applied one loss's gradient right away
