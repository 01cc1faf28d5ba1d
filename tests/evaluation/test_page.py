"""The page as a browser shows it."""

import base64
import json
import re
import time

import numpy as np
import pytest

from phantom.evaluation.cells import delta_cell, difference_cell, gain_bar
from phantom.evaluation.charts import chart
from phantom.evaluation.compare import compare
from phantom.evaluation.page import (
    Bar,
    Cell,
    Page,
    Scene,
    SceneVideo,
    Table,
    TableRow,
    as_csv,
    embed_data,
    embed_frames,
    render,
)
from phantom.evaluation.protocol import Mark
from phantom.evaluation.worlds_figures import WORLDS
from tests.axe import WINDOWS

FPS, SECONDS = 4, 5
MARKS = [Mark(4.8, "Last frame held: 4.8"), Mark(80.7, "Other take: 80.7")]
ODD = 'A ball <b>rolls</b> & "hits" {{ 7 * 7 }} </script>'


def video(value, frames=FPS * SECONDS):
    grey = (np.arange(frames) * 8 + value).astype(np.uint8)
    return np.broadcast_to(grey[:, None, None, None], (frames, 64, 64, 3))


def page(scenes=2):
    shown = [
        SceneVideo("Condition", "condition", embed_frames(video(0, 1), FPS), True, "single"),
        SceneVideo("Condition", "condition", embed_frames(video(0, 9), FPS), False, "multi"),
        SceneVideo("Truth", "truth", embed_frames(video(0), FPS), False),
    ]
    for mode in ("single", "multi"):
        for number, name in enumerate(("Base", "Phantom")):
            source = embed_frames(video(30 * number), FPS)
            shown.append(SceneVideo(name, name.lower(), source, False, mode, ["IoU 0.5"]))
    row = TableRow("Score", "0 to 100", [Cell("40.0"), Cell("45.0", "+5.0", "good")])
    curve = chart(
        "Losses",
        {"video <i>": [(1, 2.0), (2, 1.0), (3, 0.5)], "physics": [(1, 3.0), (2, 1.5)]},
        log=True,
        level=("threshold", 1.0),
        marks=[2],
    )
    return Page(
        title="A page",
        lede="What it is about.",
        facts=[("Videos", "64x64")],
        bars=[
            (
                "One frame",
                [
                    Bar("Base", "base", 40, "40.0", marks=MARKS),
                    Bar("Phantom" * 9, "phantom", 45, "45.0", "+5.0", "good", (40.5, 49.0), MARKS),
                ],
            )
        ],
        tables=[Table("One frame", ["Base", "Phantom"], ["base", "phantom"], [("Physics-IQ", [row])])],
        scenes=[
            Scene(
                f"Scene {i}",
                ("fall", "a <i>roll")[i % 2],
                ODD,
                shown,
                {"single": (1.5, -2.0, 3.0, 50.0)[i], "multi": (-1.0, 4.0, 2.0, 1.0)[i]},
                None,
                i // 3,
            )
            for i in range(scenes)
        ],
        modes=[("single", "from one frame"), ("multi", "from several")],
        fps=FPS,
        seconds=SECONDS,
        shape=(64, 64),
        charts=[curve],
        notes=[("Base", "The frozen branch.")],
        data=embed_data([("evaluation.json", "application/json", '{"score": "−1"}')]),
    )


def test_texts_are_escaped_and_nothing_comes_from_elsewhere():
    html = render(page())
    assert "A ball &lt;b&gt;rolls&lt;/b&gt; &amp; &#34;hits&#34; {{ 7 * 7 }}" in html and ODD not in html
    assert "video &lt;i&gt;" in html and "<i>" not in html.split("<svg")[-1].split("</svg>")[0]
    assert "http://" not in html and "https://" not in html and "<script src" not in html
    assert html.count("<script>") == 1 and "pixelated" in html


def test_the_same_page_has_the_same_bytes():
    assert render(page()) == render(page())


def test_a_chart_leaves_out_what_it_cannot_draw():
    assert chart("Empty", {"a": [(1, 1.0)], "b": []}) is None
    drawn = chart("Some", {"a": [(1, 0.0), (2, 10.0), (3, 1000.0)], "b": [(1, 5.0)]}, log=True)
    assert drawn.names == ["a"] and drawn.svg.count("polyline") == 1
    assert "nan" not in drawn.svg and "inf" not in drawn.svg
    flat = chart("Flat", {"a": [(5, 0.0), (6, 0.0)]})
    assert "nan" not in flat.svg and flat.svg.count("<text") >= 2


@pytest.fixture
def shown(browser, tmp_path):
    (tmp_path / "index.html").write_text(render(page()))
    browser.get((tmp_path / "index.html").as_uri())
    browser.execute_script("document.getElementById('player').scrollIntoView()")
    until(browser, lambda: len(state(browser)) == 6 and all(v["ready"] >= 2 for v in state(browser)))
    yield browser
    assert browser.get_log("browser") == []


def state(browser):
    """The videos that can be seen."""
    return browser.execute_script(
        "return [...document.querySelectorAll('video')].filter((v) => v.src && v.offsetParent).map((v) => "
        "({time: v.currentTime, paused: v.paused, ready: v.readyState, of: v.closest('figure').dataset.of}))"
    )


def until(browser, holds, seconds=20):
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, state(browser)
        time.sleep(0.05)


def press(browser, key):
    from selenium.webdriver.common.action_chains import ActionChains

    ActionChains(browser).send_keys(key).perform()


def test_videos_play_together_pause_on_one_frame_and_step(shown):
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys

    until(shown, lambda: all(0.5 < v["time"] < 4 and not v["paused"] for v in state(shown)))
    times = [v["time"] for v in state(shown)]
    assert max(times) - min(times) < 1 / FPS

    shown.find_element(By.ID, "play").click()
    until(shown, lambda: all(v["paused"] for v in state(shown)))
    until(shown, lambda: len({round(v["time"], 3) for v in state(shown)}) == 1)
    before = state(shown)[0]["time"]
    press(shown, Keys.ARROW_RIGHT)
    until(shown, lambda: all(abs(v["time"] - before - 1 / FPS) < 1e-3 for v in state(shown)))
    press(shown, Keys.HOME)
    until(shown, lambda: all(abs(v["time"] - 0.5 / FPS) < 1e-3 for v in state(shown)))
    assert shown.find_element(By.ID, "time").text == "0.00 s"
    press(shown, Keys.ARROW_LEFT)  # round to the last frame
    until(shown, lambda: all(v["time"] > SECONDS - 1 / FPS for v in state(shown)))
    press(shown, Keys.SPACE)
    until(shown, lambda: all(not v["paused"] for v in state(shown)))


def test_the_page_keeps_its_keys_unless_the_player_has_the_focus(browser, tmp_path):
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys

    (tmp_path / "index.html").write_text(render(page()))
    browser.get((tmp_path / "index.html").as_uri())
    playing = "return document.body.classList.contains('playing')"
    assert browser.execute_script(playing)
    press(browser, Keys.SPACE)  # scrolls
    until(browser, lambda: browser.execute_script("return scrollY > 0"))
    press(browser, Keys.HOME)
    until(browser, lambda: browser.execute_script("return scrollY === 0"))
    assert browser.execute_script(playing)
    table = browser.find_element(By.CSS_SELECTOR, ".scroll")
    browser.execute_script("document.querySelector('.scroll table').style.width = '300%'; arguments[0].focus()", table)
    press(browser, Keys.ARROW_RIGHT)
    until(browser, lambda: browser.execute_script("return arguments[0].scrollLeft > 0", table))
    assert browser.execute_script(playing)
    browser.find_element(By.CSS_SELECTOR, ".caption").click()  # the player
    press(browser, Keys.SPACE)
    until(browser, lambda: not browser.execute_script(playing))
    assert browser.get_log("browser") == []


def test_scenes_are_ordered_by_the_gain_in_the_condition_that_is_shown(browser, tmp_path):
    from selenium.webdriver.common.by import By

    (tmp_path / "index.html").write_text(render(page(3)))
    browser.get((tmp_path / "index.html").as_uri())
    choose(browser, "order", "Largest gain first")
    assert titles(browser) == ["Scene 2", "Scene 0"]
    browser.find_element(By.CSS_SELECTOR, "input[value=multi]").find_element(By.XPATH, "..").click()
    assert titles(browser) == ["Scene 1", "Scene 2"]
    assert browser.get_log("browser") == []


def test_curves_differ_without_colour_and_bars_have_bounds_and_intervals(shown):
    def styles(selector, name):
        found = "[...document.querySelectorAll(arguments[0])].map((e) => getComputedStyle(e)[arguments[1]])"
        return shown.execute_script(f"return {found}", selector, name)

    assert len(styles("polyline", "strokeDasharray")) == 2 == len(set(styles("polyline", "strokeDasharray")))
    assert styles("polyline", "strokeDasharray") == styles(".keys path", "strokeDasharray")
    assert len(styles(".bar .mark", "left")) == 4 and len(styles(".bar .interval", "left")) == 1
    box = "const r = document.querySelector(arguments[0]).getBoundingClientRect(); return [r.left, r.right]"
    track, drawn = (shown.execute_script(box, f".bar.phantom .{part}") for part in ("track", "interval"))
    width = track[1] - track[0]
    assert [(x - track[0]) / width for x in drawn] == pytest.approx([0.405, 0.49], abs=0.01)
    assert shown.execute_script("return document.querySelector('.bar.phantom .name').scrollWidth <= "
                                "document.querySelector('.bar.phantom .name').clientWidth")  # fmt: skip


LONG = "a_model_whose_name_is_long_and_has_no_space_in_it-v2.1-step-120000"


def five_models(folder):
    """`phantom report` of five models on two benchmarks."""
    files = []
    for number, name in enumerate(("one", "two", "three", LONG, "five")):
        rows = [
            {"prompt": f"p{i}", "file": f"{i}.mp4", "groups": [], "value": 40.0 + number + i % 3, "seeds": {}}
            for i in range(8)
        ]
        parts = {part: {"score": 30.0 + (7 * number + i) % 5} for i, part in enumerate(("falls", "rolls", "swings"))}
        score = {"score": 40.0 + number, "benchmark": "videophy", "pc_mean": 40.0 + number, "sa_mean": 20.0}
        path = folder / f"{number}.json"
        path.write_text(json.dumps(score | {"per_prompt": rows, "categories": parts}))
        files.append(f"{name}={path}")
    compare(files, folder / "page")
    return (folder / "page/index.html").as_uri()


@pytest.mark.parametrize(("width", "scheme"), WINDOWS)
def test_five_models_are_told_apart_with_and_without_colour(browser, tmp_path, width, scheme):
    metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
    browser.get(five_models(tmp_path))
    marks = browser.execute_script(
        "return [...document.querySelectorAll('.bars')[0].querySelectorAll('.bar i')].map((i) => "
        "[getComputedStyle(i).backgroundColor, getComputedStyle(i).clipPath, i.getBoundingClientRect().width])"
    )
    assert len(marks) == 5 and all(width > 5 for *_, width in marks)
    assert len({colour for colour, *_ in marks}) == 5 == len({shape for _, shape, _ in marks})
    heads = browser.execute_script(
        "return [...document.querySelectorAll('thead')[0].querySelectorAll('i')].slice(0, 5).map((i) => "
        "[getComputedStyle(i).backgroundColor, getComputedStyle(i).clipPath])"
    )
    assert heads == [mark[:2] for mark in marks]
    assert browser.execute_script("return document.documentElement.scrollWidth <= innerWidth")
    wide = (
        "return [...document.querySelectorAll('.bar .name, thead th')].filter((e) => e.scrollWidth > e.clientWidth + 1)"
    )
    assert browser.execute_script(wide + ".length") == 0  # a long name wraps
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
    assert browser.get_log("browser") == []


def test_a_column_is_sorted_and_what_is_not_alike_stays(browser, tmp_path):
    from selenium.webdriver.common.keys import Keys

    browser.get(five_models(tmp_path))

    def rows(kind):
        found = f"document.querySelectorAll('table')[0].querySelectorAll('{kind} tr:not(.group) th')"
        return browser.execute_script(f"return [...{found}].map((th) => th.firstChild.textContent)")

    figures = rows("tbody:not(.sortable)")
    assert len(figures) == 2 and rows(".sortable") == ["falls", "rolls", "swings"]
    second = browser.execute_script("return document.querySelectorAll('table')[0].querySelectorAll('button.sort')[1]")
    sort = "return arguments[0].closest('th').ariaSort"
    second.click()  # 32, 33, 34
    assert rows(".sortable") == ["swings", "rolls", "falls"] and browser.execute_script(sort, second) == "descending"
    browser.execute_script("arguments[0].focus()", second)
    press(browser, Keys.ENTER)
    assert rows(".sortable") == ["falls", "rolls", "swings"] and browser.execute_script(sort, second) == "ascending"
    third = browser.execute_script("return document.querySelectorAll('table')[0].querySelectorAll('button.sort')[2]")
    third.click()  # 34, 30, 31
    assert rows(".sortable") == ["falls", "swings", "rolls"] and browser.execute_script(sort, second) == "none"
    third.click()
    third.click()
    assert rows(".sortable") == ["falls", "rolls", "swings"] and rows("tbody:not(.sortable)") == figures
    assert browser.get_log("browser") == []


def test_a_link_leads_to_a_place_and_says_what_is_seen(browser, tmp_path):
    html = render(page(3))
    ids = re.findall(r' id="([^"]+)"', html)
    assert len(ids) == len(set(ids)) and {"table-one-frame", "scene-scene-1"} <= set(ids)
    (tmp_path / "index.html").write_text(html)
    at = (tmp_path / "index.html").as_uri()
    browser.get(at)
    choose(browser, "order", "Largest gain first")
    browser.find_element("css selector", "input[value=multi]").find_element("xpath", "..").click()
    link = browser.current_url
    assert link == at + "#videos&mode=multi&order=gain"
    browser.get("about:blank")
    browser.get(link)
    assert titles(browser) == ["Scene 1", "Scene 2"]
    assert (
        browser.execute_script("return document.body.dataset.mode + document.getElementById('order').value")
        == "multigain"
    )
    browser.get(at + "#scene-scene-2&mode=single")
    until(browser, lambda: titles(browser) == ["Scene 2", "Scene 0"])
    top = "return document.getElementById('scene-scene-2').getBoundingClientRect().top"
    until(browser, lambda: 0 <= browser.execute_script(top) < 300)
    browser.find_element("css selector", "#table-one-frame a").click()
    until(browser, lambda: browser.current_url == at + "#table-one-frame")
    assert browser.get_log("browser") == []


def test_the_numbers_can_be_saved():
    table = Table(
        "One, frame", ["Base", "Phantom"], ["", ""], [("IQ", [TableRow("Score", "", [Cell("4"), Cell("5", "−1")])])]
    )
    assert as_csv([table]).splitlines() == [
        "table,group,figure,column,value,difference",
        '"One, frame",IQ,Score,Base,4,',
        '"One, frame",IQ,Score,Phantom,5,-1',
    ]
    (uri,) = re.findall(r'<a download="evaluation.json" href="data:application/json;base64,([^"]+)"', render(page()))
    assert base64.b64decode(uri).decode() == '{"score": "−1"}'


def test_the_condition_chooses_which_videos_are_seen(shown):
    from selenium.webdriver.common.by import By

    assert {v["of"] for v in state(shown)} == {None, "single"}
    shown.find_element(By.CSS_SELECTOR, "input[value=multi]").find_element(By.XPATH, "..").click()
    until(shown, lambda: len(state(shown)) == 8 and all(v["ready"] >= 2 for v in state(shown)))
    assert {v["of"] for v in state(shown)} == {None, "multi"}
    loaded = shown.execute_script("return [...document.querySelectorAll('video')].filter((v) => v.src).length")
    assert loaded == 8  # those of the other mode hold no decoder


def choose(browser, name, text):
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.ui import Select

    Select(browser.find_element(By.ID, name)).select_by_visible_text(text)


def titles(browser):
    return browser.execute_script(
        "return [...document.querySelectorAll('.scene')].filter((s) => s.offsetParent).map((s) => "
        "s.querySelector('h3').firstChild.textContent)"
    )


def test_scenes_are_filtered_by_category_and_by_gain_and_loss(browser, tmp_path):
    (tmp_path / "index.html").write_text(render(page(3)))
    browser.get((tmp_path / "index.html").as_uri())
    assert titles(browser) == ["Scene 0", "Scene 1", "Scene 2"]
    choose(browser, "order", "Largest gain first")
    assert titles(browser) == ["Scene 2", "Scene 0"]
    choose(browser, "category", "a <i>roll")
    assert titles(browser) == []
    choose(browser, "order", "Largest loss first")
    assert titles(browser) == ["Scene 1"]
    browser.execute_script("document.getElementById('player').scrollIntoView()")
    until(
        browser, lambda: len(state(browser)) == 3 and all(v["ready"] >= 2 and not v["paused"] for v in state(browser))
    )
    choose(browser, "category", "All categories")
    choose(browser, "order", "Any change")
    assert titles(browser) == ["Scene 0", "Scene 1", "Scene 2"]
    assert browser.get_log("browser") == []


def test_gains_of_several_benchmarks_are_ordered_apart(browser, tmp_path):
    (tmp_path / "index.html").write_text(render(page(4)))
    browser.get((tmp_path / "index.html").as_uri())
    choose(browser, "order", "Largest gain first")
    assert titles(browser) == ["Scene 2", "Scene 0", "Scene 3"]  # the last, of another benchmark, gains 50


def test_scenes_are_filtered_by_keyboard_alone(browser, tmp_path):
    from selenium.webdriver.common.keys import Keys

    (tmp_path / "index.html").write_text(render(page(3)))
    browser.get((tmp_path / "index.html").as_uri())

    def focused():
        return browser.execute_script("return document.activeElement.id || document.activeElement.value")

    def tab_to(name):
        for _ in range(30):
            press(browser, Keys.TAB)
            if focused() == name:
                return
        pytest.fail(f"Tab never comes to {name}")

    tab_to("category")
    assert browser.execute_script("return getComputedStyle(document.activeElement).outlineStyle") != "none"
    press(browser, Keys.ARROW_DOWN)
    press(browser, Keys.ARROW_DOWN)
    until(browser, lambda: titles(browser) == ["Scene 1"])
    press(browser, Keys.HOME)  # of the list, not of the videos
    until(browser, lambda: len(titles(browser)) == 3)
    tab_to("order")
    press(browser, Keys.ARROW_DOWN)
    until(browser, lambda: titles(browser) == ["Scene 2", "Scene 0"])
    press(browser, Keys.ARROW_DOWN)
    until(browser, lambda: titles(browser) == ["Scene 1"])
    assert focused() == "order"
    browser.get((tmp_path / "index.html").as_uri())
    tab_to("single")
    press(browser, Keys.ARROW_RIGHT)
    until(browser, lambda: browser.execute_script("return document.body.dataset.mode") == "multi")
    assert browser.get_log("browser") == []


@pytest.mark.parametrize("width", [360, 1200])
def test_nothing_is_wider_than_the_window(shown, width):
    metrics = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 500}
    shown.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    assert shown.execute_script("return document.documentElement.scrollWidth <= innerWidth")
    shown.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


@pytest.mark.parametrize(("low", "high", "tone"), [(-0.4, 9.4, ""), (0.8, 8.1, "good"), (-8.1, -0.8, "bad")])
def test_a_gain_is_coloured_only_if_its_interval_excludes_zero(low, high, tone):
    base = 50.0
    gained = {"gain": (low + high) / 2, "low": low, "high": high}
    bar = gain_bar("Phantom", "phantom", base + (low + high) / 2, base, gained)
    assert bar.tone == tone and f"{high:+.1f}".replace("-", "−") in bar.delta
    assert bar.interval == (base + low, base + high)
    assert gain_bar("Phantom", "phantom", 51.0, base, gained | {"scenarios": 5}).tone == ""  # too few to tell
    error = WORLDS[0]  # of which less is better
    assert difference_cell(error, gained).tone == {"good": "bad", "bad": "good", "": ""}[tone]
    assert delta_cell(error, 51.0, base).tone == ""  # no interval
