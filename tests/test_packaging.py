"""Packaging: one version everywhere, locks that agree with constraints.txt, a wheel that works outside a checkout."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import phantom
from phantom.config import PRESETS

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
VERSION = PROJECT["version"]
LOCKS = {  # the extras of each
    "dev": tuple(PROJECT["optional-dependencies"]),
    "train": ("train", "deepspeed"),
    "orchestrator": ("orchestrate", "prepare", "kubernetes", "postgres"),
}
PLATFORM = re.compile(r"torch|triton|nvidia-.*|cuda-.*")  # left to each platform's index, without hashes


def pins(path: Path) -> dict[str, set[str]]:
    """Versions by package. A package has several where they differ between Pythons."""
    found: dict[str, set[str]] = {}
    for name, version in re.findall(r"^([\w.-]+)==([^\s;]+)", path.read_text(encoding="utf-8"), re.M):
        found.setdefault(canonicalize_name(name), set()).add(version)
    return found


# --- versions --------------------------------------------------------------------------------------------------------


def test_the_version_is_stated_once_and_the_same_everywhere():
    assert phantom.__version__ == VERSION
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))["version"] == VERSION
    changes = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.findall(r"^## \[(.+?)\]", changes, re.M)[0] == VERSION

    named = [*ROOT.glob("Dockerfile*"), ROOT / "params.yaml", *PRESETS.glob("*.yaml"), *(ROOT / "k8s").rglob("*.yaml")]
    tags = {
        tag
        for path in named
        for tag in re.findall(r"phantom(?:-|/)(?:train|orchestrator):([\d.]+)", path.read_text(encoding="utf-8"))
    }
    assert tags == {VERSION}


@pytest.mark.parametrize("lock", LOCKS)
def test_a_lock_has_hashes_and_the_versions_of_constraints(lock: str):
    path = ROOT / f"requirements/{lock}.txt"
    locked, tested = pins(path), pins(ROOT / "constraints.txt")
    assert locked and all(versions <= tested.get(name, set()) for name, versions in locked.items())

    needed = [*PROJECT["dependencies"], *(r for e in LOCKS[lock] for r in PROJECT["optional-dependencies"][e])]
    names = {canonicalize_name(Requirement(requirement).name) for requirement in needed}
    assert {name for name in names - set(locked) if not PLATFORM.fullmatch(name)} == set()
    for requirement in map(Requirement, needed):
        for version in tested[canonicalize_name(requirement.name)]:
            assert requirement.specifier.contains(version), requirement

    text = path.read_text(encoding="utf-8")
    entries = re.split(r"\n(?=[\w.-]+==)", text)[1:]
    assert all("--hash=sha256:" in entry for entry in entries)
    assert not re.search(r"://|--(extra-)?index-url|--find-links", text)
    assert not [name for name in locked if PLATFORM.fullmatch(name)]
    assert lock == "orchestrator" or "torch" in tested


def test_what_is_installed_here_is_what_is_locked():
    """Of the packages that decide results. `make install` brings them."""
    from importlib.metadata import version

    tested = pins(ROOT / "constraints.txt")
    for name in ("torch", "diffusers", "transformers", "numpy", "av", "safetensors", "scipy"):
        assert version(name).split("+")[0] in tested[name], name


# --- wheel and sdist -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sdist, and the wheel that is built from it, as `make dist` does."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    shutil.copytree(ROOT / "src", source / "src", ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    for name in ("pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", "CHANGELOG.md", "CITATION.cff"):
        shutil.copy(ROOT / name, source)
    shutil.copy(ROOT / "constraints.txt", source)
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(source)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return out


@pytest.fixture(scope="module")
def installed(dist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel's files, to be put on the path before the checkout's."""
    folder = tmp_path_factory.mktemp("installed")
    with zipfile.ZipFile(next(dist.glob("*.whl"))) as wheel:
        wheel.extractall(folder)
    return folder


def outside(installed: Path, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The wheel's `phantom` in a folder that is no checkout, without network."""
    script = "from phantom.cli import main; main()"
    env = os.environ | {"PYTHONPATH": str(installed), "HF_HUB_OFFLINE": "1"}
    env.pop("PREFECT_API_URL", None)
    return subprocess.run(
        [sys.executable, "-c", script, *arguments], cwd=folder, env=env, capture_output=True, text=True, timeout=300
    )


def test_the_wheel_has_all_code_and_data_and_nothing_else(dist: Path):
    with zipfile.ZipFile(next(dist.glob("*.whl"))) as wheel:
        names = set(wheel.namelist())
        (meta,) = (name for name in names if name.endswith(".dist-info/METADATA"))
        metadata = wheel.read(meta).decode()
        scripts = wheel.read(meta.replace("METADATA", "entry_points.txt")).decode()
    package = ROOT / "src/phantom"
    ours = {
        f"phantom/{path.relative_to(package).as_posix()}"
        for path in package.rglob("*")
        if path.is_file() and path.suffix != ".pyc"
    }
    assert {name for name in names if ".dist-info/" not in name} == ours
    assert f"{meta.split('/')[0]}/licenses/LICENSE" in names
    assert f"\nVersion: {VERSION}\n" in metadata and "\nLicense-Expression: Apache-2.0\n" in metadata
    assert "phantom = phantom.cli:main" in scripts


def test_the_sdist_builds_the_wheel(dist: Path):
    with tarfile.open(next(dist.glob("*.tar.gz"))) as sdist:
        names = {name.partition("/")[2] for name in sdist.getnames()}
    assert {"pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md", "CITATION.cff", "constraints.txt"} <= names
    assert not [name for name in names if name.startswith(("tests", "models", "k8s"))]


def test_the_wheel_brings_the_presets(installed: Path, tmp_path: Path):
    listed = outside(installed, tmp_path, "preset")
    assert listed.returncode == 0 and "wan2.2-ti2v-5b" in listed.stdout, listed.stderr
    written = outside(installed, tmp_path, "preset", "mini")
    assert written.returncode == 0, written.stderr
    assert (tmp_path / "params.yaml").read_bytes() == (PRESETS / "mini.yaml").read_bytes()


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("run", "no dvc.yaml there; the pipeline runs in a checkout of this project"),
        ("up", "runs in a checkout of this project"),
        ("approve", "no Prefect server is named; run it in a checkout of this project"),
        pytest.param(
            "plan",
            "models.base: 'models/mini': no such folder in .*; a checkout of this project has models/mini, "
            "`phantom pretrain` makes it",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_one_line_says_what_needs_a_checkout(command: str, said: str, installed: Path, tmp_path: Path):
    shutil.copy(PRESETS / "mini.yaml", tmp_path / "params.yaml")
    done = outside(installed, tmp_path, command)
    assert done.returncode == 2 and re.search(said, done.stderr), done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.slow
def test_doctor_and_plan_work_outside_a_checkout(installed: Path, tmp_path: Path):
    shutil.copy(PRESETS / "mini.yaml", tmp_path / "params.yaml")
    done = outside(installed, tmp_path, "doctor")
    assert done.returncode == 1, done.stderr
    assert "no dvc.yaml in" in done.stdout and "need a checkout of this project" in done.stdout
    assert "`phantom pretrain` makes it" in done.stdout

    planned = outside(installed, tmp_path, "plan", "--preset", "wan2.2-ti2v-5b")
    assert planned.returncode == 0 and "H200" in planned.stdout, planned.stderr
    shutil.copytree(ROOT / "models/mini", tmp_path / "models/mini")  # as `phantom pretrain` leaves it
    planned = outside(installed, tmp_path, "plan", "--json")
    assert planned.returncode == 0, planned.stderr
