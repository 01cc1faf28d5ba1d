"""Decodes untrusted files in worker processes: one that makes the decoder crash, hang or swell does no other harm.

libav is C code, and a file may be made to break it. Each thread that calls has a process of its own, started at its
first call; a process that is killed or outlasts its time is replaced, and the file is refused with that reason.
"""

from __future__ import annotations

import resource
import signal
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from typing import Any, ParamSpec, Self, TypeVar

from phantom.data.video import BadClip

P = ParamSpec("P")
R = TypeVar("R")


@dataclass(frozen=True)
class Limits:
    """What one call may take."""

    memory_gib: float = 8.0  # address space of the process: 8K frames of the longest clip need half of it
    cpu_seconds: int = 600
    wall_seconds: float = 1800.0


LIMITS = Limits()


class DecodeWorkers:
    """Calls functions in worker processes. A context: on leaving it, all of them are killed, and running calls end."""

    def __init__(self, limits: Limits = LIMITS) -> None:
        self.limits = limits
        self._own = threading.local()
        self._started: list[_Worker] = []
        self._lock, self._closed = threading.Lock(), False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._closed = True
        for worker in self._started:
            worker.kill()

    def call(self, function: Callable[P, R], *arguments: P.args, **named: P.kwargs) -> R:
        """`function` of a module, called in this thread's process. Raises what it raises, or BadClip if it exceeds the
        limits, or kills its process twice: once may be the fault of another process that took the memory."""
        for is_last in (False, True):
            try:
                return self._worker().call(function, arguments, named)
            except _Died as death:
                if is_last or death.signal == signal.SIGXCPU:
                    raise BadClip(_reason(death, self.limits)) from None
        raise AssertionError

    def _worker(self) -> _Worker:
        worker: _Worker | None = getattr(self._own, "worker", None)
        if worker is None or not worker.is_alive:
            with self._lock:
                if self._closed:
                    raise RuntimeError("the decode workers are closed")
                self._own.worker = worker = _Worker(self.limits)
                self._started.append(worker)
        return worker


class _Died(Exception):
    """The process ended in a call: by a signal, or with an exit code."""

    def __init__(self, code: int) -> None:
        self.code, self.signal = code, signal.Signals(-code) if code < 0 else None


class _Worker:
    """A process that serves calls, one at a time."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        context = get_context("spawn")  # a fork would copy locks that other threads hold
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, limits), daemon=True)
        self._process.start()
        theirs.close()

    @property
    def is_alive(self) -> bool:
        return self._process.is_alive()

    def kill(self) -> None:
        self._process.kill()

    def call(self, function: Callable[..., R], arguments: tuple[Any, ...], named: dict[str, Any]) -> R:
        try:
            self._connection.send((function, arguments, named))
            if not wait([self._connection, self._process.sentinel], self.limits.wall_seconds):
                self.kill()
                self._process.join()
                raise BadClip(f"takes more than {self.limits.wall_seconds:g} s to decode")
            is_raised, value = self._connection.recv()
        except (EOFError, OSError):  # its end of the pipe is closed
            self._process.join()
            raise _Died(self._process.exitcode or 0) from None
        if is_raised:
            raise value
        return value


def _reason(death: _Died, limits: Limits) -> str:
    if death.signal == signal.SIGXCPU:
        return f"takes more than {limits.cpu_seconds} s of a core to decode"
    how = death.signal.name if death.signal else f"exit code {death.code}"
    return f"kills the process that decodes it: {how}"


def _serve(connection: Connection, limits: Limits) -> None:
    """Runs in the worker: answers calls until the other end is closed, as when that process has died."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C: the parent ends this process
    memory = int(limits.memory_gib * 2**30)
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with suppress(EOFError, BrokenPipeError):
        while True:
            function, arguments, named = connection.recv()
            used = resource.getrusage(resource.RUSAGE_SELF)
            allowed = int(used.ru_utime + used.ru_stime) + limits.cpu_seconds + 1
            resource.setrlimit(resource.RLIMIT_CPU, (allowed, resource.getrlimit(resource.RLIMIT_CPU)[1]))
            connection.send(_answer(function, arguments, named, limits))


def _answer(
    function: Callable[..., Any], arguments: tuple[Any, ...], named: dict[str, Any], limits: Limits
) -> tuple[bool, Any]:
    """(False, its result) or (True, the exception it raised)."""
    try:
        return False, function(*arguments, **named)
    except MemoryError:
        return True, BadClip(f"needs more than {limits.memory_gib:g} GiB of memory to decode")
    except OSError as error:  # those of libav cannot be sent
        return True, OSError(error.errno, error.strerror, error.filename)
    except Exception as error:
        return True, error
