"""Draws docs/architecture.svg from the imports of src/phantom and flows: python docs/draw_architecture.py

A box is a package of src/phantom, or the modules that all packages use. An arrow is an import. Arrows that follow
from others (a transitive reduction) are left out, so that the picture stays readable.
"""

from __future__ import annotations

import ast
import textwrap
from dataclasses import dataclass
from html import escape
from itertools import product
from pathlib import Path

from phantom.orchestration.imports import imported_names

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "src" / "phantom"
BASE = ("config", "errors", "force", "logs", "progress", "cores", "cost")  # one box: modules that any package may use

# Rows of packages, from the top; each with its left and right edge in twelfths of the width.
ROWS: tuple[dict[str, tuple[float, float]], ...] = (
    {"cli": (0, 8.6), "flows": (9, 12)},
    {"cluster": (7.3, 10.6)},
    {"orchestration": (7.9, 12)},
    {"pretraining": (0, 2.7), "evaluation": (2.9, 5.5), "training": (5.7, 8.3), "serving": (8.6, 12)},
    {"tracking": (8.2, 11.1)},
    {"baselines": (0, 2.7), "generation": (2.9, 7.3), "planning": (7.5, 12)},
    {"data": (0, 6.3)},
    {"encoders": (0, 6.3), "model": (6.6, 12)},
    {"base": (0, 12)},
)
FILLS = {0: "#dbe4ff", 1: "#dbe4ff", 2: "#dbe4ff", 3: "#d3f9d8", 4: "#fff3bf", 5: "#d3f9d8", 6: "#fff3bf", 7: "#ffe3e3"}
WIDTH, COLUMN, GAP, LINE, PORT = 960, 80, 26, 15, 0.2


def package_of(module: str) -> str:
    """phantom.training.trainer -> training."""
    name = module.split(".")[1]
    return "base" if name in BASE or name.startswith("__") else name


def sources() -> dict[str, list[Path]]:
    """The files of every package."""
    packages: dict[str, list[Path]] = {"flows": sorted((ROOT / "flows").rglob("*.py"))}
    for path in sorted(PACKAGE.rglob("*.py")):
        module = ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts)
        if module != "phantom.__init__":  # which imports lazily what it exports
            packages.setdefault(package_of(module), []).append(path)
    return packages


def imports(path: Path) -> set[str]:
    """The packages that a file imports from, inside functions too."""
    return {package_of(name) for name in imported_names(path) if name != "phantom"}


def arrows() -> dict[str, set[str]]:
    """Package -> the other packages that it imports from."""
    return {package: set().union(*map(imports, paths)) - {package} for package, paths in sources().items()}


def upward(graph: dict[str, set[str]]) -> list[tuple[str, str]]:
    """Arrows that lead neither down nor, within a row, to the right."""
    place = {package: i for i, package in enumerate(package for row in ROWS for package in row)}
    return sorted((a, b) for a, targets in graph.items() for b in targets if place[a] >= place[b])


def reduced(graph: dict[str, set[str]]) -> list[tuple[str, str]]:
    """The arrows that do not follow from others, top to bottom."""
    order = [package for row in reversed(ROWS) for package in reversed(row)]
    reach: dict[str, set[str]] = {}
    for package in order:  # from the bottom: what a package leads to is known when its turn comes
        reach[package] = graph[package].union(*(reach[target] for target in graph[package]))
    return [
        (package, target)
        for package in reversed(order)
        for target in order
        if target in graph[package] and not any(target in reach[other] for other in graph[package])
    ]


@dataclass
class Box:
    """A package as it is drawn; x in columns, y in pixels."""

    row: int
    left: float
    right: float
    top: float
    height: float
    name: str
    caption: list[str]


def summary(path: Path) -> str:
    """First sentence of a module's docstring."""
    text = " ".join((ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").split("\n\n")[0].split())
    return text.split(". ")[0].rstrip(".:").replace("`", "")


def boxes() -> dict[str, Box]:
    """Every package with its name and the summary of its docstring."""
    files, made, top = sources(), {}, 4.0
    for i, row in enumerate(ROWS):
        for package, (left, right) in row.items():
            if package == "base":
                name, text = (
                    ", ".join(BASE),
                    "Typed settings, errors and exit codes, force prompts, progress, usable cores",
                )
            else:
                home = files[package][0] if package == "flows" else PACKAGE / package / "__init__.py"
                name, text = package, summary(home)
            wrapped = textwrap.wrap(text, int((right - left) * COLUMN / 6.9), max_lines=5, placeholder=" …")
            made[package] = Box(i, left, right, top, 0, name, wrapped)
        height = 34 + LINE * max(len(made[package].caption) for package in row)
        for package in row:
            made[package].height = height
        top += height + GAP
    return made


def route(a: Box, b: Box, drawn: dict[str, Box], taken: set[tuple[int, float]]) -> tuple[float, float]:
    """Where an arrow leaves `a` and enters `b`: in a straight line, or past the boxes between them and then aside."""

    def ports(box: Box, end: str) -> list[float]:
        count = int((box.right - box.left - 0.3) / PORT)
        places = [round(box.left + 0.25 + i * PORT, 2) for i in range(count)]
        key = box.row if end == "top" else -box.row - 1
        return [x for x in places if all(k != key or abs(x - t) >= 0.3 for k, t in taken)]

    def crosses(x: float) -> bool:
        return any(a.row < o.row < b.row and o.left - 0.05 <= x <= o.right + 0.05 for o in drawn.values())

    pairs = list(product(ports(a, "bottom"), ports(b, "top")))
    middle = (max(a.left, b.left) + min(a.right, b.right)) / 2
    start, end = min(pairs, key=lambda p: (crosses(p[0]), round(abs(p[0] - p[1]), 1), abs(p[0] - middle)))
    if abs(start - end) < PORT and not any(k == b.row and abs(start - t) < 0.3 for k, t in taken):
        end = start
    taken |= {(-a.row - 1, start), (b.row, end)}
    return start, end


def draw() -> str:
    """The picture as SVG. Text stands on opaque boxes only: it is read on light and dark pages alike."""
    drawn, graph = boxes(), arrows()
    height = max(box.top + box.height for box in drawn.values()) + 4
    lines, taken = [], set[tuple[int, float]]()
    for source, target in reduced(graph):
        a, b = drawn[source], drawn[target]
        if a.row == b.row:
            path = f"M{a.right * COLUMN:g} {a.top + a.height / 2:g}H{b.left * COLUMN - 5:g}"
            lines.append(f'<path d="{path}"><title>{source} imports from {target}</title></path>')
            continue
        start, end = (x * COLUMN for x in route(a, b, drawn, taken))
        y0, y1 = a.top + a.height, b.top - 5
        bend = b.top - GAP
        path = f"M{start:g} {y0:g}V{bend:g}"
        path += f"V{y1:g}" if start == end else f"C{start:g} {y1:g} {end:g} {bend:g} {end:g} {y1:g}"
        lines.append(f'<path d="{path}"><title>{source} imports from {target}</title></path>')
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="-2 0 {WIDTH + 4} {height:g}" role="img"'
        ' font-family="system-ui, -apple-system, Segoe UI, Helvetica, Arial, sans-serif" text-anchor="middle">',
        "<title>Packages of src/phantom and the imports between them</title>",
        '<marker id="tip" viewBox="0 0 8 8" refX="4" refY="4" markerWidth="5" markerHeight="5" orient="auto">'
        '<path d="M0 0L8 4L0 8z" fill="#748094"/></marker>',
        '<g fill="none" stroke="#748094" stroke-width="1.6" marker-end="url(#tip)">',
        *lines,
        "</g>",
    ]
    for box in drawn.values():
        left, width, centre = box.left * COLUMN, (box.right - box.left) * COLUMN, (box.left + box.right) / 2 * COLUMN
        parts.append(
            f'<rect x="{left:g}" y="{box.top:g}" width="{width:g}" height="{box.height:g}" rx="6"'
            f' fill="{FILLS.get(box.row, "#e9ecef")}" stroke="#748094"/>'
            f'<text x="{centre:g}" y="{box.top + 21:g}" font-size="15" font-weight="600" fill="#1a202c">'
            f"{escape(box.name)}</text>"
        )
        for i, line in enumerate(box.caption):
            parts.append(
                f'<text x="{centre:g}" y="{box.top + 39 + i * LINE:g}" font-size="12" fill="#2d3748">'
                f"{escape(line)}</text>"
            )
    return "\n".join([*parts, "</svg>", ""])


def main() -> None:
    """Writes the picture."""
    Path(__file__).with_name("architecture.svg").write_text(draw(), encoding="utf-8")


if __name__ == "__main__":
    main()
