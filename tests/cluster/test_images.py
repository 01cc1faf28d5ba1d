"""The Dockerfiles: pinned, multi-stage, not root; whatever they copy exists."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FILES = ["Dockerfile", "Dockerfile.train"]


def instructions(name: str) -> list[tuple[str, str]]:
    """(INSTRUCTION, rest) with comments dropped and continued lines joined."""
    text = "\n".join(line for line in (ROOT / name).read_text(encoding="utf-8").splitlines() if line[:1] != "#")
    joined = re.sub(r"\\\n\s*", "", text)
    return [(word, rest) for word, _, rest in (line.partition(" ") for line in joined.splitlines() if line.strip())]


@pytest.mark.parametrize("name", FILES)
def test_an_image_is_pinned_multi_stage_and_not_root(name: str):
    found = instructions(name)
    bases = [rest.split()[0] for word, rest in found if word == "FROM"]
    assert len(bases) == 2 and all(re.search(r":\d+\.\d+\.\d+", base) for base in bases)
    users = [rest for word, rest in found if word == "USER"]
    assert users == ["1000:1000"] and found.index(("USER", "1000:1000")) > max(
        i for i, (word, _) in enumerate(found) if word == "RUN"
    )
    for word, rest in found:
        assert word != "ADD"
        if word == "RUN" and "apt-get install" in rest:
            assert "--no-install-recommends" in rest and rest.endswith("rm -rf /var/lib/apt/lists/*")
        if word == "RUN" and "pip install" in rest:
            assert "--constraint constraints.txt" in rest or "--no-deps" in rest


@pytest.mark.parametrize("name", FILES)
def test_what_is_copied_exists_and_is_not_ignored(name: str):
    let_in = [line[1:] for line in (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines() if line[:1] == "!"]
    for word, rest in instructions(name):
        if word == "COPY" and "--from" not in rest:
            for source in rest.split()[:-1]:
                assert any(source == kept or source.startswith(f"{kept}/") for kept in let_in), source
                if source not in ("README.md", "models/mini"):  # written, and made, by others
                    assert (ROOT / source).exists(), source


def test_hadolint_passes():
    if not shutil.which("hadolint"):
        pytest.skip("no hadolint")
    done = subprocess.run(["hadolint", *FILES], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
