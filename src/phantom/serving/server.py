"""`phantom serve`: the HTTP server and its workers, until Ctrl-C or SIGTERM."""

from __future__ import annotations

import copy
import logging
import os
import socket
import subprocess
import sys
import threading
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import uvicorn
from uvicorn.config import LOGGING_CONFIG

from phantom.data.storage import open_folder
from phantom.errors import UserError
from phantom.progress import say
from phantom.serving.app import Service, create_app
from phantom.serving.guard import LOOPBACK
from phantom.serving.inputs import check_prefixes
from phantom.serving.jobs import JobQueue
from phantom.serving.options import Options
from phantom.serving.supervisor import Supervisor

STREAMS_END_SECONDS = 5  # in which open downloads end when the service stops


def serve(options: Options) -> None:
    """Serves until Ctrl-C or SIGTERM: unfinished jobs are given back, and a next start goes on with them.

    Raises UserError for an address, a database or a model that cannot be used.
    """
    if options.token is None and options.host not in LOOPBACK:
        raise UserError(
            f"--host: found {options.host} without a token; accepted: {', '.join(LOOPBACK)}, or any with "
            "PHANTOM_SERVE_TOKEN or --token-file"
        )
    check_prefixes(options.allowed_uris)
    listening = _listen(options.host, options.port)
    options = replace(options, port=listening.getsockname()[1])
    options.state.mkdir(parents=True, exist_ok=True)
    queue = JobQueue(options.database, options.queue_limit, options.keep_hours * 3600)
    service = Service(options, queue, open_folder(options.results, Path(), options.storage))
    config = uvicorn.Config(
        create_app(service), log_config=_logging(), timeout_graceful_shutdown=STREAMS_END_SECONDS, server_header=False
    )
    server = _Server(config, service.stopping)
    failure: list[str] = []

    def fail(line: str) -> None:
        failure.append(line)
        server.end()

    supervisor = Supervisor(options, queue, service.results, _devices(options.workers), fail)
    address = f"[{options.host}]" if ":" in options.host else options.host
    say(f"Studio   http://{address}:{options.port}/")
    supervisor.start()
    try:
        with suppress(KeyboardInterrupt):  # which uvicorn raises again after it has ended everything
            server.run([listening])
    finally:
        supervisor.stop()
        queue.close()
    if failure:
        raise UserError(failure[0])


class _Server(uvicorn.Server):
    """A server that ends its streams of events when it is told to stop, rather than waiting for them."""

    def __init__(self, config: uvicorn.Config, stopping: threading.Event) -> None:
        super().__init__(config)
        self.stopping = stopping

    def handle_exit(self, sig: int, frame: Any) -> None:
        self.stopping.set()
        super().handle_exit(sig, frame)

    def end(self) -> None:
        """Stops from another thread."""
        self.stopping.set()
        self.should_exit = True


def count_gpus() -> int:
    """The number of GPUs, asked in a process of its own: this one needs no torch."""
    if not any(Path("/dev").glob("nvidia[0-9]*")):
        return 0
    done = subprocess.run(
        [sys.executable, "-c", "import torch; print(torch.cuda.device_count())"], capture_output=True, text=True
    )
    return int(done.stdout) if done.returncode == 0 else 0


def _devices(workers: int) -> list[str | None]:
    """The GPU of each worker, in turn; None where there is none."""
    gpus = count_gpus()
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = named.split(",") if named else [str(i) for i in range(gpus)]
    return [names[i % gpus] if gpus else None for i in range(workers)]


def _listen(host: str, port: int) -> socket.socket:
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        raise UserError(f"--host and --port: {host}:{port}: {error.strerror}; accepted: a free port") from None


def _logging() -> dict[str, Any]:
    """uvicorn's, with the access log on stderr: stdout is for results. It has methods and paths, and no prompts."""
    config = copy.deepcopy(LOGGING_CONFIG)
    config["filters"] = {"no-probes": {"()": _NoProbes}}
    config["handlers"]["access"] |= {"stream": "ext://sys.stderr", "filters": ["no-probes"]}
    return config


class _NoProbes(logging.Filter):
    """Leaves out what asks every few seconds."""

    def filter(self, record: logging.LogRecord) -> bool:
        return not any(path in record.getMessage() for path in ("/healthz", "/readyz", "/metrics"))
