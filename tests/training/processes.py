"""`phantom train` in processes that fork from one where everything is loaded: they start at once, and can be killed."""

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

from phantom.config import Params
from tests.training.runs import SHARED, Place, trained_alike

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["phantom.training.trainer", "mlflow.store.tracking.sqlalchemy_store", "tests.tiny"])


class Run:
    """`train(params)` in `folder`, in as many processes as `params` say. What they say is in `said`.

    dies_at: the first process kills itself at this call of `os.fsync`, as checkpoints make them.
    """

    def __init__(self, params: Params, folder: Path, dies_at: int | None = None) -> None:
        self.said = folder / "said.txt"
        ranks, group = params.train.processes, {}
        if ranks > 1 or params.train.strategy.startswith("zero"):
            group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "TORCHELASTIC_RUN_ID": "test"}
            group |= {"WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
        self.processes = [
            CONTEXT.Process(target=_train, args=(params, folder, group, rank, dies_at)) for rank in range(ranks)
        ]
        for process in self.processes:
            process.start()

    @property
    def is_alive(self) -> bool:
        """Whether all are."""
        return all(process.is_alive() for process in self.processes)

    def wait(self, seconds: float = 500) -> list[int | None]:
        """Exit codes."""
        for process in self.processes:
            process.join(seconds)
        return [process.exitcode for process in self.processes]

    def kill(self) -> None:
        """SIGKILL to all of them."""
        for process in self.processes:
            process.kill()
        self.wait()

    def stop(self, rank: int = 0) -> None:
        """SIGTERM to one of them."""
        os.kill(self.processes[rank].pid or 0, signal.SIGTERM)

    def wait_until(self, condition: Callable[[], bool], seconds: float = 500) -> None:
        """Until `condition` holds, or one of them has ended."""
        deadline = time.monotonic() + seconds
        while self.is_alive and not condition() and time.monotonic() < deadline:
            time.sleep(0.002)


def trains_as(
    alone: Place, folder: Path, strategy: str, ranks: int, accumulation: int, checkpointing: str, *more: str
) -> None:
    """Asserts that a run in `folder`, laid out in another way, trains as the one of `alone` did."""
    shutil.copytree(alone.folder / "data", folder / "data")
    params = alone.params(
        *SHARED,
        f"train.strategy={strategy}",
        f"train.processes={ranks}",
        f"train.accumulation={accumulation}",
        f"train.activation_checkpointing={checkpointing}",
        *more,
    )
    run = Run(params, folder)
    assert run.wait(1500) == [0] * ranks, run.said.read_text()
    trained_alike(alone.folder, folder)


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def _train(params: Params, folder: Path, group: dict[str, object], rank: int, dies_at: int | None) -> None:
    import torch

    from phantom.errors import Interrupted, StageFailed
    from phantom.training.trainer import train

    os.chdir(folder)
    torchrun = {**group, "RANK": rank, "LOCAL_RANK": rank} if group else {}
    os.environ |= {**{name: str(value) for name, value in torchrun.items()}, "OMP_NUM_THREADS": "1"}
    torch.set_num_threads(1)
    said = os.open("said.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(said, 1)
    os.dup2(said, 2)
    if dies_at is not None and rank == 0:
        calls, sync = iter(range(1, dies_at + 1)), os.fsync

        def dying(handle: int) -> None:
            if next(calls) == dies_at:
                os.kill(os.getpid(), signal.SIGKILL)
            sync(handle)

        os.fsync = dying
    try:
        train(params)
    except (StageFailed, Interrupted) as error:
        print(error, file=sys.stderr, flush=True)
        sys.exit(75 if isinstance(error, Interrupted) else 1)
