"""mkdocs hooks: API pages from the modules of src/phantom, links to source files, equations as MathML.

Pages in docs/ link to source files as a reader of the repository needs it: `[src/phantom/a/b.py:name](../src/...)`. On
the site the same link leads to that name in the API reference, where its source is shown.
"""

from __future__ import annotations

import html
import re
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "src" / "phantom"
SOURCE_LINK = re.compile(
    r"\[`?(?:(?P<path>[\w/.-]+\.py):)?(?P<text>[^\]`]*)`?\]\(\.\./src/(?P<file>phantom/[\w/]+\.py)\)"
)
MATH = re.compile(r'<(?P<tag>span|div) class="arithmatex">(?:\\\(|\\\[)(?P<tex>.*?)(?:\\\)|\\\])</(?P=tag)>', re.DOTALL)


def modules() -> dict[str, Path]:
    """Dotted name -> file of every public module that says something of its own, packages before their modules."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py"), key=lambda p: (p.parent, p.name != "__init__.py", p.name)):
        parts = list(path.relative_to(PACKAGE.parent).with_suffix("").parts)
        if parts[-1] == "__init__":
            parts.pop()
        if not any(part.startswith("_") for part in parts):
            found[".".join(parts)] = path
    return found


def page(module: str) -> str:
    """Where the page of a module lies in the site's sources."""
    package = (PACKAGE.parent / module.replace(".", "/")).is_dir()
    inside = module.split(".")[1:]
    return "/".join(["api", *inside, "index"] if package else ["api", *inside]) + ".md"


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Appends the API reference to the navigation."""
    config.nav.append({"API reference": navigation("phantom", list(modules()))})
    return config


def navigation(package: str, names: list[str]) -> list[Any]:
    """The page of `package` first, then its modules and, as sections, its packages."""
    entries: list[Any] = [page(package)]
    for name in names:
        if name.rpartition(".")[0] == package:
            short = name.rpartition(".")[2]
            entries.append({short: navigation(name, names) if page(name).endswith("/index.md") else page(name)})
    return entries


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds a page for each module."""
    for name in modules():
        content = f"# `{name}`\n\n::: {name}\n"
        files.append(File.generated(config, page(name), content=content))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Links to source files lead to the API reference."""
    return SOURCE_LINK.sub(lambda match: api_link(match, page.file.src_uri), markdown)


def api_link(match: re.Match[str], src_uri: str) -> str:
    """`[path:name](../src/...)` -> a link to that name's heading."""
    module = match["file"].removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    anchor = f"#{module}.{match['text']}" if match["path"] else ""
    text = f"{match['path']}:{match['text']}" if match["path"] else match["text"]
    return f"[`{text}`]({'../' * src_uri.count('/')}{page(module)}{anchor})"


def on_page_content(content: str, **_: Any) -> str:
    """TeX to MathML, which browsers render without a script; source code stays out of the search index."""

    def mathml(match: re.Match[str]) -> str:
        return convert(html.unescape(match["tex"]).strip(), display="block" if match["tag"] == "div" else "inline")

    content = content.replace(
        '<details class="mkdocstrings-source"', '<details data-search-exclude class="mkdocstrings-source"'
    )
    return MATH.sub(mathml, content)
