"""Log lines as JSON: of commands, of libraries, and read again where another process's lines are shown."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from phantom.errors import UserError
from phantom.logs import KEYS, configure, text_of
from phantom.orchestration.run import tail
from phantom.progress import say

SAYS = """
import logging, sys, warnings
from phantom import logs
from phantom.progress import say, track
logs.configure()
logs.context.update(stage="train", run="pipeline 1", step=3)
say("it goes\\non", "warning")
with track("encode", 1, "clips") as bar:
    bar.advance()
warnings.warn("old")
try:
    1 / 0
except ZeroDivisionError:
    logging.getLogger("library").exception("failed")
logging.getLogger("library").info("not of interest")
logging.raiseExceptions = False  # else their traceback follows
logging.getLogger("library").warning("%d", "wrong")
sys.stderr.write("10%\\r20%\\nwhole")
print(" line", file=sys.stderr)
"""


def records(text: str) -> list[dict[str, Any]]:
    """The lines of `text`, each of which has exactly the keys of a record and a time in UTC."""
    found = [json.loads(line) for line in text.splitlines()]
    assert all(tuple(each) == KEYS for each in found)
    assert all(datetime.fromisoformat(each["time"]).utcoffset().total_seconds() == 0 for each in found)
    return found


def python(*arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    kept = {key: value for key, value in os.environ.items() if key not in ("RANK", "PHANTOM_LOG")}
    return subprocess.run([sys.executable, *arguments], env=kept | env, capture_output=True, text=True, timeout=300)


def test_every_line_is_an_object_also_those_of_libraries():
    done = python("-c", SAYS, PHANTOM_LOG="json", RANK="2")
    found = records(done.stderr)
    assert done.stdout == "" and done.returncode == 0
    context = {"run": "pipeline 1", "stage": "train", "step": 3, "rank": 2}
    assert all({key: each[key] for key in context} == context for each in found)
    said, progress, warned, failed, *others = [(each["level"], each["message"]) for each in found]
    assert said == ("warning", "it goes\non")
    assert progress[0] == "info" and progress[1].startswith("encode: 1/1 clips")
    assert warned[0] == "warning" and "UserWarning: old" in warned[1]
    assert (
        failed[0] == "error" and failed[1].startswith("library: failed\nTraceback") and "ZeroDivisionError" in failed[1]
    )
    assert others == [("info", "10%"), ("info", "20%"), ("info", "whole line")]


def test_a_commands_error_is_an_object_and_its_result_stays_on_stdout(tmp_path: Path):
    command = ("-m", "phantom.cli", "plan", "--params", str(tmp_path / "none.yaml"))
    done = python(*command, PHANTOM_LOG="json", PHANTOM_PIPELINE="pipeline 7")
    (found,) = records(done.stderr)
    plain = python(*command)
    assert (found["level"], found["stage"], found["run"]) == ("error", "plan", "pipeline 7")
    assert plain.stderr == f"{found['message']}\n" and plain.returncode == done.returncode == 2
    listed = python("-m", "phantom.cli", "preset", "--json", PHANTOM_LOG="json")
    assert json.loads(listed.stdout) and listed.stderr == ""


def test_another_format_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PHANTOM_LOG", "xml")
    with pytest.raises(UserError, match="PHANTOM_LOG: found xml, accepted: text, json"):
        configure()


def test_lines_of_another_process_are_shown_as_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    line = records(python("-c", SAYS, PHANTOM_LOG="json").stderr)[1] | {"message": "train: 1/2 steps, 1.0 steps/s"}
    log, shown = tmp_path / "log", list[str]()
    log.write_text(f"plain\n{json.dumps(line)}\n", encoding="utf-8")
    for on_line in (shown.append, None):
        with subprocess.Popen(["true"]) as process:
            tail(process, log, on_line)
    assert shown == capsys.readouterr().err.splitlines() == ["plain", "train: 1/2 steps, 1.0 steps/s"]
    say("a line")  # text without PHANTOM_LOG
    assert capsys.readouterr().err == "a line\n"
    of_another = '{"time": 3, "level": "info", "message": {"text": "a"}}'
    for whole in ('{"time": 3}', '{"time": "cut', '{"code": 1}', of_another, '{"time": ' + 100_000 * "["):
        assert text_of(whole) == whole


RELAYS = """
import subprocess, sys
from pathlib import Path
from phantom import logs
from phantom.orchestration.run import tail
logs.configure()
with subprocess.Popen(["true"]) as process:
    tail(process, Path(sys.argv[1]))
"""


def test_objects_of_a_stage_are_passed_on_as_they_are(tmp_path: Path):
    of_stage = python("-c", SAYS, PHANTOM_LOG="json", RANK="5").stderr
    (tmp_path / "log").write_text(f"{of_stage}plain\n", encoding="utf-8")
    passed = python("-c", RELAYS, str(tmp_path / "log"), PHANTOM_LOG="json").stderr
    assert passed.startswith(of_stage)
    assert [(each["message"], each["rank"]) for each in records(passed)][-1] == ("plain", None)
