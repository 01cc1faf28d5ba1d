"""`.github/`: workflows that run make targets, with few rights and in limited time; files that GitHub reads."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
WORKFLOWS = sorted((ROOT / ".github/workflows").glob("*.yml"))
IMAGES = ("orchestrator", "train")  # of build.yml's matrix


def read(path: Path) -> dict[Any, Any]:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def steps(workflow: Path) -> list[dict[str, Any]]:
    return [step for job in read(workflow)["jobs"].values() for step in job["steps"]]


def targets() -> set[str]:
    """Targets of the Makefile that `make help` lists, and those that these are made of."""
    return set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M))


def test_the_workflows_are_there():
    assert {"build.yml", "ci.yml", "docs.yml", "kind.yml"} == {path.name for path in WORKFLOWS}


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.stem)
def test_every_command_is_a_make_target(workflow: Path):
    commands = [step["run"] for step in steps(workflow) if "run" in step]
    assert commands
    for command in commands:
        word, *named = command.split(maxsplit=1)
        assert word == "make" and len(named) == 1, command
        for image in IMAGES:
            assert named[0].replace("${{ matrix.image }}", image) in targets(), command


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.stem)
def test_a_workflow_has_few_rights_and_is_not_run_twice_at_once(workflow: Path):
    tree = read(workflow)
    assert tree["permissions"] == {"contents": "read"}
    assert tree["concurrency"]["group"].startswith(workflow.stem)
    for name, job in tree["jobs"].items():
        assert job["timeout-minutes"] <= 180, name
        assert set(job.get("permissions", {})) <= {"pages", "id-token"}, name


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.stem)
def test_actions_are_pinned_and_keep_no_credentials(workflow: Path):
    for step in steps(workflow):
        if "uses" in step:
            assert re.fullmatch(r"[\w-]+/[\w-]+@(v\d+|[0-9a-f]{40})", step["uses"]), step
            if step["uses"].startswith("actions/checkout@"):
                assert step["with"]["persist-credentials"] is False


def test_every_supported_python_is_tested():
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    stated = re.findall(r"Programming Language :: Python :: (3\.\d+)", project)
    assert read(ROOT / ".github/workflows/ci.yml")["jobs"]["test"]["strategy"]["matrix"]["python"] == stated


def test_every_make_target_is_listed_by_help():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    listed = set(re.findall(r"^([a-z-]+):.*##", makefile, re.M))
    assert targets() - listed == {"image-orchestrator", "image-train", "docker-engine"}
    phony = {name for line in re.findall(r"^\.PHONY: (.*)", makefile, re.M) for name in line.split()}
    assert phony == targets()


def test_files_that_github_reads():
    for name in ("README.md", "LICENSE", "CONTRIBUTING.md", "SECURITY.md", "CODE_OF_CONDUCT.md", "CHANGELOG.md"):
        assert (ROOT / name).read_text(encoding="utf-8").strip(), name
    assert {"bug.yml", "feature.yml", "question.yml", "config.yml"} == {
        path.name for path in (ROOT / ".github/ISSUE_TEMPLATE").iterdir()
    }


@pytest.mark.parametrize("name", ["CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md", ".github/PULL_REQUEST_TEMPLATE.md"])
def test_links_lead_somewhere_and_make_targets_exist(name: str):
    text = (ROOT / name).read_text(encoding="utf-8")
    for link in re.findall(r"\]\((?!https?:)([^)#]+)", text):
        assert (ROOT / name).parent.joinpath(link).exists(), link
    named = re.findall(r"`make ([a-z -]+)", text) + re.findall(r"^make ([a-z -]+)", text, re.M)
    assert {target for line in named for target in line.split()} <= targets()


def test_the_paper_is_named():
    found = read(ROOT / "CITATION.cff")
    paper = found["preferred-citation"]
    assert paper["url"] == "https://arxiv.org/abs/2604.08503" and paper["year"] == 2026
    assert [author["family-names"] for author in paper["authors"]] == ["Shen", "Xiong", "Yu", "Lourentzou"]
