"""The studio in a real browser, with a real service: generate, compare, cancel, reload, two tabs, a restart."""

from __future__ import annotations

import re
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from phantom.data.video import write_mp4
from tests.axe import WINDOWS, violations
from tests.serving.service import SLOW, Service, wait
from tests.serving.test_app import png

pytestmark = pytest.mark.timeout(1200)
PLAYERS = "return [...document.querySelectorAll('#cells video')].map(v => ({time: v.currentTime, paused: v.paused}))"


@pytest.fixture
def page(browser, service: Service) -> Iterator[Page]:
    shown = Page(browser, service)
    for video in service.http.get("/v1/videos?limit=100").json()["data"]:
        service.http.delete(f"/v1/videos/{video['id']}")
    shown.open()
    yield shown
    assert shown.errors() == []


class Page:
    """The studio in the browser."""

    def __init__(self, browser, service: Service) -> None:
        self.browser, self.service = browser, service

    def open(self) -> None:
        self.browser.get("about:blank")
        self.browser.get_log("browser")
        self.browser.get(f"{self.service.url}/")
        self.browser.execute_script("sessionStorage.clear()")
        wait(lambda: "ready" in self.text("state") or "waiting" in self.text("state") or "making" in self.text("state"))

    def find(self, id: str):
        from selenium.webdriver.common.by import By

        return self.browser.find_element(By.ID, id)

    def all(self, selector: str) -> list:
        from selenium.webdriver.common.by import By

        return self.browser.find_elements(By.CSS_SELECTOR, selector)

    def text(self, id: str) -> str:
        return self.find(id).text

    def click(self, selector: str) -> None:
        self.browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", self.all(selector)[0])
        self.all(selector)[0].click()

    def ask(self, prompt: str, which: str = "phantom", **fields: object) -> None:
        self.browser.execute_script("document.getElementById('more').open = true")
        self.find("prompt").clear()
        self.find("prompt").send_keys(prompt)
        self.click(f"[name=which][value={which}] + span")
        for name in ("seed", "steps", "size", "frames"):
            element = self.all(f"[name={name}]")[0]
            element.clear()
            element.send_keys(str(fields.get(name, "")))
        self.click("#generate")

    def cells(self, status: str) -> int:
        return len(self.all(f"#cells figure.{status}"))

    def press(self, key: str) -> None:
        from selenium.webdriver.common.action_chains import ActionChains

        ActionChains(self.browser).send_keys(key).perform()

    def players(self) -> list[dict]:
        return self.browser.execute_script(PLAYERS)

    def errors(self) -> list[str]:
        return [entry["message"] for entry in self.browser.get_log("browser")]


def until(holds: Callable[[], object], seconds: float = 60.0) -> None:
    from selenium.common.exceptions import StaleElementReferenceException

    end = time.monotonic() + seconds
    while True:
        try:
            if holds():
                return
        except StaleElementReferenceException:
            pass
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.1)


def test_both_models_are_asked_from_one_seed_and_play_as_one(page: Page):
    from selenium.webdriver.common.keys import Keys

    assert page.find("empty").is_displayed() and not page.find("shown").is_displayed()
    page.click("#examples button")
    assert page.find("prompt").get_attribute("value").startswith("A red ball")
    page.ask("a <b>red</b> ball", "both", frames=9)
    until(lambda: page.cells("completed") == 2)
    assert page.text("title") == "a <b>red</b> ball"
    names = [figure.find_element("css selector", "b").text for figure in page.all("#cells figure")]
    assert names == ["Base", "Phantom"]
    assert len({re.search(r"seed (\d+)", figure.text)[1] for figure in page.all("#cells figure")}) == 1
    until(lambda: len(page.players()) == 3 and all(not one["paused"] and one["time"] > 0.2 for one in page.players()))
    assert max(one["time"] for one in page.players()) - min(one["time"] for one in page.players()) < 0.3

    page.click("#play")
    until(lambda: all(one["paused"] for one in page.players()))
    page.browser.execute_script("document.getElementById('stage').focus(); seek(0.125)")
    until(lambda: page.text("time") == "1 of 9")
    page.press(Keys.ARROW_RIGHT)
    until(lambda: page.text("time") == "2 of 9" and len({round(one["time"], 3) for one in page.players()}) == 1)
    page.press(Keys.ARROW_LEFT)
    until(lambda: page.text("time") == "1 of 9")
    states = page.all("#cells .states")[0]
    assert states.value_of_css_property("opacity") == "0"
    page.press("p")
    until(lambda: float(states.value_of_css_property("opacity")) > 0.8)
    assert page.find("about-states").is_displayed()
    page.press(" ")
    until(lambda: all(not one["paused"] for one in page.players()))

    page.click("#provenance summary")
    assert page.text("facts").count("UniPCMultistepScheduler") == 2 and "the prompt alone" in page.text("facts")
    page.click("#provenance summary")
    assert len(page.all("#gallery li")) == 1 and len(page.all("#gallery video")) == 2


def test_a_video_is_made_again_with_another_seed_or_beside_the_other_model(page: Page, tmp_path: Path):
    (tmp_path / "first.png").write_bytes(png())
    page.find("file").send_keys(str(tmp_path / "first.png"))
    assert "first.png" in page.text("source") and "is the first frame" in page.text("source")
    page.ask("a ball", "base", seed=5, frames=9, size="64x64")
    until(lambda: page.cells("completed") == 1)
    page.click("#again summary")
    page.click("[data-again=model]")
    until(lambda: page.cells("completed") == 2)
    page.click("#again summary")
    page.click("[data-again=seed]")
    until(lambda: len(page.all("#gallery li")) == 2 and page.cells("completed") == 2)
    page.click("#source button")
    page.click("#again summary")
    page.click("[data-again=edit]")
    until(lambda: "image of video_" in page.text("source"))
    values = [page.all(f"[name={name}]")[0].get_attribute("value") for name in ("size", "frames")]
    assert values == ["64x64", "9"] and page.all("[name=which]:checked")[0].get_attribute("value") == "both"
    page.click("#source button")
    made = page.service.http.get("/v1/videos").json()["data"]
    assert [video["input"] for video in made] == ["image"] * 4
    assert [video["seed"] == 5 for video in made] == [False, False, True, True] and made[0]["seed"] == made[1]["seed"]


def test_the_best_of_several_is_made_by_the_fast_profile_and_again(page: Page):
    from selenium.webdriver.support.ui import Select

    page.browser.execute_script("document.getElementById('more').open = true")
    Select(page.all("[name=profile]")[0]).select_by_value("fast")
    page.all("[name=best_of]")[0].send_keys("2")
    page.ask("a ball", seed=5, steps=4, frames=17)
    until(lambda: page.cells("completed") == 1)
    page.click("#provenance summary")
    facts = page.text("facts")
    assert "fast" in facts and re.search(r"seed 5 \(surprise [\d.]+\), seed 6 \(surprise [\d.]+\)", facts)
    for name in ("best_of", "profile"):
        page.browser.execute_script(f"document.querySelector('[name={name}]').value = ''")
    page.click("#again summary")
    page.click("[data-again=edit]")
    until(lambda: page.all("[name=best_of]")[0].get_attribute("value") == "2")
    assert page.all("[name=profile]")[0].get_attribute("value") == "fast"


def test_an_arrow_on_the_picture_is_the_force_of_phantoms_video(page: Page, tmp_path: Path):
    from selenium.webdriver.common.action_chains import ActionChains

    (tmp_path / "first.png").write_bytes(png())
    page.find("file").send_keys(str(tmp_path / "first.png"))
    until(lambda: page.browser.execute_script("return picture !== null"))
    board = page.find("board")
    page.browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", board)
    reach = board.size["height"] / 3  # the board is 64 x 48
    drag = ActionChains(page.browser).move_to_element_with_offset(board, -board.size["width"] / 4, 0)
    drag.click_and_hold().move_by_offset(0, -round(reach / 2)).release().perform()
    x, y, angle, magnitude = map(float, page.find("force").get_attribute("value").split(", "))
    assert (x, y, angle) == (pytest.approx(0.25, abs=0.02), pytest.approx(0.5, abs=0.02), 90)
    assert magnitude == pytest.approx(0.5, abs=0.03)
    page.find("force").send_keys("; wind 180, 0.25")
    page.ask("a ball", "both", frames=9)
    until(lambda: page.cells("completed") == 2)
    stated = {
        "points": [{"x": x, "y": y, "angle": 90, "magnitude": magnitude}],
        "wind": {"angle": 180, "magnitude": 0.25},
    }
    made = {video["model"]: video for video in page.service.http.get("/v1/videos").json()["data"]}
    assert "force" not in made["base"]["asked"] and made["base"]["provenance"]["force"] is None
    points = [{**stated["points"][0], "time": 0.0}]
    assert made["phantom"]["asked"]["force"] == made["phantom"]["provenance"]["force"] == {**stated, "points": points}
    # A wrong force is said; emptied, there is none.
    page.find("force").clear()
    page.find("force").send_keys("2, 0.5, 0, 1")
    page.click("#generate")
    until(lambda: "force: x: found 2; accepted: from 0 to 1, inside the picture" in page.text("said"))
    page.click("#again summary")
    page.click("[data-again=edit]")
    until(lambda: page.find("force").get_attribute("value") == f"{x:g}, {y:g}, 90, {magnitude:g}; wind 180, 0.25")
    page.find("force").clear()
    page.click("#source button")
    page.browser.get_log("browser")  # of the refused request


def test_a_clips_last_frame_is_what_an_arrow_is_drawn_on(page: Page, tmp_path: Path):
    frames = np.zeros((9, 48, 64, 3), np.uint8)
    frames[-1] = (20, 200, 40)
    write_mp4(tmp_path / "clip.mp4", frames, 4)
    page.find("file").send_keys(str(tmp_path / "clip.mp4"))
    pixel = (
        "const copy = new OffscreenCanvas(1, 1).getContext('2d', {willReadFrequently: true});"
        "copy.drawImage(document.getElementById('board'), 100, 100, 1, 1, 0, 0, 1, 1);"
        "return [...copy.getImageData(0, 0, 1, 1).data]"
    )
    until(lambda: page.browser.execute_script(pixel)[1] > 120)
    page.click("#source button")
    until(lambda: page.browser.execute_script(pixel)[3] == 0)


def test_what_the_served_model_lacks_is_said(page: Page):
    until(lambda: page.browser.execute_script("return Boolean(served && served.models)"))
    said = page.browser.execute_script(
        "const whole = served, said = [{}, {takes_force: false}, {models: ['base']}].map((less) => {"
        "served = {...whole, ...less}; describe(); return document.getElementById('lacks').textContent; });"
        "served = whole; describe(); return said;"
    )
    assert said[0] == "" and "takes no force" in said[1] and "The base alone is served" in said[2]


def test_a_running_video_is_cancelled_and_deleted(page: Page):
    page.ask("a ball", **SLOW)
    until(lambda: page.cells("in_progress") == 1 and page.all("#cells progress")[0].get_attribute("value") != "0")
    page.click("#cancel")
    until(lambda: page.cells("cancelled") == 1)
    assert "Cancelled" in page.text("cells") and not page.find("player").is_displayed()
    page.click("#delete")
    assert page.text("delete") == "Delete for good?"
    page.click("#delete")
    until(lambda: page.find("empty").is_displayed())
    assert page.service.http.get("/v1/videos").json()["data"] == []


def test_a_reload_and_another_tab_show_what_is_being_made(page: Page):
    page.ask("a ball", **SLOW)
    until(lambda: page.cells("in_progress") == 1)
    first = page.browser.current_window_handle
    page.browser.refresh()
    until(lambda: page.cells("in_progress") == 1)
    page.browser.switch_to.new_window("tab")
    try:
        page.browser.get(f"{page.service.url}/")
        until(lambda: page.cells("in_progress") == 1)
        page.ask("a block", "base")
        until(lambda: len(page.all("#gallery li")) == 2)
        until(lambda: page.cells("completed") == 1)
        assert page.text("title") == "a block" and page.errors() == []
    finally:
        page.browser.close()
        page.browser.switch_to.window(first)
    until(lambda: page.cells("completed") == 1 and len(page.all("#gallery video")) == 2)
    assert page.text("title") == "a ball"
    page.browser.refresh()
    until(lambda: page.cells("completed") == 1)
    assert page.text("title") == "a ball" and page.all("#gallery button")[1].get_attribute("aria-current") == "true"


def test_what_is_wrong_or_failed_is_said_on_the_page(page: Page):
    page.ask("a ball", frames=8)
    until(lambda: "frames: found 8; accepted: 4m + 1, from 1; nearest valid: 9" in page.text("said"))
    for _ in range(4):
        page.service.submit(**SLOW)
        time.sleep(0.5)
    page.ask("a ball")
    until(lambda: "queue: 3 videos wait, as many as may" in page.text("said"))
    assert page.find("generate").is_enabled()
    expected = ("400 (Bad Request)", "429 (Too Many Requests)")  # which Chromium itself notes
    assert [any(part in error for part in expected) for error in page.errors()] == [True, True]


def test_a_restart_of_the_service_is_waited_out_and_a_token_is_asked_for(browser, export: Path, tmp_path: Path):
    service = Service(tmp_path, export, token="a token of the tests")
    try:
        service.ready()
        page = Page(browser, service)
        browser.get("about:blank")
        browser.get(f"{service.url}/")
        until(lambda: page.find("login").is_displayed())
        page.find("token").send_keys("wrong")
        page.click("#login button")
        until(lambda: "does not accept" in page.text("login-note"))
        page.find("token").clear()
        page.find("token").send_keys("a token of the tests")
        page.click("#login button")
        until(lambda: "ready" in page.text("state"))
        page.ask("a ball", "both", **SLOW)
        until(lambda: page.cells("in_progress") == 1)
        port = int(service.url.rpartition(":")[2])
        service.stop(signal.SIGKILL)
        until(lambda: "No connection to the service" in page.text("state"))
        page.click("#generate")
        until(lambda: "cannot be reached; nothing was sent" in page.text("said"))
        service.start(port)
        until(lambda: page.cells("completed") == 2, 180)
        assert len(page.all("#gallery li")) == 1
        refused = [message for message in page.errors() if "net::ERR" not in message and "401" not in message]
        assert refused == []
    finally:
        service.stop()


@pytest.mark.parametrize("width", [1280, 390])
def test_nothing_overflows_and_everything_has_a_name(page: Page, width: int):
    page.browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride", {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": False}
    )
    try:
        page.ask("word" * 60, "both", frames=5)
        until(lambda: page.cells("completed") == 2)
        assert page.browser.execute_script("return document.documentElement.scrollWidth") <= width
        nameless = page.browser.execute_script(
            "return [...document.querySelectorAll('button, input, textarea, a, summary')].filter(e => "
            "e.offsetParent && "
            "!(e.labels?.length || e.getAttribute('aria-label') || e.textContent.trim())).map(e => e.outerHTML)"
        )
        assert nameless == []
        for button in page.all("button"):
            if button.is_displayed():
                assert min(button.size.values()) >= 36, button.get_attribute("outerHTML")
    finally:
        page.browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


@pytest.mark.parametrize(("width", "scheme"), WINDOWS)
def test_axe_finds_nothing_in_the_studio(page, width, scheme):
    assert violations(page.browser, width, scheme) == []
