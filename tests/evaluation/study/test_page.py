"""The page of a study: what it says, that it is whole, and how a browser shows it."""

from __future__ import annotations

import re
import time
from html.parser import HTMLParser

import numpy as np
import pytest

from phantom.data.video import write_mp4
from phantom.evaluation.page import render
from phantom.evaluation.study.page import make_page, write_page
from phantom.evaluation.study.plots import Row, dots, over_cost
from phantom.evaluation.study.videos import BASE, RECORDING
from tests.evaluation.study.made_up import ODD, made_up, make_run, make_study

VOID = {"meta", "link", "br", "img", "input", "line", "polyline", "path"}


class Page(HTMLParser):
    """Text by tag, the tags that are open, and attributes that name something elsewhere."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text: dict[str, list[str]] = {}
        self.count: dict[str, int] = {}
        self.elsewhere: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.count[tag] = self.count.get(tag, 0) + 1
        self.elsewhere += [
            value for key, value in attrs if key in ("src", "href") and value[:1] != "#" and value[:5] != "data:"
        ]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag, (tag, self.getpos())

    def handle_data(self, data):
        if self.open and data.strip():
            tag = next(tag for tag in reversed(self.open) if tag != "a")  # a heading is a link to itself
            self.text.setdefault(tag, []).append(data.strip())


def html(results, digest="0" * 64) -> str:
    return render(make_page(results, digest), "study/page.html")


@pytest.fixture(scope="module")
def several():
    """Four arms, one of them not equal to the others."""
    study = make_study(6, ("control", "phantom", "former", "wide"))
    gains = {"control": 0, "phantom": 0.002, "former": 0, "wide": -0.001}
    return made_up(study, gains, wide={"flops": 2 * 10**13})


def test_the_page_is_whole_and_opens_with_the_verdict(several):
    page = Page(html(several))
    assert page.open == [] and page.elsewhere == [] and "script" not in page.count
    assert page.text["p"][:2] == [ODD, several["verdict"]]
    assert page.text["li"] == ["wide is not equal to control: flops differ."]
    headings = ["The primary metric", "Paired differences", "Interventions on z", "Validation while training"]
    headings += ["What the arms cost", "Settings that differ", "All figures", "Held-out L_v by noise level"]
    assert page.text["h2"] == [*headings, "What is what"]


def test_every_seed_of_every_arm_has_a_point(several):
    text = html(several)
    assert text.count('<circle class="point"') == 4 * 6 + 3 * 6 + 4  # by arm, by comparison, and by what arms cost
    assert "<title>seed 5: 0.1" in text and text.count("polyline") == 2 * 4
    assert "frozen base" in text and "not equal" in text and "nan" not in text.lower().replace("nanmean", "")


def test_the_same_results_give_the_same_bytes(several):
    assert html(several) == html(several)


def test_texts_are_escaped(several):
    text = html(several)
    assert "Does &lt;b&gt;z&lt;/b&gt; &amp; &#34;the rest&#34; {{ 7 * 7 }} help?" in text and ODD not in text
    drawn = dots("a", [Row('<i>"', "key0", {"<b>": 1.0}, 1.0)])
    assert "<i>" not in drawn.svg and "<b>" not in drawn.svg
    assert dots("nothing", [Row("a", "key0", {}, 0.0)]) is None


def label_heights(drawn):
    return [float(y) for y in re.findall(r'class="label" x="[\d.]+" y="([\d.]+)">', drawn.svg)]


def test_what_is_gained_stands_over_what_it_costs():
    plain, best, none = (
        Row("plain", "key0", {"seed 0": 9.0, "seed 1": 9.4}, 9.2),
        Row("best of 4", "key1", {"seed 0": 8.0}, 8.0),
        Row("none", "key2", {}, 0),
    )
    drawn = over_cost("Error", [(40, plain), (160, best), (80, none)], "passes", ("base", 9.0))
    assert drawn and 'aria-label="Error: plain 9.2 for 40 passes; best of 4 8 for 160 passes"' in drawn.svg
    marks = re.findall(r'<circle class="point" cx="([\d.]+)" cy="([\d.]+)"', drawn.svg)
    (first_x, first_y), (second_x, second_y) = [tuple(map(float, mark)) for mark in marks]
    assert first_x < second_x and first_y < second_y  # lower values are further down
    for near in (1, 1.008):  # names of points at the same place, or beside each other, do not cover each other
        names = label_heights(over_cost("E", [(1, plain), (near, plain), (2, best)], ""))
        assert abs(names[0] - names[1]) >= 16
    apart = label_heights(over_cost("E", [(1, plain), (4, plain)], ""))
    assert apart[0] == apart[1]
    assert over_cost("Error", [(100, plain), (101, best)], "FLOPs") is None


def test_the_page_has_position_errors_over_the_passes_of_arms_that_differ_in_them():
    measures = {"primary": {"figure": "position_error", "better": "lower"}, "measures": {"positions": {"scenarios": 6}}}
    study = make_study(6, **measures)
    for passes, drawn in ((80, True), (40, False)):
        results = made_up(
            study,
            {"control": 0, "phantom": 0.001},
            control={"passes_per_video": 40},
            phantom={"passes_per_video": passes},
        )
        for run in results["runs"]:
            run["clips"]["position_error"] = [9.0 - (run["arm"] == "phantom")] * 20
        page = render(make_page(results, "0" * 64), "study/page.html")
        assert ("Position error over passes of the denoiser per video" in page) is drawn


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"set": ["train.steps=3"]}, "Run with settings that study.yaml does not state: train.steps=3."),
        ({"finished": 3}, "3 of 24 runs are finished."),
        ({"earlier": ["1" * 64]}, "study.yaml was changed after a first run"),
        ({"sha256": "2" * 64}, "study.yaml was changed after these results were made."),
        ({"made_with": [{"commit": c, "dirty": "true", "torch": "2"} for c in "ab"]}, "different commits or versions"),
    ],
)
def test_what_weakens_a_result_is_said_in_red(several, changes, said):
    assert any(said in warning for warning in Page(html({**several, **changes})).text["li"])


def test_a_study_with_hardly_a_run_has_a_page():
    study = make_study(2)
    page = Page(html(made_up(study, {"control": 0})))
    assert page.open == [] and page.text["p"][1].startswith("Nothing can be said")
    none = made_up(study, {})
    assert Page(html({**none, "base": None, "made_with": []})).open == []
    run = make_run("control", 0, 0) | {"curves": {}, "scalars": {}}
    assert Page(html({**none, "runs": [run], "finished": 1})).open == []


@pytest.fixture(scope="module")
def with_videos(tmp_path_factory, several):
    """The page of `several` with the videos of two worlds, of which one arm has none in the second."""
    root = tmp_path_factory.mktemp("with-videos")
    folder = root / "studies/made-up"
    frames = np.random.default_rng(0).integers(0, 256, (20, 32, 32, 3), dtype=np.uint8)
    for world in ("fall-1", "roll-2-unseen"):
        (folder / "videos" / world).mkdir(parents=True)
        for name in (RECORDING, BASE, *several["study"]["arms"][:3]):
            label = name if isinstance(name, str) else name["label"]
            if (world, label) != ("roll-2-unseen", "former"):
                write_mp4(folder / "videos" / world / f"{label}.mp4", frames, 4)
    (folder / "study.yaml").write_text("")
    results = {**several, "ids": several["ids"] | {"positions": ["fall-1", "roll-2-unseen"]}}
    runs = [{**run, "clips": run["clips"] | {"position_error": [3.21, None]}} for run in results["runs"]]
    return write_page("made-up", {**results, "runs": runs}, root)


def test_videos_stand_side_by_side_with_the_recording_first(with_videos):
    page = Page(with_videos.read_text())
    assert page.open == [] and page.elsewhere == [] and page.count["video"] == 9
    assert page.text["h3"] == ["fall 1", "roll 2 unseen"]
    names = ["Recording", "Frozen base", "control", "phantom", "former"]
    assert page.text["b"] == [*names, *names[:-1]] and page.text["span"].count("off by 3.2 px") == 3


@pytest.mark.parametrize("width", [390, 1280])
def test_the_videos_play_together(browser, with_videos, width):
    metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    browser.get(with_videos.as_uri())
    browser.execute_script("document.getElementById('player').scrollIntoView()")
    seen = (
        "return [...document.querySelectorAll('video')].filter((v) => v.src).map((v) => v.readyState && v.currentTime)"
    )

    def play_together():
        times = browser.execute_script(seen)
        return len(times) == 9 and min(times) > 0.5 and max(times) - min(times) < 0.25

    end = time.monotonic() + 20
    while not play_together():
        assert time.monotonic() < end, browser.execute_script(seen)
        time.sleep(0.05)
    assert browser.execute_script("return document.documentElement.scrollWidth <= innerWidth")
    assert browser.execute_script("return performance.getEntriesByType('resource').every((e) => /^data:/.test(e.name))")
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    assert browser.get_log("browser") == []


@pytest.mark.parametrize("width", [390, 1200])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_nothing_is_wider_than_the_window_and_nothing_is_fetched(browser, several, tmp_path, width, scheme):
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.keys import Keys

    (tmp_path / "index.html").write_text(html(several))
    metrics = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
    browser.get((tmp_path / "index.html").as_uri())
    assert browser.execute_script("return document.documentElement.scrollWidth <= innerWidth")
    assert browser.execute_script("return performance.getEntriesByType('resource').length") == 0
    dark = browser.execute_script("return getComputedStyle(document.body).backgroundColor") == "rgb(18, 19, 23)"
    assert dark == (scheme == "dark")
    red = browser.execute_script("return getComputedStyle(document.querySelector('.warnings')).color")
    assert red == ("rgb(239, 125, 112)" if dark else "rgb(179, 54, 43)")
    ActionChains(browser).send_keys(Keys.TAB).perform()  # the first table, which scrolls by keys
    assert browser.execute_script("return document.activeElement.getAttribute('aria-label')") == "Paired differences"
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
    assert browser.get_log("browser") == []


def test_the_table_of_costs_has_the_passes_of_a_video_where_videos_are_measured():
    study = make_study()
    passes = {"control": {"passes_per_video": 40}, "phantom": {"passes_per_video": 88}}
    made = make_page(made_up(study, {"control": 0, "phantom": 0.002}, **passes), "0" * 64)
    rows = {row.name: [cell.text for cell in row.cells] for _, rows in made.tables["equality"].groups for row in rows}
    assert list(rows) == ["steps", "samples", "trainable parameters", "flops", "passes per video"]
    assert rows["passes per video"] == ["40", "88"]
