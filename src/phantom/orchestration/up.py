"""`phantom up`: Prefect's server, MLflow and the served deployment on this machine, until Ctrl-C."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from contextlib import suppress
from pathlib import Path

from phantom.config import Params
from phantom.errors import StageFailed, UserError
from phantom.orchestration.privacy import NO_TELEMETRY
from phantom.orchestration.run import WORK, installed
from phantom.progress import say

HOST = "127.0.0.1"
DEPLOYMENT = "full-pipeline"
FLOW = Path("flows/full_pipeline.py")
START_SECONDS = 300.0  # each of them, on a busy machine
STOP_SECONDS = 15.0


def up(params: Params, prefect_port: int | None = None, mlflow_port: int | None = None) -> None:
    """Starts all three, says where they are, and returns after Ctrl-C with none of them left running.

    A port not given is the usual one (4200, 5000) or, if that is taken, a free one. Raises UserError for a given port
    that is taken or where there is no checkout, StageFailed if one of the three does not come up or ends.
    """
    if not FLOW.is_file():
        raise UserError(f"{Path.cwd()}: no {FLOW} there; `phantom up` runs in a checkout of this project")
    ports = {
        "prefect": _port(prefect_port, 4200, "--prefect-port"),
        "mlflow": _port(mlflow_port, 5000, "--mlflow-port"),
    }
    api, pages = f"http://{HOST}:{ports['prefect']}/api", f"http://{HOST}:{ports['mlflow']}"
    env = {
        **NO_TELEMETRY,
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",
        "PREFECT_HOME": str(Path(".prefect").resolve()),
        "PREFECT_API_URL": api,
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        "PHANTOM_MLFLOW_PAGES": pages,
    }
    python = [sys.executable, "-m"]
    server = [*python, "prefect", "server", "start", "--host", HOST, "--port", str(ports["prefect"])]
    mlflow = [*python, "mlflow", "server", "--host", HOST, "--port", str(ports["mlflow"])]
    mlflow += ["--backend-store-uri", params.tracking.uri, "--default-artifact-root", params.tracking.artifacts]
    flow = [sys.executable, str(FLOW)]

    children: dict[str, subprocess.Popen[bytes]] = {}
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        children["prefect"] = _start("prefect", server, env)
        if not params.tracking.uri.startswith("http"):
            children["mlflow"] = _start("mlflow", mlflow, env)
            _wait(f"{pages}/health", "mlflow", children)
        _wait(f"{api}/health", "prefect", children)
        children["deployment"] = _start("deployment", flow, env)
        _wait(f"{api}/deployments/name/phantom/{DEPLOYMENT}", "deployment", children)
        _announce(api, pages if "mlflow" in children else params.tracking.uri)
        while True:
            _check(children)
            time.sleep(1)
    except KeyboardInterrupt:
        say("stopping")
    finally:
        _stop(children)
        signal.signal(signal.SIGTERM, before)


def _announce(api: str, pages: str) -> None:
    elsewhere = "" if api == f"http://{HOST}:4200/api" else f"PREFECT_API_URL={api} "
    say(f"Prefect  {api.removesuffix('/api')}")
    say(f"MLflow   {pages}")
    say(f"Run      {elsewhere}{installed('prefect')} deployment run phantom/{DEPLOYMENT} --watch")
    say("""         ... -p params='{"train": {"steps": 50}}' changes settings; Ctrl-C here stops all of it""")


def _start(name: str, command: list[str], env: dict[str, str]) -> subprocess.Popen[bytes]:
    """A child in a group of its own, so that Ctrl-C reaches this process alone and the order of stopping is ours."""
    log = WORK / f"{name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as output:
        return subprocess.Popen(
            command, env=env, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
        )


def _wait(url: str, name: str, children: dict[str, subprocess.Popen[bytes]]) -> None:
    say(f"starting {name}")
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        _check(children)
        with suppress(urllib.error.URLError, OSError), urllib.request.urlopen(url, timeout=5):
            return
        time.sleep(0.5)
    raise StageFailed(f"up: {name} did not answer within {START_SECONDS:.0f} s; see {WORK / f'{name}.log'}")


def _check(children: dict[str, subprocess.Popen[bytes]]) -> None:
    for name, child in children.items():
        if child.poll() is not None:
            raise StageFailed(f"up: {name} ended with exit code {child.returncode}; see {WORK / f'{name}.log'}")


def _stop(children: dict[str, subprocess.Popen[bytes]]) -> None:
    """The deployment first: the stage of a running flow saves, while the server still takes the flow's last word."""
    for name, child in reversed(children.items()):
        patience = 120.0 if name == "deployment" else STOP_SECONDS
        for number, seconds in ((signal.SIGINT, patience), (signal.SIGTERM, STOP_SECONDS), (signal.SIGKILL, 5.0)):
            with suppress(ProcessLookupError, KeyboardInterrupt):
                os.killpg(child.pid, number)
            with suppress(subprocess.TimeoutExpired, KeyboardInterrupt):
                child.wait(seconds)
                break
        with suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)  # helpers that a server left behind in its group


def _port(given: int | None, usual: int, option: str) -> int:
    with socket.socket() as trial:
        trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            trial.bind((HOST, given or usual))
        except OSError:
            if given:
                raise UserError(f"{option}: port {given} is taken; accepted: a free port") from None
            trial.bind((HOST, 0))
        return trial.getsockname()[1]
