"""A run that is killed or stopped at any time and resumed ends with the same bits as an uninterrupted one."""

from __future__ import annotations

import random
import shutil
import time
from pathlib import Path

import mlflow
import pytest

from tests.training.processes import Run
from tests.training.runs import history, same, weights

pytestmark = pytest.mark.timeout(1800)  # starts many processes in sequence

SHARED = ("train.steps=24", "train.checkpoint_every=1", "train.validate_every=5", "train.ema_decay=0.9")
SHARED += ("train.recursive_weight.every=3", "train.recursive_weight.threshold=1.2", "train.seed=3")
SYNCS = 6  # at least, per checkpoint: weights, moments, averages, state, its folder and the parent folder


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, make_workspace):
    """`uninterrupted(*settings)`: a workspace, the settings, and weights and curves of an uninterrupted run."""
    workspace, known = make_workspace(tmp_path_factory.mktemp("killed")), {}

    def run(*overrides: str):
        if overrides not in known:
            folder = tmp_path_factory.mktemp("uninterrupted")
            shutil.copytree(workspace.folder / "data", folder / "data")
            params = workspace.params(*SHARED, *overrides)
            reference = Run(params, folder)
            assert set(reference.wait()) == {0}, reference.log.read_text()
            known[overrides] = params, weights(folder), history(folder)
        return workspace, *known[overrides]

    return run


def done(folder: Path) -> int:
    """The newest saved step."""
    return max((int(path.name[5:]) for path in folder.glob("checkpoints/*/step-*")), default=0)


def kill_at_random(params, folder: Path, times: random.Random) -> bool:
    """Starts a run and kills it within the next steps or while writing a checkpoint. Returns whether it was killed."""
    if times.random() < 0.5:
        run = Run(params, folder, dies_at=times.randint(1, 2 * SYNCS))
        run.wait_until(lambda: False)
    else:
        run, steps, pause = Run(params, folder), times.randint(0, 2), times.random()
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
def test_a_run_killed_at_random_times_ends_like_an_uninterrupted_one(uninterrupted, tmp_path, strategy, ranks, kills):
    workspace, params, expected, curves = uninterrupted(f"train.strategy={strategy}", f"train.processes={ranks}")
    shutil.copytree(workspace.folder / "data", tmp_path / "data")
    times = random.Random(f"{strategy} {ranks} {kills}")
    assert all(kill_at_random(params, tmp_path, times) for _ in range(kills))
    run = Run(params, tmp_path)
    assert set(run.wait()) == {0}, run.log.read_text()
    assert same(weights(tmp_path), expected)
    assert history(tmp_path) == curves
    # MLflow has each step once.
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    runs = client.search_runs([client.get_experiment_by_name(params.tracking.experiment).experiment_id])
    (finished,) = (r for r in runs if r.info.status == "FINISHED")
    steps = [metric.step for metric in client.get_metric_history(finished.info.run_id, "loss")]
    assert steps == sorted(set(steps)) and steps[-1] == params.train.steps


@pytest.mark.parametrize("ranks", [(2, 1), (1, 2)])
def test_a_run_resumes_with_another_number_of_processes_on_the_same_data(uninterrupted, tmp_path, ranks):
    workspace, _, expected, curves = uninterrupted("train.strategy=ddp", "train.processes=1")
    shutil.copytree(workspace.folder / "data", tmp_path / "data")
    first = Run(workspace.params(*SHARED, f"train.processes={ranks[0]}"), tmp_path)
    first.wait_until(lambda: done(tmp_path) >= 5)
    first.stop(rank=ranks[0] - 1)
    assert set(first.wait()) == {75}, first.log.read_text()  # one got the signal, all stopped
    assert 5 <= done(tmp_path) < 24
    second = Run(workspace.params(*SHARED, f"train.processes={ranks[1]}"), tmp_path)
    assert set(second.wait()) == {0}, second.log.read_text()
    for a, b in zip(curves, history(tmp_path), strict=True):
        assert b["step"] == a["step"]
        for key in ("loss", "loss_video", "loss_physics", "grad_norm_physics"):
            assert b[key] == pytest.approx(a[key], rel=1e-4), key
    assert all(abs(value - expected[name]).max() < 1e-5 for name, value in weights(tmp_path).items())
