"""Starts `phantom <command>` in `train.processes` processes on this machine, as torchrun does."""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from uuid import uuid4

import yaml
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException, Std
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from phantom.config import Params
from phantom.cores import cores
from phantom.errors import OUTCOME_ENV, StageFailed, read_outcome
from phantom.training.process_group import COLLECTIVE_TIMEOUT

# From the stop signal to SIGKILL: processes finish the step, save, and wait until the checkpoint is committed.
SHUTDOWN_TIMEOUT_SECONDS = int(COLLECTIVE_TIMEOUT.total_seconds())


def in_torchrun() -> bool:
    """Whether torchrun started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def launch(params: Params, command: list[str]) -> None:
    """Runs `phantom <command>` in `train.processes` processes. Raises the exception of the first one to fail."""
    with TemporaryDirectory() as folder:
        file, outcome = Path(folder) / "params.yaml", Path(folder) / "outcome.json"
        file.write_text(yaml.safe_dump(params.model_dump(mode="json", by_alias=True)), encoding="utf-8")
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=params.train.processes,
            run_id=uuid4().hex,
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0",
            max_restarts=0,
            shutdown_timeout=SHUTDOWN_TIMEOUT_SECONDS,
            logs_specs=DefaultLogsSpecs(folder, redirects=Std.OUT),  # the result is printed by this process
        )
        threads = max(1, cores() // params.train.processes)
        added = {OUTCOME_ENV: str(outcome), "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(threads))}
        before = dict(os.environ)
        os.environ.update(added)
        logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # the failure is reported below
        failed = ""
        try:
            elastic_launch(config, sys.executable)("-m", "phantom.cli", *command, "--params", str(file))
        except (ChildFailedError, SignalException, KeyboardInterrupt) as error:
            failed = type(error).__name__
        finally:
            os.environ.clear()
            os.environ.update(before)
        left = read_outcome(outcome.read_text(encoding="utf-8") if outcome.is_file() else None)
    if left and left.code:
        raise left.exception()
    if failed:
        raise StageFailed("train: a process was killed (out of memory?); run again to go on from the last checkpoint")
