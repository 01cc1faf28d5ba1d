"""Progress: a plain line every few seconds where there is no terminal, a bar where there is one."""

from __future__ import annotations

import os
import pty
import re
import subprocess
import sys
from itertools import pairwise

import pytest

from phantom import progress
from phantom.evaluation import sample
from phantom.progress import say, track
from phantom.training.build import build_model
from tests import tiny

LINE = re.compile(r"^encode: (\d+)/(\d+) clips, ([\d.]+) clips/s, (\d+ s left|time left unknown)(, .*)?$")


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch):
    """A clock that only advances when a test advances it."""

    class Clock:
        now = 1000.0

        def monotonic(self) -> float:
            return self.now

    made = Clock()
    monkeypatch.setattr(progress, "time", made)
    return made


def test_a_plain_line_every_few_seconds_and_at_the_end(clock, capsys: pytest.CaptureFixture[str]):
    with track("encode", 100, "clips") as bar:
        for _ in range(100):
            clock.now += 0.2
            bar.advance()
    lines = capsys.readouterr().err.splitlines()
    shown = [int(LINE.match(line)[1]) for line in lines]  # type: ignore[index]
    assert shown[0] == 1 and shown[-1] == 100  # the first line comes at once, as a sign of life
    assert [later - earlier for earlier, later in pairwise(shown)] == [25, 25, 25, 24]
    assert lines[1] == "encode: 26/100 clips, 5.0 clips/s, 15 s left"
    assert lines[-1] == "encode: 100/100 clips, 5.0 clips/s, 0 s left"


def test_work_done_by_an_earlier_run_is_not_counted_as_speed(clock, capsys: pytest.CaptureFixture[str]):
    with track("encode", 100, "clips", done=60) as bar:
        clock.now += 10
        bar.advance(20, note="loss 0.5")
    assert capsys.readouterr().err == "encode: 80/100 clips, 2.0 clips/s, 10 s left, loss 0.5\n"


def test_a_note_stays_until_the_next(clock, capsys: pytest.CaptureFixture[str]):
    with track("encode", 3, "clips") as bar:
        for note in ("loss 1", None, "loss 2"):
            clock.now += 10
            bar.advance(note=note)
    assert [line.rsplit(", ", 1)[1] for line in capsys.readouterr().err.splitlines()] == ["loss 1", "loss 1", "loss 2"]


def test_plain_lines_have_the_format_that_the_flow_parses(clock, capsys: pytest.CaptureFixture[str]):
    with track("encode", 4, "clips") as bar:
        bar.advance()
    line = capsys.readouterr().err
    assert re.match(r"^\w[\w ]*: (\d+)/(\d+) ", line).groups() == ("1", "4")  # type: ignore[union-attr]


def test_nothing_is_written_to_stdout(clock, capsys: pytest.CaptureFixture[str]):
    with track("encode", 1, "clips") as bar:
        bar.advance()
    say("a line")
    out, err = capsys.readouterr()
    assert out == "" and err.endswith("a line\n")


def test_a_terminal_gets_a_bar():
    script = "from phantom.progress import track\nwith track('encode', 2, 'clips') as b: b.advance(2, note='loss 0.5')"
    leader, follower = pty.openpty()
    env = {**os.environ, "TERM": "xterm", "COLUMNS": "100"}
    subprocess.run([sys.executable, "-c", script], stderr=follower, env=env, check=True, timeout=60)
    os.close(follower)
    shown = os.read(leader, 65536).decode()
    os.close(leader)
    assert "encode" in shown and "2/2" in shown and "━" in shown and "loss 0.5" in shown
    assert "clips/s" not in shown


def test_stages_load_weights_silently(make_params, tiny_base, capfd):
    params = make_params("physics.prediction=clean")  # without the line on the floor under L_z
    build_model(params, tiny.PHYSICS_CHANNELS)
    sample.load(tiny_base, params, text=True)
    printed = capfd.readouterr()
    assert printed.out == printed.err == ""
