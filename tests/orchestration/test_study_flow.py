"""The flow `phantom-study` on a real Prefect server: its tasks, what is retried, and a study that is stopped."""

from __future__ import annotations

import json
import os
import shutil
import signal
import threading
from pathlib import Path
from types import ModuleType

import pytest
import yaml

from phantom.errors import UserError
from phantom.evaluation.study.spec import load_study
from phantom.orchestration import study_processes
from phantom.orchestration.study import run_study
from phantom.orchestration.study_runs import study_runs
from tests.orchestration.pipeline import ROOT, load_flow
from tests.orchestration.prefect_server import ENDED, Prefect, alive, descendants, free_port, wait
from tests.orchestration.studies import run_here, toy_study, write_study, write_study_latents

TITLES = ["base", "control, seed 0", "phantom, seed 0"]


@pytest.fixture
def flow(prefect_server: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The flow's module, set up to run in `tmp_path`, without delays between retries."""
    module = load_flow("study", monkeypatch)
    monkeypatch.setattr(module, "ROOT", tmp_path)
    quick = module.train_and_measure.with_options(retry_delay_seconds=0, retries=1)
    monkeypatch.setattr(module, "train_and_measure", quick)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return module


def write_toy(root: Path, base: Path, steps: int) -> dict:
    """The toy study with one seed: three runs, with that of the frozen base."""
    study = toy_study(base, steps) | {"seeds": [0]}
    write_study_latents(root, base)
    write_study(root, study)
    return study


def is_run(pid: int) -> bool:
    """Whether a process is that of a run of a study."""
    try:
        return "study\0one" in Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:  # it has just ended
        return False


def task_runs() -> list:
    """The task runs of the newest flow run, in the order of their start."""
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId
    from prefect.client.schemas.sorting import FlowRunSort

    with get_client(sync_client=True) as client:
        (newest,) = client.read_flow_runs(sort=FlowRunSort.START_TIME_DESC, limit=1)
        found = client.read_task_runs(flow_run_filter=FlowRunFilter(id=FlowRunFilterId(any_=[newest.id])))
    return sorted(found, key=lambda run: run.start_time)


def test_every_run_is_a_task_and_the_results_are_those_of_the_command(flow, tmp_path, tiny_base):
    study = write_toy(tmp_path, tiny_base, steps=2)
    verdict = flow.study("toy", workers=2)
    done = task_runs()
    assert sorted(run.name for run in done[:3]) == TITLES and done[3].name.startswith("report")
    assert {run.state_name for run in done} == {"Completed"}
    # Two at a time: the third begins when one of the others has ended.
    assert min(run.end_time for run in done[:2]) <= done[2].start_time
    results = json.loads((tmp_path / "studies/toy/results.json").read_text())
    assert results["verdict"] == verdict and (tmp_path / "studies/toy/index.html").is_file()

    from prefect.client.orchestration import get_client

    with get_client(sync_client=True) as client:
        (shown,) = (artifact for artifact in client.read_artifacts() if artifact.key == "study-toy")
    assert verdict in shown.data and "| phantom - control | held-out L_v |" in shown.data
    assert f"`{tmp_path}/studies/toy/index.html`" in shown.data

    # Neither repeats what the other has finished, and both find the same.
    assert run_study("toy", root=tmp_path) == results
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "checkpoints/studies").rglob("log.txt")}
    assert flow.study("toy") == verdict
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "checkpoints/studies").rglob("log.txt")}
    other = tmp_path / "other"
    write_study_latents(other, tiny_base)
    write_study(other, study)
    assert run_here(other)["runs"] == results["runs"]


def test_a_process_that_dies_is_retried_and_wrong_input_is_not(flow, tmp_path, tiny_base, monkeypatch):
    write_toy(tmp_path, tiny_base, steps=1)
    begun: list[str] = []

    class Dies(study_processes.Child):
        """The base dies at once the first time; the control finds its input wrong, and so does Phantom."""

        def __init__(self, run, study, threads, root):
            begun.append(run.title)
            super().__init__(run, study, threads, root)
            if run.title == "base" and begun.count("base") == 1:
                os.killpg(self.process.pid, signal.SIGKILL)
            elif run.title != "base":
                os.killpg(self.process.pid, signal.SIGKILL)
                self.outcome.write_text('{"code": 2, "error": "train.steps: wrong"}')

    monkeypatch.setattr(study_processes, "Child", Dies)
    with pytest.raises(UserError, match=r"control, seed 0: train\.steps: wrong"):
        flow.study("toy", params={"train": {"batch_size": 2}})
    assert begun == ["base", "base", "control, seed 0", "phantom, seed 0"]
    states = {run.name: run.state_name for run in task_runs()}
    assert states == {"base": "Completed", "control, seed 0": "Failed", "phantom, seed 0": "Failed"}
    assert not (tmp_path / "studies/toy/results.json").exists()
    told = json.loads(next((tmp_path / "checkpoints/studies").rglob("run.json")).read_text())
    assert told["params"]["train"]["batch_size"] == 2


def test_a_study_that_does_not_exist_or_a_setting_that_is_wrong_fails_in_one_line(flow, tmp_path, tiny_base):
    from prefect.exceptions import ParameterTypeError  # not above: prefect reads its settings when imported

    write_toy(tmp_path, tiny_base, steps=1)
    with pytest.raises(UserError, match=r"^study 'toi': no studies/toi/study\.yaml; nearest: toy$"):
        flow.study("toi")
    with pytest.raises(ParameterTypeError, match="greater than or equal to 1"):
        flow.study("toy", workers=0)
    with pytest.raises(UserError, match=r"train\.stepz: unknown setting; nearest: train\.steps"):
        flow.study("toy", params={"train": {"stepz": 3}})
    assert not (tmp_path / "checkpoints").exists()


def test_a_run_sets_nothing_of_the_platform_whose_settings_are_the_checkouts(
    flow, tmp_path, tiny_base, make_params, monkeypatch
):
    write_toy(tmp_path, tiny_base, steps=1)
    ours = make_params("compute.train=kubernetes", "cluster.image=ours:1", "tracking.uri=http://mlflow:5000")
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(ours.model_dump(mode="json", by_alias=True)))
    monkeypatch.setattr("phantom.orchestration.study._open_parent", lambda *_: None)  # no such server here

    def make_runner(name, workers, runs, root):
        asked = runs[0].params
        raise UserError(f"{asked.cluster.image} {asked.compute.train} {asked.tracking.uri} {asked.train.batch_size}")

    monkeypatch.setattr(flow, "make_runner", make_runner)
    with pytest.raises(UserError, match=r"^ours:1 kubernetes http://mlflow:5000 2$"):
        flow.study("toy", params={"train": {"batch_size": 2}})
    with pytest.raises(UserError, match=r"^ours:1 local http://mlflow:5000 "):
        flow.study("toy", params={"compute": {"train": "local"}})
    with pytest.raises(
        UserError, match=r"^params: cluster\.image may not be set by a run, only in params\.yaml \(in a cluster: the"
    ):
        flow.study("toy", params={"cluster": {"image": "theirs:1"}})
    shutil.copytree(tmp_path / "studies/toy", tmp_path / "outside")
    with pytest.raises(UserError, match=r"^study '\.\./outside': no studies/\.\./outside/study\.yaml; nearest: toy$"):
        flow.study("../outside")


def test_a_flow_that_is_stopped_lets_the_runs_save_and_goes_on(flow, tmp_path, tiny_base):
    write_toy(tmp_path, tiny_base, steps=24)
    phantom = tmp_path / study_runs(load_study("toy", tmp_path), (), tmp_path)[-1].folder

    def stop_when_saved():
        wait(lambda: list(phantom.rglob("step-*/state.json")), seconds=300)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=stop_when_saved, daemon=True).start()
    with pytest.raises(KeyboardInterrupt):
        flow.study("toy", workers=2)
    assert list(phantom.rglob("step-*/state.json")) and not list(phantom.rglob("result.json"))
    states = {run.name: run.state_name for run in task_runs()}
    assert states["base"] == "Completed" and states["phantom, seed 0"] == "Cancelled"
    flow.study("toy", workers=2)
    assert "train phantom: continues after step" in next(phantom.glob("processes/*/log.txt")).read_text()
    assert {run.state_name for run in task_runs()} == {"Completed"}


@pytest.mark.slow
def test_cancelling_a_served_study_lets_its_runs_save(tmp_path, tiny_base, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    write_toy(tmp_path, tiny_base, steps=300)
    (tmp_path / "flows").mkdir()
    shutil.copy(ROOT / "flows/study.py", tmp_path / "flows")
    shutil.copy(ROOT / "prefect.toml", tmp_path)
    prefect = Prefect(tmp_path, free_port())
    server = prefect.start(
        "server.log", "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(prefect.port)
    )
    served = None
    try:
        wait(lambda: prefect.answers() or server.poll() is not None)
        served = prefect.start("study.log", "python", "flows/study.py")
        wait(lambda: prefect.ask("/deployments/filter", {}) or served.poll() is not None)
        name = prefect.run("-p", "name=toy", "-p", "workers=2", deployment="phantom-study/study")
        wait(lambda: list(tmp_path.rglob("step-*/state.json")) or prefect.states()[name] in ENDED)
        ours = set(filter(is_run, descendants(served.pid)))
        assert ours, prefect.log(name)
        prefect.command("prefect", "flow-run", "cancel", prefect.runs()[name]["id"])
        assert prefect.finished(name) == "Cancelled", prefect.log(name)
        assert "Retry" not in prefect.log(name)
        wait(lambda: not any(alive(pid) for pid in ours), seconds=60)
        outcomes = [json.loads(path.read_text()) for path in tmp_path.rglob("outcome.json")]
        assert 75 in [outcome["code"] for outcome in outcomes] and list(tmp_path.rglob("step-*/state.json"))
    finally:
        for process in filter(None, (served, server)):
            process.send_signal(signal.SIGINT)
            process.wait(120)


def test_the_deployment_file_matches_the_flow(flow):
    tree = yaml.safe_load((ROOT / "prefect.yaml").read_text(encoding="utf-8"))
    (deployment,) = (one for one in tree["deployments"] if one["name"] == "study")
    file, name = deployment["entrypoint"].split(":")
    assert (ROOT / file).is_file() and getattr(flow, name).name == "phantom-study"
