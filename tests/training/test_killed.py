"""A run that is killed or stopped at any moment and started again ends as one that never was."""

from __future__ import annotations

import random
import shutil
import time
from pathlib import Path

import mlflow
import pytest

from tests.training.processes import Run
from tests.training.runs import history, same, weights

pytestmark = pytest.mark.timeout(1800)  # many processes, one after the other

SHARED = ("train.steps=24", "train.checkpoint_every=1", "train.validate_every=5", "train.ema_decay=0.9")
SHARED += ("train.recursive_weight.every=3", "train.recursive_weight.threshold=1.2", "train.seed=3")
SYNCS = 6  # or more in the writing of one checkpoint: weights, moments, averages, state, the folder, the one above


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory, make_place):
    """`unbroken(*settings)`: a place, the settings, and the weights and curves of a run that nobody disturbs."""
    place, known = make_place(tmp_path_factory.mktemp("killed")), {}

    def run(*overrides: str):
        if overrides not in known:
            folder = tmp_path_factory.mktemp("whole")
            shutil.copytree(place.folder / "data", folder / "data")
            params = place.params(*SHARED, *overrides)
            whole = Run(params, folder)
            assert set(whole.wait()) == {0}, whole.said.read_text()
            known[overrides] = params, weights(folder), history(folder)
        return place, *known[overrides]

    return run


def done(folder: Path) -> int:
    """The newest step that is saved."""
    return max((int(path.name[5:]) for path in folder.glob("checkpoints/*/step-*")), default=0)


def kill_at_random(params, folder: Path, moments: random.Random) -> bool:
    """Starts a run and kills it within its next steps, or in the midst of writing a checkpoint. Whether it was."""
    if moments.random() < 0.5:
        run = Run(params, folder, dies_at=moments.randint(1, 2 * SYNCS))
        run.wait_until(lambda: False)
    else:
        run, steps, pause = Run(params, folder), moments.randint(0, 2), moments.random()
        began, before = time.monotonic(), done(folder)
        run.wait_until(lambda: done(folder) >= before + steps)
        if run.is_alive:
            time.sleep(pause * min(0.5, time.monotonic() - began))
    killed = run.processes[0].is_alive() or run.processes[0].exitcode == -9
    run.kill()
    return killed


@pytest.mark.parametrize(
    ("strategy", "ranks", "kills"),
    [
        ("ddp", 1, 3),
        pytest.param("ddp", 1, 10, marks=pytest.mark.slow),
        pytest.param("ddp", 2, 10, marks=pytest.mark.slow),
        pytest.param("fsdp2", 2, 10, marks=pytest.mark.slow),
        pytest.param("zero2", 2, 4, marks=pytest.mark.slow),
    ],
)
def test_a_run_killed_at_random_moments_ends_as_one_that_was_not(unbroken, tmp_path, strategy, ranks, kills):
    place, params, expected, curves = unbroken(f"train.strategy={strategy}", f"train.processes={ranks}")
    shutil.copytree(place.folder / "data", tmp_path / "data")
    moments = random.Random(f"{strategy} {ranks} {kills}")
    assert all(kill_at_random(params, tmp_path, moments) for _ in range(kills))
    run = Run(params, tmp_path)
    assert set(run.wait()) == {0}, run.said.read_text()
    assert same(weights(tmp_path), expected)
    assert history(tmp_path) == curves
    # Each step is in MLflow once.
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    runs = client.search_runs([client.get_experiment_by_name(params.tracking.experiment).experiment_id])
    (finished,) = (r for r in runs if r.info.status == "FINISHED")
    steps = [metric.step for metric in client.get_metric_history(finished.info.run_id, "loss")]
    assert steps == sorted(set(steps)) and steps[-1] == params.train.steps


@pytest.mark.parametrize("ranks", [(2, 1), (1, 2)])
def test_another_number_of_processes_goes_on_with_the_same_data(unbroken, tmp_path, ranks):
    place, _, expected, curves = unbroken("train.strategy=ddp", "train.processes=1")
    shutil.copytree(place.folder / "data", tmp_path / "data")
    first = Run(place.params(*SHARED, f"train.processes={ranks[0]}"), tmp_path)
    first.wait_until(lambda: done(tmp_path) >= 5)
    first.stop(rank=ranks[0] - 1)
    assert set(first.wait()) == {75}, first.said.read_text()  # one was asked, all have answered
    assert 5 <= done(tmp_path) < 24
    second = Run(place.params(*SHARED, f"train.processes={ranks[1]}"), tmp_path)
    assert set(second.wait()) == {0}, second.said.read_text()
    for a, b in zip(curves, history(tmp_path), strict=True):
        assert b["step"] == a["step"]
        for key in ("loss", "loss_video", "loss_physics", "grad_norm_physics"):
            assert b[key] == pytest.approx(a[key], rel=1e-4), key
    assert all(abs(value - expected[name]).max() < 1e-5 for name, value in weights(tmp_path).items())
