"""`phantom up` in a temporary checkout: real servers, a deployment that runs, and nothing left after Ctrl-C."""

from __future__ import annotations

import json
import re
import shutil
import signal
import socket
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from phantom.errors import UserError
from phantom.orchestration.run import STAGES
from phantom.orchestration.up import up
from tests.orchestration.pipeline import ROOT, calls, make_checkout
from tests.orchestration.prefect_server import TIMEOUT_SECONDS, Prefect, alive, descendants, free_port, wait


class Up(Prefect):
    """A running `phantom up`, as a client of its Prefect server."""

    def __init__(self, checkout: Path) -> None:
        super().__init__(checkout, free_port())
        self.mlflow = free_port()
        ports = ("--prefect-port", str(self.port), "--mlflow-port", str(self.mlflow))
        self.process = self.start("up.log", "phantom", "up", *ports, "--set", "evaluate.sampling.steps=3")

    def said(self) -> str:
        return (self.checkout / "up.log").read_text(encoding="utf-8")

    def suspended(self, name: str) -> None:
        """Waits until the run waits for approval."""
        assert self.reaches(name, "Suspended") == "Suspended", self.log(name)


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> Iterator[Up]:
    checkout = make_checkout(tmp_path_factory.mktemp("up") / "checkout")
    shutil.copytree(ROOT / "flows", checkout / "flows", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "prefect.toml", checkout)
    shutil.copytree(tiny_base, checkout / "models/mini", dirs_exist_ok=True)
    started = Up(checkout)
    try:
        wait(lambda: "Studio " in started.said() or started.process.poll() is not None)
        assert started.process.poll() is None, started.said()
        yield started
    finally:
        started.process.send_signal(signal.SIGINT)
        started.process.wait(TIMEOUT_SECONDS)


@pytest.mark.slow
def test_it_says_where_everything_is_and_all_servers_answer(running: Up):
    said = running.said()
    assert f"Prefect  http://127.0.0.1:{running.port}\n" in said
    assert f"MLflow   http://127.0.0.1:{running.mlflow}\n" in said
    assert f"PREFECT_API_URL={running.api} " in said and "deployment run phantom/full-pipeline --watch" in said
    assert "deployment run phantom-study/study --watch -p name=NAME" in said
    with urllib.request.urlopen(f"http://127.0.0.1:{running.mlflow}/health", timeout=30) as answer:
        assert answer.read() == b"OK"
    studio = re.findall(r"^Studio   (http://127.0.0.1:\d+/)$", said, re.M)[0]

    def ready() -> bool:
        try:
            return urllib.request.urlopen(f"{studio}readyz", timeout=30).status == 200
        except OSError:
            return False

    wait(ready)
    with urllib.request.urlopen(studio, timeout=30) as answer:
        assert b"Phantom studio" in answer.read()
    with urllib.request.urlopen(f"{studio}v1/models", timeout=30) as answer:
        assert json.load(answer)["data"][0]["defaults"]["steps"] == 3  # as `up` was told
    assert (running.checkout / "mlflow.db").is_file() and (running.checkout / ".prefect/prefect.db").is_file()


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_the_deployment_runs_the_pipeline_with_changed_settings(running: Up):
    done = running.command(
        "prefect", "deployment", "run", "phantom/full-pipeline", "--watch", "-p", 'params={"train": {"steps": 50}}'
    )
    assert calls(running.checkout) == list(STAGES), done.stdout
    assert "steps: 50" in (running.checkout / "params.yaml").read_text(encoding="utf-8")
    made = {artifact["key"]: artifact for artifact in running.ask("/artifacts/filter", {})}
    assert {f"{stage}-progress" for stage in STAGES} | {"evaluation", "mlflow-run"} <= set(made)
    assert f"http://127.0.0.1:{running.mlflow}/#/experiments/1/runs/abc" in made["mlflow-run"]["data"]


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_a_run_waits_for_approval_and_goes_on_with_the_answer(running: Up):
    calls(running.checkout)
    name = running.run("-p", "approval=true", "-p", 'params={"train": {"steps": 51}}')
    running.suspended(name)
    assert calls(running.checkout)[-2:] == ["train", "evaluate"]
    assert running.command("phantom", "approve").stdout == f"{name}: approved\n"
    assert running.finished(name) == "Completed", running.log(name)
    assert calls(running.checkout) == ["register"]

    name = running.run("-p", "approval=true")
    running.suspended(name)
    answer = json.loads(running.command("phantom", "approve", name, "--reject", "--json").stdout)
    assert answer == {"run": name, "approved": False}
    assert running.finished(name) == "Completed", running.log(name)
    assert calls(running.checkout) == []


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_two_runs_at_once_follow_one_another(running: Up):
    calls(running.checkout)
    names = [running.run("-p", f'params={{"train": {{"steps": {steps}}}}}') for steps in (53, 54)]
    assert [running.finished(name) for name in names] == ["Completed", "Completed"]
    assert calls(running.checkout) == ["train", "evaluate", "register"] * 2
    first, second = sorted((running.runs()[name] for name in names), key=lambda run: run["start_time"])
    assert first["end_time"] <= second["start_time"]


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_cancelling_a_run_lets_its_stage_save_and_frees_the_checkout(running: Up):
    (running.checkout / "slow").write_text("train", encoding="utf-8")
    before = descendants(running.process.pid)
    name = running.run("-p", 'params={"train": {"steps": 55}}')
    wait((running.checkout / "started").exists)
    of_the_run = descendants(running.process.pid) - before
    running.command("prefect", "flow-run", "cancel", running.runs()[name]["id"])
    assert running.finished(name) == "Cancelled"
    wait(lambda: not any(alive(pid) for pid in of_the_run))
    outcome = json.loads((running.checkout / ".dvc/tmp/phantom/train.json").read_text(encoding="utf-8"))
    assert outcome == {"code": 75, "error": "train: interrupted after saving"}
    for left in ("slow", "started"):
        (running.checkout / left).unlink()
    calls(running.checkout)
    assert running.finished(running.run()) == "Completed"
    assert calls(running.checkout) == ["train", "evaluate", "register"]


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_ctrl_c_lets_the_running_stage_save_and_leaves_nothing(running: Up):
    """Must be the last test of this file that uses the servers: it stops them."""
    (running.checkout / "slow").write_text("train", encoding="utf-8")
    running.run("-p", 'params={"train": {"steps": 52}}')
    wait((running.checkout / "started").exists)
    ours = descendants(running.process.pid)
    assert len(ours) >= 4
    running.process.send_signal(signal.SIGINT)
    assert running.process.wait(TIMEOUT_SECONDS) == 0
    assert running.said().splitlines()[-1] == "stopping"
    outcome = json.loads((running.checkout / ".dvc/tmp/phantom/train.json").read_text(encoding="utf-8"))
    assert outcome == {"code": 75, "error": "train: interrupted after saving"}
    wait(lambda: not any(alive(pid) for pid in ours), seconds=15)
    for port in (running.port, running.mlflow):
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
    with pytest.raises(UserError, match=r"no flows/study\.py there"):
        up(make_params())
    (tmp_path / "flows/study.py").touch()
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=rf"^--mlflow-port: port {port} is taken; accepted: a free port$"):
            up(make_params(), None, port)
    assert [path.name for path in tmp_path.iterdir()] == ["flows"]
