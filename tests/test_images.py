"""`make pin-images` and `make publish`, with a script in place of `docker`."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT

DOCKER = """#!/bin/sh
echo "$@" >> calls
case "$*" in
  *"imagetools inspect python"*) printf '{"digest": "sha256:%064d"}' 1 ;;
  *"imagetools inspect gone"*) echo "gone: not found" >&2; exit 1 ;;
  *"imagetools inspect"*) printf '{"digest": "sha256:%064d"}' 2 ;;
  *--metadata-file*)
    for word in "$@"; do
      test "$last" != --metadata-file || printf '{\\n  "containerimage.digest": "sha256:%064d"\\n}' 3 > "$word"
      last=$word
    done ;;
esac
"""


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("Dockerfile", "Dockerfile.train", "Makefile", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "k8s", tmp_path / "k8s", symlinks=True)
    (tmp_path / "requirements").mkdir()
    shutil.copy(ROOT / "requirements/pin_images.py", tmp_path / "requirements")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/docker").write_text(DOCKER, encoding="utf-8")
    (tmp_path / "bin/docker").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    return tmp_path


def pin(checkout: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "requirements/pin_images.py"], cwd=checkout, capture_output=True, text=True)


def test_images_of_others_get_the_digest_of_their_tag(checkout: Path):
    for _ in range(2):  # the second time they have one
        done = pin(checkout)
        assert done.returncode == 0, done.stderr
        for name in ("Dockerfile", "Dockerfile.train"):
            bases = re.findall(r"(?m)^FROM (\S+)", (checkout / name).read_text(encoding="utf-8"))
            assert len(bases) == 2 and all(re.fullmatch(rf"python:[\w.-]+@sha256:{1:064d}", base) for base in bases)
        manifests = "".join(path.read_text(encoding="utf-8") for path in (checkout / "k8s").rglob("*.yaml"))
        found = re.findall(r"(?m)^\s*(?:- )?image: (\S+)", manifests)
        assert {image.partition(":")[0] for image in found if "@" not in image} == {
            "phantom-orchestrator",
            "phantom-train",
        }
        assert all(image.endswith(f"@sha256:{2:064d}") for image in found if "@" in image)
    assert (checkout / "k8s/10-postgres.yaml").is_symlink()
    assert next(line for line in done.stdout.splitlines() if line.startswith("postgres:")).endswith(f"{2:064d}")


def test_nothing_is_pinned_unless_everything_is_found(checkout: Path):
    (checkout / "k8s/other.yaml").write_text("image: gone:1.0\n", encoding="utf-8")
    before = (checkout / "Dockerfile").read_bytes()
    done = pin(checkout)
    assert (done.returncode, done.stderr) == (1, "make pin-images: gone:1.0: gone: not found\n")
    assert (checkout / "Dockerfile").read_bytes() == before


def test_publishing_attests_and_names_the_digests(checkout: Path):
    refused = subprocess.run(["make", "publish"], cwd=checkout, capture_output=True, text=True)
    assert refused.returncode and "make publish: REGISTRY=host/path/ is missing" in refused.stderr
    done = subprocess.run(
        ["make", "--no-print-directory", "publish", "REGISTRY=here/"], cwd=checkout, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    named = [f"here/phantom-{image}@sha256:{3:064d}" for image in ("orchestrator", "train")]
    assert done.stdout.splitlines()[-2:] == named
    builds = [line for line in (checkout / "calls").read_text(encoding="utf-8").splitlines() if " build " in line]
    assert len(builds) == 2
    assert all("--sbom=true --provenance=mode=max --push" in line for line in builds)
