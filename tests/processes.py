"""A function in several processes, as torchrun starts them: the environment variables, and ports for gloo."""

from __future__ import annotations

import multiprocessing
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["phantom.evaluation.stage", "phantom.generation.generate", "tests.tiny"])


def run_in_processes(function: Callable[..., Any], folder: Path, *arguments: Any, processes: int = 2) -> list[str]:
    """Calls `function(*arguments)` in each; their output goes to files in `folder`, which are returned as text."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    logs = [folder / f"rank-{rank}.txt" for rank in range(processes)]
    started = [
        CONTEXT.Process(target=_call, args=(function, arguments, logs[rank], rank, processes, port))
        for rank in range(processes)
    ]
    for process in started:
        process.start()
    for process in started:
        process.join(300)
    said = [log.read_text(encoding="utf-8") for log in logs]
    assert [process.exitcode for process in started] == [0] * processes, "\n".join(said)
    return said


def _call(
    function: Callable[..., Any], arguments: tuple[Any, ...], log: Path, rank: int, processes: int, port: int
) -> None:
    import torch

    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ |= {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
    torch.set_num_threads(1)
    written = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(written, 1)
    os.dup2(written, 2)
    function(*arguments)
