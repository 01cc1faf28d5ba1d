"""Generates dvc.yaml from the table of stages: `python -m phantom.orchestration.dvc_file`. A test compares the two.

A stage depends on the modules of this project that its code imports, transitively and also inside functions. Imports
are parsed from the source; nothing is executed.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from phantom.config import Role, shortest_names
from phantom.orchestration.imports import imported_names
from phantom.orchestration.stages import EVALUATION, STAGES, Stage

SOURCE = Path("src")
DVC_YAML = Path("dvc.yaml")
# No result depends on these: settings are DVC parameters of their own; the others only plan, record or start work.
NO_DEPENDENCY = (
    "config",
    "errors",
    "logs",
    "progress",
    "cores",
    "cost",
    "cli",
    "cluster",
    "orchestration",
    "planning",
    "tracking",
)


def stage_entry(stage: Stage, root: Path) -> dict[str, Any]:
    """The stage's entry in dvc.yaml."""
    outputs: list[Any] = [
        {str(artifact.path): {"persist": True}} if artifact.persists else str(artifact.path)
        for artifact in stage.writes
    ]
    metrics = [path for path in outputs if path == str(EVALUATION.path)]
    return {
        "desc": stage.summary,
        "cmd": f"phantom {stage.name}",
        "deps": [*(str(artifact.path) for artifact in stage.reads), *code_dependencies(stage.code, root)],
        "params": shortest_names(stage.settings, without=(Role.NOT_IN_RESULT,)),
        **({"metrics": metrics} if metrics else {}),
        "outs": [path for path in outputs if path not in metrics],
    }


def code_dependencies(modules: tuple[str, ...], root: Path) -> list[str]:
    """The source files that `modules` depend on, relative to `root`; a folder if all of its files are among them."""
    source = root / SOURCE
    files: set[Path] = set()
    open_files = [_file(module, source) for module in modules]
    while open_files:
        file = open_files.pop()
        if file in files or file is None:
            continue
        files |= {file, *(path for path in file.parent.iterdir() if path.suffix in (".html", ".j2"))}
        open_files += [
            found for name in _with_packages(file) if (found := _file(name, source)) and _counts(found, source)
        ]
    files = {file for file in files if not _is_empty(file)}
    return sorted(str(path.relative_to(root)) for path in _folded(source / "phantom", files))


def _with_packages(file: Path) -> set[str]:
    """What a file imports, and the packages around it, whose `__init__.py` run first."""
    parts = [name.split(".") for name in imported_names(file)]
    return {".".join(name[:end]) for name in parts for end in range(2, len(name) + 1)}


def _counts(file: Path, source: Path) -> bool:
    return file.relative_to(source / "phantom").with_suffix("").parts[0] not in NO_DEPENDENCY


def _file(module: str, source: Path) -> Path | None:
    path = source.joinpath(*module.split("."))
    return next((file for file in (path / "__init__.py", path.with_suffix(".py")) if file.is_file()), None)


def _is_empty(file: Path) -> bool:
    """Whether the file is an `__init__.py` with at most a docstring."""
    return file.name == "__init__.py" and len(ast.parse(file.read_text(encoding="utf-8")).body) <= 1


def _folded(folder: Path, files: set[Path]) -> Iterator[Path]:
    """`files` below `folder`, with each folder that is complete in place of its files."""
    for path in sorted(folder.iterdir()):
        if path.is_dir():
            inside = {file for file in path.rglob("*") if file.is_file() and "__pycache__" not in file.parts}
            inside = {file for file in inside if not _is_empty(file)}
            if inside and inside <= files:
                yield path
            elif inside & files:
                yield from _folded(path, files)
        elif path in files:
            yield path


def write(root: Path = Path()) -> None:
    """Updates the stages in dvc.yaml, keeping comments and plots."""
    from ruamel.yaml import YAML

    yaml = YAML()
    yaml.width = 120
    yaml.indent(mapping=2, sequence=4, offset=2)
    tree = yaml.load((root / DVC_YAML).read_text(encoding="utf-8"))
    for name, stage in STAGES.items():
        entry, found = stage_entry(stage, root), tree["stages"].setdefault(name, {})
        for key, value in entry.items():
            if found.get(key) != value:
                found[key] = value
    with (root / DVC_YAML).open("w", encoding="utf-8") as file:
        yaml.dump(tree, file)


if __name__ == "__main__":
    write()
