"""The structure of the code: no circle among its files, no import from a lower room into a higher one."""

from __future__ import annotations

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from tests.conftest import ROOT

SOURCE = ROOT / "src"
LAYERS = (  # from the top; what stands on one line does not import from each other
    ("cli",),
    ("cluster",),
    ("orchestration",),
    ("training", "evaluation", "pretraining"),
    ("tracking",),
    ("generation", "planning"),
    ("data",),
    ("encoders",),
    ("model",),
    ("config", "progress", "cores"),
    ("errors",),
)
LEVEL = {room: level for level, rooms in enumerate(LAYERS) for room in rooms}
MODULES = {
    ".".join(file.relative_to(SOURCE).with_suffix("").parts).removesuffix(".__init__"): file
    for file in sorted(SOURCE.rglob("*.py"))
}


def imports(file: Path, module: str) -> set[str]:
    """The modules of this project that a file imports, also inside functions; not those for type checkers alone."""
    found: set[str] = set()
    skipped: set[ast.AST] = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            skipped |= {inner for statement in node.body for inner in ast.walk(statement)}
        if node in skipped:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert not node.level, f"{file}: a relative import"
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= (names & MODULES.keys()) or {node.module}
    return {name for name in found if name in MODULES and name != module}


IMPORTS = {module: imports(file, module) for module, file in MODULES.items()}


def room(module: str) -> str:
    return module.split(".")[1]


def test_every_room_has_its_place():
    assert {room(module) for module in MODULES if module != "phantom"} == set(LEVEL)


def test_no_circle_among_the_files():
    try:
        list(TopologicalSorter(IMPORTS).static_order())
    except CycleError as circle:
        pytest.fail(" -> ".join(circle.args[1]))


def test_imports_run_downwards():
    upwards = [
        f"{module} imports {target}"
        for module, targets in IMPORTS.items()
        for target in targets
        if module != "phantom" and target != "phantom" and room(module) != room(target)
        if LEVEL[room(target)] <= LEVEL[room(module)]
    ]
    assert not upwards, upwards


def test_the_model_imports_nothing_of_ours_outside_itself():
    outside = {target for module in MODULES if room_or_none(module) == "model" for target in IMPORTS[module]}
    assert all(room(target) == "model" for target in outside)


def test_mlflow_is_known_to_tracking_alone():
    """And to who starts its server."""
    users = [module for module, file in MODULES.items() if "import mlflow" in file.read_text(encoding="utf-8")]
    assert {room(module) for module in users} <= {"tracking"}


def room_or_none(module: str) -> str | None:
    return None if module == "phantom" else room(module)
