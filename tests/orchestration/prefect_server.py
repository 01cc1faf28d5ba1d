"""A Prefect server in processes of its own, used through its command line and its API; waiting, ports, processes."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

BIN = Path(sys.executable).parent
TIMEOUT_SECONDS = 900.0  # on a busy machine
ENDED = ("Completed", "Failed", "Crashed", "Cancelled")


class Prefect:
    """Client of a server on `port`, started by the caller. Commands run in `checkout`; PREFECT_HOME is its .prefect."""

    def __init__(self, checkout: Path, port: int) -> None:
        self.checkout, self.port = checkout, port
        self.worker: subprocess.Popen[bytes] | None = None
        self.started: list[subprocess.Popen[bytes]] = []

    @property
    def api(self) -> str:
        return f"http://127.0.0.1:{self.port}/api"

    @property
    def env(self) -> dict[str, str]:
        ours = {"PREFECT_API_URL": self.api, "PREFECT_HOME": str(self.checkout / ".prefect"), "DO_NOT_TRACK": "1"}
        return {**os.environ, **ours, "PREFECT_SERVER_ANALYTICS_ENABLED": "false"}

    def start(self, log: str, *command: str, **env: str) -> subprocess.Popen[bytes]:
        """Starts a command of the environment in the background, with its output in the file `log`."""
        with (self.checkout / log).open("wb") as output:
            process = subprocess.Popen(
                [str(BIN / command[0]), *command[1:]],
                cwd=self.checkout,
                env=self.env | env,
                stdout=output,
                stderr=output,
                # Prefect stops on SIGINT, which these tests may have inherited as ignored: from a background job.
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
            )
        self.started.append(process)
        return process

    def command(self, *args: str) -> subprocess.CompletedProcess[str]:
        """Runs a command of the environment, which must succeed."""
        done = subprocess.run(
            [str(BIN / args[0]), *args[1:]], cwd=self.checkout, env=self.env, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done

    def run(self, *arguments: str, deployment: str = "phantom/full-pipeline") -> str:
        """Schedules a run of a deployment and returns its name."""
        before = set(self.states())
        self.command("prefect", "deployment", "run", deployment, *arguments)
        (name,) = set(self.states()) - before
        return name

    def answers(self) -> bool:
        """Whether the server is up."""
        try:
            with urllib.request.urlopen(f"{self.api}/health", timeout=5):
                return True
        except OSError:
            return False

    def ask(self, path: str, body: dict[str, Any]) -> Any:
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(f"{self.api}{path}", json.dumps(body).encode(), headers)
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.loads(answer.read())

    def runs(self) -> dict[str, dict[str, Any]]:
        """Every run of the flow, by name."""
        return {run["name"]: run for run in self.ask("/flow_runs/filter", {})}

    def states(self) -> dict[str, str]:
        """The state of every run of the flow, by name."""
        return {name: run["state_name"] for name, run in self.runs().items()}

    def reaches(self, name: str, *states: str) -> str:
        """Waits until the run is in one of `states` or has ended, and returns its state."""
        wait(lambda: self.states()[name] in (*states, *ENDED), lambda: f"{name} is {self.states()[name]}")
        return self.states()[name]

    def finished(self, name: str) -> str:
        """Waits until the run has ended, and returns its state."""
        return self.reaches(name)

    def log(self, name: str) -> str:
        """The run's log."""
        wanted = {"logs": {"flow_run_id": {"any_": [self.runs()[name]["id"]]}}, "sort": "TIMESTAMP_ASC"}
        lines: list[str] = []
        while page := self.ask("/logs/filter", {**wanted, "limit": 200, "offset": len(lines)}):
            lines += [line["message"] for line in page]
        return "\n".join(lines)


@contextmanager
def prefect_server_in(checkout: Path, **env: str) -> Iterator[Prefect]:
    """A server that keeps its database in the checkout. Whatever was started ends with it, the last first."""
    made = Prefect(checkout, free_port())
    arguments = ("prefect", "server", "start", "--host", "127.0.0.1", "--port", str(made.port))
    server = made.start("server.log", *arguments, **env)
    try:
        wait(lambda: made.answers() or server.poll() is not None)
        yield made
    finally:
        for process in reversed(made.started):
            ours = descendants(process.pid)
            process.terminate()
            process.wait(60)
            for pid in ours:
                if alive(pid):
                    os.kill(pid, signal.SIGKILL)


def wait(done: Callable[[], Any], found: Callable[[], str] = lambda: "", seconds: float = TIMEOUT_SECONDS) -> None:
    """Waits until `done()` is true. On timeout the failure shows `found()`."""
    deadline = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < deadline, f"it did not happen within {seconds:.0f} s: {found()}"
        time.sleep(0.2)


def free_port() -> int:
    with socket.socket() as trial:
        trial.bind(("127.0.0.1", 0))
        return trial.getsockname()[1]


def descendants(pid: int) -> set[int]:
    """All descendants of the process `pid`."""
    parents: dict[int, int] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
        except OSError:  # it has just ended
            continue
    found = {pid}
    while more := {child for child, parent in parents.items() if parent in found} - found:
        found |= more
    return found - {pid}


def alive(pid: int) -> bool:
    try:
        return (Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]) != "Z"
    except OSError:
        return False
