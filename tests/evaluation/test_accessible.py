"""Every page that is made, under axe-core: in wide and narrow windows, by day and night."""

from __future__ import annotations

import pytest

from phantom.evaluation.compare import compare
from phantom.evaluation.dataset.report import write_report
from phantom.evaluation.page import render
from phantom.evaluation.study.page import make_page
from phantom.evaluation.votes.ballot import PAGE, named_folders, write_ballot
from tests.axe import WINDOWS, violations
from tests.evaluation.study.made_up import made_up, make_study
from tests.evaluation.test_dataset import clips, params  # noqa: F401
from tests.evaluation.test_page import five_models, page
from tests.evaluation.votes.test_votes import SHADES, folders  # noqa: F401


def report(out, request):
    (out / "index.html").write_text(render(page(3)))
    return out / "index.html"


def comparison(out, request):
    five_models(out)
    return out / "page/index.html"


def published(out, request):
    compare([], out, published=True)
    return out / "index.html"


def study(out, request):
    study = make_study(6, ("control", "phantom", "former", "wide"))
    gains = {"control": 0, "phantom": 0.002, "former": 0, "wide": -0.001}
    made = make_page(made_up(study, gains, wide={"flops": 2 * 10**13}), "0" * 64)
    (out / "index.html").write_text(render(made, "study/page.html"))
    return out / "index.html"


def data(out, request):
    request.getfixturevalue("clips")
    write_report(params(), out)
    return out / "reports/data.html"


def ballot(out, request):
    root = request.getfixturevalue("folders")
    write_ballot(named_folders([str(root / model) for model in SHADES]), out / "votes", pairs=3)
    return out / "votes" / PAGE


@pytest.mark.parametrize("make", [report, comparison, published, study, data, ballot], ids=lambda make: make.__name__)
def test_axe_finds_nothing_and_nothing_is_logged(browser, tmp_path, request, make):
    path = make(tmp_path, request)
    for width, scheme in WINDOWS:
        assert violations(browser, width, scheme, path.as_uri()) == [], (width, scheme)
        assert browser.get_log("browser") == [], (width, scheme)


def test_axe_finds_what_is_wrong(browser, tmp_path):
    path = tmp_path / "index.html"
    path.write_text("<!doctype html><html><title>A</title><main><h1>A</h1><img src='data:,'></main>")
    found = violations(browser, 1280, "light", path.as_uri())
    assert {text.split()[0] for text in found} >= {"html-has-lang", "image-alt"}
    browser.get_log("browser")
