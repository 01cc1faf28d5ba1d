"""The languages of captions: what lingua says of them, and that each is found out once."""

from __future__ import annotations

from phantom.data import languages
from phantom.data.languages import caption_languages

CAPTIONS = {
    "Two dogs play.": "en",
    "El video muestra a una mujer que camina": "es",
    "The video shows a man in a red jacket.": "en",
    "Der Mann geht durch die Stadt.": "de",
    "视频中一个人在走路。": "zh",
    "12345 !!": "und",
    "": "und",
}


def test_languages_are_told_apart_and_each_caption_is_looked_at_once(tmp_path, monkeypatch):
    known = tmp_path / "work/languages.txt"
    assert caption_languages([*CAPTIONS, "Two dogs play."], known) == [*CAPTIONS.values(), "en"]
    asked, detect = [], languages._detect
    monkeypatch.setattr(languages, "_detect", lambda some: asked.extend(some.values()) or detect(some))
    assert caption_languages([*CAPTIONS], known) == [*CAPTIONS.values()] and not asked
    known.write_bytes(known.read_bytes()[:-20])  # interrupted within the last line
    caption_languages([*CAPTIONS], known)
    assert asked == [""]
    asked.clear()
    assert caption_languages([*CAPTIONS], known) == [*CAPTIONS.values()] and asked == [""]
    asked.clear()
    other = known.with_name("languages-00002-00001.txt")  # of another process
    caption_languages(["Two dogs play.", "Two cats sleep."], other)
    assert asked == ["Two cats sleep."] and len(other.read_text().splitlines()) == 1
    caption_languages(["Two cats sleep."], known)
    assert asked == ["Two cats sleep."]
