"""The page of the data: what it says of prepared clips, and how a browser shows it."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from phantom.data.files import sha256
from phantom.data.manifest import (
    CLIPS,
    MANIFEST,
    QUARANTINE,
    Clip,
    Curation,
    Quarantined,
    write_manifest,
    write_quarantine,
)
from phantom.data.video import write_mp4
from phantom.errors import UserError
from phantom.evaluation.dataset.histogram import histogram
from phantom.evaluation.dataset.report import write_report
from tests.plain import mini_params

ODD = '<b>A ball</b> & "hits" {{ 7 * 7 }}'
FILTER = "data.filter=motion > 0.3 and cuts == 0 and not duplicate"


@pytest.fixture
def clips(tmp_path):
    """data/clips of sixteen clips: clip i has motion i / 10, clip 15 has cuts, and clip 14 is like clip 13."""
    folder = tmp_path / CLIPS
    folder.mkdir(parents=True)
    clips = []
    for i in range(16):
        frames = np.full((5, 32, 32, 3), 15 * i, np.uint8)
        frames[:, 8:16, 8:16] = (200, 30, 30)
        path = folder / f"{i:02d}.mp4"
        write_mp4(path, frames, fps=4)
        seen = Curation(
            2 * (i == 15), i / 10, static=i == 0, black_bars=0.0, duplicate_of="clip-13" if i == 14 else None
        )
        split = "heldout" if i == 5 else "train"
        language = "de" if i % 4 == 0 else "en"
        clips.append(Clip(f"clip-{i}", path.name, ODD, 5, 4.0, sha256(path), split, curation=seen, language=language))
    write_manifest(folder / MANIFEST, clips)
    refused = [Quarantined(f"bad-{i}", f"bad-{i}.mp4", f"{i} frame(s) at 4 per second") for i in range(3)]
    write_quarantine(folder / QUARANTINE, [*refused, Quarantined("x", "x.mp4", "not a video: <i>")])
    (folder / "report.json").write_text(json.dumps({"removed": {"absent": 7}}))
    return clips


def params(*overrides):
    return mini_params(Path("models/mini"), "data.width=32", "data.height=32", *overrides)


def test_the_report_counts_clips_refusals_and_what_conditions_drop(clips, tmp_path):
    found = write_report(params(FILTER), tmp_path)
    assert (found.train, found.heldout, found.quarantined, found.kept) == (15, 1, 4, 9)
    assert found.drops == {
        **{"motion > 0.3": 4, "cuts == 0": 1, "not duplicate": 1},  # clips 0 to 3, 15 and 14
        **{"not static": 1, "black_bars < 0.02": 0},
    }
    assert list(found.refused.values()) == [3, 1]
    page = (tmp_path / "reports/data.html").read_text()
    for said in ("leaves 9 of 15 training clips (60.0%)", "15 training and 1 held-out", "absent", "bad-0.mp4"):
        assert said in page, said
    assert "clip-13" in page and "like <b>clip-13</b>" in page
    assert ODD not in page and "&lt;b&gt;A ball&lt;/b&gt; &amp;" in page and "not a video: &lt;i&gt;" in page
    assert "http" not in re.sub(r"http-equiv", "", page) and "<script" not in page
    assert page.count("data:image/jpeg") == 3 * (4 + 1 + 2 + 1)  # of the dropped clips, and of the one that 14 is like
    everything = write_report(params(), tmp_path)
    assert (
        everything.kept == 15 and "a run trains on all training clips" in (tmp_path / "reports/data.html").read_text()
    )


def test_a_filter_on_the_language_shows_what_it_drops(clips, tmp_path):
    found = write_report(params("data.filter=language == 'en'"), tmp_path)
    assert (found.kept, found.drops["language == 'en'"]) == (11, 4)
    page = (tmp_path / "reports/data.html").read_text()
    table = page[page.index("Languages of the captions") :]
    assert re.findall(r"<td[^>]*>\s*(?:<[^>]*>)*\s*(\d+)", table)[:4] == ["11", "11", "4", "0"]
    assert "language de" in page


def test_the_same_data_gives_the_same_page(clips, tmp_path):
    pages = []
    for _ in range(2):
        write_report(params(FILTER), tmp_path)
        pages.append((tmp_path / "reports/data.html").read_bytes())
    assert pages[0] == pages[1]


def test_without_clips_or_their_columns_there_is_one_line(clips, tmp_path):
    manifest = tmp_path / CLIPS / MANIFEST
    write_manifest(manifest, [replace(clip, curation=None) for clip in clips])
    with pytest.raises(UserError, match=rf"^{manifest}: states no columns; run `phantom prepare` again$"):
        write_report(params(), tmp_path)
    write_manifest(manifest, [])
    with pytest.raises(UserError, match=rf"^{manifest}: no clip in it; run `phantom prepare` again$"):
        write_report(params(), tmp_path)
    manifest.unlink()
    with pytest.raises(UserError, match="no such file; `phantom prepare` writes it"):
        write_report(params(), tmp_path)


def heights(drawing, kind):
    return [float(h) for h in re.findall(rf'<rect class="{kind}"[^>]* height="([\d.]+)"', drawing.svg)]


def test_a_histogram_stacks_what_is_dropped_and_ends_a_long_tail_in_its_last_bar():
    drawn = histogram("cuts", "cuts", [0, 0, 0, 2], [2, 2, 5])
    assert len(heights(drawn, "kept")) == 2 and len(heights(drawn, "dropped")) == 2
    a, b = heights(drawn, "kept")
    assert a == pytest.approx(3 * b, abs=0.3) and heights(drawn, "dropped")[0] == pytest.approx(2 * b, abs=0.3)
    assert drawn.note == "cuts" and "4 clips kept, 3 dropped, from 0 to 5" in drawn.svg
    ticks = [float(x) for x in re.findall(r'middle">([\d.-]+)<', drawn.svg)]
    assert ticks and all(tick == int(tick) for tick in ticks)
    tail = histogram("caption_length", "characters", [*range(10, 210), 9000], [])
    assert re.fullmatch(r"characters; the last bar: \d+ and more", tail.note) and "to 9000" in tail.svg
    assert "nan" not in histogram("motion", "", [0.5, 0.25], []).svg


@pytest.mark.parametrize("width", [390, 1200])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_browser_shows_it_from_the_disk(browser, clips, tmp_path, width, scheme):
    write_report(params(FILTER), tmp_path)
    metrics = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
    browser.get((tmp_path / "reports/data.html").as_uri())
    assert browser.execute_script("return document.documentElement.scrollWidth <= innerWidth")
    assert browser.execute_script("return performance.getEntriesByType('resource').every((e) => /^data:/.test(e.name))")
    pictures = "return [...document.images].map((i) => i.complete && i.naturalWidth == 32 && i.clientWidth > 60)"
    assert browser.execute_script(pictures) == [True] * 24
    dark = browser.execute_script("return getComputedStyle(document.body).backgroundColor") == "rgb(18, 19, 23)"
    assert dark == (scheme == "dark")
    colours = "return ['kept', 'dropped'].map((k) => getComputedStyle(document.querySelector('rect.' + k)).fill)"
    assert len(set(browser.execute_script(colours))) == 2
    inside = (
        "return [...document.querySelectorAll('.chart svg')].every((s) => { const b = s.getBoundingClientRect();"
        "return [...s.querySelectorAll('rect, text')].every((r) => { const c = r.getBoundingClientRect();"
        "return c.left >= b.left - 1 && c.right <= b.right + 1 && c.bottom <= b.bottom + 1 }) })"
    )
    assert browser.execute_script(inside)
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
    assert browser.get_log("browser") == []
