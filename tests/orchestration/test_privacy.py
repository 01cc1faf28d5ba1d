"""No telemetry, and no calls to the hub where every part is local."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from phantom.evaluation.vbench2_benchmark import VBENCH2
from phantom.evaluation.videophy import VIDEOPHY
from phantom.evaluation.videophy2 import VIDEOPHY2
from phantom.orchestration.privacy import NO_TELEMETRY, stay_offline


def test_telemetry_is_off_unless_the_user_enables_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    script = (
        "from phantom.orchestration.privacy import no_telemetry; "
        "import os, json; no_telemetry(); print(json.dumps(dict(os.environ)))"
    )
    kept = {k: v for k, v in os.environ.items() if k not in NO_TELEMETRY}
    env = {**kept, "DVC_NO_ANALYTICS": "0"}
    done = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True, check=True)
    assert NO_TELEMETRY.items() <= (json.loads(done.stdout) | {"DVC_NO_ANALYTICS": "1"}).items()
    assert json.loads(done.stdout)["DVC_NO_ANALYTICS"] == "0"


def test_the_hub_client_is_offline_where_all_parts_are_folders(make_params, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "")
    monkeypatch.delenv("HF_HUB_OFFLINE")
    stay_offline(make_params("models.physics_encoder=facebook/vjepa2-vitl-fpc64-256"))
    assert "HF_HUB_OFFLINE" not in os.environ
    stay_offline(make_params("evaluate.benchmarks=[another]"))  # as a study may, which runs none
    assert os.environ["HF_HUB_OFFLINE"] == "1"


@pytest.mark.parametrize(
    ("overrides", "more"),
    [
        (("evaluate.benchmarks=[videophy]", "evaluate.videophy.captions=someone/captions"), ()),
        (("evaluate.videophy2.captions=someone/captions",), (VIDEOPHY2,)),
        ((), (VIDEOPHY, {"captions": "someone/captions"})),
        (("evaluate.vbench2.judge.weights=someone/judge", "evaluate.vbench2.judge.command=j {output}"), (VBENCH2,)),
    ],
)
def test_captions_and_judges_of_the_hub_are_not_blocked(overrides, more, make_params, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "")
    monkeypatch.delenv("HF_HUB_OFFLINE")
    stay_offline(make_params(*overrides), *more)
    assert "HF_HUB_OFFLINE" not in os.environ


def test_captions_in_a_file_and_judges_that_run_elsewhere_need_no_hub(make_params, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "")
    monkeypatch.delenv("HF_HUB_OFFLINE")
    (tmp_path / "captions.csv").touch()
    here = make_params("evaluate.benchmarks=[videophy]", f"evaluate.videophy.captions={tmp_path / 'captions.csv'}")
    assert here.evaluate.videophy.judge.weights  # an id, but no command that would ask for it
    stay_offline(here)
    assert os.environ["HF_HUB_OFFLINE"] == "1"
