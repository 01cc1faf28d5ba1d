"""Processes that share samples and divide their tokens train like a single process, which has all of them."""

from __future__ import annotations

import shutil

import pytest

from phantom.training.trainer import train
from tests.training.processes import Run, assert_trains_like
from tests.training.runs import SHARED, assert_same_training

pytestmark = pytest.mark.timeout(1800)  # starts many processes in sequence

# Of the physics 3 or 5 tokens, which no even number of processes divides; of the video 8 or 12. By a seed with which
# no gradient is close to 0: AdamW's first steps would be as large, and follow the order of floating-point sums.
UNEVEN = ("train.steps=5", "train.seed=5", "physics.patch_size=[1,8,8]", "train.optimizer.decay=constant")
TWO = ("fsdp2", 2, 1, "selective", "train.mesh.context=2")
COMPILED = (*TWO, "train.compile=true")
FOUR = ("fsdp2", 4, 1, "full", "train.mesh.shard=2", "train.mesh.context=2")


@pytest.fixture(scope="module")
def alone(tmp_path_factory, make_workspace):
    """A workspace in which one process took 5 steps."""
    workspace = make_workspace(tmp_path_factory.mktemp("alone"))
    tracking = f"tracking.uri=sqlite:///{workspace.folder}/mlflow.db"
    train(workspace.params(*SHARED, *UNEVEN, tracking), workspace.folder)
    return workspace


@pytest.mark.parametrize("layout", [TWO, FOUR, pytest.param(COMPILED, marks=pytest.mark.slow)])
def test_it_trains_like_a_single_process(alone, tmp_path, layout):
    assert_trains_like(alone, tmp_path, *layout, *UNEVEN)


@pytest.mark.parametrize("first", [TWO, pytest.param(None, marks=pytest.mark.slow)])
def test_a_run_goes_on_with_another_division(alone, tmp_path, first):
    shutil.copytree(alone.folder / "data", tmp_path / "data")
    whole = ("train.strategy=ddp", "train.processes=1")
    divided = ("train.strategy=fsdp2", "train.processes=2", "train.mesh.context=2")
    for steps, layout in zip((4, 5), (divided, whole) if first else (whole, divided), strict=True):
        run = Run(alone.params(*SHARED, *UNEVEN, *layout, f"train.steps={steps}"), tmp_path)
        assert set(run.wait()) == {0}, run.log.read_text()
    assert "continues after step 4" in run.log.read_text()
    assert_same_training(alone.folder, tmp_path)


def test_heads_that_the_processes_do_not_divide_are_named_in_one_line(alone, tmp_path):
    shutil.copytree(alone.folder / "data", tmp_path / "data")
    layout = ("train.strategy=fsdp2", "train.processes=3", "train.mesh.context=3", "train.memory_check=false")
    run = Run(alone.params(*SHARED, *UNEVEN, *layout), tmp_path)
    assert run.wait() == [1] * 3
    assert "train.mesh.context: found 3; accepted: divisors of 2; nearest valid: 1" in run.log.read_text()
