"""AdamW and the moving average in host memory: the same training, and the same checkpoints."""

from __future__ import annotations

import pytest
import torch

from phantom.data.storage import LocalFolder
from phantom.errors import UserError
from phantom.training import checkpoint
from phantom.training.checkpoint_writer import CheckpointWriter
from phantom.training.learner import Learner
from phantom.training.objective import losses
from phantom.training.trainer import train
from tests.training.test_wrong_norms import SIZE, batch, model

CPU = torch.device("cpu")
OFFLOADED = "train.offload=optimizer"


@pytest.fixture
def make_learner(make_params):
    """A learner, from the checkpoints in a folder if there is one."""

    def make(*overrides: str, found: checkpoint.Checkpoint | None = None) -> Learner:
        settings = make_params("train.batch_size=4", "train.ema_decay=0.5", *overrides).train
        return Learner(model(), settings, CPU, found)

    return make


def take_steps(learner: Learner, steps: range) -> list[float]:
    """Takes steps, the even ones measured and the third one not finite. Returns the gradients' norms."""
    norms = []
    for step in steps:

        def forward(step: int = step):
            each = losses(learner.model, batch(range(step, step + SIZE)))
            yield each._replace(video=each.video / 0) if step == 2 else each

        if step % 2 == 0:
            learner.measured_backward(forward, lambda norms: 0.5)
        else:
            learner.backward(forward, 0.3)
        norms.append(float(learner.update(1e-2, step)))
    return norms


def saved(learner: Learner, folder) -> checkpoint.Checkpoint:
    """A checkpoint of the learner's tensors."""
    writer = CheckpointWriter(LocalFolder(folder), 3, CPU)
    writer.save(3, learner.tensors(), {}, 0.0)
    writer.wait()
    writer.close()
    found = checkpoint.find_newest(LocalFolder(folder))
    assert found
    return found


def test_it_trains_and_goes_on_as_without(make_learner, tmp_path):
    plain, offloaded = make_learner(), make_learner(OFFLOADED)
    first = [take_steps(learner, range(3)) for learner in (plain, offloaded)]
    assert first[1] == pytest.approx(first[0], rel=1e-5, nan_ok=True)
    assert all(p is not copy for p, copy in zip(offloaded.parameters, offloaded.stepped, strict=True))
    found = saved(offloaded, tmp_path)
    assert set(found.keys) == set(plain.tensors())
    again, elsewhere = make_learner(OFFLOADED, found=found), make_learner(found=found)
    learners = (plain, offloaded, again, elsewhere)
    for learner in learners:
        take_steps(learner, range(3, 6))
    expected, *others = (dict(learner.tensors()) for learner in learners)
    for tensors in others:
        for name, tensor in expected.items():
            assert torch.allclose(tensors[name], tensor, rtol=1e-4, atol=1e-5), name
    assert all(torch.equal(others[0][name], others[1][name]) for name in expected)
    with again.averaged():
        assert torch.equal(again.parameters[0], others[0][f"average.{next(iter(again.named))}"])
    assert torch.equal(again.parameters[0], again.stepped[0])


def test_it_needs_a_gpu(run_params):
    with pytest.raises(
        UserError, match=r"^train\.offload: found optimizer, and no GPU to make room on; accepted: none$"
    ):
        train(run_params(OFFLOADED))
