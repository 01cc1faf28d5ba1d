"""`phantom up`: a Prefect server, MLflow, the served deployments and the studio on this machine, until Ctrl-C."""

from __future__ import annotations

import importlib.util
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

import yaml

from phantom.config import Params
from phantom.errors import StageFailed, UserError
from phantom.orchestration.privacy import NO_TELEMETRY
from phantom.orchestration.run import WORK_DIR, shell_command
from phantom.progress import say

HOST = "127.0.0.1"
PIPELINE, STUDY = "phantom/full-pipeline", "phantom-study/study"  # deployments
FLOWS = {PIPELINE: Path("flows/full_pipeline.py"), STUDY: Path("flows/study.py")}  # the scripts that serve them
EXPORT = Path("models/phantom")  # what the studio serves, or as long as there is none the base
STUDIO_PACKAGES = ("torch", "diffusers", "fastapi", "uvicorn", "sqlalchemy", "prometheus_client", "python_multipart")
STUDIO_PARAMS = WORK_DIR / "studio.yaml"  # all settings of `up`, also those of its --set
START_TIMEOUT_SECONDS = 300.0  # of each process, on a busy machine
STOP_TIMEOUT_SECONDS = 15.0
SAVE_TIMEOUT_SECONDS = 120.0  # of a deployment, whose running stages save first


def up(
    params: Params,
    prefect_port: int | None = None,
    mlflow_port: int | None = None,
    studio_port: int | None = None,
    studio: bool = True,
) -> None:
    """Starts the processes, prints their addresses, and stops them all on Ctrl-C or SIGTERM.

    A port that is not given is the default (4200, 5000, 8000) or, if that is taken, a free one. MLflow is not started
    where `tracking.uri` is an http address. The studio is not started where `studio` is False, there is nothing to
    serve, or the extras that it needs are not installed; it loads its model meanwhile, and may end alone. Raises
    UserError if a given port is taken or the working directory is no checkout, StageFailed if another process exits or
    does not answer in time.
    """
    for flow in FLOWS.values():
        if not flow.is_file():
            raise UserError(f"{Path.cwd()}: no {flow} there; `phantom up` runs in a checkout of this project")
    ports = {
        "prefect": _choose_port(prefect_port, 4200, "--prefect-port"),
        "mlflow": _choose_port(mlflow_port, 5000, "--mlflow-port"),
        "studio": _choose_port(studio_port, 8000, "--studio-port"),
    }
    api, mlflow_url = f"http://{HOST}:{ports['prefect']}/api", f"http://{HOST}:{ports['mlflow']}"
    env = {
        **NO_TELEMETRY,
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",
        "PREFECT_HOME": str(Path(".prefect").resolve()),
        "PREFECT_API_URL": api,
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        "PHANTOM_MLFLOW_PAGES": mlflow_url,
    }
    python = [sys.executable, "-m"]
    server = [*python, "prefect", "server", "start", "--host", HOST, "--port", str(ports["prefect"])]
    mlflow = [*python, "mlflow", "server", "--host", HOST, "--port", str(ports["mlflow"])]
    mlflow += ["--backend-store-uri", params.tracking.uri, "--default-artifact-root", params.tracking.artifacts]

    serve = [*python, "phantom.cli", "serve", "--host", HOST, "--port", str(ports["studio"])]
    serve += ["--params", str(STUDIO_PARAMS)]
    studio_url = f"http://{HOST}:{ports['studio']}"
    no_studio = _why_no_studio(params) if studio else "--no-studio"

    children: dict[str, subprocess.Popen[bytes]] = {}
    previous = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        children["prefect"] = _start("prefect", server, env)
        if not params.tracking.uri.startswith("http"):
            children["mlflow"] = _start("mlflow", mlflow, env)
            _wait(f"{mlflow_url}/health", "mlflow", children)
        if no_studio is None:
            STUDIO_PARAMS.parent.mkdir(parents=True, exist_ok=True)
            STUDIO_PARAMS.write_text(yaml.safe_dump(params.model_dump(mode="json", by_alias=True)), encoding="utf-8")
            children["studio"] = _start("studio", serve, env)
        _wait(f"{api}/health", "prefect", children)
        for flow in FLOWS.values():
            children[flow.stem] = _start(flow.stem, [sys.executable, str(flow)], env)
        for deployment, flow in FLOWS.items():
            _wait(f"{api}/deployments/name/{deployment}", flow.stem, children)
        _announce(api, mlflow_url if "mlflow" in children else params.tracking.uri)
        say(f"Studio   {studio_url}/" if "studio" in children else f"Studio   not started: {no_studio}")
        while True:
            _check(children)
            if "studio" in children and children["studio"].poll() is not None:
                say(f"Studio   has ended; see {WORK_DIR / 'studio.log'}")
                del children["studio"]
            time.sleep(1)
    except KeyboardInterrupt:
        say("stopping")
    finally:
        _stop(children)
        signal.signal(signal.SIGTERM, previous)


def _why_no_studio(params: Params) -> str | None:
    """Why the studio cannot be started; None if it can."""
    if missing := [name for name in STUDIO_PACKAGES if importlib.util.find_spec(name) is None]:
        return f"{missing[0]} is not installed here; the extras train and serve bring it"
    if not (EXPORT / "config.json").is_file() and not Path(params.models.base).is_dir():
        return f"no {EXPORT} yet, and {params.models.base} is not on this machine"
    return None


def _announce(api: str, mlflow_url: str) -> None:
    variable = "" if api == f"http://{HOST}:4200/api" else f"PREFECT_API_URL={api} "
    say(f"Prefect  {api.removesuffix('/api')}")
    say(f"MLflow   {mlflow_url}")
    run = f"{variable}{shell_command('prefect')} deployment run"
    say(f"Run      {run} {PIPELINE} --watch")
    say("""         ... -p params='{"train": {"steps": 50}}' changes settings; Ctrl-C here stops all of it""")
    say(f"Study    {run} {STUDY} --watch -p name=NAME -p workers=2")


def _start(name: str, command: list[str], env: dict[str, str]) -> subprocess.Popen[bytes]:
    """Starts a child in its own process group: Ctrl-C reaches only this process, which stops the children in order."""
    log = WORK_DIR / f"{name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as output:
        return subprocess.Popen(
            command, env=env, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
        )


def _wait(url: str, name: str, children: dict[str, subprocess.Popen[bytes]]) -> None:
    say(f"starting {name}")
    deadline = time.monotonic() + START_TIMEOUT_SECONDS
    while time.monotonic() < deadline:
        _check(children)
        with suppress(urllib.error.URLError, OSError), urllib.request.urlopen(url, timeout=5):
            return
        time.sleep(0.5)
    raise StageFailed(f"up: {name} did not answer within {START_TIMEOUT_SECONDS:.0f} s; see {WORK_DIR / f'{name}.log'}")


def _check(children: dict[str, subprocess.Popen[bytes]]) -> None:
    for name, child in children.items():
        if name != "studio" and child.poll() is not None:
            raise StageFailed(f"up: {name} ended with exit code {child.returncode}; see {WORK_DIR / f'{name}.log'}")


def _stop(children: dict[str, subprocess.Popen[bytes]]) -> None:
    """Stops the deployments first: running stages save, and their flows report the final state to the server."""
    for name, child in reversed(children.items()):
        timeout = STOP_TIMEOUT_SECONDS if name in ("prefect", "mlflow") else SAVE_TIMEOUT_SECONDS
        signals = ((signal.SIGINT, timeout), (signal.SIGTERM, STOP_TIMEOUT_SECONDS), (signal.SIGKILL, 5.0))
        for signal_number, seconds in signals:
            with suppress(ProcessLookupError, KeyboardInterrupt):
                os.killpg(child.pid, signal_number)
            with suppress(subprocess.TimeoutExpired, KeyboardInterrupt):
                child.wait(seconds)
                break
        with suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)  # workers that the server left in its process group


def _choose_port(given: int | None, default: int, option: str) -> int:
    with socket.socket() as trial:
        trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            trial.bind((HOST, given or default))
        except OSError:
            if given:
                raise UserError(f"{option}: port {given} is taken; accepted: a free port") from None
            trial.bind((HOST, 0))
        return trial.getsockname()[1]
