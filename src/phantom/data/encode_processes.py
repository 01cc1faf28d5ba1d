"""Parts of the clips encoded at once, one in each of several processes of this machine."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

from phantom import logs
from phantom.config import Params
from phantom.cores import cores, let_idle_threads_sleep
from phantom.cost import processes_with_gpus
from phantom.data.part import Part
from phantom.errors import StageFailed, Terminated, raise_terminated

EncodePart = Callable[[Params, Part, Path], object]


@dataclass(frozen=True)
class _Place:
    """What a process has to itself: a number of cores, and a GPU where there are any."""

    cores: int
    gpu: str | None


def encode_in_processes(encode_part: EncodePart, params: Params, root: Path, processes: int) -> None:
    """Calls `encode_part(params, part, root)` for `processes` parts at once. What is finished is kept in any case.

    When interrupted, has each process write the shard that it has begun. Raises what the first part that failed did,
    when the others have ended.
    """
    context = get_context("spawn")  # CUDA does not outlive a fork
    started: list[tuple[BaseProcess, Connection]] = []
    let_idle_threads_sleep()
    places = _places(processes)
    with processes_with_gpus(len({place.gpu for place in places} - {None})):
        try:
            for number, place in enumerate(places):
                ours, theirs = context.Pipe(duplex=False)
                process = context.Process(
                    target=_encode,
                    args=(encode_part, params, Part(number, processes), root, place, dict(logs.context), theirs),
                )
                process.start()
                theirs.close()
                started.append((process, ours))
            failures = [_wait(one, connection) for one, connection in started]
        except BaseException:
            for one, _ in started:
                one.terminate()
            for one, _ in started:
                one.join()
            raise
    for failure in failures:
        if failure is not None:
            raise failure


def _wait(process: BaseProcess, connection: Connection) -> BaseException | None:
    """What the process raised, once it has ended."""
    try:
        failure = connection.recv()
    except EOFError:
        process.join()
        failure = StageFailed(
            f"a process that encodes was killed (exit code {process.exitcode}); run again to go on, with fewer "
            "encode.processes if memory was short"
        )
    process.join()
    return failure


def _places(processes: int) -> list[_Place]:
    stated = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = stated.split(",") if stated else [str(number) for number in range(torch.cuda.device_count())]
    share = max(1, cores() // processes)
    return [_Place(share, gpus[number % len(gpus)] if gpus else None) for number in range(processes)]


def _encode(
    encode_part: EncodePart,
    params: Params,
    part: Part,
    root: Path,
    place: _Place,
    log_context: dict[str, Any],
    connection: Connection,
) -> None:
    """Runs in a process of its own: sends None when the part is finished, or what it raised."""
    logs.configure()
    logs.context.update(log_context)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to all: the parent ends this process
    signal.signal(signal.SIGTERM, raise_terminated)
    os.environ["TERM"] = "dumb"  # lines of progress: several bars in one terminal overwrite each other
    if place.gpu is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = place.gpu  # read when CUDA is first used
    torch.set_num_threads(place.cores)
    failure = None
    with suppress(Terminated):
        try:
            encode_part(params, part, root)
        except Exception as error:
            failure = error
        connection.send(failure)
