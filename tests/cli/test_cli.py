"""The command line: exit codes, one-line errors, JSON output, settings."""

from __future__ import annotations

import fcntl
import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import typer

from phantom import cli
from phantom.config import load_params, preset_names, preset_path
from phantom.errors import Interrupted, StageFailed, UserError
from phantom.orchestration.privacy import NO_TELEMETRY
from phantom.tracking import registry
from phantom.tracking.registry import RegisterResult
from tests.orchestration.checks import api_server
from tests.orchestration.pipeline import ROOT, make_checkout

COMMAND = [sys.executable, "-m", "phantom.cli"]


@pytest.fixture
def phantom(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """`phantom("plan", "--json")` runs the command in an empty folder: (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)
    for name in ("HF_HUB_OFFLINE", *NO_TELEMETRY):
        monkeypatch.setenv(name, "1")  # restored after the test, whatever a command sets

    def call(*args: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["phantom", *args])
        before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            with pytest.raises(SystemExit) as end:
                cli.main()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
        out, err = capsys.readouterr()
        assert "Traceback" not in out
        return int(end.value.code or 0), out, err

    return call


def commands(group: Any, path: tuple[str, ...] = ()) -> dict[tuple[str, ...], Any]:
    """Every command, by its path such as ("score", "videophy")."""
    found: dict[tuple[str, ...], Any] = {}
    for name, command in group.commands.items():
        found |= commands(command, (*path, name)) if hasattr(command, "commands") else {(*path, name): command}
    return found


COMMANDS = commands(typer.main.get_command(cli.app))


def test_help_names_every_command(phantom):
    code, out, _ = phantom("--help")
    assert code == 0
    assert all(path[0] in out for path in COMMANDS)


@pytest.mark.parametrize("path", COMMANDS, ids=" ".join)
def test_a_command_has_help_and_json_output(phantom, path: tuple[str, ...]):
    code, out, _ = phantom(*path, "--help")
    assert code == 0 and COMMANDS[path].help.splitlines()[0].rstrip(".") in " ".join(out.split())
    options = {option for parameter in COMMANDS[path].params for option in parameter.opts}
    assert "--json" in options or path in (("up",), ("serve",))  # which have no result: they run until Ctrl-C


def test_help_is_quick_and_needs_no_torch():
    code = (
        "import sys; from phantom import cli; sys.exit(any(m in sys.modules for m in ('torch', 'mlflow', 'prefect')))"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


# --- mistakes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["trian"], "phantom: No such command 'trian'"),
        (["plan", "--gpuz", "8"], "phantom plan: No such option: --gpuz"),
        (["plan", "--gpus", "0"], "phantom plan: Invalid value for '--gpus': "),
        (["plan", "--preset", "minni"], "preset 'minni': no such preset; nearest: mini"),
        (["plan", "--preset", "mini", "--gpu", "V100"], "--gpu: found 'V100', accepted: "),
        (["plan", "--preset", "mini", "--set", "train.stepz=1"], "mini.yaml: train.stepz: unknown setting"),
        (["plan", "--preset", "mini", "--set", "train.steps"], "--set 'train.steps': expected key=value"),
        (["train"], "params.yaml: no such file; `phantom preset mini` writes one"),
        (["--params", "absent.yaml", "doctor"], "absent.yaml: no such file"),
        (["register", "--params", "."], ".: no such file"),
        (
            ["preset", "mini", "--set", "evaluate.benchmarks=[x]"],
            "evaluate.benchmarks: found 'x', accepted: physics-iq",
        ),
        (["preset", "minni"], "preset 'minni': no such preset; nearest: mini"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_usage_is_one_line_and_exit_code_2(phantom, args: list[str], said: str):
    code, out, err = phantom(*args)
    assert (code, out) == (2, "")
    assert said in err and len(err.strip().splitlines()) == 1


def test_without_a_command_it_shows_help(phantom):
    code, out, err = phantom()
    assert code == 2 and "Usage" in out + err


@pytest.mark.parametrize(
    ("raised", "code", "said"),
    [
        (UserError("register.metric: wrong"), 2, "register.metric: wrong\n"),
        (StageFailed("register: failed"), 1, "register: failed\n"),
        (Interrupted("register: saved"), 75, "register: saved\n"),
        (KeyboardInterrupt(), 75, "register: interrupted; what was finished is kept, run again to go on\n"),
    ],
)
def test_a_failed_stage_prints_one_line(
    phantom, monkeypatch: pytest.MonkeyPatch, raised: BaseException, code: int, said: str
):
    def fail(*_: Any, **__: Any) -> None:
        raise raised

    monkeypatch.setattr(registry, "register", fail)
    assert phantom("preset", "mini")[0] == 0
    assert phantom("register") == (code, "", said)


def test_an_unexpected_exception_prints_a_traceback_and_exits_1(phantom, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(registry, "register", lambda *_, **__: 1 / 0)
    phantom("preset", "mini")
    code, out, err = phantom("register")
    assert (code, out) == (1, "")
    assert err.startswith("Traceback") and err.endswith("ZeroDivisionError: division by zero\n")


def test_inside_a_pipeline_the_error_goes_to_the_outcome_file(phantom, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    outcome = tmp_path / "outcome.json"
    monkeypatch.setenv("PHANTOM_OUTCOME", str(outcome))
    assert phantom("train") == (2, "", "")
    assert json.loads(outcome.read_text(encoding="utf-8")) == {
        "code": 2,
        "error": "params.yaml: no such file; `phantom preset mini` writes one",
    }


# --- settings --------------------------------------------------------------------------------------------------------


def test_presets_are_listed(phantom):
    code, out, err = phantom("preset")
    assert (code, err) == (0, "")
    assert [line.split()[0] for line in out.splitlines()] == preset_names()
    listed = json.loads(phantom("preset", "--json")[1])
    assert list(listed) == preset_names() and listed["mini"].startswith("The whole system on a laptop's CPU")


def test_writing_a_preset_backs_up_changed_settings(phantom, tmp_path: Path):
    file, kept = tmp_path / "params.yaml", tmp_path / "params.yaml.bak"
    assert phantom("preset", "mini") == (0, "params.yaml: preset mini\n", "")
    assert file.read_bytes() == preset_path("mini").read_bytes()
    assert phantom("preset", "wan2.2-ti2v-5b")[0] == 0
    assert load_params(file).preset == "wan2.2-ti2v-5b" and not kept.exists()

    file.write_text(file.read_text(encoding="utf-8").replace("steps: 20000", "steps: 7"), encoding="utf-8")
    code, out, err = phantom("preset", "mini", "--json")
    assert code == 0 and json.loads(out) == {"preset": "mini", "file": "params.yaml", "kept": "params.yaml.bak"}
    assert err == "params.yaml: the former one is now params.yaml.bak\n"
    assert load_params(kept).train.steps == 7 and load_params(file).preset == "mini"

    assert phantom("preset", "mini", "--params", "other.yaml")[1] == "other.yaml: preset mini\n"
    assert (tmp_path / "other.yaml").read_bytes() == file.read_bytes()


def test_settings_may_be_changed_before_and_after_the_command(phantom, tmp_path: Path):
    (tmp_path / "mine.yaml").write_bytes(preset_path("wan2.2-ti2v-5b").read_bytes())
    code, out, _ = phantom(
        "--params", "mine.yaml", "--set", "train.steps=5", "plan", "--set", "train.batch_size=128", "--json"
    )
    assert code == 0
    assert json.loads(out)["time"]["steps"] == 5 and json.loads(out)["time"]["samples"] == 640
    later = phantom("--set", "train.steps=5", "plan", "--params", "mine.yaml", "--set", "train.steps=6", "--json")[1]
    assert json.loads(later)["time"]["steps"] == 6  # the last one wins


def test_plan_of_the_papers_preset_states_exact_integers(phantom):
    args = ("plan", "--preset", "wan2.2-ti2v-5b", "--gpu", "H200", "--gpus", "8")
    code, out, err = phantom(*args, "--json")
    assert (code, err) == (0, "")
    assert json.loads(out)["parameters"]["video_branch"] == 4_999_787_712
    assert "4,999,787,712" in phantom(*args)[1]
    assert json.loads(phantom(*args, "--clips", "1000", "--mfu", "0.2", "--json")[1])["storage"]["clips"] == 1000


def test_doctor_reports_and_fails_with_what_it_found(phantom, tmp_path: Path):
    phantom("preset", "mini")
    code, out, _ = phantom("doctor", "--json")
    checks = {check["name"]: check for check in json.loads(out)}
    assert code == 1 and not checks["frozen parts"]["ok"] and checks["frozen parts"]["mend"]
    assert "FAIL  frozen parts" in phantom("doctor")[1]


def test_doctor_lists_the_clusters_checks_after_the_machines(phantom, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("KUBECONFIG", "none")
    phantom("preset", "mini")
    here, both = (
        [check["name"] for check in json.loads(phantom("doctor", "--json", *more)[1])] for more in ((), ("--cluster",))
    )
    assert both == [*here, "cluster packages", "kubernetes client", "cluster"]


def test_register_reports_the_alias_and_what_decided_it(phantom, monkeypatch: pytest.MonkeyPatch):
    result = RegisterResult("phantom", 3, False, "score", 1.5, 2.0, "1", "abc")
    monkeypatch.setattr(registry, "register", lambda *_, **__: result)
    phantom("preset", "mini")
    assert phantom("register")[1] == "phantom version 3: challenger, score 1.500, the champion's was 2.000\n"
    assert json.loads(phantom("register", "--json")[1])["champion_score"] == 2.0


def test_a_package_that_is_not_there_is_named(phantom, monkeypatch: pytest.MonkeyPatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "prefect"] or ["prefect"]:
        monkeypatch.setitem(sys.modules, name, None)
    code, out, err = phantom("approve")
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert err.startswith("prefect is not installed here: `make install`, or the extra train")


def test_without_a_server_approve_says_where_it_asked(phantom, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PREFECT_API_URL", "http://127.0.0.1:9/api")
    code, out, err = phantom("approve")
    assert (code, out) == (2, "")
    assert err.startswith("approve: no answer from Prefect at http://127.0.0.1:9/api") and err.count("\n") == 1


def test_a_server_that_does_not_know_us_is_told_apart(phantom):
    from prefect.settings import PREFECT_API_URL, temporary_settings  # not above: it reads its settings when imported

    answers: dict[str, Any] = {"GET /api/admin/version": "3.8.8", "POST /api/flow_runs/filter": 401}
    with api_server(answers) as address, temporary_settings({PREFECT_API_URL: f"{address}/api"}):
        code, out, err = phantom("approve")
    said = f"approve: Prefect at {address}/api/ answers 401; set PREFECT_API_AUTH_STRING to the server's string\n"
    assert (code, out, err) == (2, "", said)


# --- the process -----------------------------------------------------------------------------------------------------


def test_ctrl_c_while_waiting_for_another_run_ends_without_a_traceback(tmp_path: Path):
    checkout = make_checkout(tmp_path / "checkout")
    (checkout / ".dvc/tmp/phantom").mkdir(parents=True)
    with (checkout / ".dvc/tmp/phantom/lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        process = subprocess.Popen([*COMMAND, "run"], cwd=checkout, stderr=subprocess.PIPE, text=True)
        assert process.stderr is not None
        assert process.stderr.readline() == "another run is active in this checkout: waiting for it to finish\n"
        time.sleep(0.2)
        process.send_signal(signal.SIGINT)
        assert process.communicate(timeout=30)[1] == "interrupted\n"
    assert process.returncode == 1
