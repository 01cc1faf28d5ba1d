"""A process that hangs is named, with its step, and the run ends within the limit."""

from __future__ import annotations

import os
import shutil
import signal
import time
from functools import partial
from pathlib import Path

import pytest
from torch.distributed.flight_recorder.components.loader import read_dump

from phantom.training import watchdog
from phantom.training.process_group import COLLECTIVE_TIMEOUT
from phantom.training.trainer import Trainer, train
from tests.training.processes import Run

pytestmark = pytest.mark.timeout(300)

LIMIT_SECONDS = 4.0
STEP = 2  # done before the hang


def hang(how: str, rank: int) -> None:
    """Lets rank 1 sleep or be stopped in the step after `STEP`, and every process notice it soon."""
    watchdog.STEP_LIMIT_SECONDS = LIMIT_SECONDS
    watchdog.POLL_SECONDS, watchdog.ANSWER_SECONDS = 0.5, 3.0
    step = Trainer.train_step

    def hanging(self, micro_batches):
        if rank == 1 and self.step == STEP:
            (Path.cwd() / "hangs").touch()
            if how == "stopped":
                time.sleep(LIMIT_SECONDS / 2)  # it is seen in this step
                os.kill(os.getpid(), signal.SIGSTOP)
            time.sleep(200)
        return step(self, micro_batches)

    Trainer.train_step = hanging


@pytest.mark.parametrize(
    ("how", "what"),
    [
        ("asleep", "hangs"),
        pytest.param("stopped", "does not answer, and was last seen", marks=pytest.mark.slow),
    ],
)
def test_a_run_with_a_hung_process_ends_within_the_limit_and_names_it(make_workspace, tmp_path, how, what):
    workspace = make_workspace(tmp_path / "latents")
    shutil.copytree(workspace.folder / "data", tmp_path / "run" / "data")
    params = workspace.params("train.processes=2", "train.checkpoint_every=100")
    run = Run(params, tmp_path / "run", prepare=partial(hang, how))
    try:
        run.wait_until((tmp_path / "run/hangs").exists)
        began = time.monotonic()
        run.processes[0].join(60)
        took = time.monotonic() - began
        log = run.log.read_text()
        assert run.processes[0].exitcode == 1, log
        if how == "asleep":
            run.processes[1].join(10)
            assert run.processes[1].exitcode == 1
    finally:
        run.kill()
    assert LIMIT_SECONDS / 2 < took < 5 * LIMIT_SECONDS + 10
    (line,) = [line for line in log.splitlines() if "no progress" in line]
    assert f"rank 1 {what} after step {STEP}, at training/trainer.py:" in line and "(run)" in line
    assert "rank 0" not in line
    (records,) = (tmp_path / "run").glob("checkpoints/*/hang")
    assert sorted(file.name for file in records.iterdir()) == ["rank_0", "rank_1"][: 2 if how == "asleep" else 1]
    assert read_dump("rank_", str(records / "rank_0"))["entries"][-1]["state"] != "completed"  # the one it waits in


def test_a_resumed_run_that_hangs_at_once_is_said_to_hang_after_the_step_that_it_resumed_from(run_params):
    constant = "train.optimizer.decay=constant"
    train(run_params(constant, "train.steps=2"))
    trainer = Trainer(run_params(constant, "train.steps=4"), Path(), "phantom", held=False)
    trainer.tracker.close()
    assert trainer.step == trainer.watchdog.step == 2


def test_the_watchdog_speaks_before_the_collectives_of_the_start_time_out():
    assert COLLECTIVE_TIMEOUT.total_seconds() > watchdog.START_LIMIT_SECONDS + watchdog.POLL_SECONDS


def test_steps_that_compile_or_write_a_trace_are_given_the_long_limit(run_params, monkeypatch):
    at = []
    monkeypatch.setattr(Trainer, "train_step", patiently(Trainer.train_step, at))
    monkeypatch.setattr("phantom.training.trainer.compile_blocks", lambda model: None)
    quiet = ("train.validate_every=0", "train.checkpoint_every=100")
    train(run_params("train.steps=7", "train.twin_steps=3", "train.compile=true", "train.profile=[5,6]", *quiet))
    assert at == [1, 4, 6]  # the first, the first of the whole model, and the last of the window


def patiently(step, at):
    """`train_step` that notes the numbers of the steps in which the long limit holds."""

    def noting(self, micro_batches):
        if self.watchdog._limit == watchdog.START_LIMIT_SECONDS:
            at.append(self.step + 1)
        return step(self, micro_batches)

    return noting
