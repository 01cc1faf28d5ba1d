"""A run goes on under another strategy or on another number of processes, with the losses of an uninterrupted one."""

from __future__ import annotations

import shutil

import pytest

from phantom.data.storage import LocalFolder
from phantom.training import checkpoint
from tests.training.processes import Run
from tests.training.runs import SHARED, assert_same_training

pytestmark = pytest.mark.timeout(1800)  # starts many processes in sequence

ONE, SHARDED, REPLICATED = ("ddp", 1), ("fsdp2", 2), ("ddp", 2)
MESH = ("fsdp2", 4, "train.mesh.replicate=2")  # two copies of the weights, each sharded over two processes
STEPS = ("train.optimizer.decay=constant", "train.checkpoint_every=2")


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, make_workspace):
    """A workspace in which a run of one process took 6 steps."""
    workspace = make_workspace(tmp_path_factory.mktemp("uninterrupted"))
    run = Run(workspace.params(*SHARED, *STEPS, "train.steps=6"), workspace.folder)
    assert run.wait() == [0], run.log.read_text()
    return workspace


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (SHARDED, ONE),
        (MESH, SHARDED),
        pytest.param(ONE, MESH, marks=pytest.mark.slow),
        pytest.param(ONE, SHARDED, marks=pytest.mark.slow),
        pytest.param(REPLICATED, SHARDED, marks=pytest.mark.slow),
        pytest.param(SHARDED, ("fsdp2", 4), marks=pytest.mark.slow),
        pytest.param(SHARDED, ("zero2", 2), marks=pytest.mark.slow),
    ],
)
def test_a_run_goes_on_with_other_shards(uninterrupted, tmp_path, first, second):
    if "zero2" in second:
        pytest.importorskip("deepspeed", reason="needs the deepspeed extra")
    shutil.copytree(uninterrupted.folder / "data", tmp_path / "data")
    for (strategy, ranks, *mesh), steps in ((first, 4), (second, 6)):
        layout = (f"train.strategy={strategy}", f"train.processes={ranks}", *mesh)
        run = Run(uninterrupted.params(*SHARED, *STEPS, *layout, f"train.steps={steps}"), tmp_path)
        assert run.wait() == [0] * ranks, run.log.read_text()
        if steps == 4:
            (folder,) = tmp_path.glob("checkpoints/phantom-*")
            found = checkpoint.find_newest(LocalFolder(folder))
            assert found and found.step == 4
            shards = {name for name in found.record.files if name.endswith(".distcp")}
            assert shards == {f"__{rank}_0.distcp" for rank in range(ranks)}
    assert "continues after step 4" in run.log.read_text()
    assert_same_training(uninterrupted.folder, tmp_path)
