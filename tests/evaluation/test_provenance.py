"""Which code, settings and files identify a sampled video."""

import ast
from pathlib import Path

import pytest

import phantom
from phantom.evaluation import provenance
from phantom.evaluation.sampling_spec import Model, Settings

PACKAGE = Path(phantom.__file__).parent
# Imported while sampling, but without influence on what a video shows: settings are recorded by value.
IRRELEVANT = {
    "__init__.py",
    "data/__init__.py",
    "data/near_duplicates.py",
    "errors.py",
    "logs.py",
    "progress.py",
    "data/manifest.py",
    "data/manifest_table.py",
    "data/part.py",
    "data/shots.py",  # cuts: measured beside motion, but no part of a search
    "data/physics_iq/__init__.py",
    "data/physics_iq/layout.py",
    "evaluation/hub_models.py",  # a model of the hub is recorded by its id and commit
    "evaluation/physics_iq/__init__.py",
    "evaluation/provenance.py",
    "generation/placement.py",  # where weights are
}


def imported(path):
    """The modules of the package that the module at `path` imports anywhere, as paths."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "phantom":
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names if alias.name.split(".")[0] == "phantom"}
    places = [PACKAGE.parent.joinpath(*name.split(".")) for name in names]
    return {p for place in places for p in (place.with_suffix(".py"), place / "__init__.py") if p.is_file()}


def closure(path):
    found, todo = set(), {path}
    while todo:
        module = todo.pop()
        found.add(module)
        todo |= imported(module) - found
    return found


def test_every_listed_part_of_the_code_exists_and_holds_code():
    for part in provenance.CODE:
        place = PACKAGE / part
        assert place.is_file() or any(place.rglob("*.py")), f"{part}: no code there"


def test_a_missing_part_is_an_error_and_not_an_empty_digest(tmp_path, make_params, monkeypatch):
    with pytest.raises(FileNotFoundError, match=r"pipeline\.py"):
        provenance.digest(tmp_path / "pipeline.py", "*.py")
    model, settings = Model("phantom", {}, lambda: None), Settings.for_prompts(make_params())
    provenance.record(model, [], settings)
    monkeypatch.setattr(provenance, "CODE", ("pipeline.py",))
    with pytest.raises(FileNotFoundError, match=r"pipeline\.py"):
        provenance.record(model, [], settings)


def test_every_module_that_sampling_imports_is_digested():
    digested = {
        p
        for part in (*provenance.CODE, *provenance.SEARCH_CODE)
        for p in (PACKAGE / part, *(PACKAGE / part).rglob("*.py"))
    }
    needed = closure(PACKAGE / "evaluation/sample.py")
    others = {path.relative_to(PACKAGE).as_posix() for path in needed - digested}
    assert {path for path in others if not path.startswith("config/")} <= IRRELEVANT
