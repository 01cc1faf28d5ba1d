"""The model card of an export with a study's numbers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from phantom.errors import UserError
from phantom.evaluation.study.card import study_card
from tests.conftest import ROOT

HEAD = "---\nlibrary_name: diffusers\nlicense: apache-2.0\n---\n"
STUDY = "physics-branch"


@pytest.fixture
def export(tmp_path: Path) -> Path:
    folder = tmp_path / "models/phantom"
    folder.mkdir(parents=True)
    (folder / "README.md").write_text(f"{HEAD}\n# Phantom\n")
    return folder


def test_a_card_has_verdict_and_differences_of_the_study_and_says_whose_they_are(export: Path):
    card = study_card(STUDY, export, ROOT)
    results = json.loads((ROOT / "studies" / STUDY / "results.json").read_text())
    one = results["comparisons"][0]
    assert card.startswith(HEAD) and ModelCard(card).data.license == "apache-2.0"
    assert results["verdict"] in card and results["study"]["question"] in card
    interval = f"{one['difference']:+.4g} [{one['low']:+.4g}, {one['high']:+.4g}]"
    assert f"| phantom - control | held-out L_v (lower is better) | {interval} | 0.00781 | 8 |" in card
    assert f"16 of 16, commit {results['made_with'][0]['commit'][:12]}), not of these weights." in card
    assert (export / "README.md").read_text() == f"{HEAD}\n# Phantom\n"


def test_what_is_missing_is_named(export: Path, tmp_path: Path):
    with pytest.raises(UserError, match="no-such-study"):
        study_card("no-such-study", export, ROOT)
    (tmp_path / "studies/new").mkdir(parents=True)
    shutil.copy(ROOT / "studies" / STUDY / "study.yaml", tmp_path / "studies/new")
    with pytest.raises(UserError, match="study new: no results yet; `phantom study run new` writes them"):
        study_card("new", export, tmp_path)
    (export / "README.md").unlink()
    with pytest.raises(UserError, match=r"README.md: no such file; accepted: an export that `phantom train` wrote"):
        study_card(STUDY, export, ROOT)
