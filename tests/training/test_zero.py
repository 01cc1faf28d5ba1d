"""DeepSpeed's ZeRO-1, 2 and 3 on the CPU: the same norms, losses and weights as one process without it."""

from __future__ import annotations

import json
import os
import shutil

import pytest
import torch
from accelerate.utils.deepspeed import DeepSpeedEngineWrapper

from phantom.training import checkpoint, process_group
from phantom.training.objective import losses
from phantom.training.trainer import Trainer
from phantom.training.zero import ZeroLearner
from tests.training.processes import CONTEXT, Run, free_port, trains_as
from tests.training.runs import SHARED, history, same, weights
from tests.training.test_wrong_norms import SIZE, batch, model, norm, trainable

pytest.importorskip("deepspeed", reason="needs the deepspeed extra")

pytestmark = pytest.mark.timeout(1800)  # many processes, one after the other

STAGES = ("zero1", "zero2", "zero3")
ONE_IN_SHORT = ("zero2", *(pytest.param(stage, marks=pytest.mark.slow) for stage in ("zero1", "zero3")))


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
def test_it_measures_and_trains_as_one_process_without_it(
    alone, tmp_path, strategy, ranks, accumulation, checkpointing
):
    control = f"train.control={str(ranks == 2).lower()}"
    trains_as(alone, tmp_path, strategy, ranks, accumulation, checkpointing, control)

    if ranks == 2:
        assert all(r["alpha"] == 0 for r in history(tmp_path, "control"))

    # Any strategy takes up what another has saved: weights, moments and the moving average are the same in the file.
    ours, theirs = (checkpoint.load_newest(next((f / "checkpoints").glob("phantom-*"))) for f in (alone.folder, tmp_path))
    for group in ("model", "optimizer", "average"):
        a, b = ours.tensors(group), theirs.tensors(group)
        assert a.keys() == b.keys()
        assert all(torch.allclose(a[k], b[k], atol=1e-5) for k in a), group
    resumed = Trainer(alone.params(*SHARED), tmp_path, "phantom", held=False)
    resumed.tracker.close()
    assert resumed.step == 4 and same(resumed.learner.weights(keep=True), weights(tmp_path))


@pytest.mark.parametrize("strategy", ONE_IN_SHORT)
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


@pytest.mark.parametrize("strategy", ONE_IN_SHORT)
def test_a_gradient_that_is_not_finite_is_skipped(alone, tmp_path, strategy):
    shutil.copytree(alone.folder / "data", tmp_path / "data")
    params = alone.params(
        *SHARED, f"train.strategy={strategy}", "train.optimizer.learning_rate=1e30", "train.max_bad_steps=2"
    )
    run = Run(params, tmp_path)
    assert run.wait() == [1]
    assert "2 steps in a row without a finite gradient" in run.said.read_text()
    found = checkpoint.load_newest(next((tmp_path / "checkpoints").iterdir()))
    assert all(torch.isfinite(w).all() for w in found.tensors("model").values())


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["zero2", "zero3"])
def test_bfloat16(alone, tmp_path, strategy):
    shutil.copytree(alone.folder / "data", tmp_path / "data")
    run = Run(alone.params(*SHARED, f"train.strategy={strategy}", "train.precision=bfloat16"), tmp_path)
    assert run.wait() == [0], run.said.read_text()
    for a, b in zip(history(alone.folder), history(tmp_path), strict=True):
        assert a["loss"] != b["loss"] == pytest.approx(a["loss"], rel=0.05)
        assert b["grad_norm_physics"] == pytest.approx(a["grad_norm_physics"], rel=0.05)


# --- the ways that are wrong ------------------------------------------------------------------------------------------


def tried(params, folder, ways: tuple[str, ...]) -> None:
    """In a process of its own: what comes of each way, as JSON in `folder`."""
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    torch.set_num_threads(1)
    own, whole = model(), batch(range(SIZE))
    learner = ZeroLearner(own, params.train, process_group.join(params.train), None)
    engine, found = learner.model, {}
    for way in ways:
        each = losses(engine, whole)
        physics, video = each.physics.sum() / SIZE, each.video.sum() / SIZE
        try:
            if way == "autograd.grad":
                given = torch.autograd.grad(physics, list(learner.named.values()), allow_unused=True)
                found[way] = norm(given)
            if way == "two backwards":
                engine.set_gradient_accumulation_boundary(True)
                engine.backward(physics, retain_graph=True)
                engine.backward(video)
                found[way] = float(learner._norm())
            if way == "accelerator.backward":
                before = learner.weights(keep=True)
                wrapper = DeepSpeedEngineWrapper(engine)  # what `accelerator.backward` calls
                wrapper.backward(physics)
                found[way] = "stepped" if not same(before, learner.weights(keep=True)) else "no step"
        except Exception as error:
            found[way] = type(error).__name__
            break  # the engine is not to be trusted any more
    (folder / "found.json").write_text(json.dumps(found))


@pytest.mark.parametrize("strategy", ONE_IN_SHORT)
def test_the_documented_ways_lose_a_gradient_raise_or_step(alone, tmp_path, strategy):
    found = {}
    for way in ("autograd.grad", "two backwards", "accelerator.backward"):
        params = alone.params(f"train.strategy={strategy}")
        process = CONTEXT.Process(target=tried, args=(params, tmp_path, (way,)))
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
    assert found["accelerator.backward"] == "stepped"  # the norm of one loss's gradient, and it is already applied
