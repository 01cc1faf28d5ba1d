"""The structure of the code: no import cycles, and packages import only from lower layers."""

from __future__ import annotations

from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from phantom.orchestration.imports import imported_names
from tests.conftest import ROOT

SOURCE = ROOT / "src"
LAYERS = (  # top to bottom; packages of one layer do not import each other
    ("cli",),
    ("cluster",),
    ("orchestration",),
    ("pretraining",),
    ("evaluation",),
    ("training",),
    ("serving",),
    ("tracking",),
    ("generation", "planning", "baselines"),
    ("data",),
    ("encoders",),
    ("model",),
    ("config", "force", "progress", "cores", "cost"),
    ("logs",),
    ("errors",),
)
LEVEL = {package: level for level, packages in enumerate(LAYERS) for package in packages}
MODULES = {
    ".".join(file.relative_to(SOURCE).with_suffix("").parts).removesuffix(".__init__"): file
    for file in sorted(SOURCE.rglob("*.py"))
}


def imports(file: Path, module: str) -> set[str]:
    """The modules that a file imports: for `from package import module` the module, else the package."""
    names = imported_names(file)
    found = names & MODULES.keys()
    packages = {name.rpartition(".")[0] for name in found}
    return found - packages - {module}


IMPORTS = {module: imports(file, module) for module, file in MODULES.items()}


def package(module: str) -> str:
    return module.split(".")[1]


def test_every_package_has_a_layer():
    assert {package(module) for module in MODULES if module != "phantom"} == set(LEVEL)


def test_there_are_no_import_cycles():
    try:
        list(TopologicalSorter(IMPORTS).static_order())
    except CycleError as cycle:
        pytest.fail(" -> ".join(cycle.args[1]))


def test_packages_import_only_from_lower_layers():
    upwards = [
        f"{module} imports {target}"
        for module, targets in IMPORTS.items()
        for target in targets
        if module != "phantom" and target != "phantom" and package(module) != package(target)
        if LEVEL[package(target)] <= LEVEL[package(module)]
    ]
    assert not upwards, upwards


def test_the_model_package_imports_nothing_else_of_this_project():
    outside = {target for module in MODULES if package_or_none(module) == "model" for target in IMPORTS[module]}
    assert all(package(target) == "model" for target in outside)


def test_only_tracking_imports_mlflow():
    users = [module for module, file in MODULES.items() if "import mlflow" in file.read_text(encoding="utf-8")]
    assert {package(module) for module in users} <= {"tracking"}


def package_or_none(module: str) -> str | None:
    return None if module == "phantom" else package(module)
