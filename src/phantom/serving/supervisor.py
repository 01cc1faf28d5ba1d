"""Starts the worker processes, starts those again that end, and removes what has expired."""

from __future__ import annotations

import os
import shutil
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from multiprocessing import get_context
from multiprocessing.process import BaseProcess
from typing import Any

from phantom.data.storage import Folder
from phantom.progress import say
from phantom.serving import worker
from phantom.serving.inputs import clear_arrivals
from phantom.serving.jobs import JobQueue
from phantom.serving.options import Options

TICK_SECONDS = 0.5
STOP_SECONDS = 20.0  # in which a worker gives its job back
SWEEP_SECONDS = 30.0  # between two looks for what has expired
RESTART_DELAYS_SECONDS = (0.0, 1.0, 5.0, 15.0, 60.0)  # before a worker that ended early is started again
LONG_LIFE_SECONDS = 300.0  # after which a worker has not ended early


class Supervisor:
    """Keeps `options.workers` worker processes running until it is stopped.

    devices: the GPU of each, None for none. on_failure: called with one line if no worker can load the model.
    """

    def __init__(
        self,
        options: Options,
        queue: JobQueue,
        results: Folder,
        devices: list[str | None],
        on_failure: Callable[[str], None],
    ) -> None:
        self.options, self.queue, self.results, self.on_failure = options, queue, results, on_failure
        self._slots = [_Slot(device) for device in devices]
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._swept = 0.0

    def start(self) -> None:
        """Starts the workers."""
        self._clear_work()
        for slot in self._slots:
            slot.start(self.options)
        self._thread.start()

    def stop(self) -> None:
        """Stops the workers, which give their jobs back."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()
        for slot in self._slots:
            slot.terminate()
        deadline = time.monotonic() + STOP_SECONDS  # of all of them
        for slot in self._slots:
            slot.end(self.queue, deadline)

    def _run(self) -> None:
        while not self._stop.wait(TICK_SECONDS):
            try:
                for slot in self._slots:
                    self._watch(slot)
                self.queue.end_abandoned()
                if time.monotonic() - self._swept > SWEEP_SECONDS:
                    self._swept = time.monotonic()
                    for job in self.queue.expired():
                        remove(job, self.queue, self.results)
            except Exception as error:  # the database or the storage is away for a while
                say(f"serve: {(str(error).splitlines() or [type(error).__name__])[0]}")
                self._stop.wait(SWEEP_SECONDS / 6)

    def _watch(self, slot: _Slot) -> None:
        process = slot.process
        if process is None:
            if time.monotonic() >= slot.start_at:
                slot.start(self.options)
            return
        if process.is_alive():
            return
        id = f"{worker.host()}:{process.pid}"
        error = next((row.error for row in self.queue.workers(worker.host()) if row.id == id), None)
        self.queue.worker_died(id)
        slot.ended()
        if process.exitcode == worker.WRONG_MODEL and slot.starts == 1:  # later on, a model may be about to be replaced
            self.on_failure(error or "model: cannot be loaded")
            self._stop.set()
            return
        say(f"serve: worker {process.pid} ended with exit code {process.exitcode}; it is started again")
        self._clear_work()

    def _clear_work(self) -> None:
        """Removes what killed processes of this machine have left."""
        for folder in worker.work_folder(self.options.state).glob("[0-9]*"):
            if _is_alive(int(folder.name)):
                continue
            try:
                clear_arrivals(folder, self.queue, self.results)
            except Exception as error:  # the database or the storage is away: a next start tries again
                say(f"serve: {(str(error).splitlines() or [type(error).__name__])[0]}")
            else:
                shutil.rmtree(folder, ignore_errors=True)


class _Slot:
    """The place of one worker process."""

    def __init__(self, device: str | None) -> None:
        self.device = device
        self.process: BaseProcess | None = None
        self.start_at, self.starts = 0.0, 0
        self._started_at, self._early_ends = 0.0, 0

    def start(self, options: Options) -> None:
        """Starts a process."""
        # spawn: a fork would copy the threads' locks, and torch cannot use a GPU in one.
        self.process = get_context("spawn").Process(target=worker.run, args=(options, self.device))
        self._started_at, self.starts = time.monotonic(), self.starts + 1
        self.process.start()

    def ended(self) -> None:
        """Notes that the process has ended, and when another is to be started."""
        self.process = None
        lived = time.monotonic() - self._started_at
        delay = 0.0 if lived > LONG_LIFE_SECONDS else RESTART_DELAYS_SECONDS[self._early_ends]
        last = len(RESTART_DELAYS_SECONDS) - 1
        self._early_ends = 0 if lived > LONG_LIFE_SECONDS else min(self._early_ends + 1, last)
        self.start_at = time.monotonic() + delay

    def terminate(self) -> None:
        """Asks the process to stop."""
        if self.process is not None:
            self.process.terminate()

    def end(self, queue: JobQueue, deadline: float) -> None:
        """Waits for the process; one that does not stop until `deadline` is killed, and its job given back for it."""
        if self.process is None or self.process.pid is None:
            return
        self.process.join(max(0.0, deadline - time.monotonic()))
        if self.process.exitcode is None:
            self.process.kill()
            self.process.join()
        with suppress(Exception):
            queue.worker_stopped(f"{worker.host()}:{self.process.pid}")


def remove(job: Any, queue: JobQueue, results: Folder) -> None:
    """Removes a job and its files.

    The files of one that has ended go first: where the storage fails, it is expired still, and tried again. One that
    runs goes first itself, so that its worker stops and leaves no files.
    """
    names = [f"videos/{job.id}.mp4", f"videos/{job.id}.physics.mp4"]
    names += [job.input["name"]] if job.input else []
    if job.finished_at is None:
        queue.remove(job.id)
        results.delete(names)
    else:
        results.delete(names)
        queue.remove(job.id)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's
        pass
    return True
