"""The imports of a source file, read from its text; nothing is run."""

from __future__ import annotations

import ast
from pathlib import Path


def imported_names(file: Path) -> set[str]:
    """The dotted names that a source file imports from this project, also inside functions, not under TYPE_CHECKING.

    `from phantom.data import video` gives phantom.data and phantom.data.video: the caller knows which are modules.
    """
    found: set[str] = set()
    skipped: set[ast.AST] = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):  # breadth first: an `if` before what is in it
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            skipped |= {inner for statement in node.body for inner in ast.walk(statement)}
        if node in skipped:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return {name for name in found if name.split(".")[0] == "phantom"}
