"""The pipeline around the stages: which stages rerun, how they fail and stop, and the Prefect flow."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest
import yaml

from phantom.config import load_params
from phantom.errors import StageFailed, UserError
from phantom.orchestration import run as pipeline
from phantom.orchestration.run_settings import START, platform_overrides
from tests.orchestration.pipeline import ROOT, calls, load_flow, make_checkout

STAGES = list(pipeline.STAGES)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkout in which all stages have run."""
    checkout = make_checkout(tmp_path_factory.mktemp("flow") / "checkout")
    assert [r.stage for r in pipeline.run(checkout) if r.ran] == STAGES
    assert calls(checkout) == STAGES
    return checkout


def run_with(checkout: Path, *overrides: str) -> list[str]:
    """Runs the pipeline with changed settings, and returns the stages that ran."""
    pipeline.write_params(checkout / "params.yaml", list(overrides))
    pipeline.run(checkout)
    return calls(checkout)


def test_a_second_run_finds_everything_up_to_date(finished: Path, capfd: pytest.CaptureFixture[str]):
    done = pipeline.run(finished)
    assert not any(r.ran for r in done)
    assert calls(finished) == []
    said = capfd.readouterr().err
    assert all(f"{stage}: up to date" in said for stage in STAGES)


def test_a_changed_setting_reruns_its_stage_and_later_ones(finished: Path):
    assert run_with(finished, "train.steps=50") == ["train", "evaluate", "register"]
    # Results do not depend on where a stage runs or how often it saves.
    assert run_with(finished, "compute.train=kubernetes", "train.checkpoint_every=7", "tracking.experiment=other") == []
    assert run_with(finished, "register.metric=score") == ["register"]
    assert run_with(finished, "train.steps=720", "register.metric=physics_iq.single.phantom.score") == []


def test_a_changed_setting_that_dvc_does_not_know_reruns_its_stage(tmp_path: Path):
    checkout = make_checkout(tmp_path / "checkout")
    assert run_with(checkout) == STAGES
    other = "train.export_dtype=float32"
    assert [run_with(checkout, other)[:1], run_with(checkout, other)] == [["train"], []]
    assert run_with(checkout, "train.export_dtype=null")[:1] == ["train"]
    with pytest.raises(UserError, match=r"^train.init_from: models/phantom: DVC deletes it before the stage runs; "):
        run_with(checkout, "train.init_from=models/phantom")
    assert (checkout / "models/phantom/config.json").is_file()


def test_a_new_clip_in_the_folder_reruns_prepare(tmp_path: Path):
    checkout = make_checkout(tmp_path / "checkout")
    (checkout / "videos").mkdir()
    (checkout / "videos/a.mp4").write_bytes(b"a")
    assert run_with(checkout, "data.source=folder", "data.path=videos") == STAGES
    assert run_with(checkout) == []
    (checkout / "videos/b.mp4").write_bytes(b"b")
    assert run_with(checkout) == ["prepare"]  # the stub of prepare writes the same clips, whatever the folder contains


def test_wrong_input_in_a_stage_is_a_user_error_and_keeps_earlier_outputs(finished: Path):
    (finished / "fail").write_text("evaluate", encoding="utf-8")
    before = (finished / "data/clips/manifest.parquet").read_bytes()
    with pytest.raises(UserError, match="evaluate: found nothing"):
        run_with(finished, "train.steps=31")
    assert calls(finished) == ["train", "evaluate"]
    assert (finished / "data/clips/manifest.parquet").read_bytes() == before
    assert (finished / "models/phantom/config.json").is_file()
    (finished / "fail").unlink()
    assert run_with(finished) == ["evaluate", "register"]


def test_a_stage_that_dvc_cannot_run_reports_dvcs_error(tmp_path: Path):
    checkout = make_checkout(tmp_path / "checkout")
    with pytest.raises(StageFailed, match=r"encode: .*data/clips"):
        pipeline.run_stage("encode", load_params(checkout / "params.yaml"), checkout)


def test_a_forged_outcome_makes_no_failure_a_success_and_writes_no_second_line(tmp_path: Path):
    checkout = make_checkout(tmp_path / "checkout")
    stage = "import os, pathlib, sys; pathlib.Path(os.environ['PHANTOM_OUTCOME']).write_text(open('forged').read()); "
    (checkout / "stage.py").write_text(f"{stage}sys.exit(1)\n", encoding="utf-8")
    said = {}
    for forged in ('{"code": 0, "error": ""}', '{"code": 1, "error": "a\\nb\\u001b[1A"}', '{"code": {}}', "\0[[["):
        (checkout / "forged").write_text(forged, encoding="utf-8")
        with pytest.raises(StageFailed) as failure:
            pipeline.run_stage("prepare", load_params(checkout / "params.yaml"), checkout)
        said[forged] = str(failure.value)
    assert [text.partition(";")[0] for text in said.values()] == [
        "prepare: finished, but DVC could not take its outputs",
        "a b [1A",
        *2 * ["prepare: its process was killed (out of memory?)"],
    ]
    assert not (checkout / "dvc.lock").exists()


def test_a_users_settings_of_dvc_are_kept(tmp_path: Path):
    checkout = make_checkout(tmp_path / "checkout")
    shutil.rmtree(checkout / ".git")
    theirs = "['remote \"mine\"']\n    url = s3://bucket/of-mine\n    secret_access_key = 100%secret\n"
    local = checkout / ".dvc/config.local"
    local.write_text(theirs, encoding="utf-8")
    for _ in range(2):
        with pipeline.checkout_lock(checkout):
            text = local.read_text(encoding="utf-8")
        assert theirs in text and text.count("no_scm = true") == 1
    status = subprocess.run([sys.executable, "-m", "dvc", "status"], cwd=checkout, capture_output=True, text=True)
    assert status.returncode == 0, status.stderr


def test_a_folder_without_dvc_yaml_is_a_user_error(tmp_path: Path):
    with pytest.raises(UserError, match=r"no dvc\.yaml"):
        pipeline.run(tmp_path, load_params(ROOT / "params.yaml"))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_stops_its_stage_and_exits_75(tmp_path: Path, number: int):
    checkout = make_checkout(tmp_path / "checkout")
    (checkout / "slow").write_text("prepare", encoding="utf-8")
    process = phantom_run(checkout)
    wait_for(checkout / "started")
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 75, said
    assert said.splitlines()[-1] == "prepare: interrupted; what was finished is kept, run again to go on"
    assert calls(checkout) == ["prepare"]
    (checkout / "slow").unlink()
    pipeline.run(checkout)
    assert calls(checkout) == STAGES


def test_a_stage_outlives_a_killed_run_and_the_next_run_uses_its_result(tmp_path: Path):
    checkout = make_checkout(tmp_path / "checkout")
    stage = checkout / "stage.py"
    stage.write_text(stage.read_text(encoding="utf-8").replace("sleep(30)", "sleep(1)"), encoding="utf-8")
    (checkout / "slow").write_text("prepare", encoding="utf-8")
    process = phantom_run(checkout)
    wait_for(checkout / "started")
    process.kill()
    process.communicate()
    pipeline.run(checkout)
    assert calls(checkout) == STAGES  # prepare once


@pytest.mark.parametrize("steps", [61, 62])
def test_stale_dvc_locks_of_a_killed_run_are_removed(finished: Path, steps: int):
    """Truncated, or with a process id that another process has by now: 1 always exists."""
    ours = {"write": {"pid": 1, "cmd": "dvc repro --quiet --single-item train"}}
    stale = json.dumps({str(finished / out): ours for out in ("data/clips", "models/phantom")})
    (finished / ".dvc/tmp/rwlock").write_text(stale if steps == 61 else stale[:9], encoding="utf-8")
    assert run_with(finished, f"train.steps={steps}") == ["train", "evaluate", "register"]


def test_locks_of_other_dvc_commands_are_kept(tmp_path: Path):
    checkout = make_checkout(tmp_path / "checkout")
    lock = checkout / ".dvc/tmp/rwlock"
    lock.parent.mkdir(parents=True, exist_ok=True)
    lock.write_text('{"x": {"read": [{"pid": 1, "cmd": "dvc pull"}]}}', encoding="utf-8")
    with pipeline.checkout_lock(checkout):
        assert lock.is_file()


def test_writing_settings_keeps_comments(tmp_path: Path):
    path = tmp_path / "params.yaml"
    text = (ROOT / "params.yaml").read_text(encoding="utf-8")
    path.write_text(text, encoding="utf-8")
    assert pipeline.write_params(path, ["train.steps=720", "data.path=null"]) == []
    assert path.read_text(encoding="utf-8") == text
    assert pipeline.write_params(path, ["train.steps=17"]) == [f"{path}: train.steps: 720 -> 17"]
    assert path.read_text(encoding="utf-8") == text.replace("  steps: 720\n", "  steps: 17\n")
    with pytest.raises(UserError, match=r"train\.steps"):
        pipeline.write_params(path, ["train.steps=none"])
    with pytest.raises(UserError, match=r"^evaluate\.benchmarks: found 'phisics-iq', accepted: "):
        pipeline.write_params(path, ["train.steps=18", "evaluate.benchmarks=[phisics-iq]"])
    assert load_params(path).train.steps == 17


# --- Prefect ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def flow(finished: Path, monkeypatch: pytest.MonkeyPatch):
    """The flow's module, set up to run in the finished checkout."""
    module = load_flow("full_pipeline", monkeypatch)
    monkeypatch.setattr(module, "ROOT", finished)
    monkeypatch.setenv("PHANTOM_MLFLOW_PAGES", "http://127.0.0.1:5000")
    return module


def artifacts() -> dict[str, object]:
    from prefect.client.orchestration import get_client

    with get_client(sync_client=True) as client:
        return {a.key: a for a in client.read_artifacts() if a.key}


def test_the_flow_runs_a_task_for_each_stage(prefect_server: None, flow, finished: Path):
    ran = flow.full_pipeline(params={"train": {"steps": 77}})
    assert ran == {stage: stage in ("train", "evaluate", "register") for stage in STAGES}
    assert load_params(finished / "params.yaml").train.steps == 77
    assert calls(finished) == ["train", "evaluate", "register"]
    made = artifacts()
    assert {f"{stage}-progress" for stage in STAGES} <= set(made)
    assert made["train-progress"].data == 100
    rows = json.loads(made["evaluation"].data)
    assert [row["model"] for row in rows] == ["base", "phantom"]
    assert "/#/experiments/1/runs/abc" in made["mlflow-run"].data
    assert {name: task.name for name, task in flow.TASKS.items()} == {stage: stage for stage in STAGES}


def test_an_unreachable_server_stops_no_stage(
    prefect_server: None, flow, finished: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    create = flow.create_progress_artifact

    def refused(*_: object, **__: object) -> None:
        monkeypatch.setattr(flow, "create_progress_artifact", create)  # fails once
        raise httpx.ConnectError("All connection attempts failed")

    for call in ("create_progress_artifact", "update_progress_artifact"):
        monkeypatch.setattr(flow, call, refused)
    ran = flow.full_pipeline(params={"train": {"steps": 90}})
    assert ran == {stage: stage in ("train", "evaluate", "register") for stage in STAGES}
    assert calls(finished) == ["train", "evaluate", "register"]
    assert caplog.text.count("the progress of train is not shown: All connection attempts failed") == 1


def test_the_flow_does_not_retry_wrong_input(prefect_server: None, flow, finished: Path):
    (finished / "fail").write_text("train", encoding="utf-8")
    try:
        with pytest.raises(UserError, match="train: found nothing"):
            flow.full_pipeline(params={"train": {"steps": 78}})
    finally:
        (finished / "fail").unlink()
    assert calls(finished) == ["train"]


@pytest.mark.slow
def test_a_stage_that_times_out_is_stopped_and_saves(
    prefect_server: None, flow, finished: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(flow.TASKS, "train", flow.repro.with_options(name="train", timeout_seconds=20))
    monkeypatch.setattr(pipeline, "STOP_TIMEOUT_SECONDS", {signal.SIGINT: 60.0, signal.SIGKILL: 1.0})
    (finished / "slow").write_text("train", encoding="utf-8")
    try:
        with pytest.raises(TimeoutError):
            flow.full_pipeline(params={"train": {"steps": 79}})
    finally:
        (finished / "slow").unlink()
    assert calls(finished) == ["train"]
    left = json.loads((finished / ".dvc/tmp/phantom/train.json").read_text(encoding="utf-8"))
    assert left == {"code": 75, "error": "train: interrupted after saving"}


def test_the_flow_rejects_an_unknown_setting(prefect_server: None, flow, finished: Path):
    with pytest.raises(UserError, match=r"train\.stepz: unknown setting; nearest: train\.steps"):
        flow.full_pipeline(params={"train": {"stepz": 1}})
    assert calls(finished) == []


@pytest.mark.parametrize(
    ("params", "refused"),
    [
        ({"cluster": {"secrets": ["phantom-postgres"]}}, "cluster.secrets"),
        (
            {"cluster": {"image": "other:1", "nodes": 2}, "evaluate": {"videophy": {"judge": {"command": "id"}}}},
            "cluster.image, evaluate.videophy.judge.command",
        ),
        ({"cluster.env": ["LD_PRELOAD=/workspace/a.so"]}, "cluster.env"),
        ({"tracking": {"uri": "http://elsewhere.example"}, "storage": {"models": "s3://theirs"}}, "tracking.uri, "),
        (
            {"evaluate": {"vlm": {"endpoint": "http://elsewhere.example", "key": "AWS_SECRET_ACCESS_KEY"}}},
            "evaluate.vlm",
        ),
        ({"train": {"init_from=/etc #": 1}}, "train.init_from=/etc #"),
        ({"models": None}, "models"),
    ],
)
def test_what_a_run_may_not_set_is_refused_before_anything_is_written(
    prefect_server: None, flow, finished: Path, params: dict, refused: str
):
    before = (finished / "params.yaml").read_bytes()
    with pytest.raises(UserError) as said:
        flow.full_pipeline(params={"train": {"steps": 5}} | params)
    assert str(said.value).startswith(f"params: {refused}")
    assert " may not be set by a run, only in params.yaml (in a cluster: the ConfigMap ph" in str(said.value)
    assert "; accepted: models.dtype, " in str(said.value)
    assert len(str(said.value).splitlines()) == 1
    assert (finished / "params.yaml").read_bytes() == before and calls(finished) == []


def test_a_run_starts_from_the_settings_of_its_pod_and_not_from_those_of_the_run_before(
    prefect_server: None, flow, finished: Path, monkeypatch: pytest.MonkeyPatch
):
    path, start = finished / "params.yaml", finished / START
    shutil.copy(path, start)
    given, before = load_params(start), path.read_bytes()
    pipeline.write_params(path, ["train.seed=77", "cluster.nodes=2"])  # of a run that has got the lock first
    monkeypatch.setattr(flow, "STAGES", {})
    monkeypatch.setattr(flow, "_link_model", lambda: None)
    try:
        assert "cluster.nodes=1" in platform_overrides(finished)  # of a study beside it
        flow.full_pipeline(params={"evaluate": {"seed": 5}})
        found = load_params(path)
        assert (found.train.seed, found.cluster.nodes, found.evaluate.seed) == (given.train.seed, 1, 5)
        flow.full_pipeline()
        assert load_params(path) == given
    finally:
        start.unlink()
        path.write_bytes(before)


@pytest.mark.parametrize("place", ["/etc", "../outside", "data/../../outside", "link", "s3://theirs/clips", 5, "~\0"])
def test_a_run_reads_no_path_outside_of_the_workspace(prefect_server: None, flow, finished: Path, place):
    (finished / "link").unlink(missing_ok=True)
    (finished / "link").symlink_to("/etc")
    for params in ({"data": {"source": "folder", "path": place}}, {"train": {"init_from": place}}):
        with pytest.raises(
            UserError, match=r"^params: \w+\.\w+: found .*, accepted from a run: a folder inside the work"
        ):
            flow.full_pipeline(params=params)
    assert calls(finished) == []


def test_the_deployment_file_matches_the_flow(flow):
    tree = yaml.safe_load((ROOT / "prefect.yaml").read_text(encoding="utf-8"))
    (deployment,) = (one for one in tree["deployments"] if one["name"] == "full-pipeline")
    file, name = deployment["entrypoint"].split(":")
    assert (ROOT / file).is_file() and getattr(flow, name).name == "phantom"
    assert "schedules" not in deployment  # a deploy would reset those that were changed on the server


def phantom_run(checkout: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "phantom.cli", "run"]
    return subprocess.Popen(
        command, cwd=checkout, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=_env()
    )


def _env() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT / "src")}


def wait_for(path: Path, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} did not appear"
        time.sleep(0.05)
