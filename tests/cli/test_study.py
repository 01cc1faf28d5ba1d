"""`phantom study`: what it prints, and errors in one line."""

from __future__ import annotations

import json
import shutil
import sys

import pytest

from phantom import cli
from tests.conftest import ROOT
from tests.evaluation.study.made_up import ODD
from tests.orchestration.studies import run_here, toy_study, write_study, write_study_latents


@pytest.fixture
def phantom(tmp_path, monkeypatch, capsys):
    """`phantom("list")` runs `phantom study list` in an empty folder: (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)

    def call(*args: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["phantom", "study", *args])
        with pytest.raises(SystemExit) as end:
            cli.main()
        out, err = capsys.readouterr()
        return int(end.value.code or 0), out, err

    return call


def test_the_card_of_an_export_is_printed_with_a_study(phantom, tmp_path):
    shutil.copytree(ROOT / "studies/physics-branch", tmp_path / "studies/physics-branch")
    (tmp_path / "models/phantom").mkdir(parents=True)
    (tmp_path / "models/phantom/README.md").write_text("# Phantom\n")
    code, out, err = phantom("card", "physics-branch")
    assert (code, err) == (0, "")
    assert out.startswith("# Phantom\n\n## Results of the study physics-branch\n") and "| phantom - control |" in out
    assert json.loads(phantom("card", "physics-branch", "--json")[1])["card"] == out
    code, _, err = phantom("card", "physics-branch", "--model", "models/other")
    assert code == 2 and err.startswith("model: models/other/README.md: no such file")


def test_a_study_is_listed_run_and_reported(phantom, tmp_path, tiny_base):
    study = toy_study(tiny_base, steps=1)
    study |= {"question": ODD, "seeds": [0]}
    write_study(tmp_path, study)
    assert phantom("list") == (0, f"toy: {ODD}\n    not run\n", "")
    code, _, err = phantom("report", "toy")
    assert (code, err) == (
        2,
        "arm 'control': data/latents/index.json: no such file; `phantom encode` writes it; `phantom study run` encodes "
        "its own\n",
    )
    write_study_latents(tmp_path, tiny_base)
    code, _, err = phantom("report", "toy")
    assert (code, err) == (2, "study 'toy': no run is finished; `phantom study run toy` runs it\n")
    results = run_here(tmp_path)
    code, out, _ = phantom("report", "toy")
    assert (code, out) == (0, f"{results['verdict']}\nstudies/toy/index.html\n")
    code, out, err = phantom("run", "toy", "--json")
    assert code == 0 and json.loads(out) == results
    assert "3 of 3 runs are finished already" in err
    assert "with 1 seed no p is below 1, so the test at level 0.5 cannot be passed" in err
    (row,) = json.loads(phantom("list", "--json")[1])
    assert (row["name"], row["state"], row["verdict"]) == ("toy", "2 of 2 runs", results["verdict"])


def test_errors_are_one_line(phantom, tmp_path, tiny_base):
    assert phantom("list") == (0, "studies: there is none; docs/studies.md says how to write one\n", "")
    code, _, err = phantom("run", "toy")
    assert code == 2 and err.startswith("study 'toy': no studies/toy/study.yaml; there is none in ")
    write_study(tmp_path, toy_study(tiny_base) | {"seed": [0]})
    code, _, err = phantom("run", "toy")
    assert code == 2 and err.startswith("studies/toy/study.yaml: seed: unknown key; nearest: seeds (of question,")
    write_study(tmp_path, toy_study(tiny_base))
    code, _, err = phantom("run", "toy", "--set", "train.stepz=3")
    assert code == 2 and "train.stepz: unknown setting; nearest: train.steps" in err and err.count("\n") == 1
