"""The documentation site builds without a warning and needs no network; what its pages name in the code exists."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
REFERENCE = re.compile(r"\[`(?P<path>[\w/.]+\.py):(?P<name>[\w.]+)`\]\((?P<link>[^)]+)\)")
FILE = re.compile(r"(?<![\w/.-])(?:src|tests|flows|benchmarks|docs|k8s)/[\w/.-]*\w")  # named in a page or the README
FETCHED = re.compile(
    r"""<(?:script|img|iframe|source)[^>]*\ssrc=["']?https?://|<link[^>]*(?:stylesheet|icon)[^>]*https?://"""
)
MADE = ("docs/architecture.svg",)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The built site."""
    pytest.importorskip("mkdocs", reason="needs the docs extra: pip install -e '.[docs]'")
    pytest.importorskip("material", reason="needs the docs extra: pip install -e '.[docs]'")
    home = tmp_path_factory.mktemp("docs")
    out = home / "site"
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(out)]
    environment = {"PATH": "/usr/bin:/bin", "NO_MKDOCS_2_WARNING": "1", "HOME": str(home)}
    built = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert (built.returncode, built.stdout + built.stderr) == (0, "")
    return out


def test_the_site_fetches_nothing(site):
    pages = list(site.rglob("*.html"))
    assert len(pages) > 100
    assert [page for page in pages if FETCHED.search(page.read_text(encoding="utf-8"))] == []
    assert not [
        css for css in site.rglob("*.css") if re.search(r"url\(['\"]?https?://", css.read_text(encoding="utf-8"))
    ]


def test_search_works_from_disk(site, browser):
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.ui import WebDriverWait

    browser.get((site / "api" / "model" / "coupling.html").as_uri() + "?q=recursive+weight")
    found = WebDriverWait(browser, 60).until(
        lambda page: page.find_elements(By.CSS_SELECTOR, "a.md-search-result__link")
    )
    assert any("equations.html" in link.get_attribute("href") for link in found)
    script = "return [...document.querySelectorAll('[src], link[rel=stylesheet]')].map(e => e.src || e.href)"
    loaded = browser.execute_script(script)
    assert loaded and not [address for address in loaded if address.startswith("http")]


def test_equations_are_mathml(site):
    page = (site / "equations.html").read_text(encoding="utf-8")
    assert page.count('<math xmlns="http://www.w3.org/1998/Math/MathML" display="block"') == 8
    assert "arithmatex" not in page and "\\frac" not in page


def test_references_lead_to_the_api(site):
    page = (site / "equations.html").read_text(encoding="utf-8")
    for path, name, _ in REFERENCE.findall((DOCS / "equations.md").read_text(encoding="utf-8")):
        module = path.removeprefix("src/").removesuffix(".py").replace("/", ".")
        assert f'href="api/{path.removeprefix("src/phantom/").removesuffix(".py")}.html#{module}.{name}"' in page
        api = (site / "api" / path.removeprefix("src/phantom/")).with_suffix(".html").read_text(encoding="utf-8")
        assert f'id="{module}.{name}"' in api


def test_only_pages_and_figures_are_published(site):
    kinds = {path.suffix for path in site.iterdir() if path.is_file()}
    assert kinds <= {".html", ".css", ".js", ".svg", ".png", ".xml", ".gz", ".inv"}
    assert not list(site.rglob("*.py*"))


def test_every_public_module_has_a_page(site):
    for path in (ROOT / "src" / "phantom").rglob("*.py"):
        inside = path.relative_to(ROOT / "src" / "phantom")
        if not any(part.startswith("_") and part != "__init__.py" for part in inside.parts):
            assert (site / "api" / str(inside).replace("__init__", "index")).with_suffix(".html").is_file()


@pytest.mark.parametrize("page", sorted(DOCS.glob("*.md")), ids=lambda page: page.name)
def test_lists_and_tables_start_after_an_empty_line(page):
    """GitHub shows them anyway; the site would run them into the paragraph."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    assert re.findall(r"^(?![-#|\d]|  |<).+\n(?:- |\d+\. |\|).*", text, re.MULTILINE) == []


def defines(path: Path, name: str) -> bool:
    """Whether the file has that function, class or method, by its dotted name."""
    body: list[ast.stmt] = ast.parse(path.read_text(encoding="utf-8")).body
    for part in name.split("."):
        found = [n for n in body if isinstance(n, ast.FunctionDef | ast.ClassDef) and n.name == part]
        if not found:
            return False
        body = found[-1].body
    return True


@pytest.mark.parametrize("page", sorted(DOCS.glob("*.md")), ids=lambda page: page.name)
def test_references_exist(page):
    found = REFERENCE.findall(page.read_text(encoding="utf-8"))
    for path, name, link in found:
        assert defines(ROOT / path, name), f"{page.name} names {path}:{name}"
        assert (DOCS / link).resolve() == ROOT / path
    assert len(found) > 25 or page.name != "equations.md"


@pytest.mark.parametrize("page", [*sorted(DOCS.glob("*.md")), ROOT / "README.md"], ids=lambda page: page.name)
def test_files_exist(page):
    for name in FILE.findall(page.read_text(encoding="utf-8")):
        assert (ROOT / name).exists() or name.startswith(MADE), f"{page.name} names {name}"


def test_equations_are_two_clicks_from_the_readme():
    assert "(docs/equations.md)" in (ROOT / "README.md").read_text(encoding="utf-8")
    targets = re.findall(r"\]\((\.\./src/[^)#]+)\)", (DOCS / "equations.md").read_text(encoding="utf-8"))
    assert targets and all((DOCS / target).is_file() for target in targets)
