"""The number of cores a process may use: the CPU affinity, and the cgroup limit of a pod."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from phantom import cores as module
from phantom.cores import cores


@pytest.mark.parametrize(
    ("limit", "expected"), [("200000 100000", 2), ("150000 100000", 2), ("50000 100000", 1), ("max 100000", 64)]
)
def test_the_cgroup_limit_is_respected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: str, expected: int):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)))
    monkeypatch.setattr(module, "CPU_MAX", tmp_path / "cpu.max")
    assert cores() == 64
    (tmp_path / "cpu.max").write_text(limit + "\n", encoding="utf-8")
    assert cores() == expected


def test_the_cpu_affinity_is_respected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {3, 5})
    monkeypatch.setattr(module, "CPU_MAX", tmp_path / "cpu.max")
    assert cores() == 2


@pytest.mark.parametrize(("given", "expected"), [(None, "PASSIVE"), ("ACTIVE", "ACTIVE")])
def test_openmp_threads_of_a_command_sleep_when_idle_unless_the_user_says_otherwise(given: str | None, expected: str):
    """What OpenMP itself says of its settings, in a command that imports torch."""
    env = {key: value for key, value in os.environ.items() if key != "OMP_WAIT_POLICY"} | {"OMP_DISPLAY_ENV": "true"}
    env |= {"OMP_WAIT_POLICY": given} if given else {}
    command = [sys.executable, "-m", "phantom.cli", "plan", "--preset", "mini", "--gpus", "1"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    assert f"OMP_WAIT_POLICY = '{expected}'" in done.stderr
