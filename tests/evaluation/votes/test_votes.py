"""Blind pairwise comparisons: the page in a browser, its key, and the scores of votes."""

from __future__ import annotations

import json
import time
from collections import Counter

import numpy as np
import pytest
from scipy.special import expit

from phantom.data.video import write_mp4
from phantom.errors import UserError
from phantom.evaluation.votes.ballot import KEY, PAGE, QUESTIONS, named_folders, write_ballot
from phantom.evaluation.votes.scores import bradley_terry, preference, score_votes

PROMPTS = 10
SHADES = {"dim-net": 40, "mid-net": 120, "sun-net": 220}  # of each model's videos


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Videos of ten prompts by three models; a caption for each prompt."""
    root = tmp_path_factory.mktemp("videos")
    for model, shade in SHADES.items():
        (root / model).mkdir()
        for number in range(1, PROMPTS + 1):
            frames = np.full((4, 32, 32, 3), shade, np.uint8)
            frames[:, :4, :4] = 20 * number
            write_mp4(root / model / f"{number:04d}.mp4", frames, fps=4)
    rows = [f"ball number {number} <i>" for number in range(1, PROMPTS + 1)]
    (root / "captions.csv").write_text("\n".join(["caption", *rows]) + "\n")
    return root


def ballot(folders, out, **options):
    made = write_ballot(named_folders([str(folders / model) for model in SHADES]), out, **options)
    return made, json.loads((out / KEY).read_text())


def vote(key, voter, choose, path, question="physics"):
    """Writes the votes of `voter`, who prefers `choose(model a, model b)` of each pair."""
    votes = [
        {
            "pair": p["id"],
            "question": question,
            "choice": "a" if choose(p["a"], p["b"]) == p["a"] else "b",
            "seconds": 1,
        }
        for p in key["pairs"]
    ]
    path.write_text(json.dumps({"ballot": key["ballot"], "voter": voter, "votes": votes}))
    return path


def brighter(a, b):
    return max(a, b, key=SHADES.__getitem__)


def test_pairs_are_spread_over_the_models_and_some_come_again_with_the_sides_exchanged(folders, tmp_path):
    made, key = ballot(folders, tmp_path / "ballot", pairs=30)
    assert (made.pairs, made.repeated, made.models) == (30, 3, list(SHADES))
    first = [pair for pair in key["pairs"] if not pair["again"]]
    assert set(Counter(frozenset((p["a"], p["b"])) for p in first).values()) == {10}
    assert len({(p["file"], frozenset((p["a"], p["b"]))) for p in first}) == 30
    assert {p["a"] for p in first} == set(SHADES)  # no model is always on one side
    by_id = {pair["id"]: pair for pair in key["pairs"]}
    for pair in key["pairs"][30:]:
        shown = by_id[pair["again"]]
        assert (pair["file"], pair["a"], pair["b"]) == (shown["file"], shown["b"], shown["a"])
    _, other = ballot(folders, tmp_path / "other", pairs=30, seed=1)
    assert other["pairs"] != key["pairs"] and other["ballot"] != key["ballot"]


def test_the_page_does_not_tell_whose_the_videos_are(folders, tmp_path):
    ballot(folders, tmp_path, pairs=6, captions=folders / "captions.csv")
    page = (tmp_path / PAGE).read_text()
    assert not any(model in page for model in SHADES) and "0001.mp4" not in page
    assert "ball number" in page and "<i>" not in page.partition("<main>")[2].replace("<i></i>", "")
    assert "http" not in page.replace("http-equiv", "")
    ids = [[p["id"] for p in ballot(folders, tmp_path / str(s), seed=s)[1]["pairs"]] for s in (1, 2)]
    assert ids[0] == ids[1]  # whatever is on which side


def test_an_answer_that_is_changed_at_once_skips_no_pair(folders, tmp_path, browser):
    from selenium.webdriver.common.by import By

    ballot(folders, tmp_path, pairs=3)
    browser.get((tmp_path / PAGE).as_uri())
    browser.execute_script("""for (const [name, side] of [["physics", "a"], ["quality", "a"], ["quality", "b"]])
        document.querySelector(`input[name=${name}][value=${side}]`).click();""")
    time.sleep(1)
    assert browser.find_element(By.ID, "where").text == "Pair 2 of 3"


def test_a_voter_in_a_browser(folders, tmp_path, browser):
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys

    _, key = ballot(folders, tmp_path, pairs=3, captions=folders / "captions.csv")
    browser.set_window_size(1280, 900)
    browser.get((tmp_path / PAGE).as_uri())
    browser.execute_script("localStorage.clear()")
    browser.refresh()
    body = browser.find_element(By.TAG_NAME, "body")

    def where():
        return browser.find_element(By.ID, "where").text

    def wait_for(what):
        until = time.monotonic() + 20
        while not what():
            assert time.monotonic() < until, where()
            time.sleep(0.05)

    def brightest():
        """The side of the brighter video, by what is drawn."""
        read = """const one = document.querySelector(`#side-${arguments[0]} video`);
        const pen = document.createElement("canvas").getContext("2d");
        pen.drawImage(one, 0, 0, 32, 32);
        return pen.getImageData(20, 20, 1, 1).data[0];"""
        ready = "return [...document.querySelectorAll('video')].every(one => one.readyState >= 2)"
        wait_for(lambda: browser.execute_script(ready))
        return max("ab", key=lambda side: browser.execute_script(read, side))

    assert where() == "Pair 1 of 3" and "ball number" in browser.find_element(By.ID, "caption").text
    chosen = {}
    for number, pair in enumerate(key["pairs"], 1):
        wait_for(lambda number=number: where() == f"Pair {number} of 3")
        chosen[pair["id"]] = brightest()
        body.send_keys(chosen[pair["id"]])
        if number == 2:  # the votes so far outlast a reload
            browser.refresh()
            body = browser.find_element(By.TAG_NAME, "body")
            assert where() == "Pair 2 of 3"
            body.send_keys(Keys.BACKSPACE)
            wait_for(lambda: where() == "Pair 1 of 3")
            assert browser.find_element(By.CSS_SELECTOR, "[name=physics]:checked").get_attribute("value") in "ab"
            browser.find_elements(By.CSS_SELECTOR, ".question span")[2].click()  # quality: changed to A, and on
            wait_for(lambda: where() == "Pair 2 of 3")
        body.send_keys("b")
    wait_for(lambda: browser.find_element(By.ID, "done").is_displayed())
    text = browser.find_element(By.ID, "text").get_attribute("value")
    (tmp_path / "votes.json").write_text(text)
    assert browser.get_log("browser") == []
    found = {(vote["pair"], vote["question"]): vote["choice"] for vote in json.loads(text)["votes"]}
    ids = [pair["id"] for pair in key["pairs"]]
    assert [found[id_, "physics"] for id_ in ids] == list(chosen.values())
    assert [found[id_, "quality"] for id_ in ids] == ["a", "b", "b"]
    wins = {
        (row["a"], row["b"]): row["a_preferred"]
        for row in physics(score_votes([tmp_path / "votes.json"], tmp_path / KEY))
    }
    assert all(share == (100 if SHADES[a] > SHADES[b] else 0) for (a, b), share in wins.items()) and wins
    browser.set_window_size(390, 844)
    assert browser.execute_script("return document.documentElement.scrollWidth <= innerWidth")


def physics(result):
    return result["questions"]["physics"]["pairs"]


def test_bradley_terry_finds_the_strengths_that_the_votes_were_drawn_from():
    b, rng = np.array([-1.0, 0.2, 0.8]), np.random.default_rng(0)
    wins = np.zeros((3, 3))
    for i in range(3):
        for j in range(i):
            wins[i, j] = rng.binomial(20_000, expit(b[i] - b[j]))
            wins[j, i] = 20_000 - wins[i, j]
    assert np.abs(bradley_terry(wins) - b).max() < 0.03
    two = np.array([[0.0, 3.0], [1.0, 0.0]])  # of two models, whose prior pulls towards 50%
    assert 50 < preference(bradley_terry(two))[0] < 75 and preference(bradley_terry(1000 * two))[0] == pytest.approx(
        75, abs=0.1
    )


def test_scores_of_votes_and_how_sure_they_are(folders, tmp_path):
    _, key = ballot(folders, tmp_path, pairs=30)
    rng = np.random.default_rng(0)
    files = [vote(key, f"sure-{i}", brighter, tmp_path / f"{i}.json") for i in range(3)]
    files.append(vote(key, "guesses", lambda a, b: rng.choice([a, b]), tmp_path / "3.json"))
    found = score_votes(files, tmp_path / KEY)
    models = found["questions"]["physics"]["models"]
    assert found["voters"] == 4 and list(found["questions"]) == ["physics"]
    assert models["sun-net"]["low"] > models["mid-net"]["high"] > models["mid-net"]["low"] > models["dim-net"]["high"]
    assert sum(row["score"] for row in models.values()) == pytest.approx(150)
    assert all(row["votes"] == 40 for row in physics(found))
    assert 75 <= found["questions"]["physics"]["agreement"] <= 100
    alone = score_votes(files[3:], tmp_path / KEY)["questions"]["physics"]["models"]["mid-net"]
    assert alone["low"] < 50 < alone["high"]
    assert score_votes([*files, files[0]], tmp_path / KEY) == found  # a file given twice counts once


def test_wrong_input_is_one_line(folders, tmp_path):
    _, key = ballot(folders, tmp_path, pairs=3)
    good = vote(key, "one", brighter, tmp_path / "votes.json")
    with pytest.raises(UserError, match=r"key\.json: exists, and votes may be out for it"):
        ballot(folders, tmp_path, pairs=3)
    with pytest.raises(UserError, match="two folders are needed"):
        write_ballot(named_folders([str(folders / "dim-net")]), tmp_path / "x")
    with pytest.raises(UserError, match="a second folder of dim-net"):
        named_folders([str(folders / "dim-net")] * 2)
    with pytest.raises(UserError, match="found 'nowhere'"):
        named_folders(["nowhere"])
    (tmp_path / "other").mkdir()
    write_mp4(tmp_path / "other/9.mp4", np.zeros((2, 32, 32, 3), np.uint8), fps=4)
    with pytest.raises(UserError, match="no file name is in all of them"):
        write_ballot({"dim-net": folders / "dim-net", "other": tmp_path / "other"}, tmp_path / "x")
    changed = json.loads(good.read_text())
    for text, message in (
        ("{}", "not a file of votes"),
        (json.dumps(changed | {"ballot": "f"}), "votes on another ballot"),
        (json.dumps(changed | {"votes": [{"pair": "p", "question": "physics", "choice": "a"}]}), "pair 'p' is not in"),
        (json.dumps(changed | {"votes": [{"pair": "p", "question": "physics", "choice": "c"}]}), "found physics: c"),
        (json.dumps(changed | {"votes": []}), "no vote in them"),
    ):
        (tmp_path / "bad.json").write_text(text)
        with pytest.raises(UserError, match=message):
            score_votes([tmp_path / "bad.json"], tmp_path / KEY)
    with pytest.raises(UserError, match="not the key of a ballot"):
        score_votes([good], good)
    assert set(QUESTIONS) == {"physics", "quality"}
