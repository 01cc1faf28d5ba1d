"""`phantom up` in a temporary checkout: real servers, a deployment that runs, and nothing left after Ctrl-C."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from phantom.errors import UserError
from phantom.run import STAGES
from phantom.up import up
from tests.pipeline import ROOT, calls, make_checkout

BIN = Path(sys.executable).parent
SECONDS = 120.0


class Up:
    """A running `phantom up`, and commands of the environment asked against its Prefect."""

    def __init__(self, checkout: Path) -> None:
        self.checkout = checkout
        self.ports = free_port(), free_port()
        self.log = checkout / "up.log"
        command = [sys.executable, "-m", "phantom.cli", "up"]
        command += ["--prefect-port", str(self.ports[0]), "--mlflow-port", str(self.ports[1])]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(command, cwd=checkout, stdout=log, stderr=log)

    @property
    def api(self) -> str:
        return f"http://127.0.0.1:{self.ports[0]}/api"

    def said(self) -> str:
        return self.log.read_text(encoding="utf-8")

    def command(self, *args: str) -> subprocess.CompletedProcess[str]:
        env = {**os.environ, "PREFECT_API_URL": self.api, "PREFECT_HOME": str(self.checkout / ".prefect")}
        done = subprocess.run(
            [str(BIN / args[0]), *args[1:]], cwd=self.checkout, env=env, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done

    def ask(self, path: str, body: dict[str, Any]) -> Any:
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(f"{self.api}{path}", json.dumps(body).encode(), headers)
        with urllib.request.urlopen(request, timeout=30) as answer:
            return json.loads(answer.read())

    def states(self) -> dict[str, str]:
        """The state of every run of the flow, by its name."""
        return {run["name"]: run["state_name"] for run in self.ask("/flow_runs/filter", {})}

    def suspended(self) -> str:
        """Waits for a run that waits for approval; its name."""
        wait(lambda: "Suspended" in self.states().values())
        return next(name for name, state in self.states().items() if state == "Suspended")

    def finished(self, name: str) -> str:
        """Waits until the run has ended; how."""
        wait(lambda: self.states()[name] in ("Completed", "Failed", "Crashed", "Cancelled"))
        return self.states()[name]


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Up]:
    checkout = make_checkout(tmp_path_factory.mktemp("up") / "checkout")
    (checkout / "flows").mkdir()
    shutil.copy(ROOT / "flows/full_pipeline.py", checkout / "flows")
    shutil.copy(ROOT / "prefect.toml", checkout)
    started = Up(checkout)
    try:
        wait(lambda: "Ctrl-C here stops all of it" in started.said() or started.process.poll() is not None)
        assert started.process.poll() is None, started.said()
        yield started
    finally:
        started.process.send_signal(signal.SIGINT)
        started.process.wait(SECONDS)


@pytest.mark.slow
def test_it_says_where_everything_is_and_both_servers_answer(running: Up):
    prefect, mlflow = running.ports
    said = running.said()
    assert f"Prefect  http://127.0.0.1:{prefect}\n" in said and f"MLflow   http://127.0.0.1:{mlflow}\n" in said
    assert f"PREFECT_API_URL={running.api} " in said and "deployment run phantom/full-pipeline --watch" in said
    with urllib.request.urlopen(f"http://127.0.0.1:{mlflow}/health", timeout=30) as answer:
        assert answer.read() == b"OK"
    assert (running.checkout / "mlflow.db").is_file() and (running.checkout / ".prefect/prefect.db").is_file()


@pytest.mark.slow
def test_the_deployment_runs_the_pipeline_with_changed_settings(running: Up):
    done = running.command(
        "prefect", "deployment", "run", "phantom/full-pipeline", "--watch", "-p", 'params={"train": {"steps": 50}}'
    )
    assert calls(running.checkout) == list(STAGES), done.stdout
    assert "steps: 50" in (running.checkout / "params.yaml").read_text(encoding="utf-8")
    made = {artifact["key"]: artifact for artifact in running.ask("/artifacts/filter", {})}
    assert {f"{stage}-progress" for stage in STAGES} | {"evaluation", "mlflow-run"} <= set(made)
    assert f"http://127.0.0.1:{running.ports[1]}/#/experiments/1/runs/abc" in made["mlflow-run"]["data"]


@pytest.mark.slow
def test_a_run_waits_for_approval_and_goes_on_with_the_answer(running: Up):
    calls(running.checkout)
    arguments = ["-p", "approval=true", "-p", 'params={"train": {"steps": 51}}']
    running.command("prefect", "deployment", "run", "phantom/full-pipeline", *arguments)
    name = running.suspended()
    assert calls(running.checkout)[-2:] == ["train", "evaluate"]
    assert running.command("phantom", "approve").stdout == f"{name}: approved\n"
    assert running.finished(name) == "Completed"
    assert calls(running.checkout) == ["register"]

    running.command("prefect", "deployment", "run", "phantom/full-pipeline", "-p", "approval=true")
    name = running.suspended()
    answer = json.loads(running.command("phantom", "approve", name, "--reject", "--json").stdout)
    assert answer == {"run": name, "approved": False}
    assert running.finished(name) == "Completed"
    assert calls(running.checkout) == []


@pytest.mark.slow
def test_ctrl_c_lets_the_running_stage_save_and_leaves_nothing(running: Up):
    """The last test of this file: the servers are gone after it."""
    (running.checkout / "slow").write_text("train", encoding="utf-8")
    running.command("prefect", "deployment", "run", "phantom/full-pipeline", "-p", 'params={"train": {"steps": 52}}')
    wait((running.checkout / "started").exists)
    ours = descendants(running.process.pid)
    assert len(ours) >= 4
    running.process.send_signal(signal.SIGINT)
    assert running.process.wait(SECONDS) == 0
    assert running.said().splitlines()[-1] == "stopping"
    outcome = json.loads((running.checkout / ".dvc/tmp/phantom/train.json").read_text(encoding="utf-8"))
    assert outcome == {"code": 75, "error": "train: interrupted after saving"}
    wait(lambda: not any(alive(pid) for pid in ours), 15)
    for port in running.ports:
        with socket.socket() as trial:
            assert trial.connect_ex(("127.0.0.1", port)) != 0


def test_a_taken_port_and_a_folder_without_a_checkout_are_refused_before_anything_starts(
    make_params, tmp_path: Path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"no flows/full_pipeline\.py there"):
        up(make_params())
    (tmp_path / "flows").mkdir()
    (tmp_path / "flows/full_pipeline.py").touch()
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=rf"^--mlflow-port: port {port} is taken; accepted: a free port$"):
            up(make_params(), None, port)
    assert [path.name for path in tmp_path.iterdir()] == ["flows"]


def wait(done, seconds: float = SECONDS) -> None:
    deadline = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.2)


def free_port() -> int:
    with socket.socket() as trial:
        trial.bind(("127.0.0.1", 0))
        return trial.getsockname()[1]


def descendants(pid: int) -> set[int]:
    """The processes that `pid` has started, and those that these have started."""
    parents: dict[int, int] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
        except OSError:  # it has ended in between
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
