"""A real service for tests: `phantom serve` in a process of its own, with its workers."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx

TIMEOUT_SECONDS = 240.0  # of anything that is waited for, on a busy machine
SLOW = {"steps": 200, "frames": 33}  # a job that runs for seconds


class Service:
    """`phantom serve` in `folder`, which keeps its state between starts."""

    def __init__(self, folder: Path, model: Path | str | None, *options: str, token: str | None = None) -> None:
        self.folder, self.model, self.options, self.token = folder, model, options, token
        self.start()

    def start(self, port: int = 0) -> None:
        """Starts the service and waits until it answers."""
        self.log = self.folder / f"serve-{time.monotonic_ns()}.log"
        command = [sys.executable, "-m", "phantom.cli", "serve", "--port", str(port)]
        command += ["--model", str(self.model)] if self.model else []
        env = os.environ | ({"PHANTOM_SERVE_TOKEN": self.token} if self.token else {})
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [*command, *self.options], cwd=self.folder, env=env, stdout=subprocess.DEVNULL, stderr=log
            )
        wait(lambda: "startup complete" in self.said() or self.process.poll() is not None)
        assert self.process.poll() is None, self.said()
        self.url = re.findall(r"^Studio   (http://\S+)/$", self.said(), re.M)[0]
        headers = {"Authorization": f"Bearer {self.token}"} if self.token else {}
        no_reuse = httpx.Limits(max_keepalive_connections=0)  # one that the server is about to close is reset
        self.http = httpx.Client(base_url=self.url, headers=headers, timeout=60, limits=no_reuse)

    def said(self) -> str:
        return self.log.read_text()

    def stop(self, how: int = signal.SIGTERM) -> int:
        """Ends the service and waits until it has ended; returns its exit code."""
        self.http.close()
        if self.process.poll() is None:
            self.process.send_signal(how)
        return self.process.wait(TIMEOUT_SECONDS)

    def ready(self) -> Service:
        wait(lambda: self.http.get("/readyz").status_code == 200 or self.process.poll() is not None)
        assert self.process.poll() is None, self.said()
        return self

    def submit(self, **fields: Any) -> dict[str, Any]:
        answer = self.http.post("/v1/videos", json={"prompt": "a ball falls", **fields})
        assert answer.status_code == 200, answer.text
        return answer.json()

    def video(self, id: str) -> dict[str, Any]:
        return self.http.get(f"/v1/videos/{id}").json()

    def ended(self, id: str) -> dict[str, Any]:
        """The video when it is completed or failed."""
        wait(lambda: self.video(id)["status"] in ("completed", "failed"))
        return self.video(id)

    def running(self, id: str) -> dict[str, Any]:
        """The video when its first steps are made."""
        wait(lambda: self.video(id)["progress"] > 0 or self.video(id)["status"] in ("completed", "failed"))
        found = self.video(id)
        assert found["status"] == "in_progress", found
        return found

    def workers(self) -> list[int]:
        """The process ids of the workers, oldest first."""
        done = subprocess.run(
            ["pgrep", "-P", str(self.process.pid), "-f", "spawn_main"], capture_output=True, text=True
        )
        return sorted(map(int, done.stdout.split()))


def wait(until: Callable[[], bool]) -> None:
    deadline = time.monotonic() + TIMEOUT_SECONDS
    while not until():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.1)
