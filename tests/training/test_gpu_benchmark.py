"""benchmarks/gpu.py, at the sizes that a CPU can do."""

from __future__ import annotations

import json

import pytest
import torch
from benchmarks import gpu

from phantom.config import load_params, preset_path


def test_every_row_is_measured_beside_its_plan(capsys):
    gpu.main(["--tiny", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert [(row["checkpointing"], row["measured"]) for row in found["training"]] == [
        ("full", False),
        ("full", True),
        ("selective", False),
        ("none", False),
    ]
    assert all(row["step"] > 0 and row["planned_gib"] > 0 and "problem" not in row for row in found["training"])
    sampling, steps = found["sampling"], load_params(preset_path("mini")).evaluate.sampling.steps
    assert sampling["video"] == pytest.approx(2 * steps * sampling["pass"] + sampling["decode"])
    text = gpu.as_markdown(found)
    assert text.count("\n| native | ") == 4 and "Sampling: pass " in text


def test_without_a_gpu_it_says_so_in_one_line(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="found no GPU, which it measures; accepted without one: --tiny"):
        gpu.main([])
