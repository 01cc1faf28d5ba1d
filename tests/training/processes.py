"""Training in processes forked from a server with all imports loaded: they start quickly and can be killed."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from phantom.config import Params
from tests.training.runs import SHARED, Workspace, assert_same_training, history

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["phantom.training.trainer", "mlflow.store.tracking.sqlalchemy_store", "tests.tiny"])


class Run:
    """`train(params)` in `folder`, in `train.processes` processes. Their output goes to the file `log`.

    dies_at: the first process kills itself at this call of `os.fsync`, which writing checkpoints calls.
    prepare: called in each process before it trains, with its rank.
    """

    def __init__(
        self,
        params: Params,
        folder: Path,
        dies_at: int | None = None,
        prepare: Callable[[int], None] | None = None,
    ) -> None:
        self.log = folder / "log.txt"
        ranks, group = params.train.processes, {}
        if ranks > 1 or params.train.strategy.startswith("zero"):
            group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "TORCHELASTIC_RUN_ID": "test"}
            group |= {"WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
        self.processes = [
            CONTEXT.Process(target=_train, args=(params, folder, group, rank, dies_at, prepare))
            for rank in range(ranks)
        ]
        for process in self.processes:
            process.start()

    @property
    def is_alive(self) -> bool:
        """Whether all processes are running."""
        return all(process.is_alive() for process in self.processes)

    def wait(self, seconds: float = 500) -> list[int | None]:
        """Waits for each process up to `seconds`. Returns the exit codes."""
        for process in self.processes:
            process.join(seconds)
        return [process.exitcode for process in self.processes]

    def kill(self) -> None:
        """Sends SIGKILL to all processes."""
        for process in self.processes:
            process.kill()
        self.wait()

    def stop(self, rank: int = 0) -> None:
        """Sends SIGTERM to one process."""
        os.kill(self.processes[rank].pid or 0, signal.SIGTERM)

    def wait_until(self, condition: Callable[[], bool], seconds: float = 500) -> None:
        """Waits until `condition` holds or a process has exited."""
        deadline = time.monotonic() + seconds
        while self.is_alive and not condition() and time.monotonic() < deadline:
            time.sleep(0.002)


def assert_trains_like(
    reference: Workspace, folder: Path, strategy: str, ranks: int, accumulation: int, checkpointing: str, *more: str
) -> None:
    """Asserts that a run in `folder` with another strategy gives the same results as the `reference` run."""
    shutil.copytree(reference.folder / "data", folder / "data")
    params = reference.params(
        *SHARED,
        f"train.strategy={strategy}",
        f"train.processes={ranks}",
        f"train.accumulation={accumulation}",
        f"train.activation_checkpointing={checkpointing}",
        *more,
    )
    run = Run(params, folder)
    assert run.wait(1500) == [0] * ranks, run.log.read_text()
    assert_same_training(reference.folder, folder)
    for a, b in zip(history(reference.folder), history(folder), strict=True):
        for key in ("val_loss_video", "val_coupling_ratio_block_0"):
            if a[key] is not None and strategy.startswith("zero"):
                assert b[key] > 0, key  # of the raw weights
            elif a[key] is not None:
                assert b[key] == pytest.approx(a[key], rel=1e-4), key


def free_port() -> int:
    """An unused TCP port."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def _train(
    params: Params,
    folder: Path,
    group: dict[str, object],
    rank: int,
    dies_at: int | None,
    prepare: Callable[[int], None] | None,
) -> None:
    import torch

    from phantom.errors import Interrupted, StageFailed
    from phantom.training.trainer import train

    os.chdir(folder)
    torchrun = {**group, "RANK": rank, "LOCAL_RANK": rank} if group else {}
    os.environ |= {**{name: str(value) for name, value in torchrun.items()}, "OMP_NUM_THREADS": "1"}
    torch.set_num_threads(1)
    log = os.open("log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    if dies_at is not None and rank == 0:
        calls, sync = iter(range(1, dies_at + 1)), os.fsync

        def dying(handle: int) -> None:
            if next(calls) == dies_at:
                os.kill(os.getpid(), signal.SIGKILL)
            sync(handle)

        os.fsync = dying
    if prepare:
        prepare(rank)
    try:
        train(params)
    except (StageFailed, Interrupted) as error:
        print(error, file=sys.stderr, flush=True)
        sys.exit(75 if isinstance(error, Interrupted) else 1)
