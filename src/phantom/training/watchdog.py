"""Names the process that hangs: without it the others would wait for that one until a collective times out.

Every process has a thread that sees when training makes no progress. It tells the others, through the store by which
the processes found each other, its step and how many collectives it has entered. Those that wait have entered the one
that they wait in, so a process that has entered fewer is the one waited for; one that does not answer is stopped, or
its machine is gone. The first to answer reports this in one line, and every process ends with exit code 1, after it has
written torch's record of its last collectives (flight recorder).
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import Any

import torch.distributed as dist

from phantom.errors import listed, write_outcome
from phantom.progress import say
from phantom.training import process_group

MARGIN_SECONDS = 60.0  # of the time-out of collectives over the limit: the watchdog speaks first
STEP_LIMIT_SECONDS = 600.0  # without progress in training; NCCL's own limit
# While starting, saving, validating, sampling; collectives start with this time-out.
START_LIMIT_SECONDS = process_group.COLLECTIVE_TIMEOUT.total_seconds() - MARGIN_SECONDS
POLL_SECONDS = 5.0
ANSWER_SECONDS = 15.0  # in which every process must answer
CODE = Path(__file__).parents[1]


class Watchdog:
    """Watches a run of several processes; does nothing in a run of one. name: of the model. folder: for the records.

    step: the last one that is done; a resumed run sets it.
    """

    def __init__(self, name: str, folder: Path) -> None:
        self.name, self.folder = name, folder
        self.rank, self.ranks = process_group.place()
        self.step = 0
        self._limit, self._seen, self._closed = START_LIMIT_SECONDS, time.monotonic(), threading.Event()
        if self.ranks > 1:
            self._store = process_group.new_store_client()
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def progress(self, step: int) -> None:
        """`step` steps are done in all processes, which have just met in a collective: the short limit holds."""
        self.step = step
        self._set_limit(STEP_LIMIT_SECONDS)

    def alive(self) -> None:
        """A part of a step is done."""
        self._seen = time.monotonic()

    def be_patient(self) -> None:
        """The long limit holds until the next `progress`."""
        self._set_limit(START_LIMIT_SECONDS)

    def close(self) -> None:
        """Stops watching."""
        self._closed.set()

    def _set_limit(self, seconds: float) -> None:
        self.alive()
        if seconds != self._limit and self.ranks > 1:
            process_group.set_timeout(seconds + MARGIN_SECONDS)
        self._limit = seconds

    def _watch(self) -> None:
        try:
            while not self._closed.wait(min(POLL_SECONDS, self._limit / 4)):
                state = {"step": self.step, "collectives": process_group.collectives(), "code": _current_line()}
                self._store.set(f"watchdog/state/{self.rank}", json.dumps(state))
                if time.monotonic() - self._seen > self._limit:
                    self._store.set("watchdog/alarm", f"{self._limit / 60:.3g} minutes")
                if self._store.check(["watchdog/alarm"]):
                    try:
                        self._report(state)
                    finally:
                        os._exit(1)  # the main thread waits in a collective, which nothing else interrupts
        except dist.DistError:  # the process that holds the store has ended
            return

    def _report(self, state: dict[str, Any]) -> None:
        """Names the process waited for, and waits until all others have done so too."""
        self._store.set(f"watchdog/answer/{self.rank}", json.dumps(state))
        limit, deadline = self._store.get("watchdog/alarm").decode(), time.monotonic() + ANSWER_SECONDS
        while len(answers := self._read("answer")) < self.ranks and time.monotonic() < deadline:
            time.sleep(0.2)
        process_group.write_flight_record(self.folder / f"rank_{self.rank}")
        text = f"train {self.name}: {_verdict(answers, self._read('state'), self.ranks)}; no progress for {limit}; "
        text += f"the last collectives of each process are in {self.folder} (torchfrtrace reads them); run again to go "
        text += "on from the last checkpoint"
        if not write_outcome(1, text) and self.rank == min(answers):
            say(text)
        self._store.set(f"watchdog/reported/{self.rank}", json.dumps(state))
        deadline = time.monotonic() + ANSWER_SECONDS
        while len(self._read("reported")) < len(answers) and time.monotonic() < deadline:
            time.sleep(0.1)  # the first to end closes connections, and would make the others fail with an error

    def _read(self, kind: str) -> dict[int, dict[str, Any]]:
        """What processes have left in the store, by rank."""
        keys = {rank: f"watchdog/{kind}/{rank}" for rank in range(self.ranks)}
        found = {rank: self._store.get(key) for rank, key in keys.items() if self._store.check([key])}
        return {rank: json.loads(value) for rank, value in found.items()}


def _verdict(answers: dict[int, dict[str, Any]], states: dict[int, dict[str, Any]], ranks: int) -> str:
    """Which of so many processes the others wait for. states: as last seen, also of those that do not answer."""
    silent = [rank for rank in range(ranks) if rank not in answers]
    if silent:
        return _named(
            silent, {rank: states.get(rank, {"step": 0}) for rank in silent}, "does not answer, and was last seen"
        )
    most = max(state["collectives"] for state in answers.values())
    behind = [rank for rank, state in answers.items() if state["collectives"] < most]
    if behind:
        return _named(behind, answers, "hangs")
    step = min(state["step"] for state in answers.values())
    return f"all {ranks} processes hang after step {step}, in the same collective: the network, or a GPU's driver"


def _named(hung: list[int], states: dict[int, dict[str, Any]], what: str) -> str:
    places = []
    for rank in hung:
        code = f", at {states[rank]['code']}" if states[rank].get("code") else ""
        places.append(f"rank {rank} {what} after step {states[rank]['step']}{code}")
    return listed(places, 4)


def _current_line() -> str:
    """The innermost line of this package that the main thread is in: file, line and function."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    ours = [f for f in traceback.extract_stack(frame) if Path(f.filename).is_relative_to(CODE)]
    return f"{Path(ours[-1].filename).relative_to(CODE)}:{ours[-1].lineno} ({ours[-1].name})" if ours else ""
