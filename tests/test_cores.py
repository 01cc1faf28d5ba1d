"""How many cores a process may use, on a machine and in a pod."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from phantom import cores as module
from phantom.cores import cores


@pytest.mark.parametrize(
    ("limit", "expected"), [("200000 100000", 2), ("150000 100000", 2), ("50000 100000", 1), ("max 100000", 64)]
)
def test_a_pods_limit_is_kept_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: str, expected: int):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)))
    monkeypatch.setattr(module, "CPU_MAX", tmp_path / "cpu.max")
    assert cores() == 64
    (tmp_path / "cpu.max").write_text(limit + "\n", encoding="utf-8")
    assert cores() == expected


def test_the_schedulers_limit_is_kept_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {3, 5})
    monkeypatch.setattr(module, "CPU_MAX", tmp_path / "cpu.max")
    assert cores() == 2
