"""The picture of the architecture: drawn from the imports, all of which lead down."""

from __future__ import annotations

import xml.etree.ElementTree as ET

import pytest

from docs import draw_architecture as architecture


def test_every_package_has_a_place_and_no_arrow_leads_up():
    placed = {package for row in architecture.ROWS for package in row}
    assert set(architecture.sources()) == placed
    assert architecture.upward(architecture.arrows()) == []


def test_it_draws_the_same_svg_twice():
    picture = architecture.draw()
    assert picture == architecture.draw()
    texts = {element.text for element in ET.fromstring(picture).iter("{http://www.w3.org/2000/svg}text")}
    assert {"model", "training", "cli"} <= texts


def test_the_picture_in_the_readme_is_up_to_date():
    """If not, run `make docs`."""
    assert (architecture.ROOT / "docs/architecture.svg").read_text(encoding="utf-8") == architecture.draw()


def test_arrows_that_follow_from_others_are_left_out():
    graph = {package: set[str]() for row in architecture.ROWS for package in row}
    graph |= {"cli": {"data", "encoders", "model"}, "data": {"encoders"}}
    assert sorted(architecture.reduced(graph)) == [("cli", "data"), ("cli", "model"), ("data", "encoders")]


@pytest.mark.parametrize(
    ("source", "packages"),
    [
        ("from phantom.data.video import write_mp4", {"data"}),
        ("import phantom.model.branch", {"model"}),
        ("from phantom import config, __version__", {"base"}),
        ("def f():\n    from phantom.training import trainer", {"training"}),
        ("import torch", set()),
    ],
)
def test_imports_are_read_without_running_them(tmp_path, source, packages):
    path = tmp_path / "module.py"
    path.write_text(source)
    assert architecture.imports(path) == packages
