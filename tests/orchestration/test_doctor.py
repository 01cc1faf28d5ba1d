"""`phantom doctor` on this machine: where every check passes, and where each of them fails."""

from __future__ import annotations

import shutil
import sqlite3
import sys
from pathlib import Path
from typing import Any

import pytest

from phantom.config import load_params, preset_path
from phantom.orchestration import doctor as checking
from phantom.orchestration.checks import Check
from phantom.orchestration.doctor import as_text, doctor
from tests.orchestration.checks import api_server, named, set_versions

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    for name in ("dvc.yaml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path / name)
    return tmp_path


def test_where_all_is_well_every_check_says_what_it_found(make_params, checkout: Path):
    found = named(doctor(make_params(), root=checkout))
    assert [name for name, check in found.items() if not check.ok] == []
    assert "torch 2." in found["packages"].finding and "libx264" in found["video encoder"].finding
    assert found["settings"].finding == "preset mini, fits the frozen parts"
    assert as_text(list(found.values())).endswith("all is well")
    assert not (checkout / "mlflow.db").exists()  # looking makes nothing


def test_other_versions_than_the_tested_ones_are_named(make_params, checkout: Path):
    lines = (checkout / "constraints.txt").read_text(encoding="utf-8").replace("diffusers==0.42.1", "diffusers==9.0")
    (checkout / "constraints.txt").write_text(lines, encoding="utf-8")
    found = named(doctor(make_params(), root=checkout))["packages"]
    assert not found.ok and found.fix == "make install"
    assert found.finding == "diffusers 0.42.1, tested is 9.0"


@pytest.mark.parametrize(
    ("package", "version", "check", "fix"),
    [
        ("fastapi", "0.155.0", "prefect and fastapi", "pip install 'fastapi>=0.139,<=0.150'"),
        ("prefect", None, "prefect and fastapi", "make install"),
        ("dvc", None, "git and dvc", "make install"),
        ("mlflow", None, "packages", "make install"),
    ],
)
def test_versions_that_do_not_work_together(
    make_params,
    checkout: Path,
    monkeypatch: pytest.MonkeyPatch,
    package: str,
    version: str | None,
    check: str,
    fix: str,
):
    set_versions(monkeypatch, {package: version})
    found = named(doctor(make_params(), root=checkout))[check]
    assert not found.ok and found.fix == fix


def test_an_orchestrator_needs_no_torch(make_params, checkout: Path, monkeypatch: pytest.MonkeyPatch):
    gone = ("torch", "diffusers", "transformers", "accelerate", "safetensors")
    set_versions(monkeypatch, dict.fromkeys(gone))
    for name in (*gone, "phantom.planning.plan", "phantom.planning.parts"):
        monkeypatch.setitem(sys.modules, name, None)
    jobs = [f"compute.{stage}=kubernetes" for stage in ("encode", "train", "evaluate")]
    found = named(doctor(make_params(*jobs), root=checkout))
    assert [name for name, check in found.items() if not check.ok] == []
    assert found["device"].finding.startswith("not looked at: no torch is installed")
    here = named(doctor(make_params(*jobs[:2]), root=checkout))  # evaluation is not a job
    assert not here["packages"].ok and "torch is missing" in here["packages"].finding


def test_settings_that_the_frozen_parts_cannot_take(make_params, checkout: Path):
    found = named(doctor(make_params("data.height=70"), root=checkout))
    assert not found["settings"].ok and "data.height: found 70" in found["settings"].finding
    assert found["frozen parts"].ok


def test_frozen_parts_that_are_not_there(make_params, checkout: Path, tiny_base: Path):
    absent = named(doctor(make_params("models.base=models/mini"), root=checkout))
    assert absent["settings"].ok  # one cause, one failure
    assert "models/mini/transformer/config.json" in absent["frozen parts"].finding
    assert "`phantom pretrain`" in absent["frozen parts"].fix

    shutil.copytree(tiny_base, checkout / "base")
    weights = next((checkout / "base/vae").glob("*.safetensors"))
    weights.unlink()
    partial = named(doctor(make_params("models.base=base"), root=checkout))["frozen parts"]
    assert partial.finding == "missing: base/vae/*.safetensors"

    hub = named(doctor(load_params(preset_path("wan2.2-ti2v-5b")), root=checkout))
    assert hub["settings"].ok and not hub["frozen parts"].ok
    assert hub["frozen parts"].fix == (
        "hf download Wan-AI/Wan2.2-TI2V-5B-Diffusers; hf download facebook/vjepa2-vitl-fpc64-256"
    )


def test_too_small_a_disk(make_params, checkout: Path, monkeypatch: pytest.MonkeyPatch):
    free = shutil.disk_usage(checkout)._replace(free=300 * 2**30)
    monkeypatch.setattr(checking.shutil, "disk_usage", lambda path: free)
    assert named(doctor(make_params(), root=checkout))["disk"].ok
    large = named(doctor(load_params(preset_path("wan2.2-ti2v-5b")), root=checkout))["disk"]
    assert not large.ok and large.finding == "300 GiB free, about 548 GiB needed"  # five checkpoints of 16 bytes each


# --- MLflow's store --------------------------------------------------------------------------------------------------


def test_a_store_that_is_a_file(make_params, checkout: Path):
    with sqlite3.connect(checkout / "good.db") as store:
        store.execute("create table alembic_version (version_num text)")
        store.execute("insert into alembic_version values ('abc')")
    (checkout / "bad.db").write_text("this is no database, whatever its name says", encoding="utf-8")

    def store_check(uri: str) -> Check:
        return named(doctor(make_params(f"tracking.uri={uri}"), root=checkout))["mlflow store"]

    assert store_check("sqlite:///good.db").ok
    bad = store_check("sqlite:///bad.db")
    assert not bad.ok and "file is not a database" in bad.finding
    assert not store_check("sqlite:///no/such/folder/mlflow.db").ok
    assert not store_check("file:./mlruns").ok


def test_a_store_that_is_a_server(make_params, checkout: Path):
    def store_check(uri: str) -> Check:
        return named(doctor(make_params(f"tracking.uri={uri}"), root=checkout))["mlflow store"]

    answers: dict[str, Any] = {}
    with api_server(answers) as address:
        answers["GET /api/2.0/mlflow/experiments/get-by-name"] = {}
        assert store_check(address).ok
        answers["GET /api/2.0/mlflow/experiments/get-by-name"] = 403
        refused = store_check(address)
        assert not refused.ok and "--allowed-hosts" in refused.fix
        answers["GET /api/2.0/mlflow/experiments/get-by-name"] = 401
        stranger = store_check(address)
        assert not stranger.ok and "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD" in stranger.fix
    gone = store_check(address)
    assert not gone.ok and "refused" in gone.finding


# --- servers, ports, DVC's remote ------------------------------------------------------------------------------------


def test_a_prefect_server_that_is_named_must_answer(make_params, checkout: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    assert named(doctor(make_params(), root=checkout))["prefect server"].finding.startswith("none is named")
    answers: dict[str, Any] = {"GET /api/admin/version": "3.8.8"}
    with api_server(answers) as address:
        (checkout / "prefect.toml").write_text(f'[api]\nurl = "{address}/api"\n', encoding="utf-8")
        assert named(doctor(make_params(), root=checkout))["prefect server"].finding == f"{address}/api answers"
        monkeypatch.setenv("PREFECT_API_URL", f"{address}/api")
        assert named(doctor(make_params(), root=checkout))["prefect server"].ok
        answers["GET /api/admin/version"] = 401
        stranger = named(doctor(make_params(), root=checkout))["prefect server"]
        assert not stranger.ok and "set PREFECT_API_AUTH_STRING" in stranger.fix
    monkeypatch.delenv("PREFECT_API_URL")
    ours = named(doctor(make_params(), root=checkout))["prefect server"]
    assert ours.ok and ours.finding.startswith(f"none at {address}/api: `phantom up` starts one")
    monkeypatch.setenv("PREFECT_API_URL", f"{address}/api")
    gone = named(doctor(make_params(), root=checkout))["prefect server"]
    assert not gone.ok and "refused" in gone.finding and "`phantom up`" in gone.fix


def test_a_remote_of_dvc(make_params, checkout: Path):
    def look() -> Check:
        return named(doctor(make_params(), root=checkout))["dvc remote"]

    assert look().ok  # no checkout of DVC's at all
    (checkout / ".dvc").mkdir()
    config = checkout / ".dvc/config"
    config.write_text("[core]\n    no_scm = true\n", encoding="utf-8")
    assert look().ok and look().finding.startswith("none is set")
    config.write_text(
        f"[core]\n    no_scm = true\n    remote = here\n['remote \"here\"']\n    url = {checkout}/store\n",
        encoding="utf-8",
    )
    assert look().ok and look().finding == f"here ({checkout}/store) answers"
    config.write_text(
        "[core]\n    no_scm = true\n    remote = s\n['remote \"s\"']\n    url = s3://b/p\n"
        "    endpointurl = http://127.0.0.1:9\n    access_key_id = a\n    secret_access_key = b\n",
        encoding="utf-8",
    )
    found = look()
    assert not found.ok and found.finding.startswith("s (s3://b/p): ") and "`dvc remote modify s url" in found.fix
